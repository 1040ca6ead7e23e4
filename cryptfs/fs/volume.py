"""A volume in use, from taking its lock to leaving it clean. What `fuse` and the offline commands work on."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable

import trio

from cryptfs.errors import CryptfsError, Damaged, RolledBack, VolumeBusy, VolumeDamaged
from cryptfs.format.log import HEADER_BYTES
from cryptfs.fs.context import FsContext, VolumeConfig, log, open_ours
from cryptfs.fs.epoch import read_state, sign_states, write_slot
from cryptfs.fs.files import Files
from cryptfs.fs.inodes import ROOT_INO, Inode, InodeTable
from cryptfs.fs.namespace import Namespace
from cryptfs.fs.reaper import Reaper, remove_tree
from cryptfs.fs.reserve import Reserve
from cryptfs.fs.sealed_log import header_of
from cryptfs.fs.xattr import Xattrs
from cryptfs.names import DIR_LOG
from cryptfs.ports import Clock, DekProvider, Random, Store


class Volume:
    """One open volume. Make it with `open_volume`, run `serve` beside its use, end with `close`."""

    def __init__(self, ctx: FsContext, root_ino: int = ROOT_INO) -> None:
        self.ctx = ctx
        self.inodes = InodeTable(ctx, root_ino)
        self.reaper = Reaper(ctx)
        self.files = Files(ctx, self.inodes, self.reaper)
        self.names = Namespace(ctx, self.inodes, self.files, self.reaper)
        self.xattrs = Xattrs(ctx, self.inodes, self.files)
        self.reserve = Reserve()
        self._background = trio.CancelScope()
        self._idle: trio.Event | None = None
        self._flushing = trio.Lock()
        self._closed = False

    @property
    def root(self) -> Inode:
        """The root directory."""
        return self.inodes.root

    async def serve(self, *others: Callable[[], Awaitable[None]]) -> None:
        """Background work: settling files, deleting what is dead, and `others`. Ends when cancelled, or by `close`."""
        self._idle = trio.Event()
        try:
            with self._background:
                async with trio.open_nursery() as nursery:
                    self.ctx.spawn = nursery.start_soon
                    if not self.ctx.read_only:
                        nursery.start_soon(self.ctx.freshness.serve)
                        nursery.start_soon(self.files.serve)
                        nursery.start_soon(self.reserve.serve)
                        nursery.start_soon(self.reaper.serve)
                    for other in others:
                        nursery.start_soon(other)
                    await trio.sleep_forever()
        finally:
            self.ctx.spawn = None
            self._idle.set()

    async def flush(self) -> None:
        """Write and sync everything now, with the keys at hand: the agent is going away. Errors are logged."""
        if self.ctx.read_only:
            return
        async with self._flushing:
            if not self._closed:
                await self.files.commit_all()
                await self.files.sync_all()

    def unwritten(self) -> int:
        """Files and directories with changes that no frame says yet: they are in memory, and nowhere else."""
        files = (i.file for i in self.inodes.with_files())
        owing = sum(1 for f in files if f is not None and not f.unlinked and f.journal.needs_frame)
        return owing + sum(node.has_pending for node in self.inodes.open_dirs())

    def statfs(self) -> os.statvfs_result:
        """Of the backing file system."""
        return self.ctx.store.fstatvfs(self.ctx.store.root())

    async def close(self) -> bool:
        """Make everything durable and leave the volume; True if it was left clean.

        Only for a volume nobody uses any more.
        """
        ctx = self.ctx
        clean = True
        # Neither may be in the middle of a sync when the descriptors are closed.
        self._background.cancel()
        if self._idle is not None:
            await self._idle.wait()
        async with self._flushing:
            self._closed = True
            if not ctx.read_only:
                try:
                    clean = await self._leave()
                except (OSError, CryptfsError) as error:
                    log.error("the volume was not left clean: %s", error)
                    clean = False
            self.inodes.close()
            ctx.close()
        return clean

    async def _leave(self) -> bool:
        """Frames, sync, cuts, deletions, sync, and then the word that all of it was done."""
        ctx, store = self.ctx, self.ctx.store
        assert ctx.state is not None
        good = await self.files.commit_all()
        good = await self.files.sync_all() and good
        await ctx.freshness.sync()
        if ctx.doubts:
            log.error("the volume was not left clean: syncing it failed before, not everything was written again")
            good = False
        for inode in self.inodes.all():
            if inode.is_unnamed:
                # Somebody still has it, on a mount that was detached: it ends with us.
                self.reaper.add_id(inode.log_id)
        await self.reaper.flush()
        await self._record()
        if not good:
            return False
        await ctx.sync_everything()
        ended = ctx.state.ended()
        await ctx.in_thread(write_slot, store, ended, ctx.farewell)
        await self._record(ended.sequence)
        return True

    async def _record(self, state_sequence: int | None = None) -> None:
        """Tell the freshness record. Never raises: what it is not told now, a replay of could go unnoticed."""
        try:
            await self.ctx.freshness.record(state_sequence)
        except CryptfsError as error:
            log.error("the freshness record was not told what is durable: %s", error)


async def open_volume(
    config: VolumeConfig, store: Store, keys: DekProvider, clock: Clock, random: Random, *, read_only: bool = False,
    root_ino: int = ROOT_INO,
) -> Volume:  # fmt: skip
    """Take the lock, begin a mount epoch, empty `tmp/`. `root_ino`: see `InodeTable`.

    Raises `VolumeBusy` (another process has it), `VolumeDamaged`, `RolledBack`, `FreshnessUnavailable`, OSError, key
    errors.
    """
    ctx = FsContext(config, store, keys, clock, random, read_only=read_only)
    try:
        store.lock()
    except BlockingIOError:
        raise VolumeBusy("the volume is mounted or being changed by another process") from None
    try:
        state = await read_state(store, keys, config.volume_id)
        _open_directories(ctx)
        _check_newest(ctx)
        if await keys.begin(state.sequence):
            log.info("this machine sees the volume for the first time: an older state of it could not be told")
        if read_only:
            # Nothing is written, so no epoch begins; forgiveness is decided as if one had.
            ctx.state = state.next_epoch()
        else:
            await ctx.sync_everything()
            ctx.state = state.next_epoch()
            begun, ctx.farewell = await sign_states(keys, config.volume_id, ctx.state, ctx.state.ended())
            await ctx.in_thread(write_slot, store, ctx.state, begun)
            # Only now: what is recorded before it is durable, a power cut turns into an alarm.
            await keys.record({}, (), ctx.state.sequence)
            await ctx.in_thread(_empty_tmp, ctx)
        if not state.clean:
            log.warning("the volume was not left clean; what a crash left is settled as it is used")
    except BaseException:
        ctx.close()
        raise
    return Volume(ctx, root_ino)


def _open_directories(ctx: FsContext) -> None:
    """Open them once, on the loop, so that no thread ever adds to the table of descriptors. Raises `VolumeDamaged`."""
    for path in (b"tree",), (b"tmp",), *((b"sidecars", b"%02x" % first) for first in range(256)):
        try:
            ctx.dir_fd(*path)
        except (FileNotFoundError, NotADirectoryError):
            raise VolumeDamaged(f"the volume's directory `{b'/'.join(path).decode()}` is missing") from None


def _check_newest(ctx: FsContext) -> None:
    """Raise `RolledBack` if the root directory's log is sealed under a later KEK than the `volume` file knows.

    Then an older `volume` was put back. The header is not authenticated, which takes a key that may be destroyed:
    whoever damages it gets the whole volume refused instead of its root directory, which amounts to the same.
    """
    store = ctx.store
    try:
        fd = open_ours(store, ctx.dir_fd(b"tree"), DIR_LOG, os.O_RDONLY)
    except (OSError, Damaged):
        return  # the root directory's own opening says what is wrong with it
    try:
        header = header_of(store.pread(fd, HEADER_BYTES, 0))
    except (OSError, Damaged):
        return
    finally:
        store.close(fd)
    if header.kek_version > ctx.config.volume_key_kek:
        raise RolledBack("the volume file is older than the volume: its root directory names a later key version")


def _empty_tmp(ctx: FsContext) -> None:
    tmp = ctx.dir_fd(b"tmp")
    for name in ctx.store.listdir(tmp):
        remove_tree(ctx.store, tmp, name)
