"""pyfuse3's `Operations` over a `Volume`.

One short method per request, in the kernel's words on one side, `fs`'s on the other.
"""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import pyfuse3
from pyfuse3 import EntryAttributes, FileInfo, StatvfsData

from cryptfs.errors import AgentUnavailable, VolumeLocked
from cryptfs.format.dirlog import Entry
from cryptfs.fs.attributes import Attr, Changes
from cryptfs.fs.inodes import Inode
from cryptfs.fs.making import Owner
from cryptfs.fs.volume import Volume
from cryptfs.fuse.errno_map import answered, guarded
from cryptfs.fuse.gate import Gate
from cryptfs.fuse.open_files import OpenFiles

if TYPE_CHECKING:
    from pyfuse3 import (
        FileHandleT,
        FileNameT,
        FlagT,
        InodeT,
        ModeT,
        ReaddirToken,
        RequestContext,
        SetattrFields,
        XAttrNameT,
    )

TIMEOUT_S = 3600
"""How long the kernel may believe attributes: nobody else changes the volume while it is mounted."""

_BLOCK_BYTES = 4096
_DOTS = 2
"""Positions in a listing before its first entry: "." and ".."."""


_CAPABILITY = b"security.capability"


class _Groups:
    """Whether the caller of a request is in a group, or root: only they keep a setgid bit that others would lose.

    Of a caller that is gone, or in a PID namespace that this process does not see (its pid is 0 here), nobody knows
    more than its uid and gid.
    """

    __slots__ = ("_ctx",)

    def __init__(self, ctx: RequestContext) -> None:
        self._ctx = ctx

    def __call__(self, gid: int) -> bool:
        ctx = self._ctx
        if ctx.uid == 0 or gid == ctx.gid:
            return True
        try:
            return gid in pyfuse3.get_sup_groups(ctx.pid)
        except OSError:
            return False


class _Listing:
    """An open directory: the entries one pass over it goes through, and how many went into the last answer."""

    __slots__ = ("entries", "inode", "usual")

    def __init__(self, inode: Inode) -> None:
        self.inode = inode
        self.entries: list[Entry] | None = None
        self.usual = 16


class Operations(pyfuse3.Operations):
    """One mounted volume."""

    enable_writeback_cache = True
    enable_acl = True
    supports_dot_lookup = False

    def __init__(self, volume: Volume, gate: Gate, open_files: OpenFiles, forced: Owner | None = None) -> None:
        """`forced`: who everything belongs to as far as programs can see; what they make is the daemon's own below."""
        super().__init__()
        self.gate = gate
        self._open_files = open_files
        self._forced = forced
        self._own = Owner(os.geteuid(), os.getegid())
        self._volume = volume
        self._inodes = volume.inodes
        self._names = volume.names
        self._files = volume.files
        self._xattrs = volume.xattrs
        self._listings: dict[int, _Listing] = {}
        self.handles = itertools.count(1)
        """Of directories, one for each `opendir` in the mount."""
        self.places: dict[int, Callable[[], os.stat_result]] = {}
        """By inode number, what `stat` says of places of domains that are open (`fuse.routing`)."""
        self.above: Callable[[], int] | None = None
        """The number of the directory that a domain's place is in; None if the root is the mount's."""

    # attributes ------------------------------------------------------------------------------------------------

    @guarded
    async def lookup(self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext) -> EntryAttributes:
        parent = self._inodes.get(parent_inode)
        try:
            attr = await self._names.lookup(parent, name)
        except FileNotFoundError:
            missing = EntryAttributes()
            missing.st_ino = pyfuse3.InodeT(0)
            missing.entry_timeout = self.gate.name_timeout_s
            return missing
        return self._counted(attr)

    @answered
    async def getattr(self, inode: InodeT, ctx: RequestContext) -> EntryAttributes:
        return self._entry(await self._files.attr(self._inodes.get(inode)))

    @answered
    async def setattr(
        self, inode: InodeT, attr: EntryAttributes, fields: SetattrFields, fh: FileHandleT | None, ctx: RequestContext
    ) -> EntryAttributes:
        uid, gid = attr.st_uid if fields.update_uid else None, attr.st_gid if fields.update_gid else None
        if self._forced is not None:
            if uid not in {None, self._forced.uid} or gid not in {None, self._forced.gid}:
                raise pyfuse3.FUSEError(errno.EPERM)
            uid = gid = None
        want = Changes(
            mode=attr.st_mode if fields.update_mode else None,
            uid=uid,
            gid=gid,
            size=attr.st_size if fields.update_size else None,
            atime_ns=attr.st_atime_ns if fields.update_atime else None,
            mtime_ns=attr.st_mtime_ns if fields.update_mtime else None,
        )
        return self._entry(await self._files.setattr(self._inodes.get(inode), want))

    @guarded
    async def readlink(self, inode: InodeT, ctx: RequestContext) -> FileNameT:
        target = await self._files.readlink(self._inodes.get(inode))
        self.gate.check()
        return pyfuse3.FileNameT(target)

    @answered
    async def forget(self, inode_list: Sequence[tuple[InodeT, int]]) -> None:
        for ino, count in inode_list:
            self._inodes.forget(ino, count)

    @answered
    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        below = self._volume.statfs()
        out = StatvfsData()
        for name in ("f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail", "f_files", "f_ffree", "f_favail"):
            setattr(out, name, getattr(below, name))
        out.f_namemax = 255
        return out

    # extended attributes ---------------------------------------------------------------------------------------

    @answered
    async def setxattr(self, inode: InodeT, name: XAttrNameT, value: bytes, ctx: RequestContext) -> None:
        # XATTR_CREATE and XATTR_REPLACE: pyfuse3 asks `getxattr` first. The kernel holds the inode's lock meanwhile.
        await self._xattrs.set(self._inodes.get(inode), name, value, _Groups(ctx))

    async def getxattr(self, inode: InodeT, name: XAttrNameT, ctx: RequestContext) -> bytes:
        if name == _CAPABILITY:
            # The kernel asks before every write(2): no more than this, if there are none.
            known = self._inodes.find(inode)
            if known is not None and known.file is not None:
                self._volume.reserve.about_to_be_written(known.file)
            if known is not None and self._xattrs.surely_none(known):
                raise pyfuse3.FUSEError(errno.ENODATA)
        return await self._getxattr(inode, name)

    @answered
    async def _getxattr(self, inode: InodeT, name: XAttrNameT) -> bytes:
        return await self._xattrs.get(self._inodes.get(inode), name)

    @answered
    async def listxattr(self, inode: InodeT, ctx: RequestContext) -> Sequence[XAttrNameT]:
        # What the kernel's own filesystems show to whoever has CAP_SYS_ADMIN.
        names = await self._xattrs.names(self._inodes.get(inode), trusted=ctx.uid == 0)
        return [pyfuse3.XAttrNameT(name) for name in names]

    @answered
    async def removexattr(self, inode: InodeT, name: XAttrNameT, ctx: RequestContext) -> None:
        await self._xattrs.remove(self._inodes.get(inode), name)

    # names -----------------------------------------------------------------------------------------------------

    @guarded
    async def mknod(
        self, parent_inode: InodeT, name: FileNameT, mode: ModeT, rdev: int, ctx: RequestContext
    ) -> EntryAttributes:
        parent = self._inodes.get(parent_inode)
        return self._counted(await self._names.mknod(parent, name, mode, rdev, self._owner(ctx)))

    @guarded
    async def mkdir(self, parent_inode: InodeT, name: FileNameT, mode: ModeT, ctx: RequestContext) -> EntryAttributes:
        parent = self._inodes.get(parent_inode)
        return self._counted(await self._names.mkdir(parent, name, mode, self._owner(ctx)))

    @guarded
    async def symlink(
        self, parent_inode: InodeT, name: FileNameT, target: FileNameT, ctx: RequestContext
    ) -> EntryAttributes:
        parent = self._inodes.get(parent_inode)
        return self._counted(await self._names.symlink(parent, name, target, self._owner(ctx)))

    @guarded
    async def link(
        self, inode: InodeT, new_parent_inode: InodeT, new_name: FileNameT, ctx: RequestContext
    ) -> EntryAttributes:
        parent = self._inodes.get(new_parent_inode)
        return self._counted(await self._names.link(self._inodes.get(inode), parent, new_name))

    @guarded
    async def unlink(self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext) -> None:
        await self._names.unlink(self._inodes.get(parent_inode), name)

    @guarded
    async def rmdir(self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext) -> None:
        await self._names.rmdir(self._inodes.get(parent_inode), name)

    @guarded
    async def rename(
        self, parent_inode_old: InodeT, name_old: FileNameT, parent_inode_new: InodeT, name_new: FileNameT, flags:
        FlagT,
        ctx: RequestContext,
    ) -> None:  # fmt: skip
        old, new = self._inodes.get(parent_inode_old), self._inodes.get(parent_inode_new)
        await self._names.rename(old, name_old, new, name_new, flags)

    # files -----------------------------------------------------------------------------------------------------

    @guarded
    async def create(
        self, parent_inode: InodeT, name: FileNameT, mode: ModeT, flags: FlagT, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        parent = self._inodes.get(parent_inode)
        attr, _ = await self._names.create(parent, name, mode, self._owner(ctx))
        self._open_files.opened(attr.inode.ino, writing=True)
        return _file_info(attr.inode.ino), self._counted(attr)

    @guarded
    async def open(self, inode: InodeT, flags: FlagT, ctx: RequestContext) -> FileInfo:
        known, cut = self._inodes.get(inode), bool(flags & os.O_TRUNC)
        writing = cut or flags & os.O_ACCMODE != os.O_RDONLY
        file = await self._files.open(known, writing=writing)
        if cut:
            # The kernel leaves it to us (FUSE_ATOMIC_O_TRUNC, which libfuse asks for): no setattr follows.
            try:
                # Asked before anything is lost: it may fail.
                lost = 0 if ctx.uid == 0 else self._files.set_id_lost(file, _Groups(ctx))
                await file.truncate(0)
                if lost:
                    self._files.drop_set_id(file, lost)
                    pyfuse3.invalidate_inode(inode, attr_only=True)
            except BaseException:
                await self._files.release(known)
                raise
        self._open_files.opened(inode, writing=writing)
        return _file_info(inode)

    @guarded
    async def read(self, fh: FileHandleT, off: int, size: int) -> bytes:
        file = self._inodes.get(fh).file
        assert file is not None
        buffer = self._volume.ctx.take_buffer(size)
        try:
            # pyfuse3 takes any buffer, and has given it to the kernel before anything else runs on this loop:
            # so the buffer may be given back now and is not written again before that.
            content = await file.read_into(buffer, off, size)
            # From here to the kernel nothing else runs: what is answered before the gate closes is dropped there.
            self.gate.check()
            return content  # type: ignore[return-value]
        finally:
            self._volume.ctx.give_buffer(buffer)

    @answered
    async def write(self, fh: FileHandleT, off: int, buf: bytes) -> int:
        file = self._inodes.get(fh).file
        assert file is not None
        while True:
            if self.gate.refusing:
                try:
                    await self.gate.knock()
                except VolumeLocked:
                    if self.gate.on_refused is not None:
                        self.gate.on_refused(fh, off, len(buf))
                    raise
            try:
                return await file.write(off, buf)
            except (AgentUnavailable, VolumeLocked):
                # The kernel drops what it is told was not written, and the program may be gone: hold on to it.
                await self.gate.keys_back()

    @answered
    async def fsync(self, fh: FileHandleT, datasync: bool) -> None:
        file = self._inodes.get(fh).file
        assert file is not None
        try:
            await file.journal.fsync(data_only=datasync)
        except VolumeLocked:
            # Interrupted by a lock that lets everything be written first, this too.
            if not self.gate.closed or self.gate.refusing:
                raise
            await file.journal.fsync(data_only=datasync)

    @answered
    async def release(self, fh: FileHandleT) -> None:
        self._open_files.released(fh)
        await self._files.release(self._inodes.get(fh))

    # directories -----------------------------------------------------------------------------------------------

    @answered
    async def opendir(self, inode: InodeT, ctx: RequestContext) -> FileHandleT:
        handle = next(self.handles)
        self._listings[handle] = _Listing(self._inodes.get(inode))
        return pyfuse3.FileHandleT(handle)

    @guarded
    async def readdir(self, fh: FileHandleT, start_id: int, token: ReaddirToken) -> None:
        listing = self._listings[fh]
        if start_id == 0 or listing.entries is None:
            # Also when a new descriptor begins at a position that another one told (telldir(3), a file server).
            listing.entries = await self._names.listing(listing.inode)
        if start_id < _DOTS and not await self._dots(listing.inode, start_id, token):
            return
        entries = listing.entries
        at, answered_now, full = max(0, start_id - _DOTS), 0, False
        while at < len(entries) and not full:
            try:
                batch = await self._names.described(listing.inode, entries[at : at + listing.usual])
                self.gate.check()
            except Exception:
                if answered_now:
                    # The kernel counts what is in this answer; the next one will say what is wrong.
                    break
                raise
            for item in batch:
                at += 1
                if item is None:
                    continue
                name, attr = item
                full = full or not pyfuse3.readdir_reply(token, pyfuse3.FileNameT(name), self._listed(attr), at + _DOTS)
                if not full:
                    answered_now += 1
                if attr is not None:
                    attr.inode.lookups += not full
                    self._inodes.release(attr.inode)
        if answered_now:
            listing.usual = answered_now + 1

    async def _dots(self, inode: Inode, start_id: int, token: ReaddirToken) -> bool:
        """The entries every directory has; the kernel takes no reference for them. False if the answer is full."""
        here = self._entry(await self._files.attr(inode))
        for at, (name, ino) in enumerate(((b".", inode.ino), (b"..", self._ino_above(inode))), start=1):
            here.st_ino = pyfuse3.InodeT(ino)
            if at > start_id and not pyfuse3.readdir_reply(token, pyfuse3.FileNameT(name), here, at):
                return False
        return True

    def _ino_above(self, inode: Inode) -> int:
        """What `..` stands for. The mount's root is above itself, and so is what is gone."""
        if inode is self._inodes.root and self.above is not None:
            return self.above()
        return inode.ino if inode.path is None else inode.path[0].ino

    @answered
    async def releasedir(self, fh: FileHandleT) -> None:
        del self._listings[fh]

    @answered
    async def fsyncdir(self, fh: FileHandleT, datasync: bool) -> None:
        await self._files.sync_dirs(self._listings[fh].inode)

    # as pyfuse3 wants it ----------------------------------------------------------------------------------------

    def _owner(self, ctx: RequestContext) -> Owner:
        """Who a new object belongs to below."""
        return Owner(ctx.uid, ctx.gid) if self._forced is None else self._own

    def _entry(self, attr: Attr) -> EntryAttributes:
        """As pyfuse3 wants it."""
        st, size = attr.st, attr.size
        if self.places and attr.inode.ino in self.places:
            st = self.places[attr.inode.ino]()
            size = st.st_size
        out = EntryAttributes()
        out.st_ino = pyfuse3.InodeT(attr.inode.ino)
        out.generation = attr.inode.generation
        out.entry_timeout = self.gate.name_timeout_s
        out.attr_timeout = TIMEOUT_S
        out.st_mode = pyfuse3.ModeT(st.st_mode)
        out.st_nlink = st.st_nlink
        forced = self._forced
        out.st_uid = st.st_uid if forced is None else forced.uid
        out.st_gid = st.st_gid if forced is None else forced.gid
        out.st_rdev = st.st_rdev
        out.st_size = size
        out.st_blksize = _BLOCK_BYTES
        out.st_blocks = st.st_blocks
        out.st_atime_ns = st.st_atime_ns
        out.st_mtime_ns = st.st_mtime_ns if attr.mtime_ns is None else attr.mtime_ns
        out.st_ctime_ns = st.st_ctime_ns
        return out

    def _counted(self, attr: Attr) -> EntryAttributes:
        """For an answer by which the kernel gains a reference to the inode."""
        attr.inode.lookups += 1
        return self._entry(attr)

    def _listed(self, attr: Attr | None) -> EntryAttributes:
        """For readdir; a damaged entry is listed without attributes, so that whoever asks for it is told EIO.

        readdir(3) skips entries of number 0, and the kernel ignores (and forgets, which we ignore) attributes that say
        they are the root's.
        """
        if attr is not None:
            return self._entry(attr)
        out = EntryAttributes()
        out.st_ino = pyfuse3.ROOT_INODE
        out.st_mode = pyfuse3.ModeT(0)
        return out


def _file_info(ino: int) -> FileInfo:
    return FileInfo(fh=pyfuse3.FileHandleT(ino), keep_cache=True)
