"""Extended attributes and POSIX ACLs: one sealed set per file, directory, symlink or special file (FORMAT.md §8).

A set is always read and written whole. It lives where the object's other metadata does: a file's in its sidecar
(`journal`), a directory's in its log (`directory`), a symlink's or special file's in a sidecar (`attr_log`). In memory
it stays sealed, so that it opens only as long as its key may be had; that there is none is known without any key,
which is what makes the kernel's question for `security.capability` before each write cheap.

Who may ask for what is the kernel's to check (xattr(7)), but for `trusted.` names in a list, and for what setting an
ACL does to the mode.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Mapping

import trio

from cryptfs.crypto.aead import ATTR_XATTRS, open_attr, seal_attr
from cryptfs.errors import Damaged
from cryptfs.format.sidecar import Sealed
from cryptfs.format.xattrs import NAME_MAX_BYTES, SET_MAX_BYTES, VALUE_MAX_BYTES, decode_xattrs, encode_xattrs
from cryptfs.fs import acl
from cryptfs.fs.attr_log import find_attr_log, is_under, rotate_attr_log, sync_name, write_xattrs
from cryptfs.fs.attributes import Changes
from cryptfs.fs.context import FsContext
from cryptfs.fs.directory import pinned
from cryptfs.fs.files import Files
from cryptfs.fs.history import XATTRS_LOST
from cryptfs.fs.inodes import Inode, InodeTable
from cryptfs.ports import KeyRun
from cryptfs.types import Kind, Purpose

TRUSTED = b"trusted."
LIST_MAX_BYTES = 65536
"""XATTR_LIST_MAX: a longer list could never be shown."""

_NAMESPACES = (b"user.", TRUSTED, b"security.")
_ACLS = (acl.ACCESS, acl.DEFAULT)

Values = dict[bytes, bytes]
Edit = Callable[[Values], None]


async def open_set(ctx: FsContext, log_id: bytes, xattrs: Sealed | None) -> Values:
    """The set in clear. Raises `Damaged`, key errors."""
    if xattrs is None:
        return {}
    if xattrs is XATTRS_LOST:
        raise Damaged("frame", "extended attributes")
    key = ctx.keys.peek(xattrs.wrapped)
    if key is None:
        run = KeyRun(log_id, Purpose.ATTR, xattrs.kek_version, (xattrs.wrapped,))
        key = (await ctx.keys.unwrap([run]))[0][0]
    plain = open_attr(key, ATTR_XATTRS, ctx.config.volume_id, log_id, xattrs.generation, xattrs.sealed)
    return decode_xattrs(plain)


async def seal_set(ctx: FsContext, log_id: bytes, values: Mapping[bytes, bytes]) -> Sealed | None:
    """Under a new key; None for an empty set. Raises key errors."""
    if not values:
        return None
    # No await after this one: the key is good.
    made = await ctx.keys.generate(log_id, Purpose.ATTR, 1)
    generation = ctx.next_generation()
    sealed = seal_attr(
        made.keys[0], ATTR_XATTRS, ctx.config.volume_id, log_id, generation, encode_xattrs(values)
    )  # fmt: skip
    return Sealed(generation, made.kek_version, made.wrapped[0], sealed)


async def inherited(ctx: FsContext, dir_id: bytes, xattrs: Sealed, mode: int, *, directory: bool) -> tuple[int, Values]:
    """(mode, xattrs) of what is made with `mode` in a directory that has `xattrs`: its default ACL decides."""
    default = (await open_set(ctx, dir_id, xattrs)).get(acl.DEFAULT)
    parsed = acl.parse(default) if default is not None else None
    if default is None or parsed is None:
        return mode, {}
    own = parsed.inherited(mode)
    values = {} if own.is_minimal else {acl.ACCESS: own.encode()}
    if directory:
        values[acl.DEFAULT] = default
    return mode & ~0o777 | own.mode_bits, values


class Xattrs:
    """Those of one volume."""

    def __init__(self, ctx: FsContext, inodes: InodeTable, files: Files) -> None:
        self.ctx = ctx
        self.inodes = inodes
        self.files = files
        self._changing = trio.Lock()
        """Who changes the xattrs of symlinks and special files: one at a time, it is rare."""

    # reading ---------------------------------------------------------------------------------------------------

    def surely_none(self, inode: Inode) -> bool:
        """Whether it is known, without looking anything up, that there are none."""
        file = inode.file
        if file is not None and file.journal.loaded:
            return file.journal.xattrs is None
        return inode.xattrs_known and inode.xattrs is None

    async def get(self, inode: Inode, name: bytes) -> bytes:
        """One value. Raises ENODATA, EOPNOTSUPP, EINVAL, `Damaged`, key errors."""
        _check_name(name)
        if inode.kind == Kind.SYMLINK and name in _ACLS:
            raise _error(errno.EOPNOTSUPP)
        value = (await self._values(inode)).get(name)
        if value is None:
            raise _error(errno.ENODATA)
        if name == acl.ACCESS:
            kept = acl.parse(value)
            assert kept is not None
            return kept.with_mode((await self.files.attr(inode)).st.st_mode).encode()
        return value

    async def names(self, inode: Inode, *, trusted: bool) -> list[bytes]:
        """Names in ascending order; those in `trusted.` only if asked for."""
        return [name for name in await self._values(inode) if trusted or not name.startswith(TRUSTED)]

    async def _values(self, inode: Inode) -> Values:
        return await open_set(self.ctx, inode.log_id, await self._sealed(inode))

    async def _sealed(self, inode: Inode) -> Sealed | None:
        if inode.kind == Kind.DIR:
            return (self.inodes.dir_nowait(inode) or await self.inodes.dir(inode)).xattrs
        file = inode.file
        if file is not None and file.journal.loaded:
            return file.journal.xattrs
        if inode.xattrs_known:
            return inode.xattrs
        if inode.kind == Kind.FILE:
            file = await self.files.open(inode)
            try:
                if not file.journal.loaded:
                    await file.journal.load()
                return file.journal.xattrs
            finally:
                await self.files.release(inode)
        async with self._changing:
            found = await find_attr_log(self.ctx, inode.log_id)
            inode.know_xattrs(found.xattrs if found is not None else None)
        return found.xattrs if found is not None else None

    # changing --------------------------------------------------------------------------------------------------

    async def set(
        self, inode: Inode, name: bytes, value: bytes, in_group: Callable[[int], bool] = lambda _: True
    ) -> None:
        """Set one value, made or replaced. `in_group`: whether the caller may keep a setgid bit for this gid.

        Raises EOPNOTSUPP, EINVAL, ERANGE, E2BIG, ENOSPC (the set would be too large), OSError, `Damaged`, key errors;
        then nothing has changed.
        """
        _check_name(name)
        if name in _ACLS:
            await self._set_acl(inode, name, value, in_group)
            return
        if len(value) > VALUE_MAX_BYTES:
            raise _error(errno.E2BIG)

        def edit(values: Values) -> None:
            values[name] = value

        await self.edit(inode, edit)

    async def remove(self, inode: Inode, name: bytes) -> None:
        """Remove one. Raises ENODATA (not for an ACL: there is none, as wanted), and as `set`."""
        _check_name(name)

        def edit(values: Values) -> None:
            if name not in values:
                raise _error(errno.ENODATA)
            del values[name]

        if name in _ACLS and name not in await self._values(inode):
            return
        await self.edit(inode, edit)

    async def _set_acl(self, inode: Inode, name: bytes, value: bytes, in_group: Callable[[int], bool]) -> None:
        if inode.kind == Kind.SYMLINK:
            raise _error(errno.EOPNOTSUPP)
        wanted = acl.parse(value)
        if wanted is None:
            await self.remove(inode, name)
            return
        if name == acl.DEFAULT:
            if inode.kind != Kind.DIR:
                raise _error(errno.EACCES)
            await self.edit(inode, lambda values: values.update({name: value}))
            return
        st = (await self.files.attr(inode)).st
        mode = stat.S_IMODE(st.st_mode) & ~0o777 | wanted.mode_bits
        if mode & stat.S_ISGID and not in_group(st.st_gid):
            mode &= ~stat.S_ISGID
        if wanted.is_minimal:
            # In this order, and the other way round below: the group's digit of the mode means the mask's only where
            # there is an ACL.
            await self.files.setattr(inode, Changes(mode=mode))
            await self.remove(inode, name)
        else:
            await self.edit(inode, lambda values: values.update({name: value}))
            await self.files.setattr(inode, Changes(mode=mode))

    async def edit(self, inode: Inode, edit: Edit, *, anew: bool = False) -> None:
        """Read the set, let `edit` change it, write it, move the ctime. Raises as `set`, and what `edit` raises.

        `anew`: a set that cannot be read counts as empty.
        """
        if self.ctx.read_only:
            raise _error(errno.EROFS)
        if inode.kind == Kind.FILE:
            await self._edit_file(inode, edit, anew=anew)
        elif inode.kind == Kind.DIR:
            await self._edit_dir(inode, edit, anew=anew)
        else:
            await self._edit_other(inode, edit)

    async def give(self, inode: Inode, values: Mapping[bytes, bytes]) -> None:
        """Replace the whole set, also one that is damaged. For files and directories."""

        def edit(old: Values) -> None:
            old.clear()
            old.update(values)

        await self.edit(inode, edit, anew=True)

    async def _changed(self, log_id: bytes, xattrs: Sealed | None, edit: Edit, *, anew: bool = False) -> Sealed | None:
        try:
            values = await open_set(self.ctx, log_id, xattrs)
        except Damaged:
            if not anew:
                raise
            values = {}
        edit(values)
        if sum(len(name) + 1 for name in values) > LIST_MAX_BYTES:
            raise _error(errno.ENOSPC)
        if sum(len(name) + len(value) for name, value in values.items()) > SET_MAX_BYTES:
            raise _error(errno.ENOSPC)
        return await seal_set(self.ctx, log_id, values)

    async def _edit_file(self, inode: Inode, edit: Edit, *, anew: bool) -> None:
        file = await self.files.open(inode, writing=True)
        try:
            journal = file.journal
            if not journal.loaded:
                await journal.load()
            await file.state.lock.acquire_exclusive()
            try:
                await journal.set_xattrs(await self._changed(inode.log_id, journal.xattrs, edit, anew=anew))
                await self.files.touch(inode)
            finally:
                file.state.lock.release_exclusive()
        finally:
            await self.files.release(inode)

    async def _edit_dir(self, inode: Inode, edit: Edit, *, anew: bool) -> None:
        node = self.inodes.dir_nowait(inode) or await self.inodes.dir(inode)
        with pinned(node):
            async with node.lock.exclusive():
                xattrs = await self._changed(inode.log_id, node.xattrs, edit, anew=anew)
                node.set_xattrs((await node.keys()).log_key, xattrs)
                node.settled()
                await self.files.touch(inode)

    async def _edit_other(self, inode: Inode, edit: Edit) -> None:
        async with self._changing:
            known = await find_attr_log(self.ctx, inode.log_id)
            xattrs = await self._changed(inode.log_id, known.xattrs if known is not None else None, edit)
            inode.xattrs_known = False
            await write_xattrs(self.ctx, inode.log_id, known, xattrs)
            inode.know_xattrs(xattrs)
            await self.files.touch(inode)

    async def rotate(self, inode: Inode, kek_version: int, *, at_once: bool = False) -> bool:
        """Have a symlink's or special file's sidecar, if there is one, be under this KEK or a newer one; was it not?

        When that is durable: see `Journal.rotate`. Raises `Damaged`, OSError, key errors.
        """
        async with self._changing:
            known = await find_attr_log(self.ctx, inode.log_id)
            if known is None and inode.kind == Kind.SYMLINK:
                raise Damaged("missing-sidecar")
            if known is None or is_under(known, kek_version):
                return False
            inode.xattrs_known = False
            inode.know_xattrs(await rotate_attr_log(self.ctx, inode.log_id, known, kek_version))
            if at_once:
                await sync_name(self.ctx, inode.log_id)
            return True

    async def quiet(self) -> None:
        """Wait until whatever changes now has changed."""
        async with self._changing:
            pass


def _check_name(name: bytes) -> None:
    """Raises EOPNOTSUPP for what is in none of our namespaces, EINVAL for a namespace alone, ERANGE for a long one."""
    if len(name) > NAME_MAX_BYTES:
        raise _error(errno.ERANGE)
    if name in _ACLS:
        return
    namespace = next((each for each in _NAMESPACES if name.startswith(each)), None)
    if namespace is None:
        raise _error(errno.EOPNOTSUPP)
    if name == namespace:
        raise _error(errno.EINVAL)


def _error(code: int) -> OSError:
    return OSError(code, os.strerror(code))
