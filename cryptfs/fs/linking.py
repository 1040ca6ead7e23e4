"""Other names for what is there already: link, rename, exchange.

The frame that binds the new name comes before the call on the tree. It is durable before that if what it names is older
than this epoch or was acknowledged: after a crash the tree alone does not speak for such a thing (`_sync_arrival`,
ADR 8). Between two directories the target's frame comes before the source's, so a crash leaves a name too many in the
logs, never one too few, and `reconcile` keeps the one that the tree has.

A directory that replaces an empty one is exchanged with it, since neither is empty below, and then the old one goes to
`tmp/`. A crash in between leaves the old one under the name that was renamed, and the source's log, durable by then,
says that this is gone.
"""

from __future__ import annotations

import errno

from cryptfs.format.dirlog import Entry
from cryptfs.fs.attributes import Attr
from cryptfs.fs.directory import DirNode, pinned
from cryptfs.fs.inodes import Inode
from cryptfs.fs.looking import check_name, os_error
from cryptfs.fs.removing import Removing
from cryptfs.names import tree_name
from cryptfs.ports import RENAME_EXCHANGE, RENAME_NOREPLACE
from cryptfs.types import Kind


class Linking(Removing):
    """Things that get another name in the tree of one volume."""

    async def link(self, inode: Inode, parent: Inode, name: bytes) -> Attr:
        """One more name for a file, symlink or special file."""
        check_name(name)
        if inode.kind == Kind.DIR:
            raise os_error(errno.EPERM)
        node = await self._changing(parent)
        try:
            above, below_old = inode.place()
            source = await self.inodes.dir(above)
            source.pins += 1
            try:
                await self._before_entering(node, source, inode.log_id)
                keys = await node.keys()
                sealed = self._free_name(node, keys.names.seal(name))
                below = tree_name(sealed)
                old = next((e for e in source.entries.values() if tree_name(e.sealed) == below_old), None) \
                    if inode.kind in (Kind.CHAR, Kind.BLOCK) else None  # fmt: skip
                node.apply(keys.log_key, [Entry(sealed, inode.kind, inode.log_id, old.rdev if old else 0)])
                linked = False
                try:
                    await self._sync_arrival(node, sealed, inode.log_id)
                    # It may have been renamed meanwhile, and another file may lie under its old name.
                    source_now, below_now = await self.inodes.where(inode)
                    self.ctx.store.link(source_now.fd, below_now, node.fd, below)
                    linked = True
                    inode.add_path(parent, below)
                    self._arrived(parent, inode.log_id)
                    return await self.files.attr(inode)
                except BaseException:
                    if linked:
                        inode.drop_path(parent, below)
                        node.discard(below)
                    await node.take_back(gone=[sealed])
                    raise
            finally:
                source.pins -= 1
        finally:
            self._changed(node)

    async def rename(self, old: Inode, old_name: bytes, new: Inode, new_name: bytes, flags: int = 0) -> None:
        """renameat2(2) with RENAME_NOREPLACE or RENAME_EXCHANGE."""
        check_name(new_name)
        if flags not in (0, RENAME_NOREPLACE, RENAME_EXCHANGE):
            raise os_error(errno.EINVAL)
        nodes = await self._changing_both(old, new)
        source, target = nodes
        try:
            src = self._entry(source, (await source.keys()).names.seal(old_name))
            dst_sealed = (await target.keys()).names.seal(new_name)
            dst = target.entries.get(dst_sealed)
            if flags == RENAME_NOREPLACE and dst is not None:
                raise os_error(errno.EEXIST)
            if source is target and dst is src:
                return  # To its own name, which the kernel never asks for: an empty directory would be its own victim.
            if flags == RENAME_EXCHANGE:
                if dst is None:
                    raise os_error(errno.ENOENT)
                await self._before_entering(source, target, dst.log_id)
            await self._before_entering(target, source, src.log_id)
            replaced: tuple[Inode, DirNode] | None = None
            if dst is not None and flags != RENAME_EXCHANGE:
                replaced = await self._may_replace(new, target, src, dst)
            with pinned(replaced[1] if replaced is not None else target):
                await self._rename(old, new, source, target, src, dst, dst_sealed, flags, replaced)
        finally:
            self._changed(source)
            if target is not source:
                self._changed(target)

    async def _may_replace(self, new: Inode, target: DirNode, src: Entry, dst: Entry) -> tuple[Inode, DirNode] | None:
        """Check that `src` may take `dst`'s name; for directories, the one that goes, which must be empty."""
        if dst.kind != Kind.DIR:
            if src.kind == Kind.DIR:
                raise os_error(errno.ENOTDIR)
            return None
        if src.kind != Kind.DIR:
            raise os_error(errno.EISDIR)
        inode, child = await self._child(new, target, dst)
        if child.domain:
            raise os_error(errno.EBUSY)
        if child.entries:
            raise os_error(errno.ENOTEMPTY)
        return inode, child

    async def _rename(  # noqa: PLR0913, PLR0917 - a rename has two sides
        self, old: Inode, new: Inode, source: DirNode, target: DirNode, src: Entry, dst: Entry | None,
        dst_sealed: bytes, flags: int, replaced: tuple[Inode, DirNode] | None,
    ) -> None:  # fmt: skip
        store = self.ctx.store
        src_below, dst_below = tree_name(src.sealed), tree_name(dst_sealed)
        moved = Entry(dst_sealed, src.kind, src.log_id, src.rdev)
        back = Entry(src.sealed, dst.kind, dst.log_id, dst.rdev) if flags == RENAME_EXCHANGE and dst else None
        dst_st = store.lstat(target.fd, dst_below) if dst is not None else None
        src_st = store.lstat(source.fd, src_below)
        if dst_st is not None and dst_st.st_ino == src_st.st_ino and src.kind != Kind.DIR:
            return  # Two names of one file: rename(2) does nothing.
        await self._log_rename(source, target, src, moved, back, dst)
        try:
            await self._sync_arrival(target, dst_sealed, src.log_id)
            if back is not None and dst is not None:
                await self._sync_arrival(source, src.sealed, dst.log_id)
            if replaced is not None:
                # After a crash the log must say that what lies under the old name is on its way out.
                await source.sync_log()
            if dst_st is not None and back is None and replaced is None:
                # Only now: whoever looked it up during a sync knows it, too.
                self._keep_number(target, dst_below, dst_st)
            # A directory below is never empty, because of its log: exchange the two, then take the old one away.
            tree_flags = RENAME_EXCHANGE if replaced is not None else flags
            store.rename(source.fd, src_below, target.fd, dst_below, tree_flags)
        except BaseException:
            await self._unlog_rename(source, target, src, moved, dst)
            # Whoever looked meanwhile found them in neither place.
            self._arrived(old, src.log_id)
            if back is not None:
                self._arrived(new, back.log_id)
            raise
        if replaced is not None and dst is not None and dst_st is not None:
            try:
                self._to_tmp(source, src_below, replaced[1], dst_st)
            except OSError:
                # The rename is done; what it replaced lies where the other was, and goes when it can.
                source.discard(src_below)
            self._dir_gone(new, dst_below, *replaced, dst_st)
        elif dst is not None and back is None and dst_st is not None:
            self._name_gone(new, dst_below, dst, dst_st)
        self._moved(src_st.st_ino, src.log_id, old, src_below, new, dst_below)
        if back is not None and dst_st is not None:
            self._moved(dst_st.st_ino, back.log_id, new, dst_below, old, src_below)

    async def _log_rename(
        self, source: DirNode, target: DirNode, src: Entry, moved: Entry, back: Entry | None, dst: Entry | None
    ) -> None:
        """The frames of a rename: one if it stays in its directory, else the target's first."""
        if source is target:
            key = (await source.keys()).log_key
            if back is not None:
                source.apply(key, [moved, back])
            else:
                source.apply(key, [moved], [src.sealed])
            return
        # Together, so that nothing is awaited between the two frames.
        (target_key,), (source_key,) = await self.ctx.keys.unwrap([target.key_runs()[0], source.key_runs()[0]])
        target.apply(target_key, [moved])
        try:
            source.apply(source_key, [back] if back is not None else [], [] if back is not None else [src.sealed])
        except OSError:
            target.revert(target_key, [dst] if dst else [], [] if dst else [moved.sealed])
            raise

    async def _unlog_rename(
        self, source: DirNode, target: DirNode, src: Entry, moved: Entry, dst: Entry | None
    ) -> None:
        gone = [] if dst else [moved.sealed]
        if source is not target:
            await source.take_back([src])
            await target.take_back([dst] if dst else [], gone)
        else:
            await source.take_back([src, dst] if dst else [src], gone)

    def _moved(self, ino: int, log_id: bytes, old: Inode, src: bytes, new: Inode, dst: bytes) -> None:
        inode = self.inodes.find(ino)
        if inode is not None and inode.log_id != log_id:
            inode = None
        if inode is not None:
            inode.add_path(new, dst)
            inode.drop_path(old, src)
        self.files.moved(inode, log_id)
        self._arrived(new, log_id)
