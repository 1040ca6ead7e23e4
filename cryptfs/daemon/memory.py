"""Giving memory back once the kernel has forgotten many inodes, as it does when memory runs short.

What a walk over a large tree takes is scattered: among a million freed objects lie a few that live on, keys until
their time is up, and what sleeping tasks hold. Python's own allocator gives back whole mebibytes with nothing in them,
so one such object keeps one. The C library's gives back pages of 4 KiB, wherever they are, but only when it is asked
to (malloc_trim(3)). So `cli.daemon_process` has the daemon use that one.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable

import trio

from cryptfs.fs.inodes import InodeTable

INTERVAL_S = 2.0
MANY = 2_000
"""Inodes, 1.5 MB of them. A trim of what 500,000 left takes 60 ms of processor time, of what 30,000 left 3 ms."""

AFTERWARDS_S = 70.0
"""So long after that it is done once more: keys that were cached meanwhile have reached the usual max age, and were
what kept the pages around them. Measured for 100,000 files: 10 MB."""


class GivingBack:
    """Of one volume; run `serve` in the background."""

    def __init__(self, inodes: InodeTable) -> None:
        self._inodes = inodes
        self._seen = 0
        self._again_s = math.inf
        # Not in every C library: then freed memory is kept for the next walk.
        self._trim: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)

    async def serve(self) -> None:
        """For ever."""
        while True:
            await trio.sleep(INTERVAL_S)
            if self.is_due():
                await self.give_back()

    def is_due(self) -> bool:
        """Whether many inodes are gone, or it is time to do it once more for those that were."""
        return self._many_are_gone() or trio.current_time() >= self._again_s

    def _many_are_gone(self) -> bool:
        """No fewer than are left: so the work is in proportion to what was forgotten."""
        return self._inodes.dropped - self._seen >= max(MANY, len(self._inodes))

    async def give_back(self) -> None:
        """On a thread: requests go on meanwhile, but those that need memory wait for the allocator's lock."""
        self._again_s = trio.current_time() + AFTERWARDS_S if self._many_are_gone() else math.inf
        self._seen = self._inodes.dropped
        self._inodes.slim()
        if self._trim is not None:
            await trio.to_thread.run_sync(self._trim, 0)
