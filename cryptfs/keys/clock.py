"""The real clock. CLOCK_BOOTTIME goes on while the machine is suspended, so a key's age does too (clock_gettime(2))."""

from __future__ import annotations

import time


class SystemClock:
    """`ports.Clock` over the kernel."""

    def monotonic(self) -> float:
        """Seconds since boot, suspend included."""
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    def time_ns(self) -> int:
        """Nanoseconds since 1970."""
        return time.time_ns()
