"""Which version of each block is current: a sorted map of extents, split and merged as writes come.

An extent is a run of blocks that were written together (format.sidecar.Run) or what later writes left of one. A
sequential reader or writer pays one look-up per request, not one per block.

An extent is FRESH until a frame names it, LOGGED until that frame and the data are synced, then DURABLE.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator

from cryptfs.format.sidecar import Run
from cryptfs.types import TAG_BYTES, WRAPPED_BYTES

FRESH, LOGGED, DURABLE = 0, 1, 2

HOME_DATA, HOME_TWIN = 0, 1


class Extent:
    """Blocks `first` … `end` - 1, all of one version, home and KEK version; `base` is `first` at the time of writing.

    `wrapped` and `tags` are those of the whole run as written and shared by all its pieces. `last_len` is the length
    in bytes of block `end` - 1.
    """

    __slots__ = ("alive", "base", "end", "first", "generation", "home", "kek_version", "last_len", "stage", "tags",
                 "version", "wrapped")  # fmt: skip

    def __init__(  # noqa: PLR0913, PLR0917 - one per field, on the path of every write
        self, first: int, end: int, version: int, last_len: int, home: int, kek_version: int, wrapped: bytes,
        tags: bytes, stage: int, generation: int = 0, base: int | None = None,
    ) -> None:  # fmt: skip
        self.first = first
        self.end = end
        self.version = version
        self.last_len = last_len
        self.home = home
        self.kek_version = kek_version
        self.wrapped = wrapped
        self.tags = tags
        self.stage = stage
        self.generation = generation
        self.base = first if base is None else base
        self.alive = True

    def piece(self, first: int, end: int, block_size: int) -> Extent:
        """The part from `first` to `end` - 1."""
        last_len = self.last_len if end == self.end else block_size
        return Extent(first, end, self.version, last_len, self.home, self.kek_version, self.wrapped, self.tags,
                      self.stage, self.generation, self.base)  # fmt: skip

    def wrapped_of(self, block: int) -> bytes:
        """The 40 bytes of one block's wrapped DEK."""
        at = (block - self.base) * WRAPPED_BYTES
        return self.wrapped[at : at + WRAPPED_BYTES]

    def wraps_of(self, first: int, end: int) -> list[bytes]:
        """The wrapped DEKs of blocks first … end - 1, 40 bytes each."""
        wrapped = self.wrapped
        start, stop = (first - self.base) * WRAPPED_BYTES, (end - self.base) * WRAPPED_BYTES
        return [wrapped[at : at + WRAPPED_BYTES] for at in range(start, stop, WRAPPED_BYTES)]

    def tag_of(self, block: int) -> bytes:
        """The 16 bytes of one block's tag."""
        at = (block - self.base) * TAG_BYTES
        return self.tags[at : at + TAG_BYTES]

    def take_wraps(self, other: Extent) -> None:
        """The same blocks under other wraps: from now on they are `other`'s."""
        self.kek_version, self.wrapped, self.tags, self.base = other.kek_version, other.wrapped, other.tags, other.base

    def run(self) -> Run:
        """As a sidecar record."""
        a, b = self.first - self.base, self.end - self.base
        wrapped = self.wrapped[a * WRAPPED_BYTES : b * WRAPPED_BYTES]
        tags = self.tags[a * TAG_BYTES : b * TAG_BYTES]
        return Run(self.first, self.version, self.last_len, self.home, self.kek_version, wrapped, tags)


class ExtentMap:
    """Disjoint extents in order. All operations are O(log n) plus the extents they touch (and a list shift)."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._firsts: list[int] = []
        self._extents: list[Extent] = []
        self._unsettled: list[Extent] = []
        """Every extent that is not DURABLE yet, and some that are no longer alive."""

    def __len__(self) -> int:
        return len(self._extents)

    def __iter__(self) -> Iterator[Extent]:
        return iter(self._extents)

    def find(self, block: int) -> Extent | None:
        """The extent that holds `block`, None for a hole."""
        at = bisect_right(self._firsts, block) - 1
        if at >= 0:
            extent = self._extents[at]
            if block < extent.end:
                return extent
        return None

    def overlapping(self, first: int, end: int) -> list[Extent]:
        """Extents that share a block with first … end - 1, in order, not cut to it."""
        at = bisect_right(self._firsts, first) - 1
        if at < 0 or self._extents[at].end <= first:
            at += 1
        return self._extents[at : bisect_left(self._firsts, end)]

    def remove(self, first: int, end: int) -> list[Extent]:
        """Make first … end - 1 holes; returns what was there, cut to that range."""
        hit = self.overlapping(first, end)
        if not hit or first >= end:
            return []
        at = bisect_left(self._firsts, hit[0].first)
        removed: list[Extent] = []
        kept: list[Extent] = []
        for extent in hit:
            a, b = max(first, extent.first), min(end, extent.end)
            if (a, b) == (extent.first, extent.end):
                removed.append(extent)
                extent.alive = False
                continue
            extent.alive = False
            removed.append(extent.piece(a, b, self._block_size))
            if extent.first < a:
                kept.append(extent.piece(extent.first, a, self._block_size))
            if b < extent.end:
                kept.append(extent.piece(b, extent.end, self._block_size))
        self._extents[at : at + len(hit)] = kept
        self._firsts[at : at + len(hit)] = [extent.first for extent in kept]
        self._unsettled += [extent for extent in kept if extent.stage != DURABLE]
        return removed

    def insert(self, extent: Extent) -> None:
        """Add an extent where there are only holes."""
        at = bisect_left(self._firsts, extent.first)
        self._firsts.insert(at, extent.first)
        self._extents.insert(at, extent)
        if extent.stage != DURABLE:
            self._unsettled.append(extent)
            if len(self._unsettled) > 64 + 2 * len(self._extents):
                # A file that is rewritten for hours and never synced must not remember every version.
                self.unsettled()

    def fresh(self) -> list[Extent]:
        """Extents no frame names yet."""
        return [extent for extent in self._unsettled if extent.alive and extent.stage == FRESH]

    def unsettled(self) -> list[Extent]:
        """Extents that are not durable."""
        self._unsettled = [extent for extent in self._unsettled if extent.alive]
        return self._unsettled

    def settle(self) -> None:
        """Everything here is durable now."""
        for extent in self._unsettled:
            extent.stage = DURABLE
        self._unsettled = []
