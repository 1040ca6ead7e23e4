"""A Hypothesis state machine: the same random operations in a mount and in a tmpfs directory, every answer compared."""

from __future__ import annotations

import errno
import mmap
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.mount.syscalls import RENAME_EXCHANGE, RENAME_NOREPLACE, renameat2
from tests.posix.probe import KINDS, make, remove

NAMES = st.sampled_from(
    ["a", "b", "c", "d/a", "d/b", "e/a", "e/b", "d/f/a", "d", "e", "d/f", "x" * 200, "d/" + "y" * 255]
)
SIZES = st.sampled_from([0, 1, 100, 4095, 4096, 4097, 16384, 16385, 50_000, 131_072, 300_000])
DATA = st.builds(
    lambda byte, count: bytes([byte]) * count, st.integers(1, 255), st.sampled_from([1, 10, 4096, 5000, 40_000])
)
TIMES = st.integers(1 - 2**31, 2**33).map(lambda s: s * 10**9 + 123_456_789)


class Machine(RuleBasedStateMachine):
    """`roots`: the mount and the other directory, both empty; `remount`: what unmounts and mounts again."""

    roots: tuple[Path, Path]
    remount: Callable[[], None] | None = None
    steps = 0

    def __init__(self) -> None:
        super().__init__()
        self.open: list[tuple[int, int]] = []
        for root in self.roots:
            for name in os.listdir(root):
                remove(str(root / name))

    # comparing ---------------------------------------------------------------------------------------------------

    def both(self, call: Callable[[Path], Any]) -> None:
        """The same on both: the same result or the same errno."""
        type(self).steps += 1
        ours, theirs = (_answer(lambda root=root: call(root)) for root in self.roots)  # type: ignore[misc]
        assert ours == theirs, f"mount: {str(ours)[:300]}; tmpfs: {str(theirs)[:300]}"

    def both_fds(self, number: int, call: Callable[[int], Any]) -> None:
        if not self.open:
            return
        type(self).steps += 1
        ours, theirs = (_answer(lambda fd=fd: call(fd)) for fd in self.open[number % len(self.open)])  # type: ignore[misc]
        assert ours == theirs, f"mount: {str(ours)[:300]}; tmpfs: {str(theirs)[:300]}"

    # names -------------------------------------------------------------------------------------------------------

    @initialize()
    def begin(self) -> None:
        for root in self.roots:
            os.makedirs(root / "d" / "f")
            os.mkdir(root / "e")

    @rule(kind=st.sampled_from(KINDS), name=NAMES, mode=st.sampled_from([0o644, 0o755, 0o600, 0o6755, 0o1777]))
    def make(self, kind: str, name: str, mode: int) -> None:
        self.both(lambda root: make(kind, str(root / name), mode))

    @rule(name=NAMES, to=st.sampled_from(["a", "b", "d/../a", "d", "loop", "t" * 1000, "t" * 4095]))
    def symlink(self, name: str, to: str) -> None:
        self.both(lambda root: os.symlink(to, root / name))

    @rule(name=NAMES)
    def readlink(self, name: str) -> None:
        self.both(lambda root: os.readlink(root / name))

    @rule(old=NAMES, new=NAMES)
    def link(self, old: str, new: str) -> None:
        self.both(lambda root: os.link(root / old, root / new, follow_symlinks=False))

    @rule(old=NAMES, new=NAMES, flags=st.sampled_from([0, 0, 0, RENAME_NOREPLACE, RENAME_EXCHANGE]))
    def rename(self, old: str, new: str, flags: int) -> None:
        self.both(lambda root: renameat2(root / old, root / new, flags))

    @rule(name=NAMES)
    def unlink(self, name: str) -> None:
        self.both(lambda root: os.unlink(root / name))

    @rule(name=NAMES)
    def rmdir(self, name: str) -> None:
        self.both(lambda root: os.rmdir(root / name))

    @rule(name=NAMES)
    def list(self, name: str) -> None:
        self.both(lambda root: sorted(os.listdir(root / name)))

    # attributes --------------------------------------------------------------------------------------------------

    @rule(name=NAMES)
    def stat(self, name: str) -> None:
        self.both(lambda root: _shown(os.lstat(root / name)))

    @rule(name=NAMES, mode=st.integers(0, 0o7777))
    def chmod(self, name: str, mode: int) -> None:
        self.both(lambda root: os.chmod(root / name, mode))

    @rule(name=NAMES, uid=st.integers(-1, 70_000), gid=st.integers(-1, 70_000))
    def chown(self, name: str, uid: int, gid: int) -> None:
        self.both(lambda root: os.chown(root / name, uid, gid, follow_symlinks=False))

    @rule(name=NAMES, atime=TIMES, mtime=TIMES)
    def utime(self, name: str, atime: int, mtime: int) -> None:
        def call(root: Path) -> tuple[int, int]:
            os.utime(root / name, ns=(atime, mtime), follow_symlinks=False)
            found = os.lstat(root / name)
            return found.st_atime_ns, found.st_mtime_ns

        self.both(call)

    # contents ----------------------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.open) < 6)
    @rule(name=NAMES, flags=st.sampled_from([0, os.O_CREAT, os.O_CREAT | os.O_EXCL, os.O_TRUNC, os.O_APPEND]),
          way=st.sampled_from([os.O_RDWR, os.O_RDWR, os.O_RDONLY, os.O_WRONLY]))  # fmt: skip
    def opens(self, name: str, flags: int, way: int) -> None:
        got: list[int] = []

        def call(root: Path) -> None:
            kind = _kind(root / name)
            if kind is None or stat.S_ISREG(kind) or stat.S_ISDIR(kind):
                got.append(os.open(root / name, flags | way | os.O_NONBLOCK, 0o640))

        try:
            self.both(call)
        finally:
            if len(got) == 2:
                self.open.append((got[0], got[1]))
            else:
                for fd in got:
                    os.close(fd)

    @rule(number=st.integers(0, 5))
    def close(self, number: int) -> None:
        if self.open:
            for fd in self.open.pop(number % len(self.open)):
                os.close(fd)

    @rule(number=st.integers(0, 5), at=SIZES, data=DATA)
    def write(self, number: int, at: int, data: bytes) -> None:
        self.both_fds(number, lambda fd: os.pwrite(fd, data, at))

    @rule(number=st.integers(0, 5), at=SIZES, count=SIZES)
    def read(self, number: int, at: int, count: int) -> None:
        self.both_fds(number, lambda fd: os.pread(fd, count, at))

    @rule(number=st.integers(0, 5), size=SIZES)
    def ftruncate(self, number: int, size: int) -> None:
        self.both_fds(number, lambda fd: os.ftruncate(fd, size))

    @rule(name=NAMES, size=SIZES)
    def truncate(self, name: str, size: int) -> None:
        self.both(lambda root: os.truncate(root / name, size))

    @rule(number=st.integers(0, 5), at=SIZES, data=DATA, flush=st.booleans())
    def map(self, number: int, at: int, data: bytes, flush: bool) -> None:
        def call(fd: int) -> bytes:
            size = os.fstat(fd).st_size
            with mmap.mmap(fd, 0) as mapped:
                end = min(size, at + len(data))
                mapped[min(at, size) : end] = data[: max(0, end - at)]
                if flush:
                    mapped.flush()
                return mapped[-100:]

        self.both_fds(number, lambda fd: call(fd) if os.fstat(fd).st_size else b"")

    @rule(number=st.integers(0, 5))
    def fsync(self, number: int) -> None:
        self.both_fds(number, os.fsync)

    @rule(number=st.integers(0, 5))
    def drop(self, number: int) -> None:
        self.both_fds(number, lambda fd: os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED))

    @rule(number=st.integers(0, 5))
    def fstat(self, number: int) -> None:
        self.both_fds(number, lambda fd: _shown(os.fstat(fd)))

    # all of it ---------------------------------------------------------------------------------------------------

    @rule()
    def whole(self) -> None:
        self.both(_everything)

    @precondition(lambda self: self.remount is not None)
    @rule(chance=st.integers(0, 9))
    def mounted_again(self, chance: int) -> None:
        if chance or self.remount is None:
            return
        while self.open:
            self.close(0)
        self.remount()
        self.whole()

    @invariant()
    def sizes_are_the_same(self) -> None:
        for ours, theirs in self.open:
            assert os.fstat(ours).st_size == os.fstat(theirs).st_size or stat.S_ISDIR(os.fstat(ours).st_mode)

    def teardown(self) -> None:
        self.both(_everything)
        while self.open:
            self.close(0)


def _answer(call: Callable[[], Any]) -> Any:  # noqa: ANN401 - whatever it returns
    try:
        return call()
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))
    except ValueError:
        return "ValueError"


def _kind(path: Path) -> int | None:
    try:
        return os.stat(path).st_mode
    except OSError:
        return None


def _shown(found: os.stat_result) -> tuple[object, ...]:
    size = None if stat.S_ISDIR(found.st_mode) else found.st_size
    device = found.st_rdev if stat.S_ISBLK(found.st_mode) or stat.S_ISCHR(found.st_mode) else 0
    return oct(found.st_mode), found.st_uid, found.st_gid, found.st_nlink, size, device


def _everything(root: Path) -> dict[str, tuple[object, ...]]:
    """Every name below, with attributes and content."""
    out: dict[str, tuple[object, ...]] = {}
    for above, dirs, files in os.walk(root):
        for name in dirs + files:
            path = Path(above, name)
            found = path.lstat()
            content: object = None
            if stat.S_ISREG(found.st_mode):
                content = path.read_bytes()
            elif stat.S_ISLNK(found.st_mode):
                content = os.readlink(path)
            out[str(path.relative_to(root))] = (*_shown(found), content)
    return out
