"""Writing and cutting one file; `file_reading` reads it, `journal` makes it durable.

`write` is the mirror image of `read`: homes that hold nothing durable, fresh DEKs, encrypt, write, then the map.

A crash between any two calls here leaves data in homes that no durable frame names, which is invisible.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress

from cryptfs.blocks.extents import DURABLE, FRESH, HOME_DATA, HOME_TWIN, Extent
from cryptfs.errors import Damaged
from cryptfs.format.datafile import HEADER_BYTES
from cryptfs.fs.context import FsContext, log, open_ours, twin_name, write_all
from cryptfs.fs.file_reading import Reading, skip
from cryptfs.fs.history import POISON
from cryptfs.fs.journal import Journal
from cryptfs.fs.state import FileState
from cryptfs.ports import FreshKeys, Kit
from cryptfs.types import Buffer, Purpose

SIZE_MAX = (1 << 63) - 1 - (1 << 20)
"""Plaintext bytes: what a signed 64-bit file offset leaves after the header and a block."""

_DEKS_MIN, _DEKS_MAX = 4, 512


class FileNode(Reading):
    """A file somebody has open, or that is not settled yet. All offsets and sizes are of plaintext, in bytes."""

    def __init__(self, ctx: FsContext, state: FileState, journal: Journal) -> None:
        super().__init__(ctx, state, journal)
        self.opens = 0
        self.unlinked = False
        self._stock: FreshKeys | None = None
        self._stock_next = 0
        self._stock_size = _DEKS_MIN

    def use_stock(self, kit: Kit) -> None:
        """Take a new file's first DEKs from its kit, which is its alone."""
        self._stock, self._stock_next = kit.deks, 0

    # writing ---------------------------------------------------------------------------------------------------

    async def write(self, offset: int, data: Buffer) -> int:
        """All of `data` at `offset`; returns its length.

        Raises OSError (then the file is as it was), `Damaged`, key errors.
        """
        if not data:
            return 0
        if offset + len(data) > SIZE_MAX:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        if not self.journal.loaded:
            await self.journal.load()
        await self.state.lock.acquire_exclusive()
        try:
            await self._write(offset, memoryview(data))
        finally:
            self.state.lock.release_exclusive()
        return len(data)

    async def _write(self, offset: int, data: memoryview) -> None:
        state, block_size = self.state, self.ctx.config.block_size
        end_offset = offset + len(data)
        first, end = offset // block_size, -(-end_offset // block_size)
        new_size = max(state.size, end_offset)
        plains: list[Buffer] = []
        head = offset - first * block_size
        at = 0
        for block in range(first, end):
            start = block * block_size
            length = min(block_size, new_size - start)
            take = min(block_size - head, len(data) - at)
            if head == 0 and take == length:
                plains.append(data[at : at + take])
            else:
                plains.append(await self._merged(block, length, head, data[at : at + take]))
            at += take
            head = 0
        await self._put(first, plains, new_size)
        state.size = new_size

    async def _merged(self, block: int, length: int, at: int, piece: memoryview) -> bytearray:
        """Block `block` with `piece` laid over it at `at`; `length` bytes at most, no longer than it has content."""
        block_size = self.ctx.config.block_size
        if self.state.blocks.find(block) is None:
            plain = bytearray(length)
        else:
            whole = bytearray(block_size)
            await self._read_blocks(block, block + 1, memoryview(whole))
            plain = whole[:length]
        plain[at : at + len(piece)] = piece
        assert len(plain) <= block_size
        return plain

    async def _put(self, first: int, plains: list[Buffer], size: int) -> None:
        """Encrypt and write blocks first …, make them current, and make room for a file of `size` bytes.

        On an error all is as it was.
        """
        ctx, state = self.ctx, self.state
        count = len(plains)
        version = ctx.next_generation()
        slots = ctx.take_slots(count)
        try:
            volatile = await self._volatile(first, first + count)
            stock, start = await self._take_deks(count)
            # No await between here and the end of seal_run: the keys could be wiped meanwhile.
            deks = stock.keys[start : start + count]
            ciphers, tags = ctx.codec.seal_run(state.file_id, first, version, plains, deks, slots)
            kek_version = stock.kek_version
            wrapped = b"".join(stock.wrapped[start : start + count])
            new: list[Extent] = []
            try:
                for a, b, home in self._homes(first, first + count):
                    if home == HOME_TWIN and state.twin_fd is None:
                        self._open_twin()
                    piece = ciphers[a - first : b - first]
                    self._write_home(home, piece, state.home_offset(home, a))
                    last_len = len(piece[-1])
                    new.append(Extent(a, b, version, last_len, home, kek_version, wrapped, tags, FRESH, base=first))
                self._make_room(size)
            except BaseException:
                self._put_back(volatile)
                raise
        finally:
            ctx.give_slots(slots)
        for old in state.blocks.remove(first, first + count):
            if old.stage == DURABLE:
                state.displaced.insert(old)
        for extent in new:
            state.blocks.insert(extent)

    async def _volatile(self, first: int, end: int) -> list[tuple[int, int, bytes]]:
        """(home, offset, ciphertext) of the versions of blocks first … end - 1 that will be overwritten where they are.

        They were never synced, but a program wrote them: it must not lose them to a later write that fails.
        """
        state, block_size = self.state, self.ctx.config.block_size
        out: list[tuple[int, int, bytes]] = []
        for extent in state.blocks.overlapping(first, end):
            if extent.stage == DURABLE or extent.home == POISON:
                continue
            a, b = max(first, extent.first), min(end, extent.end)
            length = (b - 1 - a) * block_size + (extent.last_len if b == extent.end else block_size)
            ciphers = bytearray(length)
            offset = state.home_offset(extent.home, a)
            # What cannot be read cannot be lost: the new version may even heal it.
            with suppress(OSError, Damaged):
                await self._fill(state.home_fd(extent.home), [memoryview(ciphers)], offset, a)
                out.append((extent.home, offset, bytes(ciphers)))
        return out

    def _put_back(self, volatile: list[tuple[int, int, bytes]]) -> None:
        """After a write that failed half-way: what `_volatile` found, in its place again."""
        try:
            for home, offset, ciphers in volatile:
                write_all(self.ctx.store, self.state.home_fd(home), ciphers, offset)
        except OSError as error:
            log.error("inode %d: blocks written since the last sync are lost: %s", self.state.ino, error)
            self.journal.distrust()

    def _homes(self, first: int, end: int) -> list[tuple[int, int, int]]:
        """Split first … end - 1 by where each block may be written: never where its last durable version lies."""
        state = self.state
        taken: list[tuple[int, int, int]] = [
            (e.first, e.end, 1 - e.home if e.home in (HOME_DATA, HOME_TWIN) else HOME_DATA)
            for e in state.displaced.overlapping(first, end)
        ]
        for e in state.blocks.overlapping(first, end):
            if e.home == POISON:
                continue
            # A version that is not durable may be overwritten where it is; a displaced one already decided otherwise.
            taken.append((e.first, e.end, 1 - e.home if e.stage == DURABLE else e.home))
        if not taken:
            return [(first, end, HOME_DATA)]
        out: list[tuple[int, int, int]] = []
        at = first
        for a, b, home in sorted(taken):
            start, stop = max(a, at), min(b, end)
            if start >= stop:
                continue
            if at < start:
                _extend(out, at, start, HOME_DATA)
            _extend(out, start, stop, home)
            at = stop
        if at < end:
            _extend(out, at, end, HOME_DATA)
        return out

    def _write_home(self, home: int, ciphers: list[memoryview], offset: int) -> None:
        state, store = self.state, self.ctx.store
        if home == HOME_DATA:
            state.data_unsynced = state.mtime_stale = True
        else:
            state.twin_unsynced = True
        fd = state.home_fd(home)
        wanted, done = sum(map(len, ciphers)), 0
        try:
            while done < wanted:
                done += store.pwritev(fd, skip(ciphers, done) if done else ciphers, offset + done)
        finally:
            if home == HOME_DATA and done:
                state.data_len = max(state.data_len, offset + done - HEADER_BYTES)

    def _open_twin(self) -> None:
        ctx, state = self.ctx, self.state
        where, name = ctx.sidecar_dir(state.file_id), twin_name(state.file_id)
        try:
            state.twin_fd = open_ours(ctx.store, where, name, os.O_RDWR)
        except FileNotFoundError:
            state.twin_fd = ctx.store.open(where, name, os.O_RDWR | os.O_CREAT | os.O_EXCL)
            state.twin_new = True

    async def _take_deks(self, count: int) -> tuple[FreshKeys, int]:
        """`count` unused DEKs: (stock, index of the first). Each is handed out once, also if the write then fails."""
        stock, start = self._stock, self._stock_next
        if stock is None or stock.wiped or start + count > len(stock.keys):
            self._stock_size = min(_DEKS_MAX, max(self._stock_size * 2, count))
            # Those left over are never used: a write takes its DEKs from one stock.
            stock = await self.ctx.keys.generate(self.state.file_id, Purpose.BLOCK, max(self._stock_size, count))
            start = 0
        self._stock = stock
        self._stock_next = start + count
        return stock, start

    def has_deks(self, count: int) -> bool:
        """Whether as many unused DEKs are at hand."""
        stock = self._stock
        return stock is not None and not stock.wiped and len(stock.keys) - self._stock_next >= count

    async def stock_up(self, count: int) -> None:
        """Have `count` unused DEKs at hand. Raises what keys raise."""
        stock = await self.ctx.keys.generate(self.state.file_id, Purpose.BLOCK, count)
        # In one stretch: who took DEKs before refers to the stock they are of, and who awaits a stock brings its own.
        self._stock, self._stock_next = stock, 0

    def _make_room(self, size: int) -> None:
        """Let the data file reach the end of a file of `size` bytes: its size is how `stat` knows the file's."""
        state = self.state
        if state.data_len < size:
            self.ctx.store.ftruncate(state.data_fd, HEADER_BYTES + size)
            state.data_len = size
            state.data_unsynced = state.mtime_stale = True

    # cutting ---------------------------------------------------------------------------------------------------

    async def truncate(self, size: int) -> None:
        """Make the file `size` bytes long; new bytes are a hole."""
        if size > SIZE_MAX:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        if not self.journal.loaded:
            await self.journal.load()
        state = self.state
        await state.lock.acquire_exclusive()
        try:
            if size < state.size:
                await self._shrink(size)
            elif size > state.size:
                self._make_room(size)
                state.size = size
        finally:
            state.lock.release_exclusive()

    async def _shrink(self, size: int) -> None:
        state, block_size = self.state, self.ctx.config.block_size
        tail, rest = divmod(size, block_size)
        if rest:
            extent = state.blocks.find(tail)
            if extent is not None:
                length = extent.last_len if extent.end == tail + 1 else block_size
                if length > rest:
                    # The bytes past the cut must not come back when the file grows again: a new, shorter version.
                    kept = bytearray(block_size)
                    await self._read_blocks(tail, tail + 1, memoryview(kept))
                    await self._put(tail, [kept[:rest]], size)
        first_gone = -(-size // block_size)
        end = -(-state.size // block_size)
        if first_gone < end:
            for old in state.blocks.remove(first_gone, end):
                if old.stage == DURABLE:
                    state.displaced.insert(old)
            self.journal.holes.append((first_gone, end - first_gone))
        state.size = size
        if not state.acked:
            # Nothing of this file was ever acknowledged: no durable frame can want the bytes past the cut. The file is
            # cut all the same if that fails: the next sync does it.
            with suppress(OSError):
                self.journal.cut()


def _extend(out: list[tuple[int, int, int]], first: int, end: int, home: int) -> None:
    if out and out[-1][2] == home and out[-1][1] == first:
        out[-1] = (out[-1][0], end, home)
    else:
        out.append((first, end, home))
