"""Work in a thread whose result somebody must take: if nobody is there any more, it is undone.

A client may leave while its request is in a thread (a KDF, a token). The thread cannot be stopped; what it makes must
not stay behind.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

import trio

T = TypeVar("T")


async def in_thread(work: Callable[[], T], undo: Callable[[T], None], limiter: trio.CapacityLimiter) -> T:
    """`work`'s result. If the caller is cancelled, `undo` is called with it instead, in a thread. Raises as `work`."""
    made: list[T] = []
    lock = threading.Lock()
    left = False

    def run() -> None:
        result = work()
        # Under the lock: either the caller finds it, or we find that the caller has left.
        with lock:
            if not left:
                made.append(result)
                return
        undo(result)

    try:
        await trio.to_thread.run_sync(run, abandon_on_cancel=True, limiter=limiter)
    except trio.Cancelled:
        with lock:
            left = True
        for result in made:
            # Cancelled in the moment it was done. `undo` may block, and this task may not wait any more.
            trio.lowlevel.start_thread_soon(lambda late=result: undo(late), lambda _outcome: None)  # type: ignore[misc]
        raise
    return made[0]
