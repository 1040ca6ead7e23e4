"""System calls Python has no words for, and what tests do to files all the time."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

RENAME_NOREPLACE, RENAME_EXCHANGE, RENAME_WHITEOUT = 1, 2, 4

_AT_FDCWD = -100
_libc = ctypes.CDLL(None, use_errno=True)


def renameat2(old: bytes | Path, new: bytes | Path, flags: int) -> None:
    """renameat2(2). Raises OSError."""
    if _libc.renameat2(_AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new), ctypes.c_uint(flags)):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), os.fsdecode(old))


class Dirent(NamedTuple):
    """What getdents64(2) says of a name. `position`: behind it, for lseek(2)."""

    name: str
    position: int
    ino: int


def getdents(path: Path, position: int = 0) -> list[Dirent]:
    """What a new descriptor of the directory lists from a position on. Raises OSError."""
    out, buffer = [], ctypes.create_string_buffer(1 << 16)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.lseek(fd, position, os.SEEK_SET)
        while got := _libc.getdents64(fd, buffer, ctypes.c_size_t(len(buffer))):
            if got < 0:
                code = ctypes.get_errno()
                raise OSError(code, os.strerror(code), os.fspath(path))
            at = 0
            while at < got:
                ino, behind, length = struct.unpack_from("=QqH", buffer.raw, at)
                out.append(Dirent(os.fsdecode(ctypes.string_at(ctypes.addressof(buffer) + at + 19)), behind, ino))
                at += length
    finally:
        os.close(fd)
    return out


def drop_pages(path: Path) -> None:
    """Write what is dirty and drop the file's pages, so that the next read reaches the daemon."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def reread(path: Path) -> bytes:
    """The file's content as the daemon has it."""
    drop_pages(path)
    return path.read_bytes()


@contextmanager
def refused(*codes: int) -> Iterator[None]:
    """What is done inside fails with one of these errnos."""
    with pytest.raises(OSError) as caught:  # noqa: PT011 - what is asked for is the errno
        yield
    name = errno.errorcode.get(caught.value.errno or 0)
    assert caught.value.errno in codes, f"refused with {name}, not {[errno.errorcode[code] for code in codes]}"
