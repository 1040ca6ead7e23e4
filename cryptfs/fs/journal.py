"""Making a file durable, and finding it again: its sidecar's frames, fsync, opening, and what a crash left.

fsync: one frame appended, then data, twin and log synced at the same time. Only if all of that returned 0 do the new
versions count as durable; only then is the data file cut, and only the next frame says so (`durable_up_to`).

A crash before the frame: the file as of the frame before. Between frame and syncs: any of them may be missing, and
the frame is above `durable_up_to`, so `recovery` falls back to the longest prefix that authenticates; the versions it
needs are all still in place because writers never touch the home of a durable version. After the syncs: the new
state, whatever `durable_up_to` says.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Protocol

import trio

from cryptfs.blocks.extents import HOME_TWIN, LOGGED, ExtentMap
from cryptfs.errors import AgentUnavailable, Damaged, VolumeLocked
from cryptfs.format.datafile import HEADER_BYTES, decode_data_header
from cryptfs.format.log import HEADER_BYTES as LOG_HEADER_BYTES
from cryptfs.format.log import KIND_FILE, LogHeader
from cryptfs.format.sidecar import Sealed, SidecarPayload
from cryptfs.fs.context import FsContext, log, open_ours, sidecar_name, twin_name
from cryptfs.fs.freshness import check
from cryptfs.fs.history import POISON, XATTRS_LOST, build_map, xattrs_after
from cryptfs.fs.log_gap import take_up
from cryptfs.fs.recovery import recover, restart_newborn
from cryptfs.fs.resync import write_again
from cryptfs.fs.rewrapping import Rewrapping
from cryptfs.fs.sealed_log import Frame, Replay, SealedLog, authenticate, parse, read_log
from cryptfs.fs.state import FileState
from cryptfs.ports import KeyRun
from cryptfs.types import Purpose, epoch_of

_COMPACT_MIN_BYTES = 64 * 1024


class Owner(Protocol):
    """What a journal needs to know of its file's place in the tree (`files`)."""

    async def sync_entry(self) -> None:
        """Make the file's directory entry durable. Raises OSError."""
        ...

    def sidecar_read_ahead(self) -> Replay | None:
        """The sidecar, not authenticated, if it was read ahead."""
        ...

    async def warm(self, parsed: Replay) -> None:
        """Get the keys that reading a small file takes into the cache, if that can be done."""
        ...


class Journal:
    """The sidecar of one file."""

    def __init__(self, ctx: FsContext, state: FileState, owner: Owner) -> None:
        self.ctx = ctx
        self.state = state
        self.owner = owner
        self.loaded = False
        self.gap = False
        """Frames of the log are lost (`log_gap`)."""
        self.log: SealedLog | None = None
        self.log_wrapped = b""
        self.kek_version = 0
        self.holes: list[tuple[int, int]] = []
        self.durable_gen = 0
        self.entry_durable = False
        self.xattrs: Sealed | None = None
        """The xattr set, sealed; None: there are none."""
        self._framed_size: int | None = None
        self._framed_xattrs: Sealed | None = None
        self._owes_word = False
        """An fsync succeeded and no frame says so yet: without one, a crash could not be told from damage."""
        self._last_gen = 0
        self._found_gen = 0
        """The generation the log ended at when it was opened."""
        self._sidecar_new = False
        self._syncing = trio.Lock()
        self._distrusted = False
        self._doubts = 0

    # a file that was created just now --------------------------------------------------------------------------

    def begin(self, kek_version: int, log_wrapped: bytes, xattrs: Sealed | None = None) -> None:
        """A new, empty file: its sidecar appears with its first frame."""
        self.xattrs, self._framed_xattrs = xattrs, None
        self.kek_version = kek_version
        self.log_wrapped = log_wrapped
        self._doubts = self.ctx.doubts
        self.loaded = True
        self.state.acked = False
        self.state.twin_unsynced = False

    # frames ----------------------------------------------------------------------------------------------------

    @property
    def needs_frame(self) -> bool:
        """Something changed that no frame says yet; also a new file's emptiness."""
        if not self.loaded:
            return False
        changed = self._framed_size != self.state.size or bool(self.holes) or bool(self.state.blocks.fresh())
        changed = changed or self.xattrs is not self._framed_xattrs
        return changed or (self.log is not None and self.log.torn)

    @property
    def needs_settling(self) -> bool:
        """Acknowledged versions are kept aside, a cut waits, a sync failed or the log is bloated."""
        if not self.loaded:
            return False
        return len(self.state.displaced) > 0 or self.state.cut_pending or self._distrusted or self.bloated

    @property
    def sync_failed(self) -> bool:
        """A sync of this file, or of everything, failed: the next one is to be believed only after `write_again`."""
        return self._distrusted or self._doubts != self.ctx.doubts

    def distrust(self) -> None:
        """What was written since the last sync may not be in its place: the next sync has to find out."""
        self._distrusted = True

    async def log_key(self) -> memoryview:
        """The log's MAC key; good until the next await."""
        while True:
            wrapped = self.log_wrapped
            key = self.ctx.keys.peek(wrapped)
            if key is None:
                run = KeyRun(self.state.file_id, Purpose.LOG_FILE, self.kek_version, (wrapped,))
                key = (await self.ctx.keys.unwrap([run]))[0][0]
            # A rotation gives the log another key; whoever waited must not append with the one before.
            if wrapped is self.log_wrapped:
                return key

    async def commit(self) -> None:
        """Append a frame for whatever no frame says yet. Not durable. The caller holds the file's lock alone."""
        if self.needs_frame:
            self._append(await self.log_key())
        elif self._owes_word:
            # Without a key the word waits: it matters after a crash only, and an epoch that ends well needs none.
            with suppress(AgentUnavailable, VolumeLocked):
                self._append(await self.log_key())

    def _append(self, key: memoryview) -> None:
        state, ctx = self.state, self.ctx
        ctx.sidecar_writes += 1
        fresh = state.blocks.fresh()
        says, gone = self.xattrs is not self._framed_xattrs, self.xattrs is None
        payload = SidecarPayload(
            tuple(e.run() for e in fresh), tuple(self.holes), self.xattrs if says else None, says and gone
        )
        generation = ctx.next_generation()
        frame = Frame(
            generation, self.durable_gen, state.size, payload.encode(), payload.extent(), payload.flags
        )  # fmt: skip
        if self.log is None:
            header = LogHeader(KIND_FILE, self.kek_version, state.file_id, self.log_wrapped)
            where = ctx.sidecar_dir(state.file_id)
            self.log = SealedLog.create(ctx.store, where, sidecar_name(state.file_id), header, key, frame)
            self._sidecar_new = True
        else:
            self.log.append(ctx.store, key, frame)
        for extent in fresh:
            extent.stage = LOGGED
            extent.generation = generation
        self.holes.clear()
        self._framed_size = state.size
        self._framed_xattrs = self.xattrs
        self._owes_word = False
        self._last_gen = generation

    async def set_xattrs(self, xattrs: Sealed | None) -> None:
        """Another xattr set, in a frame of its own at once. Not durable. The caller holds the file's lock alone.

        Raises OSError, key errors; then it is as it was.
        """
        key = await self.log_key()
        before, self.xattrs = self.xattrs, xattrs
        try:
            self._append(key)
        except BaseException:
            self.xattrs = before
            raise

    # fsync -----------------------------------------------------------------------------------------------------

    async def fsync(self, *, data_only: bool = False) -> None:
        """Return once everything written before the call is durable.

        Raises OSError. After a sync that failed, the next one writes everything again first (`resync`).
        """
        async with self._syncing:
            if not self.loaded:
                # Whoever wrote the file may have closed it: its log and twin are as unsynced as its data.
                await self.load()
            lock = self.state.lock
            await lock.acquire_exclusive()
            try:
                await self._all_said()
            except BaseException:
                lock.release_exclusive()
                raise
            # Readers may go on. Writers wait: a block may not be overwritten in its home while that is being synced.
            lock.downgrade()
            try:
                self.state.restore_mtime()
                await self._sync(data_only=data_only)
                self._settled()
            finally:
                lock.release_shared()

    async def _all_said(self) -> None:
        """What a failed sync was about is written again, and a frame names whatever is new. The lock is held alone."""
        if self.sync_failed:
            doubts = self.ctx.doubts
            await write_again(self)
            self._distrusted, self._doubts = False, doubts
        if self.needs_frame:
            self._append(await self.log_key())

    async def _sync(self, *, data_only: bool) -> None:
        state, store = self.state, self.ctx.store
        calls: list[tuple[Callable[[int], None], int]] = []
        if state.data_unsynced or (state.meta_unsynced and not data_only):
            calls.append((store.fdatasync if data_only else store.fsync, state.data_fd))
        if state.twin_fd is not None and state.twin_unsynced:
            calls.append((store.fdatasync, state.twin_fd))
        if self.log is not None and self.log.unsynced:
            calls.append((store.fdatasync, self.log.fd))
        if self._sidecar_new or state.twin_new:
            calls.append((store.fsync, self.ctx.sidecar_dir(state.file_id)))
        if not data_only:
            # Before the call: who changes attributes takes no lock, and what comes during the sync is not part of it.
            state.meta_unsynced = False
        try:
            with self.ctx.freshness.doubted_on_failure(state.file_id):
                await self.ctx.in_threads(calls)
        except OSError:
            self._distrusted = True
            state.meta_unsynced = state.meta_unsynced or not data_only
            raise
        state.data_unsynced = state.twin_unsynced = state.twin_new = False
        self._named()
        if self.log is not None:
            self.log.unsynced = False
        if not self.entry_durable:
            # Before the call: a rename during it is not part of it.
            self.entry_durable = True
            try:
                await self.owner.sync_entry()
            except BaseException:
                self.entry_durable = False
                raise

    def _named(self) -> None:
        """The log's directory was synced: the log has its name for good. No replacing comes between, see `_syncing`."""
        self._sidecar_new = False
        self.ctx.renamed_logs.pop(self.state.file_id, None)

    def _settled(self) -> None:
        """All of the file is durable as it is now; what stood aside is dead."""
        self._owes_word = self._owes_word or self.durable_gen != self._last_gen
        if self._last_gen:
            self.ctx.freshness.durable(self.state.file_id, self._last_gen)
        self.durable_gen = self._last_gen
        self.state.acked = True
        self.state.blocks.settle()
        self.state.displaced = ExtentMap(self.ctx.config.block_size)
        self.cut()

    def cut(self) -> None:
        """Shorten the data file to the file's size; not before that size is durable, unless nothing of the file is."""
        state, store = self.state, self.ctx.store
        if not state.cut_pending:
            return
        store.ftruncate(state.data_fd, HEADER_BYTES + state.size)
        state.data_len = state.size
        state.data_unsynced = state.mtime_stale = True
        # At an unmount nothing comes after this that would.
        state.restore_mtime()

    def settle_frame(self, key: memoryview) -> None:
        """A frame of this epoch that says what the file is now, so that the next opening need not ask again."""
        self._append(key)

    @property
    def bloated(self) -> bool:
        """Most of the log is dead frames."""
        log, blocks = self.log, self.state.blocks
        if log is None or log.end < _COMPACT_MIN_BYTES + 2 * log.live_from:
            return False
        live = 56 * sum(e.end - e.first for e in blocks) + 32 * len(blocks)
        if self.xattrs is not None:
            live += len(self.xattrs.sealed)
        if self.xattrs is XATTRS_LOST:
            return False
        return log.end >= _COMPACT_MIN_BYTES + 2 * live and all(e.home != POISON for e in blocks)

    async def compact(self) -> None:
        """Sync the file and rewrite its log as one snapshot, if it is bloated. Raises as `fsync` does.

        The snapshot vouches for everything it names, so all of that is durable before it takes the log's place.
        """
        if not self.bloated:
            return
        state = self.state
        async with self._syncing:
            await state.lock.acquire_exclusive()
            try:
                # Looked at again under the locks: whoever held them may have closed or rewritten the log.
                if self.sync_failed or not self.bloated:
                    return
                if self.needs_frame:
                    self._append(await self.log_key())
                state.restore_mtime()
                await self._sync(data_only=True)
                self._settled()
                await self._rewrite()
            finally:
                state.lock.release_exclusive()

    async def _rewrite(self) -> None:
        assert self.log is not None
        payload = SidecarPayload(tuple(e.run() for e in self.state.blocks), xattrs=self.xattrs)
        frame = self._snapshot(self.ctx.next_generation(), payload)
        # The key is copied for the thread, which may outlive its time in the cache by one disk write.
        await self._replace(bytearray(await self.log_key()), self.log.header, frame)
        await self._replaced()

    def _snapshot(self, generation: int, payload: SidecarPayload) -> Frame:
        return Frame(
            generation, self.durable_gen, self.state.size, payload.encode(), payload.extent(), payload.flags
        )  # fmt: skip

    async def _replace(self, key: bytearray, header: LogHeader, *frames: Frame) -> None:
        """Put a log of these frames in this one's place. `key` is wiped. Raises OSError; then nothing has changed."""
        state, ctx = self.state, self.ctx
        assert self.log is not None
        where = ctx.sidecar_dir(state.file_id)
        ctx.sidecar_writes += 1
        try:
            self.log = await ctx.in_thread(
                self.log.rewrite, ctx.store, where, sidecar_name(state.file_id), key, header, *frames
            )
        finally:
            key[:] = bytes(len(key))
        # From here on the log is the new one, whatever becomes of the sync.
        self._last_gen = frames[-1].generation
        self._sidecar_new = True
        ctx.renamed_logs[state.file_id] = self._last_gen

    async def _replaced(self) -> None:
        """After `_replace`: make it durable that the new log has the name. Raises OSError."""
        state, ctx = self.state, self.ctx
        where, generation = ctx.sidecar_dir(state.file_id), self._last_gen
        with ctx.freshness.doubted_on_failure(state.file_id):
            await ctx.in_thread(ctx.store.fsync, where)
        self._named()
        self.durable_gen = generation
        ctx.freshness.durable(state.file_id, generation)

    # rotation --------------------------------------------------------------------------------------------------

    def is_under(self, kek_version: int) -> bool:
        """Whether everything that reading this file takes is wrapped under this KEK or a newer one."""
        attrs = self.xattrs is None or self.xattrs is XATTRS_LOST or self.xattrs.kek_version >= kek_version
        blocks = all(e.home == POISON or e.kek_version >= kek_version for e in self.state.blocks)
        return self.kek_version >= kek_version and attrs and blocks

    async def rotate(self, kek_version: int, pause: Callable[[], Awaitable[None]]) -> None:
        """Rewrite the log under the newest KEK, at least `kek_version`, with a new MAC key; nothing to do if it is.

        The new log is on disk before it takes the old one's name; that it has it is durable with the file's next fsync
        or the next sync of everything (`FsContext.renamed_logs`), and both say the same until then.
        `pause` is awaited between requests to the agent, without a lock. Raises as `fsync` does; `Damaged` for a file
        of which something is lost: a snapshot would make it forgotten, so such a log stays as it is.
        """
        if not self.loaded:
            await self.load()
        state = self.state
        anew = Rewrapping(self.ctx.keys, state.file_id, kek_version)
        # Most of it before the file is held up; what is written meanwhile is under the newest KEK already.
        for portion in anew.portions(list(state.blocks), self.ctx.config.block_size):
            await anew.blocks(portion)
            await pause()
        async with self._syncing:
            await state.lock.acquire_exclusive()
            try:
                if not self.is_under(kek_version):
                    await self._rotate(anew)
            finally:
                state.lock.release_exclusive()

    async def _rotate(self, anew: Rewrapping) -> None:
        state, ctx = self.state, self.ctx
        if self.xattrs is XATTRS_LOST or any(e.home == POISON for e in state.blocks):
            raise Damaged("frame", "a part of the file is lost with a damaged frame")
        doubtful = self.sync_failed
        await self._all_said()
        # Mounting made durable what earlier epochs left: of a file that is as they left it nothing has to be synced.
        assert ctx.state is not None
        older = epoch_of(self._last_gen) < ctx.state.epoch
        synced = older or self._last_gen <= ctx.synced_gen
        if doubtful or not synced or len(state.displaced) or state.cut_pending:
            state.restore_mtime()
            await self._sync(data_only=True)
            self._settled()
        elif not older:
            # A sync of everything was as good as the file's own. What the snapshot names may not be overwritten.
            self._settled()
        while portion := next(anew.portions(state.blocks, ctx.config.block_size), None):
            await anew.blocks(portion)
        xattrs = await anew.sealed(self.xattrs)
        made = await anew.log_key(Purpose.LOG_FILE)
        # No await between here and the copy: the key could be wiped meanwhile.
        key = bytearray(made.keys[0])
        blocks = [anew.extent(e) for e in state.blocks]
        payload = SidecarPayload(tuple(e.run() for e in blocks), xattrs=xattrs)
        # The snapshot says what the frame before said, under its number: when things were made is told by that. The
        # one after it makes every older log older than what was seen.
        snapshot = self._snapshot(self._last_gen, payload)
        word = Frame(ctx.next_generation(), self.durable_gen, state.size, SidecarPayload().encode())
        header = LogHeader(KIND_FILE, made.kek_version, state.file_id, made.wrapped[0])
        await self._replace(key, header, snapshot, word)
        # In one stretch with it: what is in memory must lead to the keys as the log does.
        self.log_wrapped, self.kek_version = header.log_wrapped, header.kek_version
        for old, new in zip(state.blocks, blocks, strict=True):
            old.take_wraps(new)
        self.xattrs = self._framed_xattrs = xattrs
        self._owes_word = False

    # opening ---------------------------------------------------------------------------------------------------

    async def load(self, *, to_read: bool = True) -> None:
        """Find out what the file is: header, sidecar, block map. `to_read`: it will be read, get keys for that, too.

        Raises `Damaged`, OSError, key errors; may be tried again.
        """
        await self.state.lock.acquire_exclusive()
        try:
            if not self.loaded:
                await self._load(to_read=to_read)
        finally:
            self.state.lock.release_exclusive()

    async def _load(self, *, to_read: bool) -> None:
        ctx, state, store = self.ctx, self.state, self.ctx.store
        raw_header = store.pread(state.data_fd, HEADER_BYTES, 0)
        data_size = store.fstat(state.data_fd).st_size
        born = 0
        if any(raw_header) or not ctx.crashed_before:
            header = decode_data_header(raw_header)
            if header.file_id != state.file_id:
                raise Damaged("id-mismatch", "the data file is another file's")
            ctx.check_header(await ctx.volume_key(), header)
            born = header.born
        else:
            raw_header = b""
        where, name = ctx.sidecar_dir(state.file_id), sidecar_name(state.file_id)
        mode = os.O_RDWR if state.writable else os.O_RDONLY
        try:
            fd = self._open_sidecar(where, name, mode)
        except FileNotFoundError:
            if not (ctx.forgives(born) if raw_header else ctx.crashed_before):
                raise Damaged("missing-sidecar") from None
            await ctx.freshness.check_unborn(state.file_id)
            await restart_newborn(self, data_size)
            return
        try:
            parsed = self.owner.sidecar_read_ahead()
            if parsed is None:
                parsed = parse(await ctx.in_thread(read_log, store, fd) if data_size > 1 << 30 else read_log(store, fd))
            log_header = parsed.header
            if log_header.kind != KIND_FILE or log_header.log_id != state.file_id:
                raise Damaged("id-mismatch", "the sidecar is another file's")
            self.log_wrapped, self.kek_version = log_header.log_wrapped, log_header.kek_version
            if to_read and ctx.keys.peek(self.log_wrapped) is None:
                await self.owner.warm(parsed)
            log_key = await self.log_key()
            floor = ctx.freshness.floor(state.file_id)
            replayed = take_up(authenticate(parsed, log_key), log_key, ctx.is_settled)
            if replayed.gap:
                log.warning("inode %d: frames of its sidecar are damaged, read from the next one on", state.ino)
            await self._adopt(fd, replayed, data_size, born, floor, has_header=bool(raw_header))
        except BaseException:
            if self.log is None or self.log.fd != fd:
                store.close(fd)
            raise

    def _open_sidecar(self, where: int, name: bytes, mode: int) -> int:
        """Its descriptor. After a crash a sidecar whose header never reached the disk counts as missing: ENOENT."""
        store = self.ctx.store
        fd = open_ours(store, where, name, mode)
        try:
            if self.ctx.crashed_before:
                header = store.pread(fd, LOG_HEADER_BYTES, 0)
                if len(header) < LOG_HEADER_BYTES or not any(header):
                    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        except BaseException:
            store.close(fd)
            raise
        return fd

    async def _adopt(
        self, fd: int, replayed: Replay, data_size: int, born: int, floor: int, *, has_header: bool
    ) -> None:
        ctx, state = self.ctx, self.state
        self._open_twin()
        last = replayed.heads[-1].generation if replayed.heads else born
        if ctx.state is not None and epoch_of(last) < ctx.state.epoch and ctx.crashed_since(last):
            await recover(self, fd, replayed, data_size, floor, born=born if has_header else None)
            return
        if not replayed.heads:
            raise Damaged("frame", "no intact frame")
        if replayed.tail:
            raise Damaged("frame", f"{replayed.tail} bytes after the last intact frame")
        check(last, floor)
        blocks, size = build_map(replayed, len(replayed.heads), ctx.config.block_size)
        if data_size != HEADER_BYTES + size:
            raise Damaged("size", f"data file of {data_size} bytes, {HEADER_BYTES + size} expected")
        self.adopt(fd, replayed, len(replayed.heads), blocks, size)
        state.data_len = size
        self.loaded = True

    def adopt(self, fd: int, replayed: Replay, keep: int, blocks: ExtentMap, size: int) -> None:
        """Take the first `keep` frames (at least one) of a replayed log as what the file is."""
        ctx, state = self.ctx, self.state
        self.gap = replayed.gap
        state.blocks = blocks
        state.size = self._framed_size = size
        self.xattrs = self._framed_xattrs = xattrs_after(replayed, keep, ctx.config.block_size)
        self.log = SealedLog.resume(fd, replayed, keep)
        # What an earlier incarnation of this opening made and appended may still be unsynced.
        self.log.unsynced = True
        self._sidecar_new = not self.entry_durable or state.file_id in ctx.renamed_logs
        state.twin_new = state.twin_fd is not None and all(e.home != HOME_TWIN for e in blocks)
        self._last_gen = self._found_gen = replayed.heads[keep - 1].generation
        said = max(head.durable_up_to for head in replayed.heads[:keep])
        # Mounting synced the whole file system: frames of earlier epochs are durable.
        old = [h.generation for h in replayed.heads[:keep] if ctx.state and epoch_of(h.generation) < ctx.state.epoch]
        self.durable_gen = max([said, *old])

    def disown(self) -> None:
        """Settling what was adopted failed: to be loaded again. The log's descriptor is the caller's."""
        self.log = None

    def _open_twin(self) -> None:
        state, store = self.state, self.ctx.store
        if state.twin_fd is not None:
            return  # From an attempt at loading that failed later.
        mode = os.O_RDWR if state.writable else os.O_RDONLY
        try:
            where = self.ctx.sidecar_dir(state.file_id)
            state.twin_fd = open_ours(store, where, twin_name(state.file_id), mode)
        except FileNotFoundError:
            state.twin_fd = None

    @property
    def last_gen(self) -> int:
        """The generation of the log's last frame; 0: it has none yet."""
        return self._last_gen

    def close(self) -> None:
        """Close the log's descriptor. From now on the log must not be older than it is."""
        if self._last_gen != self._found_gen:
            self.ctx.freshness.wrote(self.state.file_id, self._last_gen)
        if self.log is not None:
            self.ctx.store.close(self.log.fd)
            self.log = None
