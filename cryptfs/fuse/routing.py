"""Which volume of a mount a request is about: the mounted one, or a domain of it (docs/adr/0013-domains.md).

Inode numbers are those of the backing file system, which all volumes of a mount lie in, so a number says the volume.
The number of a domain's place is known to both: its name, its references and what `stat` is answered are the parent's,
everything else is the domain's, whose root it is.

Until there is a domain this object's handlers *are* the mounted volume's own (`begin`), and routing costs nothing.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import pyfuse3
from pyfuse3 import EntryAttributes, FileInfo, StatvfsData

from cryptfs.errors import AgentUnavailable, CryptfsError, VolumeLocked
from cryptfs.fs.domain import id_in_name, root_stat, show_at_place
from cryptfs.fs.inodes import Inode
from cryptfs.fs.making import Owner
from cryptfs.fs.volume import Volume
from cryptfs.fuse.errno_map import answered
from cryptfs.fuse.gate import Gate
from cryptfs.fuse.open_files import OpenFiles
from cryptfs.fuse.operations import Operations
from cryptfs.types import DOMAIN_XATTR, Kind

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

log = logging.getLogger("cryptfs")

_HANDLERS = (
    "lookup", "getattr", "setattr", "readlink", "forget", "statfs", "getxattr", "listxattr", "removexattr", "mknod",
    "mkdir", "symlink", "link", "unlink", "rmdir", "rename", "create", "open", "read", "write", "fsync", "release",
    "opendir", "readdir", "releasedir", "fsyncdir",
)  # fmt: skip
"""All but `setxattr`, through which the first domain comes."""


class Part:
    """One volume of a mount."""

    __slots__ = ("gate", "ops", "volume")

    def __init__(self, volume: Volume, gate: Gate, open_files: OpenFiles, forced: Owner | None = None) -> None:
        """`open_files`: the mount's; `forced`: see `Operations`."""
        self.volume = volume
        self.gate = gate
        self.ops = Operations(volume, gate, open_files, forced)


class Domains(Protocol):
    """What opens and makes domains: the composition root's."""

    async def enter(self, place: Inode, domain_id: bytes) -> Part:
        """The domain of that place, opened if it is not; `Routing.add` and `Routing.place` were called for it.

        Raises `VolumeLocked`, `AgentUnavailable`, `Damaged`, EBUSY, other OSError.
        """
        ...

    async def make(self, place: Inode, domain_id: bytes) -> None:
        """Make the empty directory the place of the domain that was laid out for it. Raises as `fs.domain.make_place`.

        ENOENT: none was laid out.
        """
        ...


class Routing(pyfuse3.Operations):
    """The handlers of one mount."""

    enable_writeback_cache = True
    enable_acl = True
    supports_dot_lookup = False

    def __init__(self, main: Part) -> None:
        super().__init__()
        self.main = main
        self.gate = main.gate
        self.domains: Domains | None = None
        self._own_uid = os.geteuid()
        self._at: dict[int, Part] = {}
        """By the number of the place."""
        self._parts: list[Part] = []
        self._listings: dict[int, Operations] = {}
        for name in _HANDLERS:
            setattr(self, name, getattr(main.ops, name))

    def begin(self) -> None:
        """There may be domains from now on."""
        for name in _HANDLERS:
            self.__dict__.pop(name, None)

    def add(self, part: Part) -> None:
        """A domain is open; its root has the number of its place."""
        self.begin()
        part.ops.handles = self.main.ops.handles
        self._parts.append(part)

    def place(self, place: int, part: Part) -> None:
        """It is to be seen at its place from now on."""
        self._at[place] = part
        self.main.ops.places[place] = lambda: root_stat(part.volume)
        part.ops.above = lambda: self._above(place)
        # What the kernel was told before came from the place alone.
        pyfuse3.invalidate_inode(pyfuse3.InodeT(place), attr_only=True)

    def unplace(self, place: int) -> None:
        """A domain has no place any more; files of it that are open go on."""
        self._at.pop(place, None)
        self.main.ops.places.pop(place, None)

    def remove(self, place: int, part: Part) -> None:
        """A domain is closed."""
        if self._at.get(place) is part:
            self.unplace(place)
        self._parts.remove(part)

    def _above(self, place: int) -> int:
        """The number of the directory a place is in; its own if it is gone."""
        inode = self.main.volume.inodes.find(place)
        return inode.path[0].ino if inode is not None and inode.path is not None else place

    # whose ------------------------------------------------------------------------------------------------------

    def _of(self, ino: int) -> Operations:
        """Of an inode, as far as it is no domain's root."""
        if self.main.volume.inodes.find(ino) is None:
            for part in self._parts:
                if part.volume.inodes.find(ino) is not None:
                    return part.ops
        return self.main.ops

    async def _holder(self, ino: int) -> Operations:
        """Of what is in a directory, or of any other inode. Raises as `Domains.enter`, and as `InodeTable.dir`."""
        part = self._at.get(ino)
        if part is not None:
            return part.ops
        inodes = self.main.volume.inodes
        inode = inodes.find(ino)
        if inode is None:
            return self._of(ino)
        domain_id = await self._domain_at(inode)
        if not domain_id or self.domains is None:
            return self.main.ops
        return (await self.domains.enter(inode, domain_id)).ops

    async def _domain_at(self, inode: Inode) -> bytes:
        """The id of the domain whose place an inode of the mounted volume is; b"" for any other."""
        if inode.kind is not Kind.DIR or self.gate.closed:
            return b""
        inodes = self.main.volume.inodes
        return (inodes.dir_nowait(inode) or await inodes.dir(inode)).domain

    async def _asked(self, ino: int) -> Operations:
        """As `_holder`, for questions about xattrs, which `ls -l` asks about everything.

        A locked domain's cannot be known. Any other errno than this makes programs complain that list its parent.
        """
        try:
            ops = await self._holder(ino)
        except (AgentUnavailable, VolumeLocked):
            raise pyfuse3.FUSEError(errno.EOPNOTSUPP) from None
        if ino in self._at and ops.gate.closed:
            raise pyfuse3.FUSEError(errno.EOPNOTSUPP)
        return ops

    async def _changed(self, ino: int) -> None:
        """A domain's root may have another mode or owner: its place must show them when the domain is not open."""
        part, place = self._at.get(ino), self.main.volume.inodes.find(ino)
        if part is None or place is None:
            return
        try:
            await show_at_place(self.main.volume, place, part.volume)
        except (OSError, CryptfsError) as error:
            log.warning("inode %d: the domain's place does not show its new attributes: %s", ino, error)

    # attributes ------------------------------------------------------------------------------------------------

    @answered
    async def lookup(self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext) -> EntryAttributes:
        return await (await self._holder(parent_inode)).lookup(parent_inode, name, ctx)

    async def getattr(self, inode: InodeT, ctx: RequestContext) -> EntryAttributes:
        return await self._of(inode).getattr(inode, ctx)

    @answered
    async def setattr(
        self, inode: InodeT, attr: EntryAttributes, fields: SetattrFields, fh: FileHandleT | None, ctx: RequestContext
    ) -> EntryAttributes:
        ops = await self._holder(inode)
        if inode in self._at:
            self._at[inode].gate.check()
        out = await ops.setattr(inode, attr, fields, fh, ctx)
        await self._changed(inode)
        return out

    async def readlink(self, inode: InodeT, ctx: RequestContext) -> FileNameT:
        return await self._of(inode).readlink(inode, ctx)

    async def forget(self, inode_list: Sequence[tuple[InodeT, int]]) -> None:
        for ino, count in inode_list:
            await self._of(ino).forget([(ino, count)])

    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        return await self.main.ops.statfs(ctx)

    # extended attributes ---------------------------------------------------------------------------------------

    @answered
    async def setxattr(self, inode: InodeT, name: XAttrNameT, value: bytes, ctx: RequestContext) -> None:
        if name == DOMAIN_XATTR:
            await self._make_domain(inode, value, ctx)
            return
        await (await self._holder(inode)).setxattr(inode, name, value, ctx)
        await self._changed(inode)

    async def _make_domain(self, ino: int, value: bytes, ctx: RequestContext) -> None:
        """Only for the user whose volume it is: nobody else may have a directory open into another volume."""
        place, domain_id = self.main.volume.inodes.find(ino), id_in_name(value)
        if ctx.uid != self._own_uid:
            raise pyfuse3.FUSEError(errno.EPERM)
        if place is None or self.domains is None or domain_id is None:
            raise pyfuse3.FUSEError(errno.EINVAL)
        if self.main.volume.ctx.read_only:
            raise pyfuse3.FUSEError(errno.EROFS)
        self.gate.check()
        self.begin()
        if await self._domain_at(place):
            raise pyfuse3.FUSEError(errno.EEXIST)
        await self.domains.make(place, domain_id)

    @answered
    async def getxattr(self, inode: InodeT, name: XAttrNameT, ctx: RequestContext) -> bytes:
        if name == DOMAIN_XATTR:
            known = self.main.volume.inodes.find(inode)
            domain_id = await self._domain_at(known) if known is not None else b""
            if not domain_id:
                raise pyfuse3.FUSEError(errno.ENODATA)
            return domain_id.hex().encode()
        return await (await self._asked(inode)).getxattr(inode, name, ctx)

    @answered
    async def listxattr(self, inode: InodeT, ctx: RequestContext) -> Sequence[XAttrNameT]:
        return await (await self._asked(inode)).listxattr(inode, ctx)

    @answered
    async def removexattr(self, inode: InodeT, name: XAttrNameT, ctx: RequestContext) -> None:
        await (await self._holder(inode)).removexattr(inode, name, ctx)

    # names -----------------------------------------------------------------------------------------------------

    @answered
    async def mknod(
        self, parent_inode: InodeT, name: FileNameT, mode: ModeT, rdev: int, ctx: RequestContext
    ) -> EntryAttributes:
        return await (await self._holder(parent_inode)).mknod(parent_inode, name, mode, rdev, ctx)

    @answered
    async def mkdir(self, parent_inode: InodeT, name: FileNameT, mode: ModeT, ctx: RequestContext) -> EntryAttributes:
        return await (await self._holder(parent_inode)).mkdir(parent_inode, name, mode, ctx)

    @answered
    async def symlink(
        self, parent_inode: InodeT, name: FileNameT, target: FileNameT, ctx: RequestContext
    ) -> EntryAttributes:
        return await (await self._holder(parent_inode)).symlink(parent_inode, name, target, ctx)

    @answered
    async def link(
        self, inode: InodeT, new_parent_inode: InodeT, new_name: FileNameT, ctx: RequestContext
    ) -> EntryAttributes:
        ops = await self._holder(new_parent_inode)
        if self._of(inode) is not ops:
            raise pyfuse3.FUSEError(errno.EXDEV)
        return await ops.link(inode, new_parent_inode, new_name, ctx)

    @answered
    async def unlink(self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext) -> None:
        await (await self._holder(parent_inode)).unlink(parent_inode, name, ctx)

    @answered
    async def rmdir(self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext) -> None:
        await (await self._holder(parent_inode)).rmdir(parent_inode, name, ctx)

    @answered
    async def rename(
        self, parent_inode_old: InodeT, name_old: FileNameT, parent_inode_new: InodeT, name_new: FileNameT, flags:
        FlagT,
        ctx: RequestContext,
    ) -> None:  # fmt: skip
        ops = await self._holder(parent_inode_old)
        if await self._holder(parent_inode_new) is not ops:
            raise pyfuse3.FUSEError(errno.EXDEV)
        await ops.rename(parent_inode_old, name_old, parent_inode_new, name_new, flags, ctx)

    # files: their handles are inode numbers ---------------------------------------------------------------------

    @answered
    async def create(
        self, parent_inode: InodeT, name: FileNameT, mode: ModeT, flags: FlagT, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        return await (await self._holder(parent_inode)).create(parent_inode, name, mode, flags, ctx)

    async def open(self, inode: InodeT, flags: FlagT, ctx: RequestContext) -> FileInfo:
        return await self._of(inode).open(inode, flags, ctx)

    async def read(self, fh: FileHandleT, off: int, size: int) -> bytes:
        return await self._of(fh).read(fh, off, size)

    async def write(self, fh: FileHandleT, off: int, buf: bytes) -> int:
        return await self._of(fh).write(fh, off, buf)

    async def fsync(self, fh: FileHandleT, datasync: bool) -> None:
        await self._of(fh).fsync(fh, datasync)

    async def release(self, fh: FileHandleT) -> None:
        await self._of(fh).release(fh)

    # directories: their handles are the mount's -----------------------------------------------------------------

    @answered
    async def opendir(self, inode: InodeT, ctx: RequestContext) -> FileHandleT:
        ops = await self._holder(inode)
        fh = await ops.opendir(inode, ctx)
        if ops is not self.main.ops:
            self._listings[fh] = ops
        return fh

    async def readdir(self, fh: FileHandleT, start_id: int, token: ReaddirToken) -> None:
        await self._listings.get(fh, self.main.ops).readdir(fh, start_id, token)

    async def releasedir(self, fh: FileHandleT) -> None:
        await self._listings.pop(fh, self.main.ops).releasedir(fh)

    async def fsyncdir(self, fh: FileHandleT, datasync: bool) -> None:
        await self._listings.get(fh, self.main.ops).fsyncdir(fh, datasync)
