"""A Hypothesis state machine: the same random operations in a mount and in a tmpfs directory, every answer compared."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.mount.syscalls import RENAME_EXCHANGE, RENAME_NOREPLACE, renameat2
from tests.posix.calls import HOWS, LOCKS, direct_read, direct_write, holes, lock
from tests.posix.on_times import NOW, OMIT, utimensat
from tests.posix.probe import KINDS, TICK_S, make, remove

_NAMES = ["a", "b", "c", "d/a", "d/b", "e/a", "e/b", "d/f/a", "d", "e", "d/f", "x" * 200, "d/" + "y" * 255]
NAMES = st.sampled_from(_NAMES)
AT_SYMLINK_NOFOLLOW = 0x100
SIZES = st.sampled_from([0, 1, 100, 4095, 4096, 4097, 16384, 16385, 50_000, 131_072, 300_000])
DATA = st.builds(
    lambda byte, count: bytes([byte]) * count, st.integers(1, 255), st.sampled_from([1, 10, 4096, 5000, 40_000])
)
SECONDS = st.integers(1 - 2**31, 15_032_385_534)
"""What the file system below the mount can store."""
TIMES = SECONDS.map(lambda s: s * 10**9 + 123_456_789)
SET = st.one_of(
    st.tuples(SECONDS, st.sampled_from([0, 1, 999_999_999])),
    st.sampled_from([(0, NOW), (0, OMIT), (-1, 0), (-1, 999_999_999), (0, -1), (0, 10**9)]),
)
FAR = st.sampled_from([-(2**31) - 1, 15_032_385_536, 10**11, -(10**11), 2**40])
XATTRS = st.sampled_from(
    ["user.a", "user.b", "trusted.a", "security.a", "security.capability", "user.", "nonsense.a", "user." + "n" * 251]
)
VALUES = st.sampled_from(
    [b"", b"x", b"value" * 20, bytes(5000), b"\x01\x00\x00\x02" + bytes([4]) + bytes(15), bytes(65536), bytes(65537)]
)
"""The fifth is what security.capability may be (capabilities(7))."""


class Machine(RuleBasedStateMachine):
    """`roots`: the mount and the other directory, both empty; `remount`: what unmounts and mounts again."""

    roots: tuple[Path, Path]
    remount: Callable[[], None] | None = None
    steps = 0

    def __init__(self) -> None:
        super().__init__()
        self.open: list[tuple[int, int]] = []
        self.watching = False
        for root in self.roots:
            for name in os.listdir(root):
                remove(str(root / name))

    # comparing ---------------------------------------------------------------------------------------------------

    def both(self, call: Callable[[Path], Any]) -> None:
        """The same on both: the same result or the same errno, and the same times moved by it."""
        self._compare(call, self.roots)

    def both_fds(self, number: int, call: Callable[[int], Any]) -> None:
        if self.open:
            self._compare(call, self.open[number % len(self.open)])

    def _compare(self, call: Callable[[Any], Any], two: tuple[Any, Any]) -> None:
        type(self).steps += 1
        before = [self._times(side) for side in (0, 1)] if self.watching else None
        if before is not None:
            time.sleep(TICK_S)
        ours, theirs = (_answer(lambda each=each: call(each)) for each in two)  # type: ignore[misc]
        assert ours == theirs, f"mount: {str(ours)[:300]}; tmpfs: {str(theirs)[:300]}"
        if before is not None:
            ours, theirs = (_moved(before[side], self._times(side)) for side in (0, 1))
            by_itself = {each for each in ours if each.kind == stat.S_IFDIR and each.time == "ctime"}
            wrong = (ours ^ theirs) - (by_itself - theirs)
            assert not wrong, f"times moved, mount: {ours}; tmpfs: {theirs}"

    def _times(self, side: int) -> dict[int, tuple[str, os.stat_result]]:
        """By inode number, of all that has a name or is open: what to call it, and its attributes."""
        out: dict[int, tuple[str, os.stat_result]] = {}
        for name in ("", *_NAMES):
            with contextlib.suppress(OSError):
                found = os.lstat(self.roots[side] / name)
                out.setdefault(found.st_ino, (name, found))
        for number, fds in enumerate(self.open):
            found = os.fstat(fds[side])
            out.setdefault(found.st_ino, (f"open {number}", found))
        return out

    # names -------------------------------------------------------------------------------------------------------

    @initialize(watching=st.booleans())
    def begin(self, watching: bool) -> None:
        """`watching`: compare which times move, too. That takes longer than a file system's clock needs for a step."""
        for root in self.roots:
            os.makedirs(root / "d" / "f")
            os.mkdir(root / "e")
        self.watching = watching

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
    def listed(self, name: str) -> None:
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

    @rule(name=NAMES, atime=SET, mtime=SET)
    def utimensat(self, name: str, atime: tuple[int, int], mtime: tuple[int, int]) -> None:
        def call(root: Path) -> tuple[int | None, int | None]:
            utimensat(str(root / name), atime, mtime, flags=AT_SYMLINK_NOFOLLOW)
            found = os.lstat(root / name)
            # What is left alone or now depends on what came before, and when.
            return (
                found.st_atime_ns if atime[1] not in {NOW, OMIT} else None,
                found.st_mtime_ns if mtime[1] not in {NOW, OMIT} else None,
            )

        self.both(call)

    @rule(name=NAMES, far=FAR, back=TIMES)
    def set_far_time(self, name: str, far: int, back: int) -> None:
        """Taken; what is shown is as near as the file system below comes, so something else is set right away."""

        def call(root: Path) -> None:
            utimensat(str(root / name), (far, 0), (far, 0), flags=AT_SYMLINK_NOFOLLOW)
            os.utime(root / name, ns=(back, back), follow_symlinks=False)

        self.both(call)

    @rule(name=NAMES, key=XATTRS, value=VALUES, flags=st.sampled_from([0, 0, os.XATTR_CREATE, os.XATTR_REPLACE]))
    def set_xattr(self, name: str, key: str, value: bytes, flags: int) -> None:
        self.both(lambda root: os.setxattr(root / name, key, value, flags, follow_symlinks=False))

    @rule(name=NAMES, key=XATTRS)
    def get_xattr(self, name: str, key: str) -> None:
        self.both(lambda root: os.getxattr(root / name, key, follow_symlinks=False))

    @rule(name=NAMES, key=XATTRS)
    def remove_xattr(self, name: str, key: str) -> None:
        self.both(lambda root: os.removexattr(root / name, key, follow_symlinks=False))

    @rule(number=st.integers(0, 5), key=XATTRS, value=VALUES)
    def xattr_of_open(self, number: int, key: str, value: bytes) -> None:
        def call(fd: int) -> bytes:
            os.setxattr(fd, key, value)
            return os.getxattr(fd, key)

        self.both_fds(number, call)

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
            self._keep(got)

    @precondition(lambda self: 0 < len(self.open) < 6)
    @rule(number=st.integers(0, 5), way=st.sampled_from([os.O_RDWR, os.O_RDWR, os.O_RDONLY, os.O_WRONLY]),
          more=st.sampled_from([0, os.O_DIRECT, os.O_DIRECT | os.O_SYNC, os.O_APPEND | os.O_DIRECT]))  # fmt: skip
    def opens_again(self, number: int, way: int, more: int) -> None:
        """Another descriptor of what is open, named or not."""
        got: list[int] = []
        try:
            self.both_fds(number, lambda fd: got.append(os.open(f"/proc/self/fd/{fd}", way | more)))
        finally:
            self._keep(got)

    def _keep(self, got: list[int]) -> None:
        """Descriptors that were opened on both are the machine's from now on."""
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

    @rule(number=st.integers(0, 5), at=SIZES, data=DATA, aside=st.sampled_from([0, 0, 512, 1, 4095]))
    def write_from(self, number: int, at: int, data: bytes, aside: int) -> None:
        """Past the page cache, where that was asked for."""
        self.both_fds(number, lambda fd: direct_write(fd, data, at, aside))

    @rule(number=st.integers(0, 5), at=SIZES, count=SIZES, aside=st.sampled_from([0, 0, 512, 1, 4095]))
    def read_into(self, number: int, at: int, count: int, aside: int) -> None:
        self.both_fds(number, lambda fd: direct_read(fd, count, at, aside))

    @rule(number=st.integers(0, 5), start=st.one_of(SIZES, st.just(-1)))
    def seek_holes(self, number: int, start: int) -> None:
        self.both_fds(number, lambda fd: holes(fd, start) if stat.S_ISREG(os.fstat(fd).st_mode) else None)

    @rule(number=st.integers(0, 5), kind=st.sampled_from(LOCKS), how=st.sampled_from(HOWS), start=st.integers(0, 2),
          count=st.integers(0, 2))  # fmt: skip
    def lock(self, number: int, kind: str, how: int, start: int, count: int) -> None:
        self.both_fds(number, lambda fd: lock(fd, kind, how, start, count))

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


class _Moved(NamedTuple):
    """A time that moved. In the mount, a directory's ctime does so by itself: its log is rewritten now and then."""

    name: str
    kind: int
    time: str


def _moved(before: dict[int, tuple[str, os.stat_result]], after: dict[int, tuple[str, os.stat_result]]) -> set[_Moved]:
    """Which of mtime and ctime moved of what was there before and is still."""
    out = set()
    for ino in before.keys() & after.keys():
        name, old = before[ino]
        new = after[ino][1]
        kind = stat.S_IFMT(old.st_mode)
        if old.st_mtime_ns != new.st_mtime_ns:
            out.add(_Moved(name, kind, "mtime"))
        if old.st_ctime_ns != new.st_ctime_ns:
            out.add(_Moved(name, kind, "ctime"))
    return out


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
    """Every name below, with attributes, content and xattrs."""
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
            keys = sorted(os.listxattr(path, follow_symlinks=False))
            kept = [(key, os.getxattr(path, key, follow_symlinks=False)) for key in keys]
            out[str(path.relative_to(root))] = (*_shown(found), content, kept)
    return out
