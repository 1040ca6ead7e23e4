"""As `tests/crash/test_real_crashes.py`, ten times as many rounds: 200 kills of daemon, agent or both, 50 power cuts.

`CRYPTFS_TORTURE_SEED` chooses another run.
"""

from __future__ import annotations

import os
import sys
import time

import pytest

from tests.crash.conftest import box, fuse, mounted, template
from tests.crash.disk import LoopDisk
from tests.crash.rounds import Rounds, any_killed
from tests.crash.test_real_crashes import on_loop, power_cut
from tests.mount.box import Box

__all__ = ["box", "fuse", "mounted", "on_loop", "template"]

pytestmark = [pytest.mark.mount, pytest.mark.torture]

KILLS, POWER_CUTS = 200, 50


def play(rounds: Rounds, count: int) -> None:
    """All of them; says the seed first."""
    sys.stdout.write(f"\nseed {rounds.seed}\n")
    for _ in range(count):
        rounds.play(longest_s=2)
    sys.stdout.write(f"{count} rounds, {rounds.acknowledged} acknowledgements\n")


@pytest.fixture
def seed() -> int:
    return int(os.environ.get("CRYPTFS_TORTURE_SEED", str(time.time_ns() % 1_000_000)))


def test_kills(mounted: Box, seed: int) -> None:
    play(Rounds(mounted, seed, any_killed), KILLS)


def test_power_cuts(on_loop: tuple[Box, LoopDisk], seed: int) -> None:
    box, disk = on_loop
    play(Rounds(box, seed, power_cut(disk), stop_writers=True), POWER_CUTS)
