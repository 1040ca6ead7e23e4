"""What real programs do to a directory: the same steps run in the volume and in a plain directory, for comparison.

Every step is deterministic: dates, thread counts and hash seeds are fixed, so that both trees must come out equal, byte
by byte. A step returns what its programs said, which must be equal too.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import random
import shutil
import sqlite3
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from scripts.demo.source import Source
from scripts.driver import run

MIB = 1 << 20
BIG_FILE_BYTES = 64 * MIB
LOG_FILE_BYTES = 24 * MIB
IMAGE_PATCHES = 600
FIXED_TIME_S = 1_500_000_000
FIXED_TIME_NS = FIXED_TIME_S * 10**9 + 123_456_789


@dataclass(frozen=True, slots=True)
class Step:
    """One line of the summary."""

    title: str
    run: Callable[[Path, Source], str]
    """(directory to work in, source) -> what the programs said"""


def git(root: Path, *arguments: str) -> str:
    """One git command in the unpacked tree, with fixed dates and without anybody's configuration."""
    name_and_date = {
        f"GIT_{who}_{what}": value
        for who in ("AUTHOR", "COMMITTER")
        for what, value in (("NAME", "Demo"), ("EMAIL", "demo@example.org"), ("DATE", f"{FIXED_TIME_S} +0000"))
    }
    env = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "GIT_CONFIG_NOSYSTEM": "1", "LC_ALL": "C.UTF-8"}
    fixed = ["-c", "pack.threads=1", "-c", "gc.auto=0", "-c", "core.pager=cat"]
    done = run(["git", *fixed, *arguments], cwd=root / "src", env=env | name_and_date)
    return done.stdout + done.stderr


def unpack(root: Path, source: Source) -> str:
    """Unpacks the archive into src/."""
    (root / "src").mkdir()
    run(["tar", "-xzf", source.archive, "-C", root / "src", "--strip-components=1", "--no-same-owner"])
    return str(sum(len(files) for _, _, files in os.walk(root / "src")))


def commit(root: Path, _source: Source) -> str:
    """Puts the tree under git."""
    git(root, "init", "--quiet", "--initial-branch=main")
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--message", "Import")
    return git(root, "rev-parse", "HEAD") + git(root, "status", "--porcelain")


def byte_compile(root: Path, source: Source) -> str:
    """Compiles the package in a fresh interpreter; recorded paths are relative, so both trees get the same bytes."""
    compile_all = [sys.executable, "-m", "compileall", "-q", "-f", "--invalidation-mode", "checked-hash"]
    env = {"PATH": os.environ["PATH"], "PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"}
    # Some sources are test data with deliberate errors: the outcome must be the same, not a success.
    done = run([*compile_all, source.package], cwd=root / "src", env=env, expect=(0, 1))
    compiled = sum(path.suffix == ".pyc" for path in (root / "src").rglob("*"))
    return f"{done.returncode} {compiled} {done.stdout}"


def edit_and_collect(root: Path, source: Source) -> str:
    """Edits, moves and deletes in the work tree, commits, packs everything, and checks every object."""
    rng = random.Random(1)
    paths = sorted(path for path in (root / "src" / source.package).rglob("*.py") if path.stat().st_size > 1000)
    for path in rng.sample(paths, 100):
        with open(path, "r+b") as file:
            file.seek(500)
            file.write(b"# edited in place\n")
            file.seek(0, os.SEEK_END)
            file.write(b"# appended\n")
    git(root, "mv", source.package, "moved")
    git(root, "mv", "moved", source.package)
    git(root, "commit", "--quiet", "--all", "--message", "Edit a hundred files")
    git(root, "gc", "--quiet", "--prune=now")
    # Progress goes to stderr and differs from run to run; what counts is the exit code and what it finds.
    found = git(root, "fsck", "--strict", "--full", "--no-progress", "--no-dangling")
    packed = git(root, "count-objects", "-v")
    return found + packed + git(root, "log", "--format=%H %s", "--stat") + git(root, "ls-files", "--stage")


def database(root: Path, source: Source) -> str:
    """Keeps the tree's catalogue in SQLite: transactions, a rollback, the write-ahead log, VACUUM, integrity_check."""
    rows = [
        (str(path.relative_to(root)), path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in sorted((root / "src" / source.package).rglob("*.py"))
    ]
    writer = sqlite3.connect(root / "catalogue.db", isolation_level=None)
    reader = sqlite3.connect(root / "catalogue.db", isolation_level=None)
    try:
        writer.execute("CREATE TABLE file (path TEXT PRIMARY KEY, size INTEGER, sha256 TEXT)")
        writer.execute("CREATE INDEX by_size ON file (size)")
        half = len(rows) // 2
        _insert(writer, rows[:half])
        writer.execute("BEGIN")
        writer.execute("DELETE FROM file")
        writer.execute("ROLLBACK")
        mode = writer.execute("PRAGMA journal_mode = WAL").fetchone()[0]
        _insert(writer, rows[half:])
        writer.execute("BEGIN")
        writer.execute("UPDATE file SET size = -size")
        seen_meanwhile = reader.execute("SELECT count(*), min(size) FROM file").fetchone()
        writer.execute("COMMIT")
        writer.execute("DELETE FROM file WHERE path LIKE '%/locale/%'")
        writer.execute("VACUUM")
        checks = [reader.execute(f"PRAGMA {check}").fetchall() for check in ("integrity_check", "foreign_key_check")]
        totals = reader.execute("SELECT count(*), sum(size), max(path), count(DISTINCT sha256) FROM file").fetchone()
    finally:
        reader.close()
        writer.close()
    if checks[0] != [("ok",)]:
        raise sqlite3.DatabaseError(f"integrity_check: {checks[0]}")
    return f"{mode} {seen_meanwhile} {checks} {totals}"


def _insert(connection: sqlite3.Connection, rows: list[tuple[str, int, str]], batch: int = 100) -> None:
    for start in range(0, len(rows), batch):
        connection.execute("BEGIN IMMEDIATE")
        connection.executemany("INSERT INTO file VALUES (?, ?, ?)", rows[start : start + batch])
        connection.execute("COMMIT")


def rewrite_in_place(root: Path, _source: Source) -> str:
    """A large image rewritten in parts and through mmap, a log that grows, shrinks and has holes."""
    rng = random.Random(2)
    with open(root / "disk.img", "w+b", buffering=0) as image:
        image.writelines(rng.randbytes(MIB) for _ in range(BIG_FILE_BYTES // MIB))
        os.fsync(image.fileno())
        for number in range(IMAGE_PATCHES):
            offset = rng.randrange(BIG_FILE_BYTES)
            os.pwrite(image.fileno(), rng.randbytes(rng.choice([1, 100, 4096, 5000, 65536])), offset)
            if number % 100 == 0:
                os.fdatasync(image.fileno())
        with mmap.mmap(image.fileno(), BIG_FILE_BYTES) as view:
            for _ in range(200):
                offset = rng.randrange(BIG_FILE_BYTES - 9000)
                view[offset : offset + 9000] = rng.randbytes(9000)
            view.flush()
        whole = _sha256(root / "disk.img")
    with open(root / "growing.log", "w+b", buffering=0) as log:
        while (size := log.seek(0, os.SEEK_END)) < LOG_FILE_BYTES:
            log.write(rng.randbytes(rng.randrange(1, 200_000)))
            if rng.random() < 0.1:
                log.truncate(size - size // 50)
        log.truncate(LOG_FILE_BYTES // 2 + 333)
        log.truncate(LOG_FILE_BYTES + 777)
        os.pwrite(log.fileno(), b"after a hole", 2 * LOG_FILE_BYTES)
    return whole + _sha256(root / "growing.log")


def rename(root: Path, source: Source) -> str:
    """Renames whole directories, moves them under others, and replaces files by renaming over them."""
    package = root / "src" / source.package
    os.rename(package, root / "renamed")
    (root / "deep" / "er").mkdir(parents=True)
    os.rename(root / "renamed", root / "deep" / "er" / "package")
    moved = root / "deep" / "er" / "package"
    for directory in sorted(path for path in moved.iterdir() if path.is_dir())[:8]:
        os.rename(directory, directory.with_name(directory.name + " (moved)"))
    modules = sorted(path for path in moved.rglob("*.py") if path.stat().st_size > 2000)[:200]
    for target, replacement in zip(modules[::2], modules[1::2], strict=True):
        temporary = target.with_name(f".{target.name}.tmp")
        shutil.copyfile(replacement, temporary)
        os.replace(temporary, target)
    shutil.copytree(next(path for path in sorted(moved.iterdir()) if path.is_dir()), root / "to-delete")
    shutil.rmtree(root / "to-delete")
    return str(len(modules))


def link(root: Path, _source: Source) -> str:
    """Hard links, symbolic links, unusual names, modes and times."""
    place = os.fsencode(root / "links")
    os.mkdir(place)
    package = root / "deep" / "er" / "package"
    for number, original in enumerate(sorted(package.rglob("*.py"))[:300]):
        os.link(original, place + b"/hard-%d" % number)
        os.symlink(os.path.relpath(os.fsencode(original), place), place + b"/soft-%d" % number)
        if number % 3 == 0:
            os.unlink(original)
    with open(place + b"/hard-0", "r+b") as file:
        file.write(b"# written through a second name\n")
    os.symlink(b"/nonexistent/" + b"x" * 3000, place + b"/dangling")
    os.symlink(b"..", place + b"/up")
    os.mkfifo(place + b"/fifo", 0o640)
    for name in (b"new\nline", b"invalid \xff\xfe utf-8", "ünïcödé ✓".encode(), b"n" * 255, b".hidden", b"-rf"):
        with open(place + b"/" + name, "wb") as file:
            file.write(name * 100)
        os.chmod(place + b"/" + name, 0o604)
        os.utime(place + b"/" + name, ns=(FIXED_TIME_NS, FIXED_TIME_NS))
    readable = sum(os.path.exists(place + b"/" + name) for name in os.listdir(place))
    return f"{readable} {hashlib.sha256(b''.join(sorted(os.listdir(place)))).hexdigest()}"


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


STEPS = [
    Step("unpack the source archive", unpack),
    Step("git init, add, commit", commit),
    Step("byte-compile", byte_compile),
    Step("edit, git commit, gc, fsck --strict", edit_and_collect),
    Step("SQLite transactions, integrity_check", database),
    Step("rewrite large files in place, mmap", rewrite_in_place),
    Step("rename directories, replace files", rename),
    Step("hard links, symlinks, odd names", link),
]
