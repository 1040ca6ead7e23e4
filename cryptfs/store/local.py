"""The `Store` protocol over the kernel: one system call per method, relative to directory descriptors.

This is the hot path of every read and write, so a method that needs no translation *is* the `os` function.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path

from cryptfs.types import Buffer

_O_ALWAYS = os.O_NOFOLLOW | os.O_CLOEXEC
_O_UNTRUSTED = os.O_NONBLOCK | os.O_NOCTTY
"""What lies under a name may be anything by now: opening a fifo must not wait for its other end."""
_O_CERTAIN = os.O_DIRECTORY | os.O_PATH | os.O_EXCL
"""With one of these the kernel sees to it that what is opened is a directory, nothing at all, or new."""
_AT_SYMLINK_NOFOLLOW = 0x100
_SYS_FCHMODAT2 = 452  # Linux 6.6; the same number on every architecture but alpha

_libc = ctypes.CDLL(None, use_errno=True)  # releases the GIL while a call runs
_renameat2 = _libc.renameat2
_renameat2.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
_renameat2.restype = ctypes.c_int
_syncfs = _libc.syncfs
_syncfs.argtypes = (ctypes.c_int,)
_syncfs.restype = ctypes.c_int


def _failure(name: bytes | None = None) -> OSError:
    """The `OSError` (of its right subclass) for the calling thread's errno after a ctypes call."""
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number), name) if name is not None else OSError(number, os.strerror(number))


class LocalStore:
    """A cipher directory on a local filesystem. Every method may raise `OSError` with the kernel's errno.

    File modes given here are subject to the process's umask, as in the system calls; the daemon sets it to 0.
    """

    def __init__(self, cipher_dir: Path) -> None:
        """Open `cipher_dir`; raises `FileNotFoundError` or `NotADirectoryError`."""
        self._root_fd = os.open(cipher_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._has_fchmodat2 = True
        self.close = os.close
        self.pread = os.pread
        self.preadv = os.preadv
        self.pwrite: Callable[[int, Buffer, int], int] = os.pwrite
        self.pwritev: Callable[[int, Sequence[Buffer], int], int] = os.pwritev
        self.ftruncate = os.ftruncate
        self.fdatasync = os.fdatasync
        self.fsync = os.fsync
        self.fstat = os.fstat
        self.fstatvfs = os.fstatvfs
        self.fchmod = os.fchmod
        self.fchown = os.fchown

    def root(self) -> int:
        """The cipher directory's descriptor; it stays the store's."""
        return self._root_fd

    def close_store(self) -> None:
        """Give up the cipher directory and with it the lock. The store is unusable afterwards; idempotent."""
        fd, self._root_fd = self._root_fd, -1
        if fd >= 0:
            os.close(fd)

    def lock(self) -> None:
        """flock(2) the cipher directory; it ends with this store or process. Raises `BlockingIOError` if held."""
        fcntl.flock(self._root_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def open(self, dir_fd: int, name: bytes, flags: int, mode: int = 0o600) -> int:
        """openat(2); a symlink as `name` is `ELOOP`, anything else that is no regular file or directory `ENXIO`."""
        if flags & _O_CERTAIN:
            return os.open(name, flags | _O_ALWAYS, mode, dir_fd=dir_fd)
        if name:
            fd = os.open(name, flags | _O_ALWAYS | _O_UNTRUSTED, mode, dir_fd=dir_fd)
        else:
            fd = os.open(_itself(dir_fd), flags | os.O_CLOEXEC | _O_UNTRUSTED)
        kind = stat.S_IFMT(os.fstat(fd).st_mode)
        if kind not in (stat.S_IFREG, stat.S_IFDIR):
            os.close(fd)
            raise OSError(errno.ENXIO, os.strerror(errno.ENXIO), name)
        return fd

    def syncfs(self, fd: int) -> None:
        """Everything written to `fd`'s filesystem before the call is durable after it."""
        if _syncfs(fd) != 0:
            raise _failure()

    def lstat(self, dir_fd: int, name: bytes) -> os.stat_result:
        """fstatat(2) without following."""
        if not name:
            return os.fstat(dir_fd)
        return os.stat(name, dir_fd=dir_fd, follow_symlinks=False)

    def listdir(self, fd: int) -> list[bytes]:
        """All names in directory `fd`, in no order.

        A second open file description, because a duplicate would share its read position with `fd`, and two
        threads listing the same directory would each see a part of it.
        """
        own_fd = self.open(fd, b".", os.O_RDONLY | os.O_DIRECTORY)
        try:
            return [os.fsencode(name) for name in os.listdir(own_fd)]
        finally:
            os.close(own_fd)

    def mkdir(self, dir_fd: int, name: bytes, mode: int = 0o700) -> None:
        """mkdirat(2)."""
        os.mkdir(name, mode, dir_fd=dir_fd)

    def rmdir(self, dir_fd: int, name: bytes) -> None:
        """unlinkat(2) with AT_REMOVEDIR."""
        os.rmdir(name, dir_fd=dir_fd)

    def unlink(self, dir_fd: int, name: bytes) -> None:
        """unlinkat(2)."""
        os.unlink(name, dir_fd=dir_fd)

    def rename(self, src_fd: int, src: bytes, dst_fd: int, dst: bytes, flags: int = 0) -> None:
        """renameat2(2): `flags` 0, RENAME_NOREPLACE (1) or RENAME_EXCHANGE (2)."""
        if not flags:
            os.rename(src, dst, src_dir_fd=src_fd, dst_dir_fd=dst_fd)
        elif _renameat2(src_fd, src, dst_fd, dst, flags) != 0:
            raise _failure(src)

    def link(self, src_fd: int, src: bytes, dst_fd: int, dst: bytes) -> None:
        """linkat(2); a symlink as `src` is linked itself."""
        os.link(src, dst, src_dir_fd=src_fd, dst_dir_fd=dst_fd, follow_symlinks=False)

    def symlink(self, target: bytes, dir_fd: int, name: bytes) -> None:
        """symlinkat(2)."""
        os.symlink(target, name, dir_fd=dir_fd)

    def readlink(self, dir_fd: int, name: bytes) -> bytes:
        """readlinkat(2)."""
        return os.readlink(name, dir_fd=dir_fd)

    def mknod(self, dir_fd: int, name: bytes, mode: int, rdev: int) -> None:
        """mknodat(2): `mode` with the file type, `rdev` 0 but for devices."""
        os.mknod(name, mode, rdev, dir_fd=dir_fd)

    def chmod(self, dir_fd: int, name: bytes, mode: int) -> None:
        """fchmodat2(2) with AT_SYMLINK_NOFOLLOW; a symlink as `name` is `EOPNOTSUPP`.

        Older kernels' fchmodat(2) follows symlinks, so there the inode is pinned first and changed by descriptor.
        """
        if not name:
            _chmod_opened(dir_fd, mode)
            return
        if self._has_fchmodat2:
            result = _libc.syscall(
                ctypes.c_long(_SYS_FCHMODAT2),
                ctypes.c_int(dir_fd),
                ctypes.c_char_p(name),
                ctypes.c_uint(mode),
                ctypes.c_int(_AT_SYMLINK_NOFOLLOW),
            )
            if result == 0:
                return
            if ctypes.get_errno() == errno.ENOSYS:
                self._has_fchmodat2 = False
            elif ctypes.get_errno() != errno.EPERM:  # which is also how some sandboxes refuse an unknown call
                raise _failure(name)
        _chmod_pinned(dir_fd, name, mode)

    def chown(self, dir_fd: int, name: bytes, uid: int, gid: int) -> None:
        """fchownat(2) with AT_SYMLINK_NOFOLLOW; -1 leaves an id as it is."""
        if name:
            os.chown(name, uid, gid, dir_fd=dir_fd, follow_symlinks=False)
        else:
            os.chown(_itself(dir_fd), uid, gid)

    def utimens(self, dir_fd: int, name: bytes, atime_ns: int, mtime_ns: int) -> None:
        """utimensat(2) with AT_SYMLINK_NOFOLLOW."""
        if name:
            os.utime(name, ns=(atime_ns, mtime_ns), dir_fd=dir_fd, follow_symlinks=False)
        else:
            os.utime(_itself(dir_fd), ns=(atime_ns, mtime_ns))

    def futimens(self, fd: int, atime_ns: int, mtime_ns: int) -> None:
        """utimensat(2) of an open file."""
        os.utime(fd, ns=(atime_ns, mtime_ns))


def _chmod_pinned(dir_fd: int, name: bytes, mode: int) -> None:
    """chmod(2) of what `name` is now, through an O_PATH descriptor; needs /proc. A symlink is `EOPNOTSUPP`."""
    fd = os.open(name, os.O_PATH | _O_ALWAYS, dir_fd=dir_fd)
    try:
        _chmod_opened(fd, mode)
    finally:
        os.close(fd)


def _chmod_opened(fd: int, mode: int) -> None:
    """chmod(2) of what an O_PATH descriptor is, which fchmod(2) refuses. A symlink is `EOPNOTSUPP`."""
    if stat.S_ISLNK(os.fstat(fd).st_mode):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
    os.chmod(_itself(fd), mode)


def _itself(fd: int) -> str:
    """A path of what a descriptor is, and of nothing it would lead to: the kernel follows it no further (proc(5))."""
    return f"/proc/self/fd/{fd}"
