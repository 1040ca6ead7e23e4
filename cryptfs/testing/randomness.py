"""Randomness that repeats."""

from __future__ import annotations

import random


class SeededRandom:
    """`ports.Random`: the same bytes for the same seed, never the same twice in one run."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)

    def __call__(self, count: int, /) -> bytes:
        return self._rng.randbytes(count)
