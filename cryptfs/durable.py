"""Small files that a crash must leave whole or not at all: what their makers have in common. Every call blocks.

Whoever makes one writes it under another name, syncs it, renames it and syncs the directory; whoever destroys one
writes zeros over it and syncs them before the name goes. What a crash in between leaves each says beside its own steps.
"""

from __future__ import annotations

import contextlib
import os

Path = str | os.PathLike[str]

_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def sync_directory(path: Path) -> None:
    """fsync(2) of a directory: the names in it are durable. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_all(fd: int, data: bytes | bytearray | memoryview) -> None:
    """write(2) until everything is there. Raises OSError."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]


def write_new(path: Path, data: bytes | bytearray | memoryview) -> None:
    """A new file of mode 0600 with this content, synced; its name is not yet durable.

    Raises OSError, FileExistsError if there is something of that name; then no file is left that was not there.
    """
    fd = os.open(path, _NEW, 0o600)
    try:
        write_all(fd, data)
        os.fsync(fd)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise
    finally:
        os.close(fd)


def destroy(path: Path, size: int) -> None:
    """Zeros over a file of `size` bytes, then no file, all of it durable. Raises OSError.

    A crash in between leaves the file, or one of zeros. A file system that overwrites in place has no copy left; flash
    memory and copy-on-write file systems may.
    """
    fd = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        write_all(fd, bytes(size))
        os.fsync(fd)
    finally:
        os.close(fd)
    os.unlink(path)
    sync_directory(os.path.dirname(path) or ".")
