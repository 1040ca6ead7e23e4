"""After an epoch that ended uncleanly: a directory's log and its tree may differ, and the tree is right (FORMAT.md §6).

Only for entries whose names open under the directory's names key, and whose own header or log is of this volume. Done
once per directory, on its first use after the crash; a crash in here leaves it to be done again.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass

from cryptfs.crypto.siv import NameCipher
from cryptfs.errors import Damaged
from cryptfs.format.datafile import HEADER_BYTES, decode_data_header
from cryptfs.format.dirlog import Entry
from cryptfs.format.log import HEADER_BYTES as LOG_HEADER_BYTES
from cryptfs.format.log import KIND_DIR, decode_header
from cryptfs.fs.context import FsContext, log
from cryptfs.fs.directory import DirNode
from cryptfs.fs.newborn import rebuild_directory
from cryptfs.fs.symlink import decode_target_text
from cryptfs.names import DIR_LOG, sealed_from_tree, tree_name
from cryptfs.ports import Store
from cryptfs.types import ID_BYTES, Kind

KIND_OF_MODE = {
    stat.S_IFREG: Kind.FILE, stat.S_IFDIR: Kind.DIR, stat.S_IFLNK: Kind.SYMLINK, stat.S_IFIFO: Kind.FIFO,
    stat.S_IFSOCK: Kind.SOCKET, stat.S_IFCHR: Kind.CHAR, stat.S_IFBLK: Kind.BLOCK,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Found:
    """An entry as the tree has it; `proof`: the bytes that say its id (data header, log header, target text)."""

    st: os.stat_result
    kind: Kind
    proof: bytes


def survey(store: Store, fd: int) -> dict[bytes, Found]:
    """Everything in the directory but its log. Blocks."""
    out: dict[bytes, Found] = {}
    for name in store.listdir(fd):
        if name.startswith(b"."):
            continue
        try:
            st = store.lstat(fd, name)
        except FileNotFoundError:
            continue
        kind = KIND_OF_MODE[stat.S_IFMT(st.st_mode)]
        try:
            out[name] = Found(st, kind, _proof(store, fd, name, kind))
        except OSError as error:
            log.warning("directory entry %s cannot be read: %s", name.decode("ascii", "replace"), error.strerror)
    return out


def _proof(store: Store, fd: int, name: bytes, kind: Kind) -> bytes:
    if kind == Kind.SYMLINK:
        return store.readlink(fd, name)
    if kind == Kind.FILE:
        return _first_bytes(store, fd, name, HEADER_BYTES)
    if kind == Kind.DIR:
        inner = store.open(fd, name, os.O_RDONLY | os.O_DIRECTORY)
        try:
            return _first_bytes(store, inner, DIR_LOG, LOG_HEADER_BYTES)
        except FileNotFoundError:
            return b""
        finally:
            store.close(inner)
    return b""


def _first_bytes(store: Store, fd: int, name: bytes, count: int) -> bytes:
    inner = store.open(fd, name, os.O_RDONLY)
    try:
        return store.pread(inner, count, 0)
    finally:
        store.close(inner)


async def reconcile(node: DirNode) -> None:
    """Bring `node`'s log in line with its tree and say so in a frame (none on a read-only mount).

    The caller holds its lock.
    """
    ctx = node.ctx
    tree = await ctx.in_thread(survey, ctx.store, node.fd)
    volume_key = bytes(await ctx.volume_key())
    keys = await node.keys()
    gone = [sealed for sealed in node.entries if tree_name(sealed) not in tree]
    known = {tree_name(sealed): entry for sealed, entry in node.entries.items()}
    changed: list[Entry] = []
    newborn: list[tuple[bytes, bytes]] = []
    for name, found in tree.items():
        recorded = known.get(name)
        try:
            entry = _entry_of(ctx, volume_key, name, found, recorded, keys.names)
        except Damaged as error:
            log.error("inode %d: entry of directory %d ignored: %s", found.st.st_ino, node.ino, error)
            continue
        if entry != recorded:
            changed.append(entry)
        # Made in the crashed epoch, its log never reached the disk, and with it nothing acknowledged.
        lost_log = entry.kind == Kind.DIR and not any(found.proof)
        if lost_log and not ctx.read_only and (recorded is None or recorded.sealed in node.unsure):
            newborn.append((name, entry.log_id))
    if ctx.read_only:
        for sealed in gone:
            del node.entries[sealed]
        node.entries.update({entry.sealed: entry for entry in changed})
        return
    if gone or changed:
        log.warning("directory inode %d: %d entries settled after a crash", node.ino, len(gone) + len(changed))
    for name, dir_id in newborn:
        fd = ctx.store.open(node.fd, name, os.O_RDONLY | os.O_DIRECTORY)
        try:
            await rebuild_directory(ctx, tree[name].st.st_ino, fd, dir_id)
        finally:
            ctx.store.close(fd)
    keys = await node.keys()
    node.apply(keys.log_key, changed, gone)


def _entry_of(
    ctx: FsContext, volume_key: bytes, name: bytes, found: Found, recorded: Entry | None, names: NameCipher
) -> Entry:
    """What the tree says about `name`. Raises `Damaged` if it is no entry of this directory."""
    sealed = recorded.sealed if recorded is not None else sealed_from_tree(name)
    if sealed is None:
        raise Damaged("name", "not one of this directory")
    names.open(sealed)
    keep = recorded.log_id if recorded is not None and recorded.kind == found.kind else None
    if found.kind == Kind.FILE:
        if not found.proof:
            # A creation cut short before its header: still empty, whichever id it gets.
            return Entry(sealed, Kind.FILE, keep or ctx.random(ID_BYTES))
        header = decode_data_header(found.proof)
        ctx.check_header(memoryview(volume_key), header)
        return Entry(sealed, Kind.FILE, header.file_id)
    if found.kind == Kind.SYMLINK:
        return Entry(sealed, Kind.SYMLINK, decode_target_text(found.proof)[0])
    if found.kind == Kind.DIR:
        if len(found.proof) < LOG_HEADER_BYTES or not any(found.proof):
            return Entry(sealed, Kind.DIR, keep or ctx.random(ID_BYTES))
        header_id = decode_header(found.proof)
        if header_id.kind != KIND_DIR:
            raise Damaged("log-header", "not a directory's")
        return Entry(sealed, Kind.DIR, header_id.log_id)
    return Entry(sealed, found.kind, keep or ctx.random(ID_BYTES), found.st.st_rdev)
