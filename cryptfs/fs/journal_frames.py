"""The sidecar of a file as it is appended to: what no frame says yet, and the frame that says it.

A frame is not durable: `journal_syncing` makes it so.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Protocol

import trio

from cryptfs.blocks.extents import LOGGED
from cryptfs.errors import AgentUnavailable, VolumeLocked
from cryptfs.format.log import KIND_FILE, LogHeader
from cryptfs.format.sidecar import Sealed, SidecarPayload
from cryptfs.fs.context import FsContext, sidecar_name
from cryptfs.fs.sealed_log import Frame, Replay, SealedLog
from cryptfs.fs.state import FileState
from cryptfs.ports import KeyRun
from cryptfs.types import Purpose


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


class Frames:
    """What the file's log says, what it owes, and its end in memory."""

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

    def begin(self, kek_version: int, log_wrapped: bytes, xattrs: Sealed | None = None) -> None:
        """A new, empty file: its sidecar appears with its first frame."""
        self.xattrs, self._framed_xattrs = xattrs, None
        self.kek_version = kek_version
        self.log_wrapped = log_wrapped
        self._doubts = self.ctx.doubts
        self.loaded = True
        self.state.acked = False
        self.state.twin_unsynced = False

    @property
    def needs_frame(self) -> bool:
        """Something changed that no frame says yet; also a new file's emptiness."""
        if not self.loaded:
            return False
        changed = self._framed_size != self.state.size or bool(self.holes) or bool(self.state.blocks.fresh())
        changed = changed or self.xattrs is not self._framed_xattrs
        return changed or (self.log is not None and self.log.torn)

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

    def settle_frame(self, key: memoryview) -> None:
        """A frame of this epoch that says what the file is now, so that the next opening need not ask again."""
        self._append(key)

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
