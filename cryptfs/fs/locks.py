"""A lock with many readers or one writer that costs nothing while nobody contends."""

from __future__ import annotations

from collections import deque
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


class SharedLock:
    """Fair: waiters are served in order, consecutive readers together.

    Unlike `trio.Lock` taking it when it is free is no checkpoint: a request that finds everything in memory runs to
    its end without a trip through the scheduler.
    """

    __slots__ = ("_exclusive", "_shared", "_waiting")

    def __init__(self) -> None:
        self._shared = 0
        self._exclusive = False
        self._waiting: deque[tuple[bool, trio.Event]] = deque()

    async def acquire_shared(self) -> None:
        """Enter along with other readers."""
        if self._exclusive or self._waiting:
            await self._wait(exclusive=False)
        else:
            self._shared += 1

    async def acquire_exclusive(self) -> None:
        """Enter alone."""
        if self._exclusive or self._shared or self._waiting:
            await self._wait(exclusive=True)
        else:
            self._exclusive = True

    def release_shared(self) -> None:
        """Leave as a reader."""
        self._shared -= 1
        self._hand_on()

    def release_exclusive(self) -> None:
        """Leave as the writer."""
        self._exclusive = False
        self._hand_on()

    def downgrade(self) -> None:
        """From writer to reader, letting waiting readers in but no writer between."""
        self._exclusive = False
        self._shared = 1
        self._hand_on()

    @property
    def idle(self) -> bool:
        """Nobody holds it or waits for it."""
        return not (self._exclusive or self._shared or self._waiting)

    async def _wait(self, *, exclusive: bool) -> None:
        event = trio.Event()
        item = (exclusive, event)
        self._waiting.append(item)
        try:
            await event.wait()
        except BaseException:
            if event.is_set():
                (self.release_exclusive if exclusive else self.release_shared)()
            else:
                self._waiting.remove(item)
                self._hand_on()
            raise

    def _hand_on(self) -> None:
        while self._waiting and not self._exclusive:
            exclusive, event = self._waiting[0]
            if exclusive:
                if self._shared:
                    return
                self._exclusive = True
            else:
                self._shared += 1
            self._waiting.popleft()
            event.set()

    @asynccontextmanager
    async def shared(self) -> AsyncIterator[None]:
        """`async with` form of the reader's side."""
        await self.acquire_shared()
        try:
            yield
        finally:
            self.release_shared()

    @asynccontextmanager
    async def exclusive(self) -> AsyncIterator[None]:
        """`async with` form of the writer's side."""
        await self.acquire_exclusive()
        try:
            yield
        finally:
            self.release_exclusive()
