"""The `state` file: two slots that say which mount epoch this is and which epochs ended uncleanly (FORMAT.md §4).

Each slot has a key of its own, as a sealed log has: whoever holds no KEK that the volume still has makes no slot.
"""

from __future__ import annotations

import itertools
import struct
from dataclasses import dataclass, replace

from cryptfs.errors import VolumeDamaged
from cryptfs.types import EPOCH_MAX, WRAPPED_BYTES

SLOT_BYTES = 512
SIGNED_BYTES = 480
RANGES_MAX = 50

_MAGIC = b"CFSTATE1"
_FIXED = struct.Struct(">8sQIBB2x")
_RANGE = struct.Struct(">II")
_KEY = struct.Struct(f">I{WRAPPED_BYTES}s12x")
_KEY_AT = SIGNED_BYTES - _KEY.size


@dataclass(frozen=True, slots=True)
class State:
    """One slot. `unclean`: ascending, disjoint (first, last) ranges of epochs that ended uncleanly."""

    sequence: int
    epoch: int
    clean: bool
    unclean: tuple[tuple[int, int], ...] = ()

    def is_unclean(self, epoch: int) -> bool:
        """Whether `epoch` ended uncleanly."""
        return any(first <= epoch <= last for first, last in self.unclean)

    def next_epoch(self) -> State:
        """What mounting writes: the next epoch, open; this one joins the unclean ones unless it ended cleanly."""
        if self.epoch >= EPOCH_MAX:
            raise VolumeDamaged("the mount epochs of this volume are used up")
        unclean = self.unclean if self.clean else _add(self.unclean, self.epoch)
        return State(self.sequence + 1, self.epoch + 1, clean=False, unclean=unclean)

    def ended(self) -> State:
        """What a clean unmount writes."""
        return replace(self, sequence=self.sequence + 1, clean=True)

    @property
    def slot(self) -> int:
        """Which slot (0 or 1) this state is written to: never the one that holds its predecessor."""
        return self.sequence & 1


def _add(ranges: tuple[tuple[int, int], ...], epoch: int) -> tuple[tuple[int, int], ...]:
    """`ranges` with `epoch` (later than all of them); over the limit, the two with the smallest gap become one."""
    if ranges and ranges[-1][1] == epoch - 1:
        return (*ranges[:-1], (ranges[-1][0], epoch))
    out = [*ranges, (epoch, epoch)]
    if len(out) > RANGES_MAX:
        at = min(range(len(out) - 1), key=lambda i: out[i + 1][0] - out[i][1])
        out[at : at + 2] = [(out[at][0], out[at + 1][1])]
    return tuple(out)


@dataclass(frozen=True, slots=True)
class Slot:
    """512 bytes: a state, and the key that it is authenticated under, wrapped (40 bytes) under KEK `kek_version`."""

    state: State
    kek_version: int
    wrapped: bytes
    mac: bytes = b""

    def signed(self) -> bytes:
        """The 480 bytes under the MAC."""
        state = self.state
        head = _FIXED.pack(_MAGIC, state.sequence, state.epoch, state.clean, len(state.unclean))
        ranges = b"".join(_RANGE.pack(*r) for r in state.unclean)
        return (head + ranges).ljust(_KEY_AT, b"\0") + _KEY.pack(self.kek_version, self.wrapped)


def decode_slot(data: bytes) -> Slot | None:
    """A slot from 512 bytes, or None if this was never one of ours (torn, zeroed, edited)."""
    if len(data) != SLOT_BYTES:
        return None
    magic, sequence, epoch, clean, count = _FIXED.unpack_from(data)
    if magic != _MAGIC or clean > 1 or count > RANGES_MAX or epoch > EPOCH_MAX:
        return None
    ranges = tuple(_RANGE.unpack_from(data, _FIXED.size + i * _RANGE.size) for i in range(count))
    kek_version, wrapped = _KEY.unpack_from(data, _KEY_AT)
    slot = Slot(State(sequence, epoch, bool(clean), ranges), kek_version, wrapped, data[SIGNED_BYTES:])
    ascending = all(first <= last for first, last in ranges) and all(
        a[1] + 1 < b[0] for a, b in itertools.pairwise(ranges)
    )
    if not ascending or not kek_version or slot.signed() != data[:SIGNED_BYTES]:
        return None
    return slot
