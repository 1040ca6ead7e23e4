"""`cryptfs check --accept`: what the owner did to the cipher directory on purpose is right from now on.

A file or directory put back from a backup is older than this machine has seen it, or was seen deleted; a file removed
below is still named in its `.dir`; one put there is not. All of that is damage until the owner says otherwise. Only
what is authentic can be accepted: an older state of the volume, never a foreign one.

Order, and what a crash after each step leaves: entries are changed by frames like any other (a crash leaves the old
or the new entry); then everything is synced; only then is the freshness record told (a crash before leaves what
cannot be opened yet, and accepting it again works).
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeVar

from cryptfs.errors import Damaged, StoreFailed, UsageError
from cryptfs.format.datafile import decode_data_header
from cryptfs.format.dirlog import Entry
from cryptfs.format.state import State
from cryptfs.fs.directory import DirNode
from cryptfs.fs.epoch import read_state, sign_states, write_slot
from cryptfs.fs.inodes import Inode
from cryptfs.fs.symlink import read_target
from cryptfs.fs.volume import Volume
from cryptfs.names import DIR_LOG, DIR_LOG_NEW, tree_name
from cryptfs.ops.check_dirs import Seen, join, opened_name, survey
from cryptfs.ops.check_files import read_sidecar
from cryptfs.ops.offline import Access, locked_context, open_to_repair, shut
from cryptfs.types import EPOCH_MAX, ID_BYTES, Kind

T = TypeVar("T")

_UNFRESH = frozenset({"rolled-back", "deleted"})


@dataclass(frozen=True, slots=True)
class Change:
    """One thing accepted or refused. `what` for an accepted one: older, deleted, removed, added or replaced."""

    path: bytes
    what: str
    log_id: bytes


@dataclass(slots=True)
class Outcome:
    """`refused`: what is not older but damaged, or foreign; `--repair` is for that."""

    accepted: list[Change] = field(default_factory=list)
    refused: list[Change] = field(default_factory=list)


async def accept_paths(access: Access, paths: list[bytes]) -> Outcome:
    """Accept what is at `paths` (absolute in the volume, plaintext) and below.

    Raises `UsageError` (no such path), `Damaged` (a directory above one must be accepted first), `VolumeBusy`
    (mounted), `RolledBack` (the whole volume must be accepted), `StoreFailed`, OSError, key errors.
    """
    looking = await open_to_repair(access)
    accepting = _Accepting(looking.volume)
    try:
        for path in paths:
            await accepting.path(path)
        await accepting.tell()
    except BaseException:
        await shut(access, looking)
        raise
    if not await shut(access, looking):
        raise StoreFailed("the volume could not be left clean")
    return accepting.out


class _Accepting:
    def __init__(self, volume: Volume) -> None:
        self.volume = volume
        self.ctx = volume.ctx
        self.out = Outcome()
        self._logs: dict[bytes, int] = {}

    async def path(self, path: bytes) -> None:
        parts = [part for part in path.split(b"/") if part and part != b"."]
        if b".." in parts:
            raise UsageError("PATH may not contain `..`")
        here, at = self.volume.root, b"/"
        if not parts:
            await self._directory(here, at, self.ctx.config.root_dir_id)
            return
        for name in parts[:-1]:
            try:
                attr = await self.volume.names.lookup(here, name)
            except FileNotFoundError:
                raise UsageError(f"there is no {os.fsdecode(join(at, name))} in the volume") from None
            except Damaged as error:
                raise Damaged(error.reason, f"{os.fsdecode(at)}; accept that first") from error
            attr.inode.lookups += 1
            here, at = attr.inode, join(at, name)
        try:
            await self.volume.inodes.dir(here)
        except Damaged as error:
            raise Damaged(error.reason, f"{os.fsdecode(at)}; accept that first") from error
        await self._entry(here, join(at, parts[-1]), parts[-1])

    async def tell(self) -> None:
        """Make sure of it, then tell the record."""
        await self.ctx.sync_everything()
        if self._logs:
            await self.ctx.keys.accept(self._logs)

    # one name --------------------------------------------------------------------------------------------------

    async def _entry(self, parent: Inode, path: bytes, name: bytes) -> None:
        """Make `.dir` agree with the tree about one name, and accept what it stands for."""
        node = await self.volume.inodes.dir(parent)
        node.pins += 1
        try:
            sealed = (await node.keys()).names.seal(name)
            before, seen = node.entries.get(sealed), self._seen(node, tree_name(sealed))
            if before is None and seen is None:
                raise UsageError(f"there is no {os.fsdecode(path)} in the volume")
            if seen is None:
                node.apply((await node.keys()).log_key, gone=[sealed])
                self._accepted(path, "removed", before.log_id if before is not None else b"")
                return
            try:
                entry = await self._claimed(sealed, seen, before)
                if entry != before:
                    node.apply((await node.keys()).log_key, [entry])
                try:
                    await self._object(parent, path, name, entry)
                except BaseException:
                    if entry != before:
                        back, gone = ([before], []) if before is not None else ([], [sealed])
                        node.revert((await node.keys()).log_key, back, gone)
                    raise
            except Damaged as error:
                self.out.refused.append(Change(path, error.reason, seen.log_id))
                return
            if entry != before:
                self._accepted(path, "added" if before is None else "replaced", entry.log_id)
        finally:
            node.pins -= 1

    def _accepted(self, path: bytes, what: str, log_id: bytes) -> None:
        self.out.accepted.append(Change(path, what, log_id))

    def _seen(self, node: DirNode, below: bytes) -> Seen | None:
        try:
            self.ctx.store.lstat(node.fd, below)
        except FileNotFoundError:
            return None
        return survey(self.ctx.store, node.fd, [below])[below]

    async def _claimed(self, sealed: bytes, seen: Seen, before: Entry | None) -> Entry:
        """The entry that what lies there asks for. Raises `Damaged` if it cannot say whose it is."""
        if seen.kind in (Kind.FILE, Kind.DIR, Kind.SYMLINK):
            if seen.kind is Kind.FILE:
                self.ctx.check_header(await self.ctx.volume_key(), decode_data_header(seen.proof))
            if not seen.log_id:
                raise Damaged("id-mismatch", seen.error or "it does not say whose it is")
            return Entry(sealed, seen.kind, seen.log_id)
        rdev = seen.st.st_rdev if seen.kind in (Kind.CHAR, Kind.BLOCK) else 0
        if before is not None and (before.kind, before.rdev) == (seen.kind, rdev):
            return before
        return Entry(sealed, seen.kind, self.ctx.random(ID_BYTES), rdev)

    # what it stands for ----------------------------------------------------------------------------------------

    async def _object(self, parent: Inode, path: bytes, name: bytes, entry: Entry) -> None:
        """Accept a file, directory or symlink whose entry is right. Raises `Damaged` if it is not merely old."""
        volume = self.volume
        if entry.kind is Kind.SYMLINK:
            await self._either_way(path, entry.log_id, lambda: self._symlink(entry.log_id))
        elif entry.kind is Kind.FILE:
            await self._either_way(path, entry.log_id, lambda: self._file(parent, name))
        elif entry.kind is Kind.DIR:
            attr = await volume.names.lookup(parent, name)
            attr.inode.lookups += 1
            try:
                await self._directory(attr.inode, path, entry.log_id)
            finally:
                volume.inodes.forget(attr.inode.ino, 1)

    async def _either_way(self, path: bytes, log_id: bytes, open_it: Callable[[], Awaitable[int]]) -> None:
        """Open it; if it is only too old, once more on the owner's word. `open_it` returns its log's generation."""
        try:
            await open_it()
            return
        except Damaged as error:
            if error.reason not in _UNFRESH:
                raise
            what = "deleted" if error.reason == "deleted" else "older"
        self.ctx.freshness.accept(log_id)
        self._logs[log_id] = await open_it()
        self._accepted(path, what, log_id)

    async def _file(self, parent: Inode, name: bytes) -> int:
        files = self.volume.files
        attr = await self.volume.names.lookup(parent, name)
        file = await files.open(attr.inode)
        try:
            if not file.journal.loaded:
                await file.journal.load()
            if file.journal.gap:
                raise Damaged("frame", "frames of its sidecar are damaged")
            return file.journal.last_gen
        finally:
            await files.release(attr.inode)

    async def _symlink(self, log_id: bytes) -> int:
        await read_target(self.ctx, log_id)
        replay = read_sidecar(self.ctx, log_id)
        return replay.heads[-1].generation if replay is not None else 0

    async def _directory(self, inode: Inode, path: bytes, dir_id: bytes) -> None:
        """A directory and all that is below it."""

        async def open_it() -> int:
            return (await self.volume.inodes.dir(inode)).last_gen

        await self._either_way(path, dir_id, open_it)
        node = await self.volume.inodes.dir(inode)
        node.pins += 1
        try:
            names = (await node.keys()).names
            wanted = {tree_name(sealed): names.open(sealed) for sealed in node.entries}
            tree = await self.ctx.in_thread(survey, self.ctx.store, node.fd)
            for below in tree.keys() - wanted.keys() - {DIR_LOG, DIR_LOG_NEW}:
                name = opened_name((await node.keys()).names, below)
                if name == below:
                    self.out.refused.append(Change(join(path, below), "name", tree[below].log_id))
                else:
                    wanted[below] = name
            for name in wanted.values():
                await self._entry(inode, join(path, name), name)
        finally:
            node.pins -= 1


# the whole volume ----------------------------------------------------------------------------------------------


async def accept_volume(access: Access, tell: Callable[[int], Awaitable[tuple[int, int]]]) -> State:
    """Take the whole volume as it is, however old; the new `state`.

    `tell` has the freshness record forget all it knows of the volume but the given `state` sequence, and returns the
    sequence and the mount epoch it had seen. The volume goes on from there: so nothing of the history that is given
    up, which whoever copied the cipher directory may still have, counts as newer than what is written from now on.

    A crash before the end leaves a volume that mounts, or that has to be accepted again.

    Raises `VolumeBusy` (mounted), `VolumeDamaged`, OSError, key errors.
    """
    with locked_context(access) as ctx:
        # What is recorded must be durable: see `fs.freshness`.
        await ctx.sync_everything()
        state = await read_state(ctx.store, access.keys, access.config.volume_id)
        sequence, epoch = await tell(state.sequence)
        now = rebased(state, sequence, epoch)
        (slot,) = await sign_states(access.keys, access.config.volume_id, now)
        await ctx.in_thread(write_slot, ctx.store, now, slot)
        await access.keys.record({}, (), now.sequence)
        return now


def rebased(state: State, sequence: int, epoch: int) -> State:
    """`state`, going on after `sequence` and `epoch`, clean; in the slot that does not hold it."""
    settled = state if state.clean else state.next_epoch()
    after = max(state.sequence, sequence) + 1
    after += (after & 1) == (state.sequence & 1)
    return State(after, min(max(settled.epoch, epoch), EPOCH_MAX), clean=True, unclean=settled.unclean)
