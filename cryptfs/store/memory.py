"""The `Store` protocol in memory, over a disk model that can lose power (`disk_model`): for crash tests.

    store = MemoryStore()
    ...                                                  # drive the code under test on it
    for survivor in store.crash_states(random.Random(1), limit=500):
        ...                                              # mount `survivor`: it is what a power cut may leave

`before_call` sees every call's name before it happens, so a test can cut the power between any two of them (or make
all calls of a kind fail, by raising); `fail` and `shorten` make one chosen call fail or fall short. There are no
permissions and no umask: the caller is root. Thread-safe.
"""

from __future__ import annotations

import errno
import random
import stat
from collections.abc import Iterator

from cryptfs.ports import RENAME_EXCHANGE, RENAME_NOREPLACE
from cryptfs.store.disk_model import Inode
from cryptfs.store.memory_files import MemoryFiles, os_error, store_call

TARGET_MAX_BYTES = 4095


class MemoryStore(MemoryFiles):
    """A cipher directory on a `Disk`. Every method may raise `OSError` with the errno Linux would give.

    Descriptors are never reused, so a use after close is always `EBADF`.
    """

    def crash_states(self, rng: random.Random, limit: int) -> Iterator[MemoryStore]:
        """Stores on what a power cut now may leave: every state if there are at most `limit`, else a sample."""
        with self._mutex:
            disk = self.disk.clone()
        return (MemoryStore(state) for state in disk.crash_states(rng, limit))

    def killed(self) -> MemoryStore:
        """A store on what kill -9 leaves: everything in the page cache, no more durable than it was."""
        with self._mutex:
            return MemoryStore(self.disk.clone())

    @store_call
    def listdir(self, fd: int) -> list[bytes]:
        """All names in directory `fd`, in no order."""
        self._enter("listdir")
        return list(self._dir(fd).entries)

    @store_call
    def mkdir(self, dir_fd: int, name: bytes, mode: int = 0o700) -> None:
        """mkdirat(2)."""
        self._enter("mkdir")
        self._create(dir_fd, name, stat.S_IFDIR | stat.S_IMODE(mode))

    @store_call
    def rmdir(self, dir_fd: int, name: bytes) -> None:
        """unlinkat(2) with AT_REMOVEDIR."""
        self._enter("rmdir")
        if name == b".":
            raise os_error(errno.EINVAL, name)
        inode = self._find(dir_fd, name)
        if not inode.is_dir:
            raise os_error(errno.ENOTDIR, name)
        if inode.entries:
            raise os_error(errno.ENOTEMPTY, name)
        self._drop_link(self._dir(dir_fd), inode)
        self.disk.commit((self._dir(dir_fd).ino, name, None))

    @store_call
    def unlink(self, dir_fd: int, name: bytes) -> None:
        """unlinkat(2)."""
        self._enter("unlink")
        inode = self._find(dir_fd, name)
        if inode.is_dir:
            raise os_error(errno.EISDIR, name)
        self._drop_link(self._dir(dir_fd), inode)
        self.disk.commit((self._dir(dir_fd).ino, name, None))

    @staticmethod
    def _drop_link(directory: Inode, inode: Inode) -> None:
        if inode.is_dir:
            inode.links = 0
            directory.links -= 1
        else:
            inode.links -= 1

    @store_call
    def rename(self, src_fd: int, src: bytes, dst_fd: int, dst: bytes, flags: int = 0) -> None:
        """renameat2(2): `flags` 0, RENAME_NOREPLACE (1) or RENAME_EXCHANGE (2)."""
        self._enter("rename")
        src_dir, dst_dir = self._dir(src_fd), self._dir(dst_fd)
        if b"." in (src, dst):
            raise os_error(errno.EBUSY, src)
        inode = self._find(src_fd, src)
        victim = self._find(dst_fd, dst) if self._exists(dst_fd, dst) else None
        if victim is not None and flags == RENAME_NOREPLACE:
            raise os_error(errno.EEXIST, dst)
        if self._is_inside(dst_dir, inode):
            raise os_error(errno.EINVAL, src)
        if flags == RENAME_EXCHANGE:
            self._exchange(src_dir, src, inode, dst_dir, dst, victim)
            return
        if not dst_dir.links:
            raise os_error(errno.ENOENT, dst)
        if victim is inode:
            return
        if victim is not None:
            self._check_replaceable(inode, victim, dst)
            self._drop_link(dst_dir, victim)
        if inode.is_dir:
            src_dir.links -= 1
            dst_dir.links += 1
        self.disk.commit((src_dir.ino, src, None), (dst_dir.ino, dst, inode.ino))

    def _exchange(
        self, src_dir: Inode, src: bytes, inode: Inode, dst_dir: Inode, dst: bytes, other: Inode | None
    ) -> None:
        if other is None:
            raise os_error(errno.ENOENT, dst)
        if self._is_inside(src_dir, other):
            raise os_error(errno.EINVAL, src)
        moved = int(inode.is_dir) - int(other.is_dir)
        src_dir.links -= moved
        dst_dir.links += moved
        self.disk.commit((src_dir.ino, src, other.ino), (dst_dir.ino, dst, inode.ino))

    @staticmethod
    def _check_replaceable(inode: Inode, victim: Inode, dst: bytes) -> None:
        if inode.is_dir and not victim.is_dir:
            raise os_error(errno.ENOTDIR, dst)
        if victim.is_dir and not inode.is_dir:
            raise os_error(errno.EISDIR, dst)
        if victim.entries:
            raise os_error(errno.ENOTEMPTY, dst)

    def _is_inside(self, directory: Inode, ancestor: Inode) -> bool:
        """Whether `directory` is `ancestor` or lies below it."""
        todo = [ancestor]
        while todo:
            here = todo.pop()
            if here is directory:
                return True
            children = (self.disk.inodes[ino] for ino in here.entries.values())
            todo += (child for child in children if child.is_dir)
        return False

    @store_call
    def link(self, src_fd: int, src: bytes, dst_fd: int, dst: bytes) -> None:
        """linkat(2); a symlink as `src` is linked itself."""
        self._enter("link")
        inode = self._find(src_fd, src)
        if inode.is_dir:
            raise os_error(errno.EPERM, src)
        if self._exists(dst_fd, dst):
            raise os_error(errno.EEXIST, dst)
        if not self._dir(dst_fd).links:
            raise os_error(errno.ENOENT, dst)
        inode.links += 1
        self.disk.commit((self._dir(dst_fd).ino, dst, inode.ino))

    @store_call
    def symlink(self, target: bytes, dir_fd: int, name: bytes) -> None:
        """symlinkat(2). The target is as durable as the name: it lies in the inode."""
        self._enter("symlink")
        if not target:
            raise os_error(errno.ENOENT, name)
        if len(target) > TARGET_MAX_BYTES:
            raise os_error(errno.ENAMETOOLONG, name)
        self._create(dir_fd, name, stat.S_IFLNK | 0o777).target = bytes(target)

    @store_call
    def readlink(self, dir_fd: int, name: bytes) -> bytes:
        """readlinkat(2)."""
        self._enter("readlink")
        inode = self._find(dir_fd, name)
        if not stat.S_ISLNK(inode.attributes.mode):
            raise os_error(errno.EINVAL, name)
        return inode.target

    @store_call
    def mknod(self, dir_fd: int, name: bytes, mode: int, rdev: int) -> None:
        """mknodat(2): `mode` with the file type (none: a regular file), `rdev` 0 but for devices."""
        self._enter("mknod")
        if stat.S_ISDIR(mode) or stat.S_ISLNK(mode):
            raise os_error(errno.EINVAL, name)
        self._create(dir_fd, name, mode if stat.S_IFMT(mode) else mode | stat.S_IFREG).rdev = rdev
