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
"""Counted each for itself; all others share one count."""
QUIET_S = 600.0
"""After that long without a wrong secret a volume's count is old and may be lost, to another's or with the agent: who
waited for it would have had 20 attempts at `DELAY_MAX_S`, more than the `FREE` ones that begin anew."""


@dataclass(slots=True)
class _Tally:
    failures: int = 0
    failed_at: float = 0.0
    turn: trio.Lock = field(default_factory=trio.Lock)
    waiting: int = 0


def delay_s(failures: int) -> float:
    """How long an attempt waits after so many wrong ones in a row: 1, 2, 4 … 30 s from the third on."""
    return 0.0 if failures < FREE else min(DELAY_MAX_S, 2.0 ** min(failures - FREE, 10))


class Attempts:
    """The counts, in memory: they begin anew with the agent, which does not end by itself while one is young.

    Volume ids are the client's word: a file with another id in it can be made at will. So a count is kept only where a
    secret was wrong, and none is dropped for another's sake before it is old.
    """

    def __init__(self) -> None:
        self._tallies: dict[bytes, _Tally] = {}
        self._others = _Tally()
        """For all volumes that find no room."""

    @contextlib.asynccontextmanager
    async def next(self, volume_id: bytes, *, proves: bool = True) -> AsyncIterator[int]:
        """The caller's turn to try a secret, after the wait; gives how many were wrong before.

        A `WrongSecret` from the block counts as one more, its end without an error as none if that `proves` that a
        secret was right.
        """
        tally = self._of(volume_id)
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
                    tally.failed_at = trio.current_time()
                    raise
                if proves and tally is not self._others:
                    tally.failures = 0
        finally:
            tally.waiting -= 1
            if not tally.waiting and not tally.failures and self._tallies.get(volume_id) is tally:
                del self._tallies[volume_id]

    @property
    def young_for_s(self) -> float:
        """Seconds until every count is old, if nothing is tried any more; 0: they are. Only then may they be lost."""
        counts = [tally.failed_at for tally in (*self._tallies.values(), self._others) if tally.failures]
        return max(0.0, max(counts) + QUIET_S - trio.current_time()) if counts else 0.0

    def _of(self, volume_id: bytes) -> _Tally:
        tally = self._tallies.get(volume_id)
        if tally is not None:
            return tally
        if len(self._tallies) >= VOLUMES_MAX:
            old_s = trio.current_time() - QUIET_S
            quiet = [key for key, other in self._tallies.items() if not other.waiting and other.failed_at <= old_s]
            if not quiet:
                if self._others.failed_at <= old_s:
                    self._others.failures = 0
                return self._others
            del self._tallies[min(quiet, key=lambda key: self._tallies[key].failed_at)]
        tally = self._tallies[volume_id] = _Tally()
        return tally
