"""All blocks of a file, in order, past those that cannot be read: what `check --deep`, salvage and export share.

Ciphertext of the next piece is read on a thread and its keys come from the agent while this one is decrypted.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import trio

from cryptfs.blocks.codec import Slots
from cryptfs.blocks.extents import HOME_TWIN, Extent
from cryptfs.errors import CryptfsError, Damaged
from cryptfs.fs.context import FsContext
from cryptfs.fs.history import POISON
from cryptfs.fs.state import FileState
from cryptfs.ports import KeyRun
from cryptfs.types import Purpose

PIECE_BYTES = 1 << 20
PIECE_BLOCKS_MAX = 512
"""Half of IOV_MAX (limits.h): each block is one buffer of a preadv(2)."""
KEYS_AT_ONCE = 2048
"""Half of what one request to the agent may ask for."""

Sink = Callable[[int, memoryview], Awaitable[None]]
"""Takes plaintext: (offset, bytes), good until it returns. What is a hole or could not be read never comes."""


@dataclass(slots=True)
class Bad:
    """Blocks that could not be read: (first, count) ranges, ascending, by the reason why."""

    ranges: list[tuple[int, int]] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)

    def add(self, first: int, end: int, reason: str) -> None:
        """Blocks first … end - 1."""
        if self.ranges and sum(self.ranges[-1]) == first:
            self.ranges[-1] = (self.ranges[-1][0], end - self.ranges[-1][0])
        else:
            self.ranges.append((first, end - first))
        if reason not in self.reasons:
            self.reasons.append(reason)

    def lost_bytes(self, block_size: int, size: int) -> list[tuple[int, int]]:
        """(offset, length) of plaintext in a file of `size` bytes."""
        out = []
        for first, count in self.ranges:
            start, end = first * block_size, min((first + count) * block_size, size)
            if start < end:
                out.append((start, end - start))
        return out


@dataclass(slots=True)
class _Piece:
    """Blocks first … end - 1 of an extent; `slots` hold their ciphertext unless reading it failed."""

    extent: Extent
    first: int
    end: int
    slots: Slots | None
    failed: str = ""


class BlockReader:
    """Reads one file's blocks.

    `done` is called with the plaintext bytes of each piece that was dealt with. `strict`: stop soon after the first bad
    block.
    """

    def __init__(
        self, ctx: FsContext, state: FileState, sink: Sink | None = None, done: Callable[[int], None] | None = None,
        *, strict: bool = False,
    ) -> None:  # fmt: skip
        self.ctx = ctx
        self.state = state
        self.bad = Bad()
        self._sink = sink
        self._done = done
        self._strict = strict
        self._failure: OSError | CryptfsError | None = None
        self._per_piece = max(1, min(PIECE_BYTES // ctx.config.block_size, PIECE_BLOCKS_MAX))

    async def run(self, extents: Sequence[Extent]) -> Bad:
        """Read all blocks of `extents`. Raises key errors other than `Damaged`, and what the sink raises."""
        pieces = [
            (extent, first, min(first + self._per_piece, extent.end))
            for extent in extents
            for first in range(extent.first, extent.end, self._per_piece)
        ]
        buffer = self.ctx.take_buffer(min(self._per_piece * self.ctx.config.block_size, 1 << 20))
        try:
            if len(pieces) <= 2:
                for extent, first, end in pieces:
                    await self._deal_with(await self._fetch(extent, first, end), buffer)
                return self.bad
            send, receive = trio.open_memory_channel[_Piece](2)
            with receive:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._fetch_all, pieces, send, nursery)
                    await self._deal_with_all(receive, buffer)
                    nursery.cancel_scope.cancel()
        finally:
            self.ctx.give_buffer(buffer)
        if self._failure is not None:
            raise self._failure
        return self.bad

    async def _deal_with_all(self, receive: trio.MemoryReceiveChannel[_Piece], buffer: memoryview) -> None:
        try:
            async for piece in receive:
                await self._deal_with(piece, buffer)
                if self._strict and self.bad.ranges:
                    return
        except (OSError, CryptfsError) as error:
            # Raised once the nursery is closed, which would wrap it.
            self._failure = error

    async def _fetch_all(
        self, pieces: list[tuple[Extent, int, int]], send: trio.MemorySendChannel[_Piece], nursery: trio.Nursery
    ) -> None:
        async with send:
            # Keys come one batch ahead of the pieces that need them.
            at = 0
            arrived, end = self._start_keys(pieces, 0, nursery)
            while at < len(pieces):
                await arrived.wait()
                if self._failure is not None:
                    return
                upto = end
                arrived, end = self._start_keys(pieces, upto, nursery)
                for extent, first, stop in pieces[at:upto]:
                    await send.send(await self._fetch(extent, first, stop))
                at = upto

    def _start_keys(
        self, pieces: list[tuple[Extent, int, int]], at: int, nursery: trio.Nursery
    ) -> tuple[trio.Event, int]:
        """Ask for the keys of pieces from `at` on: (set once they are here, the first piece it left out)."""
        runs: list[KeyRun] = []
        count = 0
        while at < len(pieces):
            extent, first, end = pieces[at]
            if runs and count + end - first > KEYS_AT_ONCE:
                break
            if extent.home != POISON:
                runs.append(self._keys_of(extent, first, end))
                count += end - first
            at += 1
        arrived = trio.Event()
        nursery.start_soon(self._bring_keys, runs, arrived)
        return arrived, at

    async def _bring_keys(self, runs: list[KeyRun], arrived: trio.Event) -> None:
        try:
            # If one does not unwrap, each piece asks for itself and finds out which.
            with suppress(Damaged):
                await self.ctx.keys.unwrap(runs)
        except CryptfsError as error:
            self._failure = error
        arrived.set()

    def _keys_of(self, extent: Extent, first: int, end: int) -> KeyRun:
        wraps = [extent.wrapped_of(block) for block in range(first, end)]
        return KeyRun(self.state.file_id, Purpose.BLOCK, extent.kek_version, wraps, first)

    async def _fetch(self, extent: Extent, first: int, end: int) -> _Piece:
        """Ciphertext from its home."""
        if extent.home == POISON:
            return _Piece(extent, first, end, None, "frame")
        if extent.home == HOME_TWIN and self.state.twin_fd is None:
            return _Piece(extent, first, end, None, "missing-twin")
        slots = self.ctx.take_slots(end - first)
        targets = self.ctx.codec.targets(extent, first, end, slots)
        wanted, offset = sum(map(len, targets)), self.state.home_offset(extent.home, first)
        try:
            got = await self._pread(self.state.home_fd(extent.home), targets, offset, wanted)
        except OSError as error:
            self.ctx.give_slots(slots)
            return _Piece(extent, first, end, None, error.strerror or "unreadable")
        if got != wanted:
            self.ctx.give_slots(slots)
            return _Piece(extent, first, end, None, "short")
        return _Piece(extent, first, end, slots)

    async def _pread(self, fd: int, targets: list[memoryview], offset: int, wanted: int) -> int:
        """At once if the kernel has all of it in memory, else from a thread."""
        preadv = self.ctx.store.preadv
        with suppress(OSError):
            if preadv(fd, targets, offset, os.RWF_NOWAIT) == wanted:
                return wanted
        return await self.ctx.in_thread(preadv, fd, targets, offset)

    async def _deal_with(self, piece: _Piece, buffer: memoryview) -> None:
        slots, extent, first, end = piece.slots, piece.extent, piece.first, piece.end
        length = self._length(extent, first, end)
        if slots is not None:
            try:
                good = await self._open(extent, first, end, slots, buffer)
                if good and self._sink is not None:
                    await self._sink(first * self.ctx.config.block_size, buffer[:length])
            finally:
                self.ctx.give_slots(slots)
            if not good:
                await self._halve(extent, first, end, buffer, "tag")
        else:
            await self._halve(extent, first, end, buffer, piece.failed)
        if self._done is not None:
            self._done(length)

    def _length(self, extent: Extent, first: int, end: int) -> int:
        block_size = self.ctx.config.block_size
        return (end - first - 1) * block_size + (extent.last_len if end == extent.end else block_size)

    async def _open(self, extent: Extent, first: int, end: int, slots: Slots, buffer: memoryview) -> bool:
        try:
            deks = (await self.ctx.keys.unwrap([self._keys_of(extent, first, end)]))[0]
        except Damaged:
            return False
        return self.ctx.codec.open_run(self.state.file_id, extent, first, end, deks, slots, buffer) < 0

    async def _halve(self, extent: Extent, first: int, end: int, buffer: memoryview, reason: str) -> None:
        """Find the bad blocks of a piece that did not read as a whole, and read the others."""
        if end - first == 1 or reason in ("frame", "missing-twin"):
            self.bad.add(first, end, reason)
            return
        middle = (first + end) // 2
        for a, b in ((first, middle), (middle, end)):
            part = await self._fetch(extent, a, b)
            if part.slots is None:
                await self._halve(extent, a, b, buffer, part.failed)
                continue
            try:
                good = await self._open(extent, a, b, part.slots, buffer)
                if good and self._sink is not None:
                    await self._sink(a * self.ctx.config.block_size, buffer[: self._length(extent, a, b)])
            finally:
                self.ctx.give_slots(part.slots)
            if not good:
                await self._halve(extent, a, b, buffer, "tag")
