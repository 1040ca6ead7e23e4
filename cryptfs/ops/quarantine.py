"""Where a repair puts what it cannot place: a directory in the volume, and for bare ciphertext `damaged/` beside it.

`cryptfs-quarantine-<date>` is an ordinary directory of the volume, seen in the mount; below it things lie under the
path they were found at. `CIPHERDIR/damaged/` keeps data files, sidecars and logs of which not everything could be
read, as they were: nothing reads them, and who has given up on them deletes them.

Each move is `.dir` frame first, tree second, as everywhere (`fs.changing`); a directory is made durable before
anything enters it. What goes to `damaged/` is linked there before its old name goes.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from datetime import UTC, datetime

from cryptfs.errors import Damaged
from cryptfs.format.dirlog import Entry
from cryptfs.fs.context import FsContext, sidecar_name, twin_name
from cryptfs.fs.inodes import Inode
from cryptfs.fs.making import Owner
from cryptfs.fs.opening_closed import wider
from cryptfs.fs.volume import Volume
from cryptfs.names import NAME_MAX_BYTES, is_long, sealed_from_tree, tree_name
from cryptfs.ports import RENAME_NOREPLACE
from cryptfs.types import Kind

PREFIX = b"cryptfs-quarantine-"
DAMAGED = b"damaged"


class Quarantine:
    """One repair's place for what has none. The directory appears with the first thing put into it."""

    def __init__(self, volume: Volume) -> None:
        self.volume = volume
        self.ctx: FsContext = volume.ctx
        self.path = b""
        self._top: Inode | None = None
        self._below: dict[bytes, Inode] = {}
        self._made: list[tuple[Inode, bytes, Inode]] = []
        self._own = Owner(os.geteuid(), os.getegid())

    async def directory(self, path: bytes) -> Inode:
        """The directory in the quarantine that stands for the volume's directory `path` (absolute, plaintext)."""
        inode = self._top or await self._make_top()
        done = b""
        for name in path.split(b"/"):
            if name:
                done += b"/" + name
                known = self._below.get(done)
                if known is None:
                    known = self._below[done] = await self._mkdir(inode, name)
                inode = known
        return inode

    def original(self, path: bytes) -> bytes:
        """The path something in this quarantine was found at; any other path as it is."""
        return path[len(self.path) :] if self.path and (path + b"/").startswith(self.path + b"/") else path

    def shown(self, path: bytes, name: bytes) -> bytes:
        """Where something that was put in as (`path`, `name`) is seen in the mount."""
        return b"/".join([self.path, *[part for part in path.split(b"/") if part], name])

    async def _make_top(self) -> Inode:
        day = datetime.fromtimestamp(self.ctx.clock.time_ns() / 1e9, UTC).strftime("%Y-%m-%d").encode()
        name = await self.free_name(self.volume.root, PREFIX + day)
        self._top = await self._mkdir(self.volume.root, name)
        self.path = b"/" + name
        return self._top

    async def _mkdir(self, parent: Inode, name: bytes) -> Inode:
        free = await self.free_name(parent, name)
        attr = await self.volume.names.mkdir(parent, free, 0o700, self._own)
        attr.inode.lookups += 1
        await self.volume.files.sync_dirs(attr.inode)
        self._made.append((parent, free, attr.inode))
        return attr.inode

    async def tidy(self) -> None:
        """Remove directories that nothing stayed in."""
        for parent, name, _ in reversed(self._made):
            with suppress(OSError):
                await self.volume.names.rmdir(parent, name)
                if self.path == b"/" + name and parent is self.volume.root:
                    self.path, self._top = b"", None

    async def free_name(self, parent: Inode, name: bytes) -> bytes:
        """`name`, or with a number after it if it is taken; names that cannot be are shortened."""
        name = name.replace(b"/", b"_").replace(b"\0", b"_")[: NAME_MAX_BYTES - 8] or b"unnamed"
        node = await self.volume.inodes.dir(parent)
        names = (await node.keys()).names
        tried, number = name, 1
        while names.seal(tried) in node.entries:
            number += 1
            tried = b"%s.%d" % (name, number)
        return tried

    async def adopt(self, dir_fd: int, below: bytes, into: Inode, name: bytes, entry: tuple[Kind, bytes, int]) -> bytes:
        """Move what lies at (`dir_fd`, `below`) into `into` as it is; its name there. `entry`: kind, id, rdev."""
        volume, store = self.volume, self.ctx.store
        free = await self.free_name(into, name)
        node = await volume.inodes.dir(into)
        node.pins += 1
        await node.lock.acquire_exclusive()
        try:
            sealed = (await node.keys()).names.seal(free)
            node.apply((await node.keys()).log_key, [Entry(sealed, *entry)])
            try:
                if is_long(sealed):
                    await self.ctx.in_thread(store.fdatasync, node.log.fd)
                rename_even_if_read_only(self.ctx, dir_fd, below, node.fd, tree_name(sealed))
            except BaseException:
                node.revert((await node.keys()).log_key, gone=[sealed])
                raise
        finally:
            node.lock.release_exclusive()
            node.pins -= 1
        return free

    # bare ciphertext -------------------------------------------------------------------------------------------

    def keep_aside(self, dir_fd: int, below: bytes, name: bytes) -> None:
        """Link the file at (`dir_fd`, `below`) into `damaged/` as `name`; the caller removes the old name.

        Nothing happens if there is no such file, or if it lies there already. Raises OSError.
        """
        store = self.ctx.store
        try:
            st = store.lstat(dir_fd, below)
        except FileNotFoundError:
            return
        with suppress(FileExistsError):
            store.mkdir(store.root(), DAMAGED)
        fd = store.open(store.root(), DAMAGED, os.O_RDONLY | os.O_DIRECTORY)
        try:
            tried, number = name, 1
            while True:
                try:
                    store.link(dir_fd, below, fd, tried)
                except FileExistsError:
                    if store.lstat(fd, tried).st_ino == st.st_ino:
                        return
                    number += 1
                    tried = b"%s.%d" % (name, number)
                else:
                    break
            store.fsync(fd)
            store.fsync(store.root())
        finally:
            store.close(fd)

    def keep_sidecar_aside(self, log_id: bytes) -> None:
        """Link an id's sidecar and twin into `damaged/`. Raises OSError."""
        where = self.ctx.sidecar_dir(log_id)
        self.keep_aside(where, sidecar_name(log_id), log_id.hex().encode() + b".sidecar")
        self.keep_aside(where, twin_name(log_id), log_id.hex().encode() + b".twin")


def open_chain(ctx: FsContext, chain: tuple[bytes, ...]) -> int:
    """A descriptor of the directory in `tree/` that `chain` leads to. Raises OSError."""
    store = ctx.store
    fd = store.open(store.root(), b"tree", os.O_RDONLY | os.O_DIRECTORY)
    for name in chain:
        try:
            below = store.open(fd, name, os.O_RDONLY | os.O_DIRECTORY)
        finally:
            store.close(fd)
        fd = below
    return fd


async def inode_of(volume: Volume, chain: tuple[bytes, ...]) -> Inode:
    """The directory that `chain` leads to, as `.dir` and tree agree on it. Raises `Damaged`, OSError."""
    inode = volume.root
    for name in chain:
        node = await volume.inodes.dir(inode)
        sealed = sealed_from_tree(name)
        entry = node.entries.get(sealed) if sealed is not None else None
        if entry is None:
            entry = next((e for e in node.entries.values() if tree_name(e.sealed) == name), None)
        if entry is None or entry.kind is not Kind.DIR:
            raise Damaged("missing", "no such directory any more")
        st = volume.ctx.store.lstat(node.fd, name)
        below = volume.inodes.meet(st.st_ino, Kind.DIR, entry.log_id, inode, name)
        below.lookups += 1
        inode = below
    return inode


async def drop_entry(volume: Volume, parent: Inode, sealed: bytes) -> None:
    """Have `.dir` forget an entry that the tree does not have. Raises OSError, key errors."""
    node = await volume.inodes.dir(parent)
    node.pins += 1
    await node.lock.acquire_exclusive()
    try:
        node.apply((await node.keys()).log_key, gone=[sealed])
    finally:
        node.lock.release_exclusive()
        node.pins -= 1


def rename_even_if_read_only(ctx: FsContext, src_fd: int, src: bytes, dst_fd: int, dst: bytes, flags: int = 0) -> None:
    """renameat2(2) that replaces nothing; a directory its owner may not write is moved all the same."""
    store = ctx.store
    flags = flags or RENAME_NOREPLACE
    try:
        store.rename(src_fd, src, dst_fd, dst, flags)
    except PermissionError:
        if not stat.S_ISDIR(store.lstat(src_fd, src).st_mode):
            raise
        with wider(store, src_fd, src, stat.S_IWUSR):
            store.rename(src_fd, src, dst_fd, dst, flags)
