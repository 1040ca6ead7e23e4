"""What a file system may tell the kernel unasked, on a descriptor of its own: forget this (linux/fuse.h).

pyfuse3 has calls for two of these messages; it has none for the one that ends the life of every name at once. Written
by hand they can also be sent while pyfuse3 is busy, and from any thread: every call here may wait for the kernel, which
may wait for this process to answer a WRITE. Never from the loop.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from contextlib import suppress

_HEADER = struct.Struct("=IiQ")
"""struct fuse_out_header: length, code, 0."""
_INODE = struct.Struct("=Qqq")
_ENTRY = struct.Struct("=QII")
_INVAL_INODE, _INVAL_ENTRY, _INC_EPOCH = 2, 3, 8
_UNKNOWN = frozenset({errno.ENOENT, errno.ENOTDIR})
_CLONE = 0x8004E500
"""_IOR(229, 0, uint32_t)."""
_REQUEST = struct.Struct("=IIQ")
"""struct fuse_in_header as far as we look at it: length, opcode, unique."""
_ANSWER = struct.Struct("=IiQ")
_REQUEST_MAX_BYTES = 2 << 20
"""A WRITE of 1 MiB, which is the most that was agreed upon, and its headers."""
_UNANSWERED = frozenset({2, 36, 42})
"""FUSE_FORGET, FUSE_INTERRUPT, FUSE_BATCH_FORGET."""
WHOLE_FILE = 0
"""Length that reaches to the end of the file."""


def fuse_descriptor() -> int:
    """A duplicate of the one descriptor of /dev/fuse this process has. Raises `OSError` if there is none."""
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}") == "/dev/fuse":
                return os.dup(int(name))
    raise OSError(errno.EBADF, "no descriptor of /dev/fuse")


def refuse_requests(fd: int, error: int) -> None:
    """Answer every request with this errno until the connection is gone. Blocks.

    For a descriptor from which nobody else reads any more.
    """
    request = bytearray(_REQUEST_MAX_BYTES)
    while True:
        try:
            os.readv(fd, [request])
        except InterruptedError:
            continue
        except OSError as failure:
            # ENOENT: it was withdrawn while it was read.
            if failure.errno in (errno.ENOENT, errno.EAGAIN):
                continue
            return
        _, opcode, unique = _REQUEST.unpack_from(request)
        if opcode not in _UNANSWERED:
            try:
                os.write(fd, _ANSWER.pack(_ANSWER.size, -error, unique))
            except OSError as failure:
                if failure.errno not in _UNKNOWN:
                    return


class Notifier:
    """Sends them. Every method blocks; what the kernel does not know (any more) is no error."""

    def __init__(self, fd: int) -> None:
        """`fd` is this object's to close."""
        self._fd = fd

    def close(self) -> None:
        """Close the descriptor."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def clone(self) -> int:
        """Another descriptor of the connection (FUSE_DEV_IOC_CLONE, linux/fuse.h), the caller's to close.

        Unlike a duplicate it has requests of its own: those that were read on the first one end with an error when the
        last process that has it is gone, while the connection lives on as long as there is a clone. Raises OSError.
        """
        cloned = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.ioctl(cloned, _CLONE, struct.pack("=I", self._fd))
        except BaseException:
            os.close(cloned)
            raise
        return cloned

    def _send(self, code: int, body: bytes) -> bool:
        """Whether the kernel knew what it was told about. Raises OSError."""
        try:
            os.write(self._fd, _HEADER.pack(_HEADER.size + len(body), code, 0) + body)
        except OSError as error:
            if error.errno in _UNKNOWN:
                return False
            raise
        return True

    def drop_pages(self, ino: int, offset: int = 0, length: int = WHOLE_FILE) -> bool:
        """Write dirty pages of a range back, then drop all of them, out of mappings too; and the inode's attributes."""
        return self._send(_INVAL_INODE, _INODE.pack(ino, offset, length))

    def drop_name(self, parent: int, name: bytes) -> bool:
        """Drop one name, and below it everything nobody uses, pages and all."""
        return self._send(_INVAL_ENTRY, _ENTRY.pack(parent, len(name), 0) + name + b"\0")

    def expire_names(self) -> bool:
        """Have the kernel ask again for every name it knows. False: it is too old for that (before Linux 6.16)."""
        try:
            return self._send(_INC_EPOCH, b"")
        except OSError as error:
            if error.errno == errno.EINVAL:
                return False
            raise
