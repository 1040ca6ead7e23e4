"""How fast work goes that programs are not to notice: a share of the time, one piece after the other; or all of it.

A piece is done in a *turn*. While programs use the volume there is one turn at a time, and each is followed by a rest
in proportion to what it took. As soon as they let it alone (`is_quiet`), a rest ends and several turns run side by
side: most of a piece is waiting, for the disk and for the key agent. Those that are under way when a program comes
back are ended, so what it meets is `workers` pieces at most.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Self

import trio

_LOOK_S = 0.05
"""How often somebody who rests looks whether programs are still there."""


class Pace:
    """One for all that is to share the time."""

    def __init__(self, share: float = 1.0, workers: int = 1, is_quiet: Callable[[], bool] = lambda: False) -> None:
        """`share` of the time is worked, 0 < `share` <= 1, but all of it by `workers` tasks while `is_quiet` says so.

        With a `share` of 1 it is never asked.
        """
        self.share = share
        self._workers = workers
        self._is_quiet = is_quiet
        self._at_work = 0
        self._freed = trio.Event()

    @property
    def hurries(self) -> bool:
        """Whether there is nobody to be gentle with now."""
        return self.share >= 1 or self._is_quiet()

    async def turn(self) -> Turn:
        """Wait for it; then `async with` it, in this task or another."""
        while self._at_work >= (self._workers if self.hurries else 1):
            await self._freed.wait()
        self._at_work += 1
        return Turn(self)

    def end_turn(self) -> None:
        """For `Turn`: the next one may begin."""
        self._at_work -= 1
        self._freed.set()
        self._freed = trio.Event()


class Turn:
    """A piece of work: ends with a `rest`, unless it fails."""

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self._since_s = trio.current_time()

    async def rest(self) -> None:
        """In the middle of a long piece, where nothing is held up by it: what is due by now. A checkpoint always."""
        now_s = trio.current_time()
        until_s = now_s + (now_s - self._since_s) * (1 / self._pace.share - 1)
        await trio.lowlevel.checkpoint()
        while not self._pace.hurries and (left_s := until_s - trio.current_time()) > 0:  # noqa: ASYNC110 - silence is no event
            await trio.sleep(min(left_s, _LOOK_S))
        self._since_s = trio.current_time()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                await self.rest()
        finally:
            self._pace.end_turn()
