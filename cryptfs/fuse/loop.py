"""A quicker request loop for pyfuse3 under trio.

pyfuse3 waits for each request with `trio.lowlevel.wait_readable` under a `trio.Lock`: an epoll registration and two
trips through the scheduler for a request that is usually there already. It looks `trio` up in its own namespace,
which is how its asyncio support replaces it; here it gets a `trio` whose `wait_readable` polls first and whose lock
is free to take when it is free. Other tasks still get their turn: after a number of requests in a row the loop passes
a checkpoint.
"""

from __future__ import annotations

import select
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pyfuse3
import trio

from cryptfs.fs.locks import SharedLock

if TYPE_CHECKING:
    from types import TracebackType

_REQUESTS_IN_A_ROW = 32


class _ReadLock:
    """`async with` form of a lock that does not checkpoint while nobody else wants it."""

    def __init__(self) -> None:
        self._lock = SharedLock()

    async def __aenter__(self) -> None:
        await self._lock.acquire_exclusive()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release_exclusive()


class _Readiness:
    """`wait_readable` for the one FUSE descriptor of the process."""

    def __init__(self) -> None:
        self._poll = select.poll()
        self._fd = -1
        self._in_a_row = 0

    async def wait_readable(self, fd: int) -> None:
        if fd != self._fd:
            self._poll = select.poll()
            self._poll.register(fd, select.POLLIN)
            self._fd = fd
        if self._in_a_row < _REQUESTS_IN_A_ROW and self._poll.poll(0):
            self._in_a_row += 1
            return
        self._in_a_row = 0
        await trio.lowlevel.wait_readable(fd)


def install() -> None:
    """Give pyfuse3 the quicker loop. Before `pyfuse3.init`."""
    lowlevel = SimpleNamespace(
        wait_readable=_Readiness().wait_readable,
        notify_closing=trio.lowlevel.notify_closing,
        current_trio_token=trio.lowlevel.current_trio_token,
        current_task=trio.lowlevel.current_task,
    )
    pyfuse3.trio = SimpleNamespace(  # type: ignore[attr-defined]
        Lock=_ReadLock,
        open_nursery=trio.open_nursery,
        ClosedResourceError=trio.ClosedResourceError,
        lowlevel=lowlevel,
        from_thread=trio.from_thread,
    )
