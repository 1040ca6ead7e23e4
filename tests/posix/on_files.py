"""Open files: flags, sizes, offsets, holes, and the calls a FUSE file system may not be able to answer."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import itertools
import mmap
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator

from tests.posix.probe import ANN, BEN, KINDS, Probe, make, opened, remove, scenario

_libc = ctypes.CDLL(None, use_errno=True)
FLAGS = {
    "r": os.O_RDONLY, "w": os.O_WRONLY, "rw": os.O_RDWR, "path": os.O_PATH,
}  # fmt: skip
MORE = {
    "creat": os.O_CREAT, "excl": os.O_EXCL, "trunc": os.O_TRUNC, "dir": os.O_DIRECTORY, "nofollow": os.O_NOFOLLOW,
}  # fmt: skip
OTHERS = {
    "append": os.O_APPEND, "sync": os.O_SYNC, "dsync": os.O_DSYNC, "direct": os.O_DIRECT, "noatime": os.O_NOATIME,
    "cloexec": os.O_CLOEXEC, "async": os.O_ASYNC,
}  # fmt: skip


@scenario
def open_flags(p: Probe) -> None:
    for kind, way in itertools.product((*KINDS, "nothing"), FLAGS):
        for number in range(2 ** len(MORE)):
            chosen = [name for bit, name in enumerate(MORE) if number >> bit & 1]
            if "excl" in chosen and "creat" not in chosen and kind == "block":
                continue
            remove("it")
            if kind != "nothing":
                make(kind, "it", 0o755 if kind == "dir" else 0o644)
            flags = FLAGS[way] | sum(MORE[name] for name in chosen) | os.O_NONBLOCK
            label = f"{kind} {way} {' '.join(chosen)}"
            p.do(label, lambda flags=flags: opened("it", flags, 0o640))  # type: ignore[misc]
            p.state("it", f"it after {label}")
    for kind, (name, flag) in itertools.product(("reg", "dir", "symlink"), OTHERS.items()):
        remove("it")
        make(kind, "it", 0o755 if kind == "dir" else 0o644)
        p.do(f"{kind} r {name}", lambda flag=flag: opened("it", os.O_RDONLY | flag))  # type: ignore[misc]
        p.do(f"{kind} rw {name}", lambda flag=flag: opened("it", os.O_RDWR | flag))  # type: ignore[misc]
    remove("it")
    make("reg", "it", 0o666)
    p.do("another's with noatime", lambda: opened("it", os.O_RDONLY | os.O_NOATIME), ANN)
    for mode in (0o000, 0o200, 0o444):
        p.do(f"create {mode:o} and write", lambda mode=mode: _create_and_write(mode), ANN)  # type: ignore[misc]
        p.state(f"made {mode:o}")


def _create_and_write(mode: int) -> bytes:
    fd = os.open(f"made {mode:o}", os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)
    os.write(fd, b"written")
    found = os.pread(fd, 100, 0)
    os.close(fd)
    return found


SIZES = (
    -1, 0, 1, 4095, 4096, 4097, 16383, 16384, 16385, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**40, 2**43,
    2**44, 2**45, 2**60, 2**62, 2**63 - 1, -(2**63),
)  # fmt: skip


@scenario
def sizes(p: Probe) -> None:
    for size in SIZES:
        make("reg", "file")
        fd = os.open("file", os.O_RDWR)
        p.do(f"truncate to {size}", lambda size=size: os.truncate("file", size))  # type: ignore[misc]
        p.state("file", f"after truncate to {size}")
        p.do(f"ftruncate to {size}", lambda size=size: os.ftruncate(fd, size))  # type: ignore[misc]  # noqa: B023
        p.do(f"blocks after {size}", lambda: os.stat("file").st_blocks < 100)
        p.do(f"first bytes after {size}", lambda: os.pread(fd, 10, 0))  # noqa: B023
        os.close(fd)
        os.unlink("file")
    for at in (2**31 - 2, 2**32 - 2, 2**32, 2**40, 2**43):
        fd = os.open("file", os.O_RDWR | os.O_CREAT)
        p.do(f"write at {at}", lambda at=at: os.pwrite(fd, b"data", at))  # type: ignore[misc]  # noqa: B023
        p.do(f"read at {at}", lambda at=at: os.pread(fd, 10, at - 2))  # type: ignore[misc]  # noqa: B023
        p.do("size", lambda: os.fstat(fd).st_size)  # noqa: B023
        p.do("sync", lambda: os.fsync(fd))  # noqa: B023
        p.do("few blocks", lambda: os.fstat(fd).st_blocks < 200)  # noqa: B023
        os.close(fd)
        os.unlink("file")
    _limited(p)


def _limited(p: Probe) -> None:
    """EFBIG of a process that may not write more."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        fd = os.open("file", os.O_RDWR | os.O_CREAT)
        p.do("write to the limit", lambda: os.pwrite(fd, b"x" * 2000, 0))
        p.do("write past the limit", lambda: os.pwrite(fd, b"x", 1000))
        p.do("truncate past the limit", lambda: os.ftruncate(fd, 1001))
        p.do("size", lambda: os.fstat(fd).st_size)
        os.close(fd)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


@scenario
def truncating_what_is_no_file(p: Probe) -> None:
    for kind in KINDS:
        make(kind, "it", 0o666)
        p.do(f"truncate {kind}", lambda: os.truncate("it", 0))
        remove("it")
    make("reg", "file")
    fd = os.open("file", os.O_RDONLY)
    p.do("ftruncate of a reader", lambda: os.ftruncate(fd, 0))
    p.do("write of a reader", lambda: os.write(fd, b"x"))
    os.close(fd)
    fd = os.open("file", os.O_WRONLY)
    p.do("read of a writer", lambda: os.read(fd, 1))
    p.do("pwrite before the start", lambda: os.pwrite(fd, b"x", -1))
    os.close(fd)
    fd = os.open(".", os.O_RDONLY)
    p.do("read a directory", lambda: os.read(fd, 10))
    p.do("ftruncate a directory", lambda: os.ftruncate(fd, 0))
    os.close(fd)


@scenario
def offsets(p: Probe) -> None:
    fd = os.open("file", os.O_RDWR | os.O_CREAT)
    os.pwrite(fd, b"begin", 0)
    os.pwrite(fd, b"end", 300_000)
    for whence, name in ((os.SEEK_SET, "set"), (os.SEEK_CUR, "cur"), (os.SEEK_END, "end")):
        for at in (-1, 0, 5, 2**40, -(2**40), 2**63 - 1):
            os.lseek(fd, 10, os.SEEK_SET)
            if at != 2**63 - 1:
                p.do(f"seek {name} {at}", lambda at=at, whence=whence: os.lseek(fd, at, whence))  # type: ignore[misc]
    for at in (0, 3, 299_999, 300_002):
        hole, data = os.lseek(fd, at, os.SEEK_HOLE), os.lseek(fd, at, os.SEEK_DATA)
        p.note(f"hole from {at} is within", at <= hole <= 300_003)
        p.note(f"data from {at} is not past data", at <= data <= max(at, 300_000))
    for at in (300_003, 400_000, -1):
        p.do(f"hole from {at}", lambda at=at: os.lseek(fd, at, os.SEEK_HOLE))  # type: ignore[misc]
        p.do(f"data from {at}", lambda at=at: os.lseek(fd, at, os.SEEK_DATA))  # type: ignore[misc]
    p.do("read at the end", lambda: os.pread(fd, 10, 300_003))
    p.do("read past it", lambda: os.pread(fd, 10, 400_000))
    p.do("read across it", lambda: os.pread(fd, 10, 300_001))
    p.do("read a hole", lambda: os.pread(fd, 100_000, 100) == bytes(100_000))
    os.close(fd)
    fd = os.open("file", os.O_RDWR | os.O_APPEND)
    p.do("pwrite with O_APPEND", lambda: os.pwrite(fd, b"appended", 0))
    p.do("size", lambda: os.fstat(fd).st_size)
    os.ftruncate(fd, 3)
    p.do("append after a cut", lambda: os.write(fd, b"more"))
    p.do("content", lambda: os.pread(fd, 100, 0))
    os.close(fd)


@contextlib.contextmanager
def _file(flags: int) -> Iterator[int]:
    fd = os.open("file", flags | os.O_CREAT, 0o644)
    try:
        yield fd
    finally:
        os.close(fd)


@scenario
def direct(p: Probe) -> None:
    """Aligned only: what ext4 refuses (EINVAL) works here."""
    with mmap.mmap(-1, 65536) as memory, _file(os.O_RDWR | os.O_DIRECT) as fd:
        memory[:] = os.urandom(65536)
        p.do("write", lambda: os.pwritev(fd, [memory], 0))
        p.do("write further on", lambda: os.pwritev(fd, [memoryview(memory)[:4096]], 1 << 20))
        p.note("size", os.fstat(fd).st_size)
        with mmap.mmap(-1, 65536) as other:
            p.do("read", lambda: os.preadv(fd, [other], 0))
            p.note("same", other[:] == memory[:])
            p.do("read at the end", lambda: os.preadv(fd, [other], (1 << 20) + 4096))
        with open("file", "rb") as file:
            p.note("same through the cache", file.read(65536) == memory[:])
        with open("file", "r+b") as file:
            file.write(b"through the cache")
        with mmap.mmap(-1, 4096) as other:
            os.preadv(fd, [other], 0)
            p.note("and back", other[:17])


@scenario
def rare_calls(p: Probe) -> None:
    make("reg", "file", 0o644, b"0123456789" * 1000)
    with open("preallocated", "w+b") as file:
        file.write(b"0123456789" * 1000)
        for name, mode in (("plain", 0), ("keep size", 1), ("punch", 3), ("collapse", 8), ("zero", 16), ("insert", 32)):
            p.do(f"fallocate {name}", lambda mode=mode: _fallocate(file.fileno(), mode, 0, 4096))  # type: ignore[misc]
    with _file(os.O_RDWR) as fd:
        p.do("posix_fallocate", lambda: os.posix_fallocate(fd, 0, 50_000))
        p.note("size", os.fstat(fd).st_size)
        p.do("copy_file_range", lambda: os.copy_file_range(fd, fd, 100, 0, 60_000))
        p.do("sendfile", lambda: _sendfile(fd))
        p.do("splice", lambda: _splice(fd))
        p.do("readahead", lambda: os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_WILLNEED))
        p.do("sync_file_range", lambda: _libc.sync_file_range(fd, ctypes.c_long(0), ctypes.c_long(0), 7))
        p.do("syncfs", lambda: _libc.syncfs(fd))
        p.do("FICLONE", lambda: fcntl.ioctl(fd, 0x40049409, fd))
        p.do("FS_IOC_GETFLAGS", lambda: len(fcntl.ioctl(fd, 0x80086601, bytes(8))))
        p.do("FIONREAD", lambda: int.from_bytes(fcntl.ioctl(fd, 0x541B, bytes(4)), "little"))
        p.do("lease", lambda: fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK))
        p.do("seals", lambda: fcntl.fcntl(fd, 1034))
        p.do("fchdir to a file", lambda: os.fchdir(fd))
    p.do("tmpfile", lambda: opened(".", os.O_RDWR | os.O_TMPFILE))
    p.do("chroot-like openat", lambda: os.close(os.open("file", os.O_RDONLY, dir_fd=os.open("..", os.O_PATH))))
    with _file(os.O_RDONLY) as fd:
        p.do("linkat by descriptor", lambda: _link_by_descriptor(fd, b"linked"))
        p.do("linkat by /proc", lambda: os.link(f"/proc/self/fd/{fd}", "linked 2"))
        p.do("links", lambda: os.fstat(fd).st_nlink)
    for mode in (0o600, 0o666):
        p.do(f"mmap shared {mode:o}", lambda mode=mode: _mapped(mode))  # type: ignore[misc]


def _fallocate(fd: int, mode: int, at: int, count: int) -> None:
    if _libc.fallocate(fd, mode, ctypes.c_long(at), ctypes.c_long(count)):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def _link_by_descriptor(fd: int, name: bytes) -> None:
    if _libc.linkat(fd, b"", -100, name, 0x1000):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def _sendfile(fd: int) -> int:
    with open("sent", "wb") as out:
        return os.sendfile(out.fileno(), fd, 0, 5000)


def _splice(fd: int) -> bytes:
    reader, writer = os.pipe()
    try:
        os.splice(fd, writer, 100, offset_src=10)
        return os.read(reader, 100)
    finally:
        os.close(reader)
        os.close(writer)


def _mapped(mode: int) -> bytes:
    fd = os.open(f"mapped {mode:o}", os.O_RDWR | os.O_CREAT, mode)
    os.ftruncate(fd, 10_000)
    with mmap.mmap(fd, 0) as mapped:
        mapped[9_990:] = b"0123456789"
        os.close(fd)
        with open(f"mapped {mode:o}", "rb") as file:
            return file.read()[-12:]


@scenario
def running_programs(p: Probe) -> None:
    with open(sys.executable, "rb") as real, open("program", "wb") as copy:
        copy.write(b"#!/bin/sh\nexit 7\n")
        real.read(0)
    os.chmod("program", 0o755)
    p.do("run a script", lambda: subprocess.run(["./program"], check=False).returncode)
    os.chmod("program", 0o644)
    p.do("run what is not executable", lambda: subprocess.run(["./program"], check=False).returncode)
    with open("/bin/sleep", "rb") as real, open("sleep", "wb") as copy:
        copy.write(real.read())
    os.chmod("sleep", 0o755)
    running = subprocess.Popen(["./sleep", "30"])
    try:
        p.do("write to a running program", lambda: opened("sleep", os.O_WRONLY))
        p.do("cut a running program", lambda: os.truncate("sleep", 0))
        p.do("open and cut a running program", lambda: opened("sleep", os.O_RDONLY | os.O_TRUNC))
        p.do("unlink a running program", lambda: os.unlink("sleep"))
    finally:
        running.kill()
        running.wait()
    with open("/bin/true", "rb") as real, open("true", "wb") as copy:
        copy.write(real.read())
        os.chmod("true", 0o755)
        copy.flush()
        p.do("run a program open for writing", lambda: subprocess.run(["./true"], check=False).returncode)


@scenario
def dangling(p: Probe) -> None:
    os.symlink("made by it", "link")
    for user in (ANN, BEN):
        p.do("create through a symlink", lambda: opened("link", os.O_CREAT | os.O_WRONLY), user)
        p.do("create through it exclusively", lambda: opened("link", os.O_CREAT | os.O_EXCL | os.O_WRONLY), user)
        p.state("made by it", f"made by {user.name}")
        remove("made by it")
