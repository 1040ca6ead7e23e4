"""One log's keys on their way from older KEKs to the newest one: what a rotation writes into the new log."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from cryptfs.blocks.extents import Extent
from cryptfs.errors import AgentUnavailable
from cryptfs.format.log import LogHeader
from cryptfs.format.sidecar import Sealed
from cryptfs.fs.history import POISON, XATTRS_LOST
from cryptfs.ports import DekProvider, FreshKeys, KeyRun, Rewrapped
from cryptfs.types import TAG_BYTES, WRAPPED_BYTES, Purpose

KEYS_AT_ONCE = 4096
"""Keys in one request to the agent, which takes no more."""


class Rewrapping:
    """Of the log `log_id`, to KEK `kek_version` or the newest one. Every method that awaits may raise key errors."""

    def __init__(self, keys: DekProvider, log_id: bytes, kek_version: int) -> None:
        self._keys = keys
        self._log_id = log_id
        self._least = kek_version
        self._version = 0
        self._blocks: dict[int, list[tuple[int, int, bytes]]] = {}
        """By a run's own version: (first block, one past the last, wraps joined), all under KEK `_version`."""

    # blocks ----------------------------------------------------------------------------------------------------

    def portions(self, extents: Iterable[Extent], block_size: int) -> Iterator[list[Extent]]:
        """What of `extents` is under an older KEK and was not asked for yet, cut to what one request takes."""
        portion: list[Extent] = []
        room = KEYS_AT_ONCE
        for extent in extents:
            if extent.kek_version >= self._least or extent.home == POISON or self._wraps(extent) is not None:
                continue
            first = extent.first
            while first < extent.end:
                end = min(extent.end, first + room)
                portion.append(extent.piece(first, end, block_size))
                room -= end - first
                first = end
                if not room:
                    yield portion
                    portion, room = [], KEYS_AT_ONCE
        if portion:
            yield portion

    async def blocks(self, portion: Sequence[Extent]) -> None:
        """Have the agent wrap these DEKs anew, in one request."""
        got = self._checked(
            await self._keys.rewrap(
                [
                    KeyRun(self._log_id, Purpose.BLOCK, e.kek_version, e.wraps_of(e.first, e.end), e.first)
                    for e in portion
                ]
            )
        )
        if got.kek_version != self._version:
            # The KEK was replaced once more: a run has one KEK version, so what came before is asked for again.
            self._blocks.clear()
            self._version = got.kek_version
        for extent, joined in zip(portion, got.wrapped, strict=True):
            self._blocks.setdefault(extent.version, []).append((extent.first, extent.end, joined))

    def extent(self, extent: Extent) -> Extent:
        """The same blocks with their new wraps, which `blocks` has brought; `extent` itself if it needs none."""
        if extent.kek_version >= self._least:
            return extent
        wraps = self._wraps(extent)
        assert wraps is not None
        start, stop = (extent.first - extent.base) * TAG_BYTES, (extent.end - extent.base) * TAG_BYTES
        return Extent(
            extent.first, extent.end, extent.version, extent.last_len, extent.home, self._version, wraps,
            extent.tags[start:stop], extent.stage, extent.generation,
        )  # fmt: skip

    def _wraps(self, extent: Extent) -> bytes | None:
        """All new wraps of an extent, which may be a part of what was asked for: files are written meanwhile."""
        out, at = bytearray(), extent.first
        for first, end, joined in sorted(self._blocks.get(extent.version, ())):
            if first <= at < min(end, extent.end):
                stop = min(end, extent.end)
                out += joined[(at - first) * WRAPPED_BYTES : (stop - first) * WRAPPED_BYTES]
                at = stop
        return bytes(out) if at == extent.end else None

    # the rest --------------------------------------------------------------------------------------------------

    async def sealed(self, value: Sealed | None) -> Sealed | None:
        """A target or xattr set with its attribute key wrapped anew; the ciphertext stays."""
        if value is None or value is XATTRS_LOST or value.kek_version >= self._least:
            return value
        run = KeyRun(self._log_id, Purpose.ATTR, value.kek_version, (value.wrapped,))
        got = self._checked(await self._keys.rewrap([run]))
        return replace(value, kek_version=got.kek_version, wrapped=got.wrapped[0])

    async def log_key(self, purpose: Purpose) -> FreshKeys:
        """A new MAC key; good until the caller's next await."""
        made = await self._keys.generate(self._log_id, purpose, 1)
        if made.kek_version < self._least:
            raise _not_yet()
        return made

    async def names_and_log_key(self, header: LogHeader) -> tuple[LogHeader, bytearray]:
        """A directory's new header, and the new MAC key that it holds, for the caller to wipe."""
        run = KeyRun(self._log_id, Purpose.NAMES, header.kek_version, (header.names_wrapped,))
        while True:
            got = self._checked(await self._keys.rewrap([run]))
            made = await self.log_key(Purpose.LOG_DIR)
            # A header has one KEK version for both.
            if made.kek_version == got.kek_version:
                anew = LogHeader(header.kind, made.kek_version, header.log_id, made.wrapped[0], got.wrapped[0])
                return anew, bytearray(made.keys[0])

    def _checked(self, got: Rewrapped) -> Rewrapped:
        if got.kek_version < self._least:
            raise _not_yet()
        return got


def _not_yet() -> AgentUnavailable:
    return AgentUnavailable("the key agent does not have the KEK that everything is to be wrapped under")
