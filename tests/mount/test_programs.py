"""Programs people run in their directories, each judged by what it leaves; again after a remount where that tells more.

Databases are in `test_databases.py`, servers and stressors in `tests/torture/`.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mount.box import Box

pytestmark = [pytest.mark.mount, pytest.mark.slow]

TIMEOUT_S = 120
REPOSITORY = Path(__file__).parents[2]


def run(*words: str | Path, cwd: Path, **environment: str) -> str:
    """What the program printed. Fails unless it ends with 0."""
    ended = subprocess.run(
        words, cwd=cwd, env=os.environ | environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=TIMEOUT_S, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, f"{words}: {ended.returncode}\n{ended.stdout}{ended.stderr}"
    return ended.stdout


def snapshot(tree: Path) -> dict[str, tuple[object, ...]]:
    """Path -> type and mode, mtime in ns, links, and content or target, of everything in `tree`."""
    out: dict[str, tuple[object, ...]] = {}
    for path in sorted(tree.rglob("*")):
        st = path.lstat()
        content: object = None
        if stat.S_ISREG(st.st_mode):
            content = path.read_bytes()
        elif stat.S_ISLNK(st.st_mode):
            content = os.readlink(path)
        nlink = 0 if stat.S_ISDIR(st.st_mode) else st.st_nlink
        out[str(path.relative_to(tree))] = (st.st_mode, st.st_mtime_ns, nlink, content)
    return out


def test_git(mounted: Box) -> None:
    def git(*words: str | Path, cwd: Path) -> str:
        return run(
            "git", "-c", "user.name=a", "-c", "user.email=a@localhost", "-c", "init.defaultBranch=main",
            "-c", "protocol.file.allow=always", *words, cwd=cwd, GIT_CONFIG_NOSYSTEM="1", HOME=str(mounted.root / "h"),
        )  # fmt: skip

    work = mounted.clear / "work"
    work.mkdir()
    git("init", "-q", cwd=work)
    for commit in range(3):
        for number in range(60):
            path = work / f"d{number % 7}" / f"{number}.txt"
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"{number} {commit * (number % 3)}\n" * (number + 1), "ascii")
        git("add", "-A", cwd=work)
        git("commit", "-q", "-m", f"{commit}", cwd=work)
    clone = mounted.clear / "clone"
    git("clone", "-q", "--no-hardlinks", work, clone, cwd=mounted.clear)
    git("clone", "-q", work, mounted.clear / "linked", cwd=mounted.clear)
    git("gc", "-q", "--aggressive", "--prune=now", cwd=clone)
    git("worktree", "add", "-q", mounted.clear / "tree", "HEAD~1", cwd=clone)
    for _ in range(2):
        for name in ("work", "clone", "linked", "tree"):
            git("fsck", "--full", "--strict", cwd=mounted.clear / name)
            assert not git("status", "--porcelain", cwd=mounted.clear / name)
        heads = {git("rev-parse", "HEAD", cwd=mounted.clear / name) for name in ("work", "clone", "linked")}
        assert len(heads) == 1
        mounted.remount()


def test_rsync_there_and_back(mounted: Box, short_tmp: Path) -> None:
    source, back = short_tmp / "source", short_tmp / "back"
    (source / "d" / "e").mkdir(parents=True)
    for number in range(40):
        (source / "d" / f"{number}").write_bytes(os.urandom(number * 997))
    os.link(source / "d" / "1", source / "d" / "e" / "one")
    os.symlink("../d/2", source / "d" / "e" / "two")
    os.symlink("/nowhere", source / "dangling")
    os.mkfifo(source / "fifo", 0o640)
    with (source / "sparse").open("wb") as file:
        file.seek(5 << 20)
        file.write(b"the end")
    os.utime(source / "d" / "3", ns=(1, -86_400_000_000_001))
    (source / "d" / "4").chmod(0o4711)
    (source / "d" / "e").chmod(0o2750)
    os.setxattr(source / "d" / "5", "user.colour", b"blue")
    there = mounted.clear / "there"
    run("rsync", "--modify-window=-1", "-aHAXS", f"{source}/", there, cwd=short_tmp)
    mounted.remount()
    assert not run("rsync", "--modify-window=-1", "-aHAXScni", "--delete", f"{source}/", there, cwd=short_tmp)
    run("rsync", "--modify-window=-1", "-aHAXS", f"{there}/", back, cwd=short_tmp)
    assert not run("rsync", "--modify-window=-1", "-aHAXScni", "--delete", f"{source}/", back, cwd=short_tmp)
    assert snapshot(back) == snapshot(source)
    with (source / "d" / "39").open("r+b") as file:
        file.write(b"changed")
    os.rename(source / "d" / "7", source / "d" / "seven")
    run(
        "rsync",
        "--modify-window=-1",
        "-aHAXS",
        "--inplace",
        "--no-whole-file",
        "--delete",
        f"{source}/",
        there,
        cwd=short_tmp,
    )
    assert snapshot(there) == snapshot(source)


def test_tar_packs_and_unpacks(mounted: Box, short_tmp: Path) -> None:
    run("tar", "-C", REPOSITORY, "-cf", mounted.clear / "c.tar", "cryptfs", "docs", "README.md", cwd=short_tmp)
    for place in (mounted.clear / "unpacked", short_tmp / "plain"):
        place.mkdir()
        run("tar", "-C", place, "-xpf", mounted.clear / "c.tar", cwd=short_tmp)
    run("tar", "-C", mounted.clear / "unpacked", "-df", mounted.clear / "c.tar", cwd=short_tmp)
    assert snapshot(mounted.clear / "unpacked") == snapshot(short_tmp / "plain")
    shutil.rmtree(mounted.clear / "unpacked")
    assert os.listdir(mounted.clear) == ["c.tar"]


def test_a_build_with_four_jobs(here: Path) -> None:
    """Objects and the program are written, mapped and run; a second make finds nothing to do, a touched file little."""
    units = 24
    for number in range(units):
        (here / f"u{number}.c").write_text(f"int f{number}(int x) {{ return x + {number}; }}\n", "ascii")
    calls = " + ".join(f"f{number}(1)" for number in range(units))
    declared = "".join(f"int f{number}(int);\n" for number in range(units))
    (here / "main.c").write_text(
        f'#include <stdio.h>\n{declared}int main(void) {{ printf("%d\\n", {calls}); return 0; }}\n', "ascii"
    )
    (here / "Makefile").write_text(
        "objects := $(patsubst %.c,%.o,$(wildcard *.c))\nprogram: $(objects)\n\tgcc -o $@ $^\n"
        "lib.a: $(objects)\n\tar rcs $@ $^\n", "ascii"
    )  # fmt: skip
    run("make", "-j4", "program", "lib.a", cwd=here)
    expected = f"{sum(range(units)) + units}\n"
    assert run(here / "program", cwd=here) == expected
    assert "up to date" in run("make", "-j4", "program", cwd=here)
    os.utime(here / "u3.c")
    again = run("make", "-j4", "program", cwd=here)
    assert "u3.o" in again
    assert "u4.c" not in again
    assert run(here / "program", cwd=here) == expected


def test_pip_and_a_virtual_environment(here: Path) -> None:
    """An environment made on the mount, a package built and installed into it, imported from there."""
    run(sys.executable, "-m", "venv", "--without-pip", "--system-site-packages", here / "env", cwd=here)
    package = here / "package"
    (package / "hello").mkdir(parents=True)
    (package / "hello" / "__init__.py").write_text("WORLD = 42\n", "ascii")
    (package / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
        '[project]\nname = "hello"\nversion = "1"\n[tool.setuptools]\npackages = ["hello"]\n', "ascii"
    )  # fmt: skip
    [site] = (here / "env" / "lib").glob("python*/site-packages")
    run(
        sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-index", "--no-deps",
        "--no-build-isolation", "--no-cache-dir", "--root-user-action=ignore", "--target", site, package,
        cwd=here, TMPDIR=str(here),
    )  # fmt: skip
    python = here / "env" / "bin" / "python"
    words = "import hello; print(hello.WORLD, hello.__file__)"
    assert run(python, "-c", words, cwd=here) == f"42 {site}/hello/__init__.py\n"


def test_editors_that_replace_by_rename(here: Path) -> None:
    path = here / "text"
    path.write_text("one\ntwo\nthree\n", "ascii")
    path.chmod(0o640)
    inode = path.stat().st_ino
    run("sed", "-i.bak", "s/two/2/", path, cwd=here)
    assert path.read_text("ascii") == "one\n2\nthree\n"
    assert (here / "text.bak").stat().st_ino == inode
    assert path.stat().st_mode & 0o777 == 0o640
    for backup in ("yes", "no"):
        command = f"%s/2/two by {backup}/"
        run(
            "vim.tiny", "-es", "-u", "NONE", "-N", "-c", f"set backupcopy={backup} backup backupskip= fsync",
            "-c", command, "-c", "wq", path, cwd=here,
        )  # fmt: skip
        assert path.read_text("ascii") == f"one\ntwo by {backup}\nthree\n"
        assert (here / "text~").read_text("ascii") == "one\n2\nthree\n"
        path.write_text("one\n2\nthree\n", "ascii")
    assert sorted(os.listdir(here)) == ["text", "text.bak", "text~"]


def test_a_package_is_unpacked(mounted: Box, short_tmp: Path) -> None:
    tree = short_tmp / "tree"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN").chmod(0o755)
    (tree / "DEBIAN" / "control").write_text(
        "Package: hello\nVersion: 1\nArchitecture: all\nMaintainer: a <a@localhost>\nDescription: a\n", "ascii"
    )
    (tree / "usr" / "share" / "hello").mkdir(parents=True)
    for number in range(50):
        (tree / "usr" / "share" / "hello" / f"{number}").write_bytes(os.urandom(3000))
    os.symlink("hello/1", tree / "usr" / "share" / "one")
    package = mounted.clear / "hello.deb"
    run("dpkg-deb", "--root-owner-group", "-b", tree, package, cwd=short_tmp)
    run("dpkg-deb", "-x", package, mounted.clear / "x", cwd=short_tmp)
    run("dpkg-deb", "-x", package, short_tmp / "x", cwd=short_tmp)
    assert snapshot(mounted.clear / "x") == snapshot(short_tmp / "x")


DELIVER = """
import os, sys
place, me, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
os.chdir(place)
for number in range(count):
    name = f"{me}.{number}.host"
    fd = os.open(f"tmp/{name}", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    body = f"Subject: {name}\\n\\n{name * (number % 50)}\\n".encode()
    os.write(fd, body[:7])
    os.write(fd, body[7:])
    if number % 10 == 0:
        os.fsync(fd)
    os.close(fd)
    if number % 2:
        os.link(f"tmp/{name}", f"new/{name}")
        os.unlink(f"tmp/{name}")
    else:
        os.rename(f"tmp/{name}", f"new/{name}")
"""

COLLECT = """
import os, sys
os.chdir(sys.argv[1])
wanted, seen = int(sys.argv[2]), 0
while seen < wanted:
    for name in os.listdir("new"):
        os.rename(f"new/{name}", f"cur/{name}:2,S")
        seen += 1
"""


def test_a_mail_directory(here: Path) -> None:
    """Six deliver 250 each while another files what has come: every letter is there once and whole."""
    writers, each = 6, 250
    for name in ("tmp", "new", "cur"):
        (here / name).mkdir()
    started = [
        subprocess.Popen([sys.executable, "-c", DELIVER, here, f"w{number}", str(each)]) for number in range(writers)
    ]
    started.append(subprocess.Popen([sys.executable, "-c", COLLECT, here, str(writers * each)]))
    try:
        assert [process.wait(TIMEOUT_S) for process in started] == [0] * len(started)
    finally:
        for process in started:
            process.kill()
            process.wait()
    assert os.listdir(here / "tmp") == os.listdir(here / "new") == []
    found = {path.name: path.read_bytes() for path in (here / "cur").iterdir()}
    expected = {}
    for writer in range(writers):
        for number in range(each):
            name = f"w{writer}.{number}.host"
            expected[f"{name}:2,S"] = f"Subject: {name}\n\n{name * (number % 50)}\n".encode()
    assert found == expected
