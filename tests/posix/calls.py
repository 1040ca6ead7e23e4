"""Calls on open files whose answers can be compared, though two file systems may lay a file out differently."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import struct

_FLOCK = "hhqqi4x"
_F_OFD_GETLK, _F_OFD_SETLK = 36, 37
_KINDS = {fcntl.F_RDLCK: "read", fcntl.F_WRLCK: "write", fcntl.F_UNLCK: "none"}
LOCKS = ("flock", "posix", "ofd", "whose", "whose ofd")
HOWS = (fcntl.F_RDLCK, fcntl.F_WRLCK, fcntl.F_UNLCK)
_PAGE = mmap.PAGESIZE


def lock(fd: int, kind: str, how: int, start: int, count: int) -> object:
    """Ask for a lock, or give one up, without waiting; `whose` tells what is in the way of one. Raises OSError."""
    if kind == "flock":
        code = {fcntl.F_RDLCK: fcntl.LOCK_SH, fcntl.F_WRLCK: fcntl.LOCK_EX, fcntl.F_UNLCK: fcntl.LOCK_UN}[how]
        fcntl.flock(fd, code | fcntl.LOCK_NB)
        return None
    if kind.startswith("whose") and how == fcntl.F_UNLCK:
        return None
    command = {
        "posix": fcntl.F_SETLK, "ofd": _F_OFD_SETLK, "whose": fcntl.F_GETLK, "whose ofd": _F_OFD_GETLK,
    }[kind]  # fmt: skip
    answer = fcntl.fcntl(fd, command, struct.pack(_FLOCK, how, os.SEEK_SET, start, count, 0))
    found, whence, at, length, pid = struct.unpack(_FLOCK, answer)
    return (_KINDS[found], whence, at, length, pid == os.getpid()) if kind.startswith("whose") else None


def direct_write(fd: int, data: bytes, at: int, aside: int) -> int:
    """pwritev(2) from memory that lies `aside` bytes behind the beginning of a page."""
    with mmap.mmap(-1, aside + len(data) + _PAGE) as memory:
        memory[aside : aside + len(data)] = data
        with memoryview(memory) as whole, whole[aside : aside + len(data)] as part:
            return os.pwritev(fd, [part], at)


def direct_read(fd: int, count: int, at: int, aside: int) -> bytes:
    """preadv(2) into memory that lies `aside` bytes behind the beginning of a page."""
    with mmap.mmap(-1, aside + count + _PAGE) as memory:
        with memoryview(memory) as whole, whole[aside : aside + count] as part:
            got = os.preadv(fd, [part], at)
        return memory[aside : aside + got]


def holes(fd: int, start: int) -> object:
    """What lseek(2) says of holes and data from `start` on, as far as all file systems must agree.

    They may call zeros data, as much as they like; but what is in the way of that is told: content in a hole, an
    answer outside the file, two that contradict each other. Raises OSError.
    """
    size = os.fstat(fd).st_size
    hole = os.lseek(fd, start, os.SEEK_HOLE)
    data = _data_from(fd, start, size)
    reader = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    try:
        content = os.pread(reader, max(0, size - start), start)
    finally:
        os.close(reader)
    if not start <= hole <= size or not start <= data <= size:
        return f"of {size} from {start}: hole {hole}, data {data}"
    if (hole == start) == (data == start):
        return f"of {size} at {start} is both or neither: hole {hole}, data {data}"
    if any(content[: data - start]):
        return f"of {size} from {start}: no data up to {data}, but there is"
    at = hole
    while at < size:
        data = _data_from(fd, at, size)
        if data <= at or any(content[at - start : data - start]):
            return f"of {size} at {at} begins a hole, the data behind it at {data}; there is some before that"
        if data == size:
            break
        at = os.lseek(fd, data, os.SEEK_HOLE)
    return "consistent"


def _data_from(fd: int, start: int, size: int) -> int:
    """SEEK_DATA; the file's size if there is none behind `start`."""
    try:
        return os.lseek(fd, start, os.SEEK_DATA)
    except OSError as error:
        if error.errno != errno.ENXIO or start >= size:
            raise
        return size
