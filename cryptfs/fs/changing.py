"""What every change of names does: take the directory alone, look again, and be seen whole or not at all.

First all awaits (directories open, keys at hand), then one stretch without an await: frame, call on the tree, memory.
So other requests see a change whole or not at all, and a crash leaves what `directory` and `reconcile` know how to
settle.

Two syncs are the exceptions, both under the directories' locks: before the frame, where something that was acknowledged
enters a directory that may not be durable (`_before_entering`); between the frame and the call on the tree, for a long
name and for what is older than this epoch (`_sync_arrival`). Who looks during the latter waits (`looking`).
"""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from cryptfs.format.dirlog import Entry
from cryptfs.fs.context import FsContext
from cryptfs.fs.directory import DirNode
from cryptfs.fs.files import Files
from cryptfs.fs.inodes import Inode, InodeTable
from cryptfs.fs.looking import Looking, check_not_place, os_error
from cryptfs.fs.reaper import Reaper
from cryptfs.names import is_long


class Changing(Looking):
    """The directory of a change; what `making`, `removing` and `linking` share."""

    def __init__(self, ctx: FsContext, inodes: InodeTable, files: Files, reaper: Reaper) -> None:
        super().__init__(ctx, inodes, files)
        self.reaper = reaper
        self.on_arrival: Callable[[Inode, bytes], None] | None = None
        """Called when something that was made before gets a name: (directory, id)."""

    @asynccontextmanager
    async def changing(self, directory: Inode) -> AsyncIterator[DirNode]:
        """The directory, pinned, its lock held alone. Raises ENOENT for one that was removed, EROFS, as `dir`."""
        node = await self._changing(directory)
        try:
            yield node
        finally:
            self._changed(node)

    async def _changing(self, parent: Inode) -> DirNode:
        """The directory, pinned, its lock held alone. Raises ENOENT for one that was removed, EROFS."""
        if self.ctx.read_only:
            raise os_error(errno.EROFS)
        if parent.last_st is not None:
            raise os_error(errno.ENOENT)
        node = self.inodes.dir_nowait(parent) or await self.inodes.dir(parent)
        node.pins += 1
        try:
            await node.lock.acquire_exclusive()
        except BaseException:
            node.pins -= 1
            raise
        if node.removed or node.domain:
            self._changed(node)
            check_not_place(node)
            raise os_error(errno.ENOENT)
        return node

    def _changed(self, node: DirNode) -> None:
        node.settled()
        node.lock.release_exclusive()
        node.pins -= 1

    async def _changing_both(self, a: Inode, b: Inode) -> tuple[DirNode, DirNode]:
        """Both directories of a rename.

        Locked in the order of their numbers so that two renames cannot wait for each other.
        """
        if a is b:
            node = await self._changing(a)
            return node, node
        first, second = (a, b) if a.ino < b.ino else (b, a)
        one = await self._changing(first)
        try:
            two = await self._changing(second)
        except BaseException:
            self._changed(one)
            raise
        return (one, two) if first is a else (two, one)

    def _entry(self, node: DirNode, sealed: bytes) -> Entry:
        entry = node.entries.get(sealed)
        if entry is None:
            raise os_error(errno.ENOENT)
        return entry

    def _free_name(self, node: DirNode, sealed: bytes) -> bytes:
        if sealed in node.entries:
            raise os_error(errno.EEXIST)
        return sealed

    async def _child(self, parent: Inode, node: DirNode, entry: Entry) -> tuple[Inode, DirNode]:
        attr = await self._look(parent, node, entry, locked=True)
        return attr.inode, await self.inodes.dir(attr.inode)

    async def _before_entering(self, target: DirNode, source: DirNode, log_id: bytes) -> None:
        """Something that may be acknowledged enters a directory that may not be durable: make it durable first.

        What is new itself was acknowledged all the same if the directory that it comes from was synced.
        """
        new = self.files.new_ids
        if target.dir_id in new and (log_id not in new or source.dir_id not in new):
            await self.files.sync_dirs(self.inodes.get(target.ino))

    async def _sync_arrival(self, node: DirNode, sealed: bytes, log_id: bytes) -> None:
        """Make the frame that binds a name durable before the call on the tree does.

        For what is older than this epoch or was acknowledged since: after a crash only this log's word, or a birth in
        the crashed epoch, speaks for an entry. And for long names, which stand nowhere but in the log.
        """
        if is_long(sealed) or log_id not in self.files.new_ids:
            await node.sync_log()

    def _arrived(self, parent: Inode, log_id: bytes) -> None:
        if self.on_arrival is not None:
            self.on_arrival(parent, log_id)
