"""Clocks that a test turns: by hand, or along with trio's own (`trio.testing.MockClock`)."""

from __future__ import annotations

import trio

_EPOCH_NS = 1_700_000_000_000_000_000


class FakeClock:
    """`ports.Clock` that stands still until `advance` is called."""

    def __init__(self, start_s: float = 1000.0) -> None:
        self._now_s = start_s

    def monotonic(self) -> float:
        return self._now_s

    def time_ns(self) -> int:
        return _EPOCH_NS + int(self._now_s * 1e9)

    def advance(self, seconds: float) -> None:
        """Let `seconds` pass at once."""
        assert seconds >= 0
        self._now_s += seconds


class TrioClock:
    """`ports.Clock` that shows trio's time: under a `MockClock`, sleeps and ages of keys move together."""

    def monotonic(self) -> float:
        return trio.current_time()

    def time_ns(self) -> int:
        return _EPOCH_NS + int(trio.current_time() * 1e9)
