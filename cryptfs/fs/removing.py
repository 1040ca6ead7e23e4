"""Names that go, and what goes with the last one.

First the frame, then the tree. After a crash between the two the name is there again, and all that it names: a
directory moves to `tmp/` at once and is deleted later, a sidecar is deleted later, both by the `reaper` and only when
the removal is durable.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, nullcontext, suppress

from cryptfs.format.dirlog import Entry
from cryptfs.fs.attributes import without_links
from cryptfs.fs.changing import Changing
from cryptfs.fs.context import FsContext
from cryptfs.fs.directory import DirNode, pinned
from cryptfs.fs.files import Files
from cryptfs.fs.inodes import Inode, InodeTable
from cryptfs.fs.looking import check_not_place, os_error
from cryptfs.fs.reaper import Reaper
from cryptfs.names import tree_name
from cryptfs.types import Kind


class Removing(Changing):
    """What leaves the tree of one volume: removed, or replaced by a rename."""

    def __init__(self, ctx: FsContext, inodes: InodeTable, files: Files, reaper: Reaper) -> None:
        super().__init__(ctx, inodes, files, reaper)
        self.removing_domain: Callable[[Inode, bytes], AbstractAsyncContextManager[None]] | None = None
        """Called with a domain's place and id, around its removal. None: domains cannot be removed (they are not open).

        Raises ENOTEMPTY, `VolumeLocked`.
        """

    async def unlink(self, parent: Inode, name: bytes) -> None:
        """Remove a name of anything but a directory."""
        store = self.ctx.store
        node = await self._changing(parent)
        try:
            keys = await node.keys()
            entry = self._entry(node, keys.names.seal(name))
            if entry.kind == Kind.DIR:
                raise os_error(errno.EISDIR)
            below = tree_name(entry.sealed)
            st = store.lstat(node.fd, below)
            self._keep_number(node, below, st)
            node.apply(keys.log_key, gone=[entry.sealed])
            try:
                store.unlink(node.fd, below)
            except BaseException:
                node.revert(keys.log_key, [entry])
                raise
            self._name_gone(parent, below, entry, st)
        finally:
            self._changed(node)

    async def rmdir(self, parent: Inode, name: bytes) -> None:
        """Remove an empty directory: it moves to `tmp/` at once and is deleted later, when that is durable."""
        node = await self._changing(parent)
        try:
            entry = self._entry(node, (await node.keys()).names.seal(name))
            if entry.kind != Kind.DIR:
                raise os_error(errno.ENOTDIR)
            inode, child = await self._child(parent, node, entry)
            with pinned(child):
                async with child.lock.exclusive(), self._taking_domain(inode, child):
                    await self._rmdir(parent, node, entry, inode, child)
        finally:
            self._changed(node)

    async def _rmdir(self, parent: Inode, node: DirNode, entry: Entry, inode: Inode, child: DirNode) -> None:
        if child.entries:
            raise os_error(errno.ENOTEMPTY)
        keys = await node.keys()
        st = self.ctx.store.fstat(child.fd)
        node.apply(keys.log_key, gone=[entry.sealed])
        try:
            self._to_tmp(node, tree_name(entry.sealed), child, st)
        except BaseException:
            node.revert(keys.log_key, [entry])
            raise
        self._dir_gone(parent, tree_name(entry.sealed), inode, child, st)

    def _taking_domain(self, inode: Inode, child: DirNode) -> AbstractAsyncContextManager[None]:
        """Around the removal of a directory, whose lock is held: a domain whose place it is goes along, or refuses."""
        if not child.domain:
            return nullcontext()
        if self.removing_domain is None:
            check_not_place(child)
        assert self.removing_domain is not None
        return self.removing_domain(inode, child.domain)

    # what a rename that replaces something needs, too -----------------------------------------------------------

    def _to_tmp(self, node: DirNode, below: bytes, child: DirNode, st: os.stat_result) -> None:
        name = child.dir_id.hex().encode()
        mode = stat.S_IMODE(st.st_mode)
        closed = not mode & stat.S_IWUSR
        if closed:
            # Moving a directory needs write permission on it; removing one does not.
            self.ctx.store.fchmod(child.fd, mode | stat.S_IWUSR)
        try:
            self.ctx.store.rename(node.fd, below, self.ctx.dir_fd(b"tmp"), name)
        except BaseException:
            if closed:
                with suppress(OSError):
                    self.ctx.store.fchmod(child.fd, mode)
            raise
        self.reaper.add_dir(name)

    def _dir_gone(self, parent: Inode, below: bytes, inode: Inode, child: DirNode, st: os.stat_result) -> None:
        child.removed, child.domain = True, b""
        inode.drop_path(parent, below)
        inode.last_st = without_links(st)
        self.files.new_ids.discard(inode.log_id)
        self.files.moved_ids.discard(inode.log_id)
        self.inodes.release(inode)

    def _keep_number(self, node: DirNode, below: bytes, st: os.stat_result) -> None:
        """Before the last name of an object goes: as long as the kernel knows its number, nothing else may get that."""
        inode = self.inodes.find(st.st_ino)
        if inode is not None and st.st_nlink == 1 and inode.kept_fd < 0:
            with suppress(OSError):
                inode.kept_fd = self.ctx.store.open(node.fd, below, os.O_PATH)

    def _name_gone(self, parent: Inode, below: bytes, entry: Entry, st: os.stat_result) -> None:
        """After a name of a non-directory went: the last one takes the object along."""
        inode = self.inodes.find(st.st_ino)
        if inode is not None and inode.log_id != entry.log_id:
            inode = None
        if inode is not None:
            inode.drop_path(parent, below)
        if st.st_nlink > 1:
            if inode is not None:
                self.inodes.release(inode)
            return
        self.files.new_ids.discard(entry.log_id)
        self.files.moved_ids.discard(entry.log_id)
        if inode is None:
            self.reaper.add_id(entry.log_id)
            return
        if inode.file is not None:
            inode.file.unlinked = True
            if inode.file.opens == 0:
                # Kept only to be settled, which is moot now.
                self.files.unsettled.discard(inode)
        # Its sidecar goes when the kernel forgets it (`InodeTable.on_dead`): until then it may be opened.
        inode.last_st = without_links(st)
        self.inodes.release(inode)
