"""Names: looking up, listing, making, removing, renaming, linking.

Every change is: all awaits first (directories open, keys at hand), then one stretch without an await: frame, call on
the tree, memory. So other requests see it whole or not at all, and a crash leaves what `directory` and `reconcile`
know how to settle. The exceptions (a sync before a long name or before something acknowledged enters a new directory)
happen before the frame, under the directories' locks.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass, replace

from cryptfs.errors import Damaged, VolumeLocked
from cryptfs.format.datafile import DataHeader
from cryptfs.format.dirlog import Entry
from cryptfs.fs.attr_log import make_attr_log
from cryptfs.fs.context import FsContext, log, write_all
from cryptfs.fs.directory import DirNode, pinned
from cryptfs.fs.file import FileNode
from cryptfs.fs.files import Attr, Files, kind_of, without_links
from cryptfs.fs.inodes import Inode, InodeTable
from cryptfs.fs.reaper import Reaper
from cryptfs.fs.symlink import TARGET_MAX_BYTES, encode_target_text, write_target
from cryptfs.fs.xattr import inherited, seal_set
from cryptfs.names import NAME_MAX_BYTES, is_long, tree_name
from cryptfs.types import ID_BYTES, Kind

RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2


@dataclass(frozen=True, slots=True)
class Owner:
    """Who a new object belongs to."""

    uid: int
    gid: int


def os_error(code: int) -> OSError:
    """An OSError as the kernel would say it."""
    return OSError(code, os.strerror(code))


class Namespace:
    """The tree of one volume."""

    def __init__(self, ctx: FsContext, inodes: InodeTable, files: Files, reaper: Reaper) -> None:
        self.ctx = ctx
        self.inodes = inodes
        self.files = files
        self.reaper = reaper
        self.on_arrival: Callable[[Inode, bytes], None] | None = None
        """Called when something that was made before gets a name: (directory, id)."""
        self._own = Owner(os.geteuid(), os.getegid())
        self.removing_domain: Callable[[Inode, bytes], AbstractAsyncContextManager[None]] | None = None
        """Called with a domain's place and id, around its removal. None: domains cannot be removed (they are not open).

        Raises ENOTEMPTY, `VolumeLocked`.
        """

    # looking ---------------------------------------------------------------------------------------------------

    async def lookup(self, parent: Inode, name: bytes) -> Attr:
        """The entry of that name. Raises ENOENT, `Damaged`, key errors."""
        _check_name(name)
        node = self.inodes.dir_nowait(parent) or await self.inodes.dir(parent)
        node.pins += 1
        try:
            names = node.names_nowait() or (await node.keys()).names
            entry = node.entries.get(names.seal(name))
            if entry is None:
                _check_not_place(node)
                raise os_error(errno.ENOENT)
            return await self._look(parent, node, entry)
        finally:
            node.pins -= 1

    async def behind(self, parent: Inode, node: DirNode, entry: Entry) -> Attr:
        """What an entry of a directory stands for, the directory being pinned. Raises as `lookup`."""
        return await self._look(parent, node, entry)

    async def _look(self, parent: Inode, node: DirNode, entry: Entry, *, locked: bool = False) -> Attr:
        """The entry's attributes, the directory being pinned. `locked`: the caller holds its lock."""
        try:
            inode, st = self._met(parent, node, entry)
        except Damaged:
            if locked or node.lock.idle:
                raise
            # A change that had to sync between frame and tree is under way: look again when it is done.
            async with node.lock.shared():
                now = node.entries.get(entry.sealed)
                if now is None:
                    raise os_error(errno.ENOENT) from None
                entry = now
                inode, st = self._met(parent, node, entry)
        name = tree_name(entry.sealed)
        # Held meanwhile: finding the attributes out may open and release the file, and nobody else may know it yet.
        inode.lookups += 1
        try:
            attr = await self.files.attr_of(inode, node, name, st)
        except BaseException:
            inode.lookups -= 1
            self.inodes.release(inode)
            raise
        inode.lookups -= 1
        return attr

    def _met(self, parent: Inode, node: DirNode, entry: Entry) -> tuple[Inode, os.stat_result]:
        """The inode behind an entry. Raises `Damaged` if log and tree are of two minds about it."""
        name = tree_name(entry.sealed)
        try:
            st = self.ctx.store.lstat(node.fd, name)
        except FileNotFoundError:
            raise Damaged("missing", "an entry that .dir names is not in the tree") from None
        if kind_of(st) != entry.kind or (entry.rdev and entry.rdev != st.st_rdev):
            raise Damaged("exchanged", "an entry is of another kind than .dir says")
        inode = self.inodes.meet(st.st_ino, entry.kind, entry.log_id, parent, name)
        inode.last_st = None
        return inode, st

    async def listing(self, inode: Inode) -> list[Entry]:
        """The directory's entries now, in a stable order: what one pass of readdir walks over."""
        if inode.last_st is not None:
            return []
        node = await self.inodes.dir(inode)
        _check_not_place(node)
        node.listed = True
        return list(node.entries.values())

    async def described(self, inode: Inode, entries: Sequence[Entry]) -> list[tuple[bytes, Attr | None] | None]:
        """(name, attributes) of each entry.

        None for one that is gone by now, attributes None for one that is damaged.
        """
        node = await self.inodes.dir(inode)
        node.pins += 1
        try:
            out: list[tuple[bytes, Attr | None] | None] = []
            for entry in entries:
                if node.entries.get(entry.sealed) != entry:
                    out.append(None)
                    continue
                names = node.names_nowait() or (await node.keys()).names
                name = names.open(entry.sealed)
                try:
                    out.append((name, await self._look(inode, node, entry)))
                except Damaged as error:
                    self.report(inode.ino, error)
                    out.append((name, None))
            return out
        finally:
            node.pins -= 1

    async def known(self, *, everywhere: bool) -> list[tuple[int, bytes]]:
        """(directory's inode number, name) of what the kernel may know by name: in the root, or everywhere.

        Raises `Damaged`, OSError, key errors.
        """
        below: dict[Inode, list[bytes]] = {}
        for inode in self.inodes.all():
            for parent, name in inode.paths:
                if everywhere or parent is self.inodes.root:
                    below.setdefault(parent, []).append(name)
        out: list[tuple[int, bytes]] = []
        for parent, names_below in below.items():
            node = self.inodes.dir_nowait(parent) or await self.inodes.dir(parent)
            with pinned(node):
                sealed = {tree_name(s): s for s in node.entries}
                wanted = [sealed[name] for name in names_below if name in sealed]
                names = (await node.keys()).names
                out += [(parent.ino, names.open(s)) for s in wanted]
        return out

    async def path_of(self, inode: Inode) -> bytes:
        """The path of something that has a name, from the root, without a leading slash.

        Raises ESTALE, `Damaged`, OSError, key errors.
        """
        parts: list[bytes] = []
        while inode is not self.inodes.root:
            parent, below = inode.place()
            node = await self.inodes.dir(parent)
            with pinned(node):
                names = (await node.keys()).names
                sealed = next((s for s in node.entries if tree_name(s) == below), None)
                if sealed is None:
                    raise os_error(errno.ESTALE)
                parts.append(names.open(sealed))
            inode = parent
        return b"/".join(reversed(parts))

    def report(self, ino: int, error: Damaged) -> None:
        """One log line for damage."""
        log.error("inode %d: %s", ino, error)

    # making ----------------------------------------------------------------------------------------------------

    async def create(self, parent: Inode, name: bytes, mode: int, owner: Owner) -> tuple[Attr, FileNode]:
        """A new, empty regular file, opened once. Raises EEXIST and what the store raises."""
        _check_name(name)
        ctx, store = self.ctx, self.ctx.store
        node = await self._changing(parent)
        try:
            kit = ctx.keys.take_kit() or await ctx.keys.make_kit(directory=False)
            xattrs = None
            if node.xattrs is not None:
                mode, values = await inherited(ctx, node.dir_id, node.xattrs, mode, directory=False)
                xattrs = await seal_set(ctx, kit.log_id, values)
            header = ctx.sign_header(await ctx.volume_key(), DataHeader(kit.log_id, ctx.next_generation()))
            keys = await node.keys()
            sealed = self._free_name(node, keys.names.seal(name))
            entry, below = Entry(sealed, Kind.FILE, kit.log_id), tree_name(sealed)
            node.apply(keys.log_key, [entry])
            fd = -1
            try:
                fd = store.open(node.fd, below, os.O_RDWR | os.O_CREAT | os.O_EXCL, stat.S_IMODE(mode))
                write_all(store, fd, header, 0)
                self._give_to(node, fd, b"", owner)
                st = store.fstat(fd)
            except BaseException:
                if fd >= 0:
                    store.close(fd)
                    node.discard(below)
                node.revert(keys.log_key, gone=[sealed])
                raise
            self.files.new_ids.add(kit.log_id)
            inode = self.inodes.meet(st.st_ino, Kind.FILE, kit.log_id, parent, below)
            inode.last_st = None
            inode.settled = True
            return Attr(inode, st, 0), self.files.created(inode, fd, kit, xattrs)
        finally:
            self._changed(node)

    async def mkdir(self, parent: Inode, name: bytes, mode: int, owner: Owner) -> Attr:
        """A new directory, built in `tmp/` and renamed into place: nobody ever sees one without its log."""
        _check_name(name)
        ctx, store = self.ctx, self.ctx.store
        node = await self._changing(parent)
        try:
            kit = await ctx.keys.make_kit(directory=True)
            xattrs = None
            if node.xattrs is not None:
                mode, values = await inherited(ctx, node.dir_id, node.xattrs, mode, directory=True)
                xattrs = await seal_set(ctx, kit.log_id, values)
                # Its keys may have been wiped meanwhile, and a log under a key of zeros would be lost.
                kit = replace(kit, log_key=await ctx.log_key_of(kit))
            tmp, built = ctx.dir_fd(b"tmp"), kit.log_id.hex().encode()
            store.mkdir(tmp, built)
            fd, made = -1, None
            try:
                fd = store.open(tmp, built, os.O_RDONLY | os.O_DIRECTORY)
                made = DirNode.create(ctx, fd, kit, xattrs)
                self._give_to(node, fd, b"", owner)
                keys = await node.keys()
                sealed = self._free_name(node, keys.names.seal(name))
                below = tree_name(sealed)
                node.apply(keys.log_key, [Entry(sealed, Kind.DIR, kit.log_id)])
                inherit, placed = store.fstat(node.fd).st_mode & stat.S_ISGID, False
                try:
                    store.rename(tmp, built, node.fd, below, RENAME_NOREPLACE)
                    placed = True
                    # After the rename: a directory its owner may not write could not be renamed.
                    store.fchmod(fd, stat.S_IMODE(mode) | inherit)
                    st = store.fstat(fd)
                except BaseException:
                    if placed:
                        node.discard(below)
                    node.revert(keys.log_key, gone=[sealed])
                    raise
            except BaseException:
                if made is not None:
                    made.close()
                elif fd >= 0:
                    store.close(fd)
                self.reaper.add_dir(built)
                raise
            self.files.new_ids.add(kit.log_id)
            inode = self.inodes.meet(st.st_ino, Kind.DIR, kit.log_id, parent, below)
            inode.last_st = None
            self.inodes.adopt_dir(inode, made)
            return Attr(inode, st, st.st_size)
        finally:
            self._changed(node)

    async def symlink(self, parent: Inode, name: bytes, target: bytes, owner: Owner) -> Attr:
        """A symlink; its target is sealed in a sidecar first."""
        _check_name(name)
        if not target:
            raise os_error(errno.ENOENT)
        if len(target) > TARGET_MAX_BYTES:
            raise os_error(errno.ENAMETOOLONG)
        ctx = self.ctx
        node = await self._changing(parent)
        try:
            kit = ctx.keys.take_kit() or await ctx.keys.make_kit(directory=False)
            self._free_name(node, (await node.keys()).names.seal(name))
            await write_target(ctx, kit, target)
            text = encode_target_text(kit.log_id, len(target))
            try:
                attr = await self._make(
                    parent,
                    node,
                    name,
                    Kind.SYMLINK,
                    kit.log_id,
                    0,
                    owner,
                    lambda n: ctx.store.symlink(text, node.fd, n),
                )
            except BaseException:
                self.reaper.add_id(kit.log_id)
                raise
            self.files.new_ids.add(kit.log_id)
            return Attr(attr.inode, attr.st, len(target))
        finally:
            self._changed(node)

    async def mknod(self, parent: Inode, name: bytes, mode: int, rdev: int, owner: Owner) -> Attr:
        """A fifo, socket or device; a regular file as `create` makes it."""
        if stat.S_ISREG(mode) or stat.S_IFMT(mode) == 0:
            attr, _ = await self.create(parent, name, mode, owner)
            attr.inode.lookups += 1
            await self.files.release(attr.inode)
            attr.inode.lookups -= 1
            return await self.files.attr(attr.inode)
        _check_name(name)
        kinds = {stat.S_IFIFO: Kind.FIFO, stat.S_IFSOCK: Kind.SOCKET, stat.S_IFCHR: Kind.CHAR, stat.S_IFBLK: Kind.BLOCK}
        kind = kinds.get(stat.S_IFMT(mode))
        if kind is None:
            raise os_error(errno.EINVAL)
        rdev = rdev if kind in (Kind.CHAR, Kind.BLOCK) else 0
        node = await self._changing(parent)
        try:
            log_id = self.ctx.random(ID_BYTES)
            if node.xattrs is not None:
                mode, values = await inherited(self.ctx, node.dir_id, node.xattrs, mode, directory=False)
                self._free_name(node, (await node.keys()).names.seal(name))
                if values:
                    await make_attr_log(self.ctx, log_id, await seal_set(self.ctx, log_id, values))
            try:
                return await self._make(
                    parent, node, name, kind, log_id, rdev, owner,
                    lambda n: self.ctx.store.mknod(node.fd, n, mode, rdev),
                )  # fmt: skip
            except BaseException:
                self.reaper.add_id(log_id)
                raise
        finally:
            self._changed(node)

    async def _make(
        self, parent: Inode, node: DirNode, name: bytes, kind: Kind, log_id: bytes, rdev: int, owner: Owner,
        call: Callable[[bytes], None],
    ) -> Attr:  # fmt: skip
        """Frame, `call` with the name in `tree/`, owner, inode."""
        store = self.ctx.store
        keys = await node.keys()
        sealed = self._free_name(node, keys.names.seal(name))
        below = tree_name(sealed)
        node.apply(keys.log_key, [Entry(sealed, kind, log_id, rdev)])
        made = False
        try:
            call(below)
            made = True
            self._give_to(node, node.fd, below, owner)
            st = store.lstat(node.fd, below)
        except BaseException:
            if made:
                node.discard(below)
            node.revert(keys.log_key, gone=[sealed])
            raise
        inode = self.inodes.meet(st.st_ino, kind, log_id, parent, below)
        inode.last_st = None
        return Attr(inode, st, st.st_size)

    async def link(self, inode: Inode, parent: Inode, name: bytes) -> Attr:
        """One more name for a file, symlink or special file."""
        _check_name(name)
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

    # removing --------------------------------------------------------------------------------------------------

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
            _check_not_place(child)
        assert self.removing_domain is not None
        return self.removing_domain(inode, child.domain)

    # renaming --------------------------------------------------------------------------------------------------

    async def rename(self, old: Inode, old_name: bytes, new: Inode, new_name: bytes, flags: int = 0) -> None:
        """renameat2(2) with RENAME_NOREPLACE or RENAME_EXCHANGE."""
        _check_name(new_name)
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
        if dst_st is not None and back is None and replaced is None:
            self._keep_number(target, dst_below, dst_st)
        await self._log_rename(source, target, src, moved, back, dst)
        try:
            await self._sync_arrival(target, dst_sealed, src.log_id)
            if back is not None and dst is not None:
                await self._sync_arrival(source, src.sealed, dst.log_id)
            if replaced is not None:
                # After a crash the log must say that what lies under the old name is on its way out.
                await source.sync_log()
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

    def _arrived(self, parent: Inode, log_id: bytes) -> None:
        if self.on_arrival is not None:
            self.on_arrival(parent, log_id)

    # pieces ----------------------------------------------------------------------------------------------------

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
            _check_not_place(node)
            raise os_error(errno.ENOENT)
        return node

    @asynccontextmanager
    async def changing(self, directory: Inode) -> AsyncIterator[DirNode]:
        """The directory, pinned, its lock held alone. Raises ENOENT for one that was removed, EROFS, as `dir`."""
        node = await self._changing(directory)
        try:
            yield node
        finally:
            self._changed(node)

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

    def _free_name(self, node: DirNode, sealed: bytes) -> bytes:
        if sealed in node.entries:
            raise os_error(errno.EEXIST)
        return sealed

    def _entry(self, node: DirNode, sealed: bytes) -> Entry:
        entry = node.entries.get(sealed)
        if entry is None:
            raise os_error(errno.ENOENT)
        return entry

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

    def _give_to(self, parent: DirNode, fd: int, name: bytes, owner: Owner) -> None:
        """Set owner and group of a new object if they are not what the daemon's own would be."""
        gid = owner.gid
        store = self.ctx.store
        if owner == self._own and not store.fstat(parent.fd).st_mode & stat.S_ISGID:
            return
        above = store.fstat(parent.fd)
        if above.st_mode & stat.S_ISGID:
            gid = above.st_gid
        if self._own.uid not in {0, owner.uid}:
            return
        if name:
            mode = store.lstat(fd, name).st_mode
            store.chown(fd, name, owner.uid, gid)
            if mode & (stat.S_ISUID | stat.S_ISGID) and not stat.S_ISLNK(mode):
                # chown(2) takes them; the kernel has left in `mode` what its caller may have.
                store.chmod(fd, name, stat.S_IMODE(mode))
        else:
            mode = store.fstat(fd).st_mode
            store.fchown(fd, owner.uid, gid)
            if mode & (stat.S_ISUID | stat.S_ISGID):
                store.fchmod(fd, stat.S_IMODE(mode))

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
        if inode is not None and inode.file is not None:
            inode.file.unlinked = True
            if inode.file.opens == 0:
                # Kept only to be settled, which is moot now.
                file, inode.file = inode.file, None
                self.files.unsettled.discard(inode)
                self.inodes.open_ids.discard(entry.log_id)
                file.journal.close()
                file.state.close()
                self.reaper.add_id(entry.log_id)
        elif entry.kind != Kind.DIR:
            self.reaper.add_id(entry.log_id)
        if inode is not None:
            inode.last_st = without_links(st)
            self.inodes.release(inode)


def _check_not_place(node: DirNode) -> None:
    """Raises `VolumeLocked` for a domain's place: what is in there is another volume's to say."""
    if node.domain:
        raise VolumeLocked("the directory is a domain's, which is not open")


def _check_name(name: bytes) -> None:
    if len(name) > NAME_MAX_BYTES:
        raise os_error(errno.ENAMETOOLONG)
