"""A domain and its place (docs/adr/0013-domains.md): a volume in `domains/` of another, seen in a directory of that.

The place's log names the domain's volume id, and holds nothing else. Order of making one, and what a crash leaves:

1. the domain is complete and synced under `domains/<id>.aside` (not here): a leftover that no place names;
2. its root gets the directory's mode, owner and xattrs, synced: the same;
3. the place's log is rewritten with the id and synced, and what is above it: the same, or a domain;
4. `<id>.aside` becomes `<id>`: a domain either way, `<id>.aside` counts where there is no `<id>`.

Removing one goes back the same way: the place goes, `<id>` becomes `<id>.aside`, and that is deleted when the removal
of the place is durable. One that was shredded cannot be looked into, and goes with all that is in it.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress

from cryptfs.errors import Damaged
from cryptfs.format.volume import FILE_MAX_BYTES, is_destroyed
from cryptfs.fs.context import FsContext, open_ours
from cryptfs.fs.inodes import Inode
from cryptfs.fs.volume import Volume
from cryptfs.fs.xattr import open_set, seal_set
from cryptfs.ports import Store
from cryptfs.types import DOMAIN_ASIDE, DOMAIN_SHREDDED, DOMAINS_DIR, ID_BYTES, Kind

DOMAINS, ASIDE, SHREDDED = DOMAINS_DIR.encode(), DOMAIN_ASIDE.encode(), DOMAIN_SHREDDED.encode()


MISSING = "domain-missing"
"""Reason of the damage that a domain is not there at all."""


def aside_name(domain_id: bytes) -> bytes:
    """Its name in `domains/` while it is made or removed."""
    return domain_id.hex().encode() + ASIDE


def id_in_name(name: bytes) -> bytes | None:
    """The domain's id if `name` is one of a domain's in `domains/`, aside or not."""
    try:
        text = name.removesuffix(ASIDE).decode("ascii")
        domain_id = bytes.fromhex(text)
    except (UnicodeDecodeError, ValueError):
        return None
    return domain_id if len(domain_id) == ID_BYTES and domain_id.hex() == text else None


def domains_fd(ctx: FsContext) -> int:
    """A descriptor of `domains/`, kept open. Raises FileNotFoundError, `Damaged` if it is no directory."""
    try:
        return ctx.dir_fd(DOMAINS)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            raise Damaged("domain", "`domains` is no directory") from None
        raise


def find_name(ctx: FsContext, domain_id: bytes) -> bytes:
    """The name of the domain's cipher directory in `domains/`. Raises `Damaged("domain-missing")`, OSError."""
    for name in (domain_id.hex().encode(), aside_name(domain_id)):
        with suppress(FileNotFoundError):
            ctx.store.lstat(domains_fd(ctx), name)
            return name
    raise Damaged(MISSING, f"domains/{domain_id.hex()} is not there")


def is_shredded(ctx: FsContext, domain_id: bytes) -> bool:
    """Whether `shred` destroyed the domain.

    Blocks. Raises OSError; a domain that is not there at all was not shredded.
    """
    try:
        return is_shredded_at(ctx, find_name(ctx, domain_id))
    except Damaged:
        return False


def is_shredded_at(ctx: FsContext, name: bytes) -> bool:
    """The same for a domain by its name in `domains/`."""
    try:
        fd = ctx.store.open(domains_fd(ctx), name, os.O_RDONLY | os.O_DIRECTORY)
    except (FileNotFoundError, NotADirectoryError):
        return False
    try:
        return was_shredded(ctx.store, fd)
    finally:
        ctx.store.close(fd)


def was_shredded(store: Store, fd: int) -> bool:
    """Whether `shred` destroyed the domain in the directory behind `fd` (`format.volume.is_destroyed`).

    Blocks. Raises OSError.
    """
    try:
        store.lstat(fd, SHREDDED)
    except FileNotFoundError:
        return False
    try:
        volume = open_ours(store, fd, b"volume", os.O_RDONLY)
    except FileNotFoundError:
        return is_destroyed(None)
    except Damaged:
        return False
    try:
        return is_destroyed(store.pread(volume, FILE_MAX_BYTES, 0))
    finally:
        store.close(volume)


def put_in_place(ctx: FsContext, domain_id: bytes) -> None:
    """After its place names it: `<id>.aside` becomes `<id>`. Blocks. Raises OSError."""
    where = domains_fd(ctx)
    ctx.store.rename(where, aside_name(domain_id), where, domain_id.hex().encode())
    ctx.store.fsync(where)


def put_aside(ctx: FsContext, domain_id: bytes) -> None:
    """After its place is gone: no place that is there again after a crash misses it. Raises OSError."""
    where = domains_fd(ctx)
    if find_name(ctx, domain_id) == aside_name(domain_id):
        return
    ctx.store.rename(where, domain_id.hex().encode(), where, aside_name(domain_id))


def root_stat(domain: Volume) -> os.stat_result:
    """Attributes of a domain's root; needs no key. Raises OSError."""
    return domain.ctx.store.lstat(domain.ctx.store.root(), b"tree")


async def make_place(parent: Volume, place: Inode, domain: Volume) -> None:
    """Make the empty directory `place` of `parent` the place of `domain`, which is open, complete and synced.

    Durable when this returns. Raises ENOTDIR, ENOTEMPTY, EEXIST (it is a domain's already), EROFS, other OSError,
    `Damaged`, key errors. After an error the place's log says whether it is one.
    """
    if place.kind != Kind.DIR or place is parent.root:
        raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    async with parent.names.changing(place) as node:
        if node.entries:
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))
        await _dress(domain, parent.ctx.store.fstat(node.fd), await open_set(parent.ctx, node.dir_id, node.xattrs))
        await node.give_to_domain(domain.ctx.config.volume_id)
        await parent.files.sync_dirs(place)
    # Now, not in a while: an older log of the place would show an empty directory of this volume.
    await parent.ctx.freshness.record()


async def _dress(domain: Volume, st: os.stat_result, xattrs: dict[bytes, bytes]) -> None:
    """Give a domain's root the attributes of its place, durably."""
    store = domain.ctx.store
    async with domain.names.changing(domain.root) as root:
        if xattrs:
            sealed = await seal_set(domain.ctx, root.dir_id, xattrs)
            root.set_xattrs((await root.keys()).log_key, sealed)
        copy_owner_and_mode(domain.ctx, root.fd, st)
        store.futimens(root.fd, st.st_atime_ns, st.st_mtime_ns)
    await domain.files.sync_dirs(domain.root)


def copy_owner_and_mode(ctx: FsContext, fd: int, st: os.stat_result) -> None:
    """Owner, group and mode of `st` for the directory behind `fd`; the owner only where he may be. Raises OSError."""
    now = ctx.store.fstat(fd)
    if (now.st_uid, now.st_gid) != (st.st_uid, st.st_gid):
        with suppress(PermissionError):
            ctx.store.fchown(fd, st.st_uid, st.st_gid)
    if stat.S_IMODE(now.st_mode) != stat.S_IMODE(st.st_mode):
        ctx.store.fchmod(fd, stat.S_IMODE(st.st_mode))


async def show_at_place(parent: Volume, place: Inode, domain: Volume, *, times: bool = False) -> None:
    """Copy the domain's root's attributes to its place, where they are seen while the domain is not open.

    Raises OSError, `Damaged`, key errors.
    """
    if parent.ctx.read_only or place.last_st is not None:
        return
    node = await parent.inodes.dir(place)
    st = root_stat(domain)
    copy_owner_and_mode(parent.ctx, node.fd, st)
    if times:
        node.set_times(st.st_atime_ns, st.st_mtime_ns)
