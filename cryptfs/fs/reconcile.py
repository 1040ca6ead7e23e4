"""After an epoch that ended uncleanly: a directory's log and its tree may differ, and the tree is right (FORMAT.md §6).

Right within limits: an entry counts if its name opens under the directory's names key, and if either this log itself
bound that name to that id since it was last known durable, or what lies there was made in an epoch that ended
uncleanly. (Whatever is older was bound durably before the tree call that brought it.) So a crash is no excuse for
exchanging or bringing back what is older.

Done once per directory, on its first use after the crash; a crash in here leaves it to be done again.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Container, Mapping
from dataclasses import dataclass

from cryptfs.crypto.siv import NameCipher
from cryptfs.errors import Damaged
from cryptfs.format.datafile import HEADER_BYTES, decode_data_header
from cryptfs.format.dirlog import Entry
from cryptfs.format.log import HEAD_BYTES, KIND_DIR, decode_head, decode_header
from cryptfs.format.log import HEADER_BYTES as LOG_HEADER_BYTES
from cryptfs.fs.context import FsContext, log, sidecar_name
from cryptfs.fs.directory import DirNode
from cryptfs.fs.headless import give_header, is_still
from cryptfs.fs.newborn import rebuild_directory
from cryptfs.fs.sealed_log import parse, read_log
from cryptfs.fs.symlink import decode_target_text
from cryptfs.names import DIR_LOG, is_long, sealed_from_tree, tree_name
from cryptfs.ports import Store
from cryptfs.types import ID_BYTES, Buffer, Kind

KIND_OF_MODE = {
    stat.S_IFREG: Kind.FILE, stat.S_IFDIR: Kind.DIR, stat.S_IFLNK: Kind.SYMLINK, stat.S_IFIFO: Kind.FIFO,
    stat.S_IFSOCK: Kind.SOCKET, stat.S_IFCHR: Kind.CHAR, stat.S_IFBLK: Kind.BLOCK,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Found:
    """An entry as the tree has it.

    `proof`: the bytes that say its id (data header; header and first head of a `.dir`; target text). `sidecar`: the
    same of a symlink's sidecar, nothing if that does not hold the target.
    """

    st: os.stat_result
    kind: Kind
    proof: bytes
    sidecar: bytes = b""


def survey(ctx: FsContext, fd: int) -> tuple[dict[bytes, Found], set[bytes]]:
    """Everything in the directory but its log; and the names of what is there and cannot be read. Blocks."""
    out: dict[bytes, Found] = {}
    unread: set[bytes] = set()
    store = ctx.store
    for name in store.listdir(fd):
        if name.startswith(b"."):
            continue
        try:
            st = store.lstat(fd, name)
        except FileNotFoundError:
            continue
        kind = KIND_OF_MODE[stat.S_IFMT(st.st_mode)]
        try:
            proof = _proof(store, fd, name, kind)
            out[name] = Found(st, kind, proof, _symlink_log(ctx, proof) if kind == Kind.SYMLINK else b"")
        except OSError as error:
            log.warning("directory entry %s cannot be read: %s", name.decode("ascii", "replace"), error.strerror)
            unread.add(name)
    return out, unread


def _proof(store: Store, fd: int, name: bytes, kind: Kind) -> bytes:
    if kind == Kind.SYMLINK:
        return store.readlink(fd, name)
    if kind == Kind.FILE:
        return _first_bytes(store, fd, name, HEADER_BYTES)
    if kind == Kind.DIR:
        inner = store.open(fd, name, os.O_RDONLY | os.O_DIRECTORY)
        try:
            return _first_bytes(store, inner, DIR_LOG, LOG_HEADER_BYTES + HEAD_BYTES)
        except FileNotFoundError:
            return b""
        finally:
            store.close(inner)
    return b""


def _symlink_log(ctx: FsContext, text: bytes) -> bytes:
    """Header and first head of a symlink's sidecar; nothing if the target, which is in the first frame, is missing."""
    try:
        log_id, _ = decode_target_text(text)
        fd = ctx.store.open(ctx.sidecar_dir(log_id), sidecar_name(log_id), os.O_RDONLY)
    except (Damaged, FileNotFoundError):
        return b""
    try:
        raw = read_log(ctx.store, fd)
        return raw[: LOG_HEADER_BYTES + HEAD_BYTES] if parse(raw).payloads[:1] not in ([], [None]) else b""
    except Damaged:
        return b""
    finally:
        ctx.store.close(fd)


def _first_bytes(store: Store, fd: int, name: bytes, count: int) -> bytes:
    inner = store.open(fd, name, os.O_RDONLY)
    try:
        return store.pread(inner, count, 0)
    finally:
        store.close(inner)


async def reconcile(node: DirNode) -> None:
    """Bring `node`'s log in line with its tree and say so in a frame (none on a read-only mount).

    The caller is the only one to know of `node` yet.
    """
    ctx = node.ctx
    tree, unread = await ctx.in_thread(survey, ctx, node.fd)
    if node.domain and tree:
        # Nothing of this volume is ever put into a domain's place.
        log.error("directory inode %d: %d things in a domain's place not accepted", node.ino, len(tree))
        tree = {}
    known = {tree_name(sealed): entry for sealed, entry in node.entries.items()}
    headless = {
        name
        for name, found in tree.items()
        if found.kind == Kind.FILE and not any(found.proof) and name in known and known[name].kind == Kind.FILE
        and await is_still(ctx, node.fd, name, known[name].log_id)
    }  # fmt: skip
    names = (await node.keys()).names
    volume_key = bytearray(await ctx.volume_key())  # outlives awaits, and with them the cache's
    try:
        await _settle(node, tree, unread, _Judge(node, volume_key, names, headless))
    finally:
        volume_key[:] = bytes(len(volume_key))


async def _settle(node: DirNode, tree: Mapping[bytes, Found], unread: Container[bytes], judge: _Judge) -> None:
    """`tree`: what lies in the directory, by name. `unread`: names of what may not be read."""
    ctx = node.ctx
    known = {tree_name(sealed): entry for sealed, entry in node.entries.items()}
    # What may not be read (its mode says so) stays what the log says it is.
    gone = [entry.sealed for name, entry in known.items() if name not in tree and name not in unread]
    changed: list[Entry] = []
    for name, found in tree.items():
        recorded = known.get(name)
        try:
            entry = judge.entry(name, found, recorded)
        except Damaged as error:
            log.error("inode %d: entry of directory %d not accepted: %s", found.st.st_ino, node.ino, error)
            continue
        if entry is None and recorded is not None:
            gone.append(recorded.sealed)
        if entry is not None and entry != recorded:
            changed.append(entry)
    back = await ctx.freshness.deleted([entry.log_id for entry in changed])
    if back:
        log.error("directory inode %d: %d entries not accepted: seen deleted by this machine", node.ino, len(back))
        changed = [entry for entry in changed if entry.log_id not in back]
    if ctx.read_only:
        for sealed in gone:
            del node.entries[sealed]
        node.entries.update({entry.sealed: entry for entry in changed})
        return
    if gone or changed:
        log.warning("directory inode %d: %d entries settled after a crash", node.ino, len(gone) + len(changed))
    await _clear(node, judge.nameless)
    for name, file_id in judge.newborn_files:
        give_header(ctx, judge.volume_key, node.fd, name, file_id)
    for name, dir_id in judge.newborn_dirs:
        fd = ctx.store.open(node.fd, name, os.O_RDONLY | os.O_DIRECTORY)
        try:
            await rebuild_directory(ctx, tree[name].st.st_ino, fd, dir_id)
        finally:
            ctx.store.close(fd)
    node.apply((await node.keys()).log_key, changed, gone)
    node.settled()


async def _clear(node: DirNode, names: list[bytes]) -> None:
    """Take away what was made in the crashed epoch and has lost its name.

    Durably, before a new frame could name it again.
    """
    ctx = node.ctx
    for name in names:
        ctx.store.rename(node.fd, name, ctx.dir_fd(b"tmp"), ctx.random(ID_BYTES).hex().encode())
    if names:
        log.warning("directory inode %d: %d nameless entries of the crashed epoch removed", node.ino, len(names))
        await ctx.in_thread(ctx.store.fsync, node.fd)


class _Judge:
    """Decides, entry by entry, what the tree may say.

    `headless`: names of data files without a header that are, beyond doubt, what the log says. `nameless`,
    `newborn_files` and `newborn_dirs` ((name, id)) want work afterwards.
    """

    def __init__(self, node: DirNode, volume_key: Buffer, names: NameCipher, headless: set[bytes]) -> None:
        self.ctx = node.ctx
        self.node = node
        self.volume_key = volume_key
        self.names = names
        self.headless = headless
        self.nameless: list[bytes] = []
        self.newborn_files: list[tuple[bytes, bytes]] = []
        self.newborn_dirs: list[tuple[bytes, bytes]] = []
        self._ids: dict[int, bytes] = {}
        # A long name that the log has let go of already, and the tree has not.
        self._long_names = {tree_name(sealed): sealed for sealed in node.bindings if is_long(sealed)}

    def entry(self, name: bytes, found: Found, recorded: Entry | None) -> Entry | None:
        """The entry as the tree has it; None for a nameless one. Raises `Damaged` for what may not be there."""
        sealed = recorded.sealed if recorded is not None else sealed_from_tree(name) or self._long_names.get(name)
        if sealed is None:
            if name.startswith(b"~") and self._is_new(found):
                self.nameless.append(name)
                return None
            raise Damaged("name", "not one of this directory")
        self.names.open(sealed)
        bound = self.node.bindings.get(sealed, [])
        if found.kind in (Kind.FILE, Kind.DIR, Kind.SYMLINK):
            log_id = self._id_of(name, found, recorded)
            is_newborn = log_id is None
            if log_id is None:
                # A new id: what the log names may be what lay here before. One for all names of an inode.
                log_id = self._ids.setdefault(found.st.st_ino, self.ctx.random(ID_BYTES))
            if self._never_was(name, found, log_id, recorded, bound):
                self.nameless.append(name)
                return None
            if not self._is_new(found) and not any(b.kind == found.kind and b.log_id == log_id for b in bound):
                raise Damaged("exchanged", "neither recorded here nor made in the crashed epoch")
            if is_newborn:
                newborn = self.newborn_files if found.kind == Kind.FILE else self.newborn_dirs
                newborn.append((name, log_id))
            return Entry(sealed, found.kind, log_id)
        for entry in bound:
            if entry.kind == found.kind and entry.rdev == found.st.st_rdev:
                return entry
        # Nothing in a special file says whose it is; one that no frame names was never acknowledged.
        self.nameless.append(name)
        return None

    def _never_was(self, name: bytes, found: Found, log_id: bytes, recorded: Entry | None, bound: list[Entry]) -> bool:
        """Whether this is a symlink whose target never reached the disk, or an empty directory on its way out."""
        is_bound = any(b.log_id == log_id for b in bound)
        if found.kind == Kind.SYMLINK:
            acknowledged = is_bound and recorded is not None and recorded.sealed not in self.node.unsure
            return not found.sidecar and not acknowledged
        # Renaming over a directory exchanges the two; the one replaced then lies under the other's old name.
        moved = recorded is None and any(b.kind == Kind.DIR for b in bound) and not is_bound
        return found.kind == Kind.DIR and moved and not self._inside(name)

    def _inside(self, name: bytes) -> dict[bytes, Found]:
        """What lies in directory `name`."""
        fd = self.ctx.store.open(self.node.fd, name, os.O_RDONLY | os.O_DIRECTORY)
        try:
            found, unread = survey(self.ctx, fd)
        finally:
            self.ctx.store.close(fd)
        if unread:
            raise Damaged("dir-log", "missing or not new, with entries that cannot be read")
        return found

    def _id_of(self, name: bytes, found: Found, recorded: Entry | None) -> bytes | None:
        """The id that what lies there proves; None for a creation cut short before its header or log."""
        if found.kind == Kind.SYMLINK:
            return decode_target_text(found.proof)[0]
        if found.kind == Kind.FILE and any(found.proof):
            data_header = decode_data_header(found.proof)
            self.ctx.check_header(memoryview(self.volume_key), data_header)
            return data_header.file_id
        if found.kind == Kind.DIR and any(found.proof[:LOG_HEADER_BYTES]):
            header = decode_header(found.proof[:LOG_HEADER_BYTES])
            if header.kind != KIND_DIR:
                raise Damaged("log-header", "not a directory's")
            return header.log_id
        if not self._is_newborn(name, found):
            if recorded is None or recorded.kind != found.kind:
                raise Damaged("dir-log", "missing, and not because it was new")
            return recorded.log_id  # It is damaged, which whoever opens it is told.
        return None

    def _is_newborn(self, name: bytes, found: Found) -> bool:
        """Of what has no header or log: whether that never reached the disk. Nothing older lies in such a directory."""
        if found.kind == Kind.FILE:
            return name not in self.headless
        return all(self._is_new(inner) for inner in self._inside(name).values())

    def _is_new(self, found: Found) -> bool:
        """Whether it was made in an epoch that ended uncleanly (for what is more than empty.

        Its own log or header says so).
        """
        if found.kind == Kind.FILE:
            return not any(found.proof) or self.ctx.forgives(decode_data_header(found.proof).born)
        if found.kind == Kind.DIR and not any(found.proof[:LOG_HEADER_BYTES]):
            return True
        if found.kind not in (Kind.DIR, Kind.SYMLINK) or (found.kind == Kind.SYMLINK and not found.sidecar):
            return True
        start = found.proof if found.kind == Kind.DIR else found.sidecar
        try:
            return self.ctx.forgives(decode_head(start[LOG_HEADER_BYTES:]).generation)
        except Damaged:
            return False
