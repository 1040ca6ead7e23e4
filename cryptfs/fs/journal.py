"""The sidecar of one file: `journal_frames`, `journal_loading`, `journal_syncing`, and here, rewriting it as a whole.

Once a log is all on disk under another name it takes the old one's place. A crash leaves one of the two, and both say
the same of the file: the new one vouches for everything it names, so all of that is durable before.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from cryptfs.errors import Damaged
from cryptfs.format.log import KIND_FILE, LogHeader
from cryptfs.format.sidecar import SidecarPayload
from cryptfs.fs.context import sidecar_name
from cryptfs.fs.history import POISON, XATTRS_LOST
from cryptfs.fs.journal_syncing import Syncing
from cryptfs.fs.rewrapping import Rewrapping
from cryptfs.fs.sealed_log import Frame
from cryptfs.types import Purpose, epoch_of

_COMPACT_MIN_BYTES = 64 * 1024


class Journal(Syncing):
    """The sidecar of one file."""

    @property
    def needs_settling(self) -> bool:
        """Acknowledged versions are kept aside, a cut waits, a sync failed or the log is bloated."""
        if not self.loaded:
            return False
        return len(self.state.displaced) > 0 or self.state.cut_pending or self._distrusted or self.bloated

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

    async def rotate(self, kek_version: int, pause: Callable[[], Awaitable[None]], *, at_once: bool = False) -> None:
        """Rewrite the log under the newest KEK, at least `kek_version`, with a new MAC key; nothing to do if it is.

        The new log is on disk before it takes the old one's name; that it has it is durable when this returns with
        `at_once`, else with the file's next fsync or the next sync of everything (`FsContext.renamed_logs`): both say
        the same until then, but whoever syncs anything next may have to wait for that, too.
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
                    if at_once:
                        await self._replaced()
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
