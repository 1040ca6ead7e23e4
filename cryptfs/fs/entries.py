"""Which entries are durable: what is new or has moved, and syncing the way to it (ADR 3).

The directory of a file that is synced is synced, too, and those above it as far as they are new. Only when all of them
are do they count as durable, all at once: a second fsync below them meanwhile goes the whole way itself.
"""

from __future__ import annotations

from cryptfs.fs.context import FsContext
from cryptfs.fs.directory import DirNode
from cryptfs.fs.inodes import Inode, InodeTable
from cryptfs.fs.resync import symlink_again
from cryptfs.types import Kind


class Entries:
    """The durability of one volume's names."""

    def __init__(self, ctx: FsContext, inodes: InodeTable) -> None:
        self.ctx = ctx
        self.inodes = inodes
        self.new_ids: set[bytes] = set()
        """Files and directories made in this epoch whose entry is not known to be durable."""
        self.moved_ids: set[bytes] = set()
        """Those that got another name since it was: an fsync makes that durable, too, as it does on other systems."""

    def moved(self, inode: Inode | None, log_id: bytes) -> None:
        """Something has a name it had not when its entry became durable."""
        if log_id not in self.new_ids:
            self.moved_ids.add(log_id)
            if inode is not None and inode.file is not None:
                inode.file.journal.entry_durable = False

    async def sync_entry(self, inode: Inode) -> None:
        """Make the way to a file durable: its directory, and those above that are new or moved themselves."""
        undo = self.new_ids if inode.log_id in self.new_ids else self.moved_ids
        self.new_ids.discard(inode.log_id)
        self.moved_ids.discard(inode.log_id)
        try:
            if inode.path is not None:
                await self.sync_dirs(inode.path[0])
        except BaseException:
            undo.add(inode.log_id)
            raise

    async def sync_dirs(self, inode: Inode) -> None:
        """Make a directory durable, and those above it as far as they are new or moved. Raises OSError."""
        here: Inode | None = inode
        done: list[bytes] = []
        while here is not None:
            node = await self.inodes.dir(here)
            node.pins += 1
            try:
                await node.sync()
                await self.sync_targets(node)
            finally:
                node.pins -= 1
            done.append(here.log_id)
            onward = here.log_id in self.new_ids or here.log_id in self.moved_ids
            here = here.path[0] if onward and here.path is not None else None
        # Only now: whoever finds one of them durable goes no further up.
        self.new_ids.difference_update(done)
        self.moved_ids.difference_update(done)

    async def sync_targets(self, node: DirNode) -> None:
        """Sidecars of new symlinks in a directory: their targets are part of the entry."""
        if len(self.new_ids) == 0:
            return
        new = [e for e in node.entries.values() if e.kind == Kind.SYMLINK and e.log_id in self.new_ids]
        if new and self.ctx.doubts:
            for entry in new:
                await symlink_again(self.ctx, entry.log_id)
        elif new:
            await self.ctx.sync_everything()
        self.new_ids.difference_update(e.log_id for e in new)
