"""fsync of a file: one frame appended, then data, twin and log synced at the same time.

Only if all of that returned 0 do the new versions count as durable; only then is the data file cut, and only the next
frame says so (`durable_up_to`).

A crash before the frame: the file as of the frame before. Between frame and syncs: any of them may be missing, and
the frame is above `durable_up_to`, so `recovery` falls back to the longest prefix that authenticates; the versions it
needs are all still in place because writers never touch the home of a durable version. After the syncs: the new
state, whatever `durable_up_to` says.
"""

from __future__ import annotations

from collections.abc import Callable

from cryptfs.blocks.extents import ExtentMap
from cryptfs.format.datafile import HEADER_BYTES
from cryptfs.fs.journal_loading import Loading
from cryptfs.fs.resync import write_again


class Syncing(Loading):
    """The durability of one file."""

    @property
    def sync_failed(self) -> bool:
        """A sync of this file, or of everything, failed: the next one is to be believed only after `write_again`."""
        return self._distrusted or self._doubts != self.ctx.doubts

    def distrust(self) -> None:
        """What was written since the last sync may not be in its place: the next sync has to find out."""
        self._distrusted = True

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
