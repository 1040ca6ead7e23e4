"""Crash states for as long as there is time: other workloads, more subsets, two more crashes, another seed each time.

`CRYPTFS_TORTURE_S`: seconds for this test (default 600; a million states take about two hours on one core).
`CRYPTFS_TORTURE_SEED`: where to start; the seed of a failure is in the command it prints.
"""

from __future__ import annotations

import itertools
import os
import random
import sys
import time
from collections.abc import Iterator

import pytest

from tests.crash.alphabet import pairs, singles, triples
from tests.crash.explorer import Explorer, Scene, Wrong
from tests.crash.machine import repeatable
from tests.crash.test_enumeration import HOLD, SCENES
from tests.crash.workload import Op

pytestmark = pytest.mark.torture

SINGLE_SUBSETS = 256
"""All of them where at most eight things are not durable."""


def workloads(rng: random.Random) -> Iterator[tuple[tuple[Op, ...], int]]:
    """(operations, survivors of each moment): all of one, all of two, and then three without end."""
    everything = [(ops, SINGLE_SUBSETS) for ops in singles()] + [(ops, 8) for ops in pairs()]
    rng.shuffle(everything)
    yield from everything
    for ops in triples(rng):
        yield ops, 4


async def test_crash_states() -> None:
    budget_s = float(os.environ.get("CRYPTFS_TORTURE_S", "600"))
    seed = int(os.environ.get("CRYPTFS_TORTURE_SEED", str(time.time_ns() % 1_000_000)))
    started = time.monotonic()
    rng = random.Random(seed)
    sys.stdout.write(f"\nseed {seed}\n")
    with repeatable():
        explorers = [Explorer(await Scene.make(order, start), seed) for order, start in SCENES]
        for explorer, (ops, subsets) in zip(itertools.cycle(explorers), workloads(rng), strict=False):
            if time.monotonic() - started > budget_s:
                break
            try:
                await explorer.explore(HOLD * rng.randrange(2) + ops, per_moment=subsets, again=rng.randrange(3))
            except Wrong as wrong:
                raise await explorer.smaller(wrong) from None
    states = sum(explorer.states for explorer in explorers)
    sys.stdout.write(f"{states} states of {sum(explorer.workloads for explorer in explorers)} workloads\n")
    assert states > 20 * budget_s
