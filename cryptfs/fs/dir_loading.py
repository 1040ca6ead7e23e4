"""Making a directory's log, and reading one: what it says, and after a crash, what it may say wrongly."""

from __future__ import annotations

from typing import Self

from cryptfs.errors import Damaged
from cryptfs.format.dirlog import DirPayload, decode_dir
from cryptfs.format.log import DELTA, KIND_DIR, Head, LogHeader
from cryptfs.format.sidecar import Sealed
from cryptfs.fs.context import FsContext, open_log
from cryptfs.fs.dir_entries import DirEntries, key_runs
from cryptfs.fs.freshness import check
from cryptfs.fs.log_gap import acknowledged_in_tail
from cryptfs.fs.sealed_log import Frame, Replay, SealedLog, authenticate, parse, read_log
from cryptfs.names import DIR_LOG
from cryptfs.ports import Kit
from cryptfs.types import epoch_of


class DirLoading(DirEntries):
    """From a log to the names."""

    @classmethod
    def create(cls, ctx: FsContext, fd: int, kit: Kit, xattrs: Sealed | None = None) -> Self:
        """Write a new log without entries into the directory behind `fd`. Synchronous: the kit's keys are good.

        Raises OSError.
        """
        assert kit.names_wrapped is not None
        header = LogHeader(KIND_DIR, kit.kek_version, kit.log_id, kit.log_wrapped, kit.names_wrapped)
        node = cls(ctx, 0, fd, header)
        generation = ctx.next_generation()
        payload = DirPayload(xattrs=xattrs)
        frame = Frame(generation, 0, 0, payload.encode(), flags=payload.flags)
        node.xattrs = xattrs
        node._log = SealedLog.create(ctx.store, fd, DIR_LOG, header, kit.log_key, frame)
        node._doubts = ctx.doubts
        node.last_gen = generation
        node.settled()
        return node

    @classmethod
    async def open(cls, ctx: FsContext, ino: int, fd: int, dir_id: bytes) -> Self:
        """Read and verify the log of the directory behind `fd`, which the node owns from now on.

        Raises `Damaged`, OSError, key errors.
        """
        store = ctx.store
        try:
            log_fd, writable = open_log(store, fd, DIR_LOG, writable=not ctx.read_only)
        except FileNotFoundError:
            raise Damaged("missing-dir-log") from None
        try:
            raw = read_log(store, log_fd)
            parsed = parse(raw)
            header = parsed.header
            if header.kind != KIND_DIR or header.log_id != dir_id:
                raise Damaged("id-mismatch", "the directory is another one")
            node = cls(ctx, ino, fd, header)
            node.writable = writable
            (log_key,), _ = await ctx.keys.unwrap(key_runs(header))
            node._adopt(log_fd, authenticate(parsed, log_key), log_key, ctx.freshness.floor(dir_id))
        except BaseException:
            store.close(log_fd)
            raise
        return node

    def _adopt(self, log_fd: int, replayed: Replay, log_key: memoryview, floor: int) -> None:
        ctx = self.ctx
        heads = replayed.heads
        last = heads[-1].generation if heads else 0
        assert ctx.state is not None
        torn = bool(replayed.tail) or None in replayed.payloads
        keep = len(heads)
        if torn:
            if not (ctx.crashed_since(last) and epoch_of(last) < ctx.state.epoch):
                raise Damaged("dir-log", "a frame is damaged")
            keep = next((i for i, payload in enumerate(replayed.payloads) if payload is None), keep)
        # Frames of epochs that ended cleanly are durable whether a later one says so or not.
        settled = (head.generation for head in heads if ctx.is_settled(head.generation))
        if not keep or (keep < len(heads) and heads[keep].generation <= max(replayed.durable_up_to, floor, *settled)):
            raise Damaged("dir-log", "a frame is damaged")
        if replayed.tail and acknowledged_in_tail(replayed, log_key, ctx.is_settled) > heads[keep - 1].generation:
            raise Damaged("dir-log", "an acknowledged frame is damaged")
        check(heads[keep - 1].generation, floor)
        crashed = ctx.crashed_since(last) and epoch_of(last) < ctx.state.epoch
        for head, payload in zip(heads[:keep], replayed.payloads[:keep], strict=True):
            assert payload is not None
            decoded = decode_dir(payload)
            if decoded.flags != head.flags:
                raise Damaged("payload", "xattrs that the head does not announce, or none that it does")
            if crashed:
                self._bind(head, decoded, max(replayed.durable_up_to, floor))
            self._hold(decoded)
        if self.domain and self.entries:
            raise Damaged("payload", "entries in a domain's place")
        if crashed and not self.bindings:
            self.bindings = {sealed: [entry] for sealed, entry in self.entries.items()}
        self._log = SealedLog.resume(log_fd, replayed, keep)
        if torn and not ctx.read_only:
            ctx.store.ftruncate(log_fd, self._log.end)
        self.last_gen = self.done_gen = heads[keep - 1].generation
        old = [h.generation for h in heads[:keep] if epoch_of(h.generation) < ctx.state.epoch]
        self.durable_gen = max([h.durable_up_to for h in heads[:keep]] + old)

    def _bind(self, head: Head, decoded: DirPayload, durable: int) -> None:
        """Remember every id a name had since the log was last known to be durable.

        The tree may still have any of them.
        """
        if head.generation <= durable or not self.ctx.forgives(head.generation):
            # Everything up to here is durable: earlier bindings are history.
            self.bindings = {}
            return
        if not self.bindings:
            self.bindings = {sealed: [entry] for sealed, entry in self.entries.items()}
        for entry in decoded.entries:
            self.bindings.setdefault(entry.sealed, []).append(entry)
            if head.kind == DELTA:
                self.unsure.add(entry.sealed)

    @property
    def needs_reconciling(self) -> bool:
        """Whether a crash since its last frame may have left log and tree of two minds."""
        state = self.ctx.state
        assert state is not None
        return epoch_of(self.last_gen) < state.epoch and self.ctx.crashed_since(self.last_gen)
