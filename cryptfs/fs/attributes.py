"""What `stat` shows and `setattr` changes: the entry's own in `tree/`, with the plaintext size."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass

from cryptfs.errors import Damaged
from cryptfs.format.datafile import HEADER_BYTES
from cryptfs.fs.file import FileNode
from cryptfs.fs.inodes import Inode
from cryptfs.fs.opening import Opening
from cryptfs.fs.reconcile import KIND_OF_MODE
from cryptfs.fs.symlink import decode_target_text, read_target
from cryptfs.types import Kind


@dataclass(frozen=True, slots=True)
class Attr:
    """What `stat` shows: the entry's own in `tree/`, with the plaintext size in bytes."""

    inode: Inode
    st: os.stat_result
    size: int
    mtime_ns: int | None = None
    """None: the one in `st`."""


@dataclass(frozen=True, slots=True)
class Changes:
    """What setattr asks for; None leaves a field as it is. Times in nanoseconds."""

    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    size: int | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None


_NOTHING = Changes()


class Attributes(Opening):
    """The attributes of one volume's files, directories and the rest."""

    async def attr(self, inode: Inode) -> Attr:
        """Attributes now. Raises ESTALE, `Damaged`, key errors."""
        file = inode.file
        if file is not None:
            return self._attr_open(inode, file)
        if inode.last_st is not None:
            node = self.inodes.dir_nowait(inode) if inode.kind == Kind.DIR else None
            if node is not None:
                # Removed, and somebody has it open: its mode, owner and times can still be changed.
                return Attr(inode, without_links(self.ctx.store.fstat(node.fd)), inode.last_st.st_size)
            if inode.kept_fd >= 0:
                kept = without_links(self.ctx.store.fstat(inode.kept_fd))
                return await self.attr_of(inode, inode.kept_fd, b"", kept)
            header = HEADER_BYTES if inode.kind == Kind.FILE else 0
            return Attr(inode, inode.last_st, max(0, inode.last_st.st_size - header))
        if inode is self.inodes.root or inode.kind == Kind.DIR:
            node = self.inodes.dir_nowait(inode) or await self.inodes.dir(inode)
            st = self.ctx.store.fstat(node.fd)
            return Attr(inode, st, st.st_size, node.mtime_ns)
        where, name = await self.inodes.handle(inode)
        st = self.ctx.store.lstat(where, name)
        if st.st_ino != inode.ino:
            raise Damaged("exchanged", "another file lies under this name")
        return await self.attr_of(inode, where, name, st)

    async def attr_of(self, inode: Inode, where: int, name: bytes, st: os.stat_result) -> Attr:
        """Attributes of an entry (as `InodeTable.handle` has it) whose `lstat` is at hand."""
        if inode.kind == Kind.FILE:
            if inode.file is not None:
                return self._attr_open(inode, inode.file)
            if self.ctx.crashed_before and not inode.settled:
                # Its size may not be arithmetic yet: find out, once.
                file = await self.open(inode)
                try:
                    await file.journal.load()
                    return self._attr_open(inode, file)
                finally:
                    await self.release(inode)
            if st.st_size < HEADER_BYTES:
                raise Damaged("data-header", f"{st.st_size} bytes")
            return Attr(inode, st, st.st_size - HEADER_BYTES)
        if inode.kind == Kind.SYMLINK:
            log_id, length = decode_target_text(self.ctx.store.readlink(where, name))
            if log_id != inode.log_id:
                raise Damaged("id-mismatch", "the symlink is another one")
            return Attr(inode, st, length)
        node = self.inodes.dir_nowait(inode) if inode.kind == Kind.DIR else None
        return Attr(inode, st, st.st_size, None if node is None else node.mtime_ns)

    def _attr_open(self, inode: Inode, file: FileNode) -> Attr:
        st = self.ctx.store.fstat(file.state.data_fd)
        size = file.size if file.journal.loaded else max(0, st.st_size - HEADER_BYTES)
        return Attr(inode, st, size, file.state.mtime_ns)

    async def setattr(self, inode: Inode, want: Changes) -> Attr:
        """Change attributes, size first. Raises OSError and what `FileNode.truncate` raises."""
        if inode.is_unnamed and inode.file is None and inode.kept_fd < 0:
            # There were no descriptors left to keep it by; the kernel still writes back what it kept of its times.
            return await self.attr(inode)
        if want.size is not None:
            await self._set_size(inode, want.size)
        where, name = await self._handle(inode)
        if want.uid is not None or want.gid is not None or want == _NOTHING:
            # chown(-1, -1) arrives as nothing at all and moves ctime, which the same call does below.
            self._chown(where, name, -1 if want.uid is None else want.uid, -1 if want.gid is None else want.gid)
        if want.mode is not None:
            self._chmod(where, name, stat.S_IMODE(want.mode))
        if want.atime_ns is not None or want.mtime_ns is not None:
            self._set_times(inode, where, name, want)
        return await self.attr(inode)

    @staticmethod
    def set_id_lost(file: FileNode, in_group: Callable[[int], bool]) -> int:
        """Which of set-user-id and set-group-id an open file is to lose when an ordinary user cuts it.

        Set-group-id without group execute is no right, and stays for members of the file's group (`in_group`, given the
        gid).
        """
        st = file.state.ctx.store.fstat(file.state.data_fd)
        lost = st.st_mode & (stat.S_ISUID | stat.S_ISGID)
        if lost & stat.S_ISGID and not st.st_mode & stat.S_IXGRP and in_group(st.st_gid):
            lost &= ~stat.S_ISGID
        return lost

    @staticmethod
    def drop_set_id(file: FileNode, lost: int) -> None:
        """Take these mode bits from an open file; the kernel has to be told. Raises OSError."""
        store = file.state.ctx.store
        store.fchmod(file.state.data_fd, stat.S_IMODE(store.fstat(file.state.data_fd).st_mode) & ~lost)
        file.state.meta_unsynced = True

    async def touch(self, inode: Inode) -> None:
        """Move its ctime and nothing else. Raises OSError."""
        where, name = await self._handle(inode)
        self._set_times(inode, where, name, Changes())

    async def _set_size(self, inode: Inode, size: int) -> None:
        if inode.kind != Kind.FILE:
            code = errno.EISDIR if inode.kind == Kind.DIR else errno.EINVAL
            raise OSError(code, os.strerror(code))
        file = await self.open(inode, writing=True)
        try:
            await file.truncate(size)
        finally:
            await self.release(inode)

    async def readlink(self, inode: Inode) -> bytes:
        """A symlink's target."""
        return await read_target(self.ctx, inode.log_id)

    # Each of these works on what `InodeTable.handle` names, or on the open file or directory `where` (no name).

    async def _handle(self, inode: Inode) -> tuple[int, bytes | None]:
        if inode.kind == Kind.DIR:
            return (self.inodes.dir_nowait(inode) or await self.inodes.dir(inode)).fd, None
        file = inode.file
        if file is None:
            where, name = await self.inodes.handle(inode)
            # Somebody may have opened it meanwhile.
            file = inode.file
            if file is None:
                return where, name
        file.state.meta_unsynced = True
        return file.state.data_fd, None

    def _chown(self, where: int, name: bytes | None, uid: int, gid: int) -> None:
        if name is not None:
            self.ctx.store.chown(where, name, uid, gid)
        else:
            self.ctx.store.fchown(where, uid, gid)

    def _chmod(self, where: int, name: bytes | None, mode: int) -> None:
        if name is not None:
            self.ctx.store.chmod(where, name, mode)
        else:
            self.ctx.store.fchmod(where, mode)

    def _set_times(self, inode: Inode, where: int, name: bytes | None, want: Changes) -> None:
        store = self.ctx.store
        now = store.lstat(where, name) if name is not None else store.fstat(where)
        node = self.inodes.dir_nowait(inode) if inode.kind == Kind.DIR else None
        known = now.st_mtime_ns if inode.file is None else inode.file.state.mtime_ns
        if node is not None and node.mtime_ns is not None:
            known = node.mtime_ns
        atime_ns = now.st_atime_ns if want.atime_ns is None else want.atime_ns
        mtime_ns = known if want.mtime_ns is None else want.mtime_ns
        if name is not None:
            store.utimens(where, name, atime_ns, mtime_ns)
        elif node is not None:
            node.set_times(atime_ns, mtime_ns)
        else:
            store.futimens(where, atime_ns, mtime_ns)
        if inode.file is not None:
            inode.file.state.mtime_ns = mtime_ns
            inode.file.state.mtime_stale = False


_STAT_EXTRAS = ("st_atime_ns", "st_mtime_ns", "st_ctime_ns", "st_blocks", "st_blksize", "st_rdev")


def without_links(st: os.stat_result) -> os.stat_result:
    """The same attributes with a link count of 0."""
    fields = list(st)
    fields[stat.ST_NLINK] = 0
    return os.stat_result(fields, {name: getattr(st, name) for name in _STAT_EXTRAS})


def kind_of(st: os.stat_result) -> Kind:
    """What an `lstat` says an entry is."""
    return KIND_OF_MODE[stat.S_IFMT(st.st_mode)]
