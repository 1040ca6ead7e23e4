"""The half of `MemoryFiles` that is about descriptors, content and attributes. Not for use by itself."""

from __future__ import annotations

import errno
import functools
import os
import stat
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Concatenate, ParamSpec, TypeVar

from cryptfs.store.disk_model import (
    ROOT_INO,
    SECTOR_BYTES,
    Attributes,
    Cut,
    Disk,
    Grown,
    Inode,
    Order,
    SectorWritten,
)
from cryptfs.types import Buffer

NAME_MAX_BYTES = 255
TOTAL_BLOCKS = 1 << 20

P = ParamSpec("P")
T = TypeVar("T")
S = TypeVar("S", bound="MemoryFiles")


def os_error(number: int, name: bytes | None = None) -> OSError:
    """The `OSError` (of its right subclass) for errno `number`."""
    return OSError(number, os.strerror(number), name) if name is not None else OSError(number, os.strerror(number))


def store_call(method: Callable[Concatenate[S, P], T]) -> Callable[Concatenate[S, P], T]:
    """Announce the call, let an injected fault happen, and serialise it with other threads' calls."""
    name = method.__name__

    @functools.wraps(method)
    def call(self: S, /, *args: P.args, **kwargs: P.kwargs) -> T:
        if self.before_call is not None:
            self.before_call(name)
        with self._mutex:
            return method(self, *args, **kwargs)

    return call


@dataclass(frozen=True, slots=True)
class _OpenFile:
    inode: Inode
    readable: bool
    writable: bool


class MemoryFiles:
    """Open files of a `Disk`, faults to order, and the calls on descriptors and attributes."""

    def __init__(self, disk: Disk | None = None, *, order: Order = Order.DIRECTORY) -> None:
        """Open `disk`, or a new empty one whose directories survive a crash by `order`."""
        self.disk = disk if disk is not None else Disk(order)
        self.before_call: Callable[[str], None] | None = None
        self.cold = False
        """While true, a preadv with RWF_NOWAIT finds nothing in memory."""
        self._mutex = threading.RLock()
        self._faults: dict[str, dict[int, int]] = {}
        self._short: dict[int, int] = {}
        self._calls: dict[str, int] = {}
        self._next_fd = 3
        self._open: dict[int, _OpenFile] = {}
        self._root_fd = self._new_fd(self.disk.inodes[ROOT_INO], readable=True, writable=False)

    # -- faults

    def fail(self, call_name: str, k: int, number: int) -> None:
        """Let the `k`-th call of `call_name` from now (1: the next) fail with errno `number`, without effect.

        A failed fsync, fdatasync or syncfs leaves what it should have written in doubt for ever.
        """
        if k < 1 or not hasattr(self, call_name):
            raise ValueError((call_name, k))
        self._faults.setdefault(call_name, {})[self._calls.get(call_name, 0) + k] = number

    def shorten(self, k: int, count: int) -> None:
        """Let the `k`-th pwrite or pwritev from now (1: the next) write `count` bytes at most."""
        if k < 1 or count < 1:
            raise ValueError((k, count))
        self._short[self._calls.get("write", 0) + k] = count

    def open_descriptors(self) -> int:
        """How many descriptors are open besides the root's: a leak check."""
        return len(self._open) - (self._root_fd in self._open)

    def _fault(self, call_name: str) -> OSError | None:
        count = self._calls[call_name] = self._calls.get(call_name, 0) + 1
        number = self._faults.get(call_name, {}).pop(count, None)
        return os_error(number) if number is not None else None

    def _enter(self, call_name: str) -> None:
        fault = self._fault(call_name)
        if fault is not None:
            raise fault

    # -- descriptors

    def _new_fd(self, inode: Inode, *, readable: bool, writable: bool) -> int:
        fd = self._next_fd
        self._next_fd += 1
        self._open[fd] = _OpenFile(inode, readable, writable)
        return fd

    def _file(self, fd: int) -> _OpenFile:
        try:
            return self._open[fd]
        except KeyError:
            raise os_error(errno.EBADF) from None

    def _dir(self, fd: int) -> Inode:
        inode = self._file(fd).inode
        if not inode.is_dir:
            raise os_error(errno.ENOTDIR)
        return inode

    def _find(self, dir_fd: int, name: bytes) -> Inode:
        if not name:
            return self._file(dir_fd).inode
        directory = self._dir(dir_fd)
        if name == b".":
            return directory
        if b"/" in name or b"\0" in name or name == b"..":
            raise ValueError(name)
        if len(name) > NAME_MAX_BYTES:
            raise os_error(errno.ENAMETOOLONG, name)
        try:
            return self.disk.inodes[directory.entries[name]]
        except KeyError:
            raise os_error(errno.ENOENT, name) from None

    def _exists(self, dir_fd: int, name: bytes) -> bool:
        try:
            self._find(dir_fd, name)
        except FileNotFoundError:
            return False
        return True

    def _create(self, dir_fd: int, name: bytes, mode: int) -> Inode:
        """A new inode under a new name."""
        directory = self._dir(dir_fd)
        if self._exists(dir_fd, name):
            raise os_error(errno.EEXIST, name)
        if not directory.links:
            raise os_error(errno.ENOENT, name)
        inode = self.disk.new_inode(Attributes(mode))
        inode.links = 1
        if inode.is_dir:
            inode.links = 2
            directory.links += 1
        self.disk.commit((directory.ino, name, inode.ino))
        return inode

    def root(self) -> int:
        """The cipher directory's descriptor; it stays the store's."""
        return self._root_fd

    def close_store(self) -> None:
        """Give up all descriptors and the lock; idempotent."""
        with self._mutex:
            self._open.clear()
            if self.disk.lock_holder is self:
                self.disk.lock_holder = None

    @store_call
    def lock(self) -> None:
        """Take the disk's lock. Raises `BlockingIOError` while another store on this disk has it."""
        self._enter("lock")
        if self.disk.lock_holder not in (None, self):
            raise os_error(errno.EWOULDBLOCK)
        self.disk.lock_holder = self

    @store_call
    def open(self, dir_fd: int, name: bytes, flags: int, mode: int = 0o600) -> int:
        """openat(2) with O_NOFOLLOW. Only regular files and directories open, anything with O_PATH."""
        self._enter("open")
        if flags & (os.O_APPEND | (os.O_TMPFILE & ~os.O_DIRECTORY)):
            raise ValueError("flags the model has no meaning for")
        if flags & os.O_CREAT and not self._exists(dir_fd, name):
            inode = self._create(dir_fd, name, stat.S_IFREG | stat.S_IMODE(mode))
        else:
            inode = self._find(dir_fd, name)
            if flags & os.O_CREAT and flags & os.O_EXCL:
                raise os_error(errno.EEXIST, name)
        kind = inode.attributes.mode
        if flags & os.O_DIRECTORY and not inode.is_dir:
            raise os_error(errno.ENOTDIR, name)
        if flags & os.O_PATH:
            return self._new_fd(inode, readable=False, writable=False)
        access = flags & os.O_ACCMODE
        if stat.S_ISLNK(kind):
            raise os_error(errno.ELOOP, name)
        if inode.is_dir and (access != os.O_RDONLY or flags & os.O_CREAT):
            raise os_error(errno.EISDIR, name)
        if not inode.is_dir and not stat.S_ISREG(kind):
            raise os_error(errno.ENXIO, name)
        if flags & os.O_TRUNC and inode.content.size_bytes:
            inode.change(Cut(0))
        return self._new_fd(inode, readable=access != os.O_WRONLY, writable=access != os.O_RDONLY)

    @store_call
    def close(self, fd: int, /) -> None:
        """Give the descriptor back."""
        self._enter("close")
        self._file(fd)
        del self._open[fd]

    # -- content

    def _regular(self, fd: int, *, write: bool) -> Inode:
        opened = self._file(fd)
        if opened.inode.is_dir:
            raise os_error(errno.EBADF if write else errno.EISDIR)
        if not (opened.writable if write else opened.readable):
            raise os_error(errno.EBADF)
        return opened.inode

    def _write(self, fd: int, data: bytes, offset: int) -> int:
        count = self._calls["write"] = self._calls.get("write", 0) + 1
        inode = self._regular(fd, write=True)
        data = data[: self._short.pop(count, len(data))]
        if not data:
            return 0
        end = offset + len(data)
        first, last = offset // SECTOR_BYTES, (end - 1) // SECTOR_BYTES
        for index in range(first, last + 1):
            start = index * SECTOR_BYTES
            sector = bytearray(inode.content.sectors.get(index, bytes(SECTOR_BYTES)))
            low, high = max(offset, start), min(end, start + SECTOR_BYTES)
            sector[low - start : high - start] = data[low - offset : high - offset]
            inode.change(SectorWritten(index, bytes(sector)))
        if end > inode.content.size_bytes or inode.in_doubt:
            # When what lies past the size on disk is written back, the size follows.
            inode.change(Grown(end))
        self._touch(inode)
        return len(data)

    def _touch(self, inode: Inode) -> None:
        now_ns = self.disk.tick()
        inode.attributes = replace(inode.attributes, mtime_ns=now_ns, ctime_ns=now_ns)

    @store_call
    def pread(self, fd: int, count: int, offset: int, /) -> bytes:
        """Up to `count` bytes, short at the end."""
        self._enter("pread")
        return self._regular(fd, write=False).content.read(offset, count)

    @store_call
    def preadv(self, fd: int, buffers: Sequence[Buffer], offset: int, flags: int = 0, /) -> int:
        """Fill the buffers in turn; RWF_NOWAIT raises `BlockingIOError` while the store is `cold`."""
        self._enter("preadv")
        inode = self._regular(fd, write=False)
        if self.cold and flags & os.RWF_NOWAIT:
            raise os_error(errno.EAGAIN)
        total = 0
        for buffer in buffers:
            with memoryview(buffer) as whole, whole.cast("B") as view:
                data = inode.content.read(offset + total, len(view))
                view[: len(data)] = data
                total += len(data)
                if len(data) < len(view):
                    break
        return total

    @store_call
    def pwrite(self, fd: int, data: Buffer, offset: int, /) -> int:
        """Write; may be short if `shorten` said so."""
        self._enter("pwrite")
        return self._write(fd, bytes(data), offset)

    @store_call
    def pwritev(self, fd: int, buffers: Sequence[Buffer], offset: int, /) -> int:
        """Write; may be short if `shorten` said so."""
        self._enter("pwritev")
        return self._write(fd, b"".join(bytes(buffer) for buffer in buffers), offset)

    @store_call
    def ftruncate(self, fd: int, size: int, /) -> None:
        """Cut or grow; grown parts read as zeros."""
        self._enter("ftruncate")
        inode = self._regular(fd, write=True)
        if size < 0:
            raise os_error(errno.EINVAL)
        inode.change(Cut(size) if size < inode.content.size_bytes else Grown(size))
        self._touch(inode)

    @store_call
    def fdatasync(self, fd: int, /) -> None:
        """Make durable: content and size."""
        self._sync(fd, "fdatasync", attributes=False)

    @store_call
    def fsync(self, fd: int, /) -> None:
        """Make durable: content and attributes of a file, entries and attributes of a directory; never its own name."""
        self._sync(fd, "fsync", attributes=True)

    def _sync(self, fd: int, call_name: str, *, attributes: bool) -> None:
        inode = self._file(fd).inode
        fault = self._fault(call_name)
        if fault is not None:
            inode.lose_content()
            raise fault
        if inode.is_dir:
            self.disk.sync_directory(inode.ino)
        inode.make_content_durable()
        if attributes:
            inode.durable_attributes = inode.attributes

    @store_call
    def syncfs(self, fd: int, /) -> None:
        """Make everything durable."""
        self._file(fd)
        fault = self._fault("syncfs")
        if fault is not None:
            for inode in self.disk.inodes.values():
                inode.lose_content()
            raise fault
        self.disk.sync_all()

    # -- attributes

    def _stat(self, inode: Inode) -> os.stat_result:
        a = inode.attributes
        seconds = [ns // 1_000_000_000 for ns in (a.atime_ns, a.mtime_ns, a.ctime_ns)]
        size = len(inode.target) or inode.content.size_bytes
        more = {
            "st_atime_ns": a.atime_ns,
            "st_mtime_ns": a.mtime_ns,
            "st_ctime_ns": a.ctime_ns,
            "st_atime": a.atime_ns / 1e9,
            "st_mtime": a.mtime_ns / 1e9,
            "st_ctime": a.ctime_ns / 1e9,
            "st_blksize": 4096,
            "st_blocks": len(inode.content.sectors),
            "st_rdev": inode.rdev,
        }
        return os.stat_result((a.mode, inode.ino, 1, inode.links, a.uid, a.gid, size, *seconds), more)

    @store_call
    def fstat(self, fd: int, /) -> os.stat_result:
        """Attributes by descriptor."""
        self._enter("fstat")
        return self._stat(self._file(fd).inode)

    @store_call
    def lstat(self, dir_fd: int, name: bytes) -> os.stat_result:
        """fstatat(2) without following."""
        self._enter("lstat")
        return self._stat(self._find(dir_fd, name))

    def _set_mode(self, inode: Inode, mode: int) -> None:
        if stat.S_ISLNK(inode.attributes.mode):
            raise os_error(errno.EOPNOTSUPP)
        mode = stat.S_IFMT(inode.attributes.mode) | stat.S_IMODE(mode)
        inode.attributes = replace(inode.attributes, mode=mode, ctime_ns=self.disk.tick())

    def _set_times(self, inode: Inode, atime_ns: int, mtime_ns: int) -> None:
        now_ns = self.disk.tick()
        inode.attributes = replace(inode.attributes, atime_ns=atime_ns, mtime_ns=mtime_ns, ctime_ns=now_ns)

    @store_call
    def chmod(self, dir_fd: int, name: bytes, mode: int) -> None:
        """fchmodat2(2) with AT_SYMLINK_NOFOLLOW; a symlink is `EOPNOTSUPP`."""
        self._enter("chmod")
        self._set_mode(self._find(dir_fd, name), mode)

    @store_call
    def fchmod(self, fd: int, mode: int, /) -> None:
        """Set the permission bits by descriptor."""
        self._enter("fchmod")
        self._set_mode(self._file(fd).inode, mode)

    @store_call
    def chown(self, dir_fd: int, name: bytes, uid: int, gid: int) -> None:
        """fchownat(2) with AT_SYMLINK_NOFOLLOW; -1 leaves an id as it is."""
        self._enter("chown")
        self._set_owner(self._find(dir_fd, name), uid, gid)

    @store_call
    def fchown(self, fd: int, uid: int, gid: int, /) -> None:
        """Set owner and group by descriptor."""
        self._enter("fchown")
        self._set_owner(self._file(fd).inode, uid, gid)

    def _set_owner(self, inode: Inode, uid: int, gid: int) -> None:
        a = inode.attributes
        uid, gid = (a.uid if uid == -1 else uid), (a.gid if gid == -1 else gid)
        inode.attributes = replace(a, uid=uid, gid=gid, ctime_ns=self.disk.tick())

    @store_call
    def utimens(self, dir_fd: int, name: bytes, atime_ns: int, mtime_ns: int) -> None:
        """utimensat(2) with AT_SYMLINK_NOFOLLOW."""
        self._enter("utimens")
        self._set_times(self._find(dir_fd, name), atime_ns, mtime_ns)

    @store_call
    def futimens(self, fd: int, atime_ns: int, mtime_ns: int) -> None:
        """Set the times by descriptor."""
        self._enter("futimens")
        self._set_times(self._file(fd).inode, atime_ns, mtime_ns)

    @store_call
    def fstatvfs(self, fd: int, /) -> os.statvfs_result:
        """Free space of a disk of 4 GiB."""
        self._enter("fstatvfs")
        self._file(fd)
        free = TOTAL_BLOCKS - sum(len(i.content.sectors) * SECTOR_BYTES for i in self.disk.inodes.values()) // 4096
        return os.statvfs_result((4096, 4096, TOTAL_BLOCKS, free, free, 1 << 20, 1 << 19, 1 << 19, 0, NAME_MAX_BYTES))
