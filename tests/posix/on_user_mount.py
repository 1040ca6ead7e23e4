"""`python -m tests.posix.on_user_mount ROOT [SCENARIO ...]`: what an ordinary user sees in a mount of its own.

Prints a JSON document: for `plain` and `mount` each, lines by what they are of (`closed`, `set_id`, `scenarios`); and
what `check` said.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.mount.box import Box
from tests.posix.probe import Probe, opened, remove


def _with_mode(path: str, mode: int) -> str:
    os.chmod(path, mode)
    return path


_MODES = (0o000, 0o100, 0o200, 0o300, 0o311, 0o400, 0o500, 0o600, 0o2000, 0o1077)
_TRIED: dict[str, Callable[[str], object]] = {
    "stat": lambda d: f"{os.lstat(d).st_mode:o}",
    "list": lambda d: sorted(os.listdir(d)),
    "list with kinds": lambda d: sorted((e.name, e.is_dir(follow_symlinks=False)) for e in os.scandir(d)),
    "stat in": lambda d: os.lstat(f"{d}/file").st_size,
    "read in": lambda d: Path(d, "file").read_bytes(),
    "write in": lambda d: Path(d, "file").write_bytes(b"other"),
    "create in": lambda d: opened(f"{d}/new", os.O_CREAT | os.O_WRONLY),
    "mkdir in": lambda d: os.mkdir(f"{d}/new"),
    "unlink in": lambda d: os.unlink(f"{d}/file"),
    "rename in": lambda d: os.rename(f"{d}/file", f"{d}/other"),
    "rename out": lambda d: os.rename(f"{d}/file", f"{d}-out"),
    "below": lambda d: os.listdir(f"{d}/sub"),
    "touch": os.utime,
    "chmod and list": lambda d: sorted(os.listdir(_with_mode(d, 0o755))),
    "chmod and write": lambda d: Path(_with_mode(d, 0o700), "file").write_bytes(b"other"),
    "rename": lambda d: os.rename(d, f"{d}-renamed"),
    "move": lambda d: os.rename(d, "into/it"),
    "rmdir": os.rmdir,
    "xattr": lambda d: os.setxattr(d, "user.what", b"x"),
}


def _each() -> Iterator[tuple[str, int, str]]:
    for mode in _MODES:
        for what in _TRIED:
            yield f"{mode:o}-{what.replace(' ', '-')}", mode, what


def prepare() -> None:
    """A directory for each try in the current one, with a mode that keeps its owner out of something."""
    os.mkdir("into")
    for name, mode, what in _each():
        os.mkdir(name)
        if what != "rmdir":
            os.mkdir(f"{name}/sub")
            Path(name, "file").write_bytes(b"content")
        os.chmod(name, mode)


def closed() -> list[str]:
    """What is in the current directory, as `prepare` left it: tried, and what its mode is afterwards."""
    probe = Probe("closed")
    for name, mode, what in _each():
        probe.do(f"{what} of {mode:o}", lambda what=what, name=name: _TRIED[what](name))  # type: ignore[misc]
        for left in (name, f"{name}-renamed", "into/it"):
            if os.path.lexists(left):
                probe.note(f"mode after {what} of {mode:o}", f"{stat.S_IMODE(os.lstat(left).st_mode):o}")
        if os.path.lexists("into/it"):
            remove("into/it")
    return probe.lines


_SET_ID = (0o6755, 0o4755, 0o2755, 0o2644, 0o4644, 0o7777, 0o1755)


def make_set_id() -> None:
    """Files and directories whose set-id bits come in different ways, in the current directory."""
    for mode in _SET_ID:
        opened(f"{mode:o}-open", os.O_CREAT | os.O_WRONLY, mode)
        os.mknod(f"{mode:o}-mknod", stat.S_IFREG | mode)
        os.mkdir(f"{mode:o}-mkdir", mode)
        for what in ("write", "cut", "write again"):
            fd = os.open(f"{mode:o}-{what}", os.O_CREAT | os.O_RDWR, 0o644)
            os.write(fd, b"program" * 5000)
            if what == "cut":
                os.ftruncate(fd, 100)
            # As cp -p and install do, before the kernel has written anything back.
            os.fchmod(fd, mode)
            os.close(fd)
            if what == "write again":
                fd = os.open(f"{mode:o}-{what}", os.O_RDWR)
                os.write(fd, b"another")
                os.close(fd)


def set_id() -> list[str]:
    """Their modes."""
    probe = Probe("set_id")
    for name in sorted(n for n in os.listdir() if n.partition("-")[0] in {f"{mode:o}" for mode in _SET_ID}):
        probe.note(f"mode of {name}", f"{os.lstat(name).st_mode:o}")
    return probe.lines


def lines_of(directory: Path, *names: str) -> list[str]:
    ended = subprocess.run(
        [sys.executable, "-m", "tests.posix.run", str(directory), *names], stdout=subprocess.PIPE, text=True, check=True
    )
    return ended.stdout.splitlines()


def main(words: list[str]) -> None:
    os.umask(0)
    box = Box(Path(words[0]))
    box.make()
    plain = box.root / "plain"
    plain.mkdir()
    out: dict[str, dict[str, list[str]]] = {}
    try:
        box.init()
        box.mount()
        for where in (plain, box.clear):
            with contextlib.chdir(where):
                prepare()
                make_set_id()
                before = set_id()
            out[where.name] = {"set_id": before}
        box.remount()
        box.run("rotate", "--kek", box.vault)
        for where in (plain, box.clear):
            seen = out[where.name]
            with contextlib.chdir(where):
                seen["set_id"] += set_id()
                seen["closed"] = closed()
            seen["scenarios"] = lines_of(where, *words[1:])
        box.umount()
        checked = box.run("check", box.vault, code=None)
        out["check"] = {"said": [str(checked.returncode), checked.stdout]}
    finally:
        box.close()
    json.dump(out, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1:])
