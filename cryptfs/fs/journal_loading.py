"""Opening a file's sidecar: what the file is, or, after a crash, what is left of it (`recovery`)."""

from __future__ import annotations

import errno
import os

from cryptfs.blocks.extents import HOME_TWIN, ExtentMap
from cryptfs.errors import Damaged
from cryptfs.format.datafile import HEADER_BYTES, decode_data_header
from cryptfs.format.log import HEADER_BYTES as LOG_HEADER_BYTES
from cryptfs.format.log import KIND_FILE
from cryptfs.fs.context import log, open_ours, sidecar_name, twin_name
from cryptfs.fs.freshness import check
from cryptfs.fs.history import build_map, xattrs_after
from cryptfs.fs.journal_frames import Frames
from cryptfs.fs.log_gap import take_up
from cryptfs.fs.recovery import recover, restart_newborn
from cryptfs.fs.sealed_log import Replay, SealedLog, authenticate, parse, read_log
from cryptfs.types import epoch_of


class Loading(Frames):
    """From data file and sidecar to the block map. Once; may be tried again if it fails."""

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
