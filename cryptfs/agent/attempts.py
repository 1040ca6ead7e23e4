"""Wrong secrets: counted per volume, and the more there were, the longer the next attempt waits.

Against whoever has the user's account but not the passphrase; a copy of the volume is guessed at elsewhere, at the
KDF's own cost. The wait is before the KDF, and holds up attempts at the same volume only.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import trio

from cryptfs.errors import WrongSecret

FREE = 3
"""Wrong ones in a row that cost nothing: people mistype."""
DELAY_MAX_S = 30.0
VOLUMES_MAX = 256
"""Counted at a time; the volume that has been quiet longest is forgotten first."""


@dataclass(slots=True)
class _Tally:
    failures: int = 0
    turn: trio.Lock = field(default_factory=trio.Lock)
    waiting: int = 0


def delay_s(failures: int) -> float:
    """How long an attempt waits after so many wrong ones in a row: 1, 2, 4 … 30 s from the third on."""
    return 0.0 if failures < FREE else min(DELAY_MAX_S, 2.0 ** min(failures - FREE, 10))


class Attempts:
    """The counts, in memory: they begin anew with the agent."""

    def __init__(self) -> None:
        self._tallies: dict[bytes, _Tally] = {}

    @contextlib.asynccontextmanager
    async def next(self, volume_id: bytes) -> AsyncIterator[int]:
        """The caller's turn to try a secret, after the wait; gives how many were wrong before.

        A `WrongSecret` from the block counts as one more, its end without an error as none.
        """
        tally = self._tallies.pop(volume_id, None) or _Tally()
        self._tallies[volume_id] = tally
        if len(self._tallies) > VOLUMES_MAX:
            idle = next((key for key, other in self._tallies.items() if not other.waiting and other is not tally), None)
            if idle is not None:
                del self._tallies[idle]
        tally.waiting += 1
        try:
            # One at a time, or many attempts at once would all wait for the same count.
            async with tally.turn:
                before = tally.failures
                await trio.sleep(delay_s(before))
                try:
                    yield before
                except WrongSecret:
                    tally.failures += 1
                    raise
                tally.failures = 0
        finally:
            tally.waiting -= 1
