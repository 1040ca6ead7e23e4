"""Reading one file: the path everything serves.

Which extents, their ciphertext from disk, their DEKs from the cache or the agent, decrypt, join.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence

from cryptfs.blocks.extents import Extent
from cryptfs.errors import Damaged
from cryptfs.fs.context import FsContext
from cryptfs.fs.history import POISON
from cryptfs.fs.journal import Journal
from cryptfs.fs.state import FileState
from cryptfs.ports import KeyRun
from cryptfs.types import Purpose

_WARM_BLOCKS = 256
_NOWAIT = os.RWF_NOWAIT


class Reading:
    """The readers' side of `file.FileNode`."""

    def __init__(self, ctx: FsContext, state: FileState, journal: Journal) -> None:
        self.ctx = ctx
        self.state = state
        self.journal = journal
        self._read_end = 0
        self._warmed_to = 0

    @property
    def size(self) -> int:
        """Plaintext bytes."""
        return self.state.size

    async def read(self, offset: int, count: int) -> bytes:
        """At most `count` bytes; fewer only at the end of the file. Raises `Damaged`, OSError, or what keys raise."""
        block_size = self.ctx.config.block_size
        return bytes(await self.read_into(memoryview(bytearray(count + 2 * block_size)), offset, count))

    async def read_into(self, out: memoryview, offset: int, count: int) -> memoryview:
        """As `read`, decrypting into `out` (`count` and two blocks long at least).

        Returns the part of it that is the answer.
        """
        state = self.state
        if not self.journal.loaded:
            await self.journal.load()
        await state.lock.acquire_shared()
        try:
            end_offset = min(offset + count, state.size)
            if offset >= end_offset:
                return out[:0]
            block_size = self.ctx.config.block_size
            first, end = offset // block_size, -(-end_offset // block_size)
            ahead = offset == self._read_end
            self._read_end = end_offset
            if not ahead:
                self._warmed_to = end
            await self._read_blocks(first, end, out, ahead=ahead)
            return out[offset - first * block_size : end_offset - first * block_size]
        finally:
            state.lock.release_shared()

    async def _read_blocks(self, first: int, end: int, out: memoryview, *, ahead: bool = False) -> None:
        """Plaintext of whole blocks into `out`, zeros where there is none. The caller holds the lock.

        Every byte of the blocks is written: `out` may hold another file's plaintext.
        """
        block_size = self.ctx.config.block_size
        at = first
        for extent in self.state.blocks.overlapping(first, end):
            a, b = max(first, extent.first), min(end, extent.end)
            if at < a:
                _zero(out, (at - first) * block_size, (a - first) * block_size)
            await self._read_extent(extent, a, b, out[(a - first) * block_size : (b - first) * block_size], ahead=ahead)
            if b == extent.end and extent.last_len != block_size:
                _zero(out, (b - 1 - first) * block_size + extent.last_len, (b - first) * block_size)
            at = b
        if at < end:
            _zero(out, (at - first) * block_size, (end - first) * block_size)

    async def _read_extent(self, extent: Extent, first: int, end: int, out: memoryview, *, ahead: bool) -> None:
        ctx, state = self.ctx, self.state
        if extent.home == POISON:
            raise Damaged("frame", f"block {first}")
        slots = ctx.take_slots(end - first)
        try:
            targets = ctx.codec.targets(extent, first, end, slots)
            fd, offset = state.home_fd(extent.home), state.home_offset(extent.home, first)
            await self._fill(fd, targets, offset, first)
            deks = await self._deks_of(extent, first, end, ahead=ahead)
            bad = ctx.codec.open_run(state.file_id, extent, first, end, deks, slots, out)
            if bad >= 0:
                raise Damaged("tag", f"block {bad}")
        finally:
            ctx.give_slots(slots)

    async def _fill(self, fd: int, targets: list[memoryview], offset: int, first: int) -> None:
        """Read ciphertext: at once if the kernel has it in memory, else from a thread."""
        store = self.ctx.store
        wanted = sum(map(len, targets))
        try:
            done = store.preadv(fd, targets, offset, _NOWAIT)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EOPNOTSUPP, errno.EINVAL):
                raise
            done = 0
        while done < wanted:
            rest = skip(targets, done)
            got = await self.ctx.in_thread(store.preadv, fd, rest, offset + done)
            if got <= 0:
                raise Damaged("short", f"block {first}")
            done += got

    async def _deks_of(self, extent: Extent, first: int, end: int, *, ahead: bool) -> Sequence[memoryview]:
        """The DEKs of blocks first … end - 1. The views are good until the next await."""
        if ahead:
            self._warm_ahead(end)
        deks = self.ctx.keys.peek_all(extent.wraps_of(first, end))
        if deks is not None:
            return deks
        run = KeyRun(self.state.file_id, Purpose.BLOCK, extent.kek_version, extent.wraps_of(first, end), first)
        return (await self.ctx.keys.unwrap([run]))[0]

    def _warm_ahead(self, end: int) -> None:
        """A sequential reader will want the next blocks' DEKs.

        The agent unwraps them while these are read and decrypted.
        """
        if self.ctx.spawn is not None and end + _WARM_BLOCKS // 2 > self._warmed_to:
            start = max(end, self._warmed_to)
            self._warmed_to = start + _WARM_BLOCKS
            runs = [
                KeyRun(self.state.file_id, Purpose.BLOCK, e.kek_version, e.wraps_of(a, b), a)
                for e in self.state.blocks.overlapping(start, self._warmed_to)
                for a, b in ((max(e.first, start), min(e.end, self._warmed_to)),)
                if e.home != POISON
            ]
            if runs:
                self.ctx.spawn(self.ctx.keys.warm, runs)


def _zero(out: memoryview, start: int, end: int) -> None:
    out[start:end] = bytes(end - start)


def skip(buffers: Sequence[memoryview], count: int) -> list[memoryview]:
    """`buffers` without their first `count` bytes."""
    out: list[memoryview] = []
    for buffer in buffers:
        if count >= len(buffer):
            count -= len(buffer)
        else:
            out.append(buffer[count:])
            count = 0
    return out
