"""Names for what is new: files, directories, symlinks, special files.

Nothing is synced. What a crash may leave, by what was done when:

- A file or special file: its frame, then the thing in `tree/`. Either may be there without the other; `reconcile` lets
  the tree decide. A file without a sidecar is empty. A special file's sidecar, if it needs one, comes first; without an
  entry it is an orphan.
- A directory: built in `tmp/` with its log, then its parent's frame, then renamed into place. What is left in `tmp/` is
  deleted when the volume is next opened. Its log may be missing after a power cut, if nothing in it was acknowledged
  (`newborn`).
- A symlink: its sidecar, which holds the target, then as a file. Without an entry the sidecar is an orphan.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, replace

from cryptfs.format.datafile import DataHeader
from cryptfs.format.dirlog import Entry
from cryptfs.fs.attr_log import make_attr_log
from cryptfs.fs.attributes import Attr
from cryptfs.fs.changing import Changing
from cryptfs.fs.context import FsContext, write_all
from cryptfs.fs.directory import DirNode
from cryptfs.fs.file import FileNode
from cryptfs.fs.files import Files
from cryptfs.fs.inodes import Inode, InodeTable
from cryptfs.fs.looking import check_name, os_error
from cryptfs.fs.reaper import Reaper
from cryptfs.fs.symlink import TARGET_MAX_BYTES, encode_target_text, write_target
from cryptfs.fs.xattr import inherited, seal_set
from cryptfs.names import tree_name
from cryptfs.ports import RENAME_NOREPLACE
from cryptfs.types import ID_BYTES, Kind


@dataclass(frozen=True, slots=True)
class Owner:
    """Who a new object belongs to."""

    uid: int
    gid: int


class Making(Changing):
    """New things in the tree of one volume."""

    def __init__(self, ctx: FsContext, inodes: InodeTable, files: Files, reaper: Reaper) -> None:
        super().__init__(ctx, inodes, files, reaper)
        self._own = Owner(os.geteuid(), os.getegid())

    async def create(self, parent: Inode, name: bytes, mode: int, owner: Owner) -> tuple[Attr, FileNode]:
        """A new, empty regular file, opened once. Raises EEXIST and what the store raises."""
        check_name(name)
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
        check_name(name)
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
        check_name(name)
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
        check_name(name)
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

    def _give_to(self, parent: DirNode, fd: int, name: bytes, owner: Owner) -> None:
        """Set owner and group of a new object if they are not what the daemon's own would be.

        A group that an ordinary user's daemon is not in cannot be given: it stays the daemon's, and a set-group-id bit,
        which was meant for the other one, goes.
        """
        store, above = self.ctx.store, self.ctx.store.fstat(parent.fd)
        gid = above.st_gid if above.st_mode & stat.S_ISGID else owner.gid
        if self._own == Owner(owner.uid, gid) and not above.st_mode & stat.S_ISGID:
            return
        if self._own.uid not in {0, owner.uid}:
            return
        st = store.lstat(fd, name) if name else store.fstat(fd)
        mode = stat.S_IMODE(st.st_mode)
        try:
            self._chown(fd, name, owner.uid, gid)
        except PermissionError:
            if self._own.uid == 0:
                raise
            if mode & stat.S_ISGID and st.st_gid != gid and not stat.S_ISDIR(st.st_mode):
                self._chmod(fd, name, mode & ~stat.S_ISGID)
            return
        if mode & (stat.S_ISUID | stat.S_ISGID) and not stat.S_ISLNK(st.st_mode):
            # chown(2) takes them; the kernel has left in `mode` what its caller may have.
            self._chmod(fd, name, mode)

    # Each of these works on `name` in the directory behind `fd`, or on `fd` itself if there is no name.

    def _chown(self, fd: int, name: bytes, uid: int, gid: int) -> None:
        if name:
            self.ctx.store.chown(fd, name, uid, gid)
        else:
            self.ctx.store.fchown(fd, uid, gid)

    def _chmod(self, fd: int, name: bytes, mode: int) -> None:
        if name:
            self.ctx.store.chmod(fd, name, mode)
        else:
            self.ctx.store.fchmod(fd, mode)
