"""Mounts whose daemon, agent or disk stops at a random moment, while seven programs write, sync and note what they
were told: nothing acknowledged is missing or wrong, and everything can be read, in this round and those before.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from cryptfs.cli import mounts
from tests.crash.disk import CannotMake, LoopDisk, loop_disk
from tests.crash.rounds import Crash, Rounds, agent_killed, both_killed, daemon_killed
from tests.mount.box import Box, boxed

pytestmark = pytest.mark.mount

SEED = 1
KILLS = 8
AGENT_KILLS = 3
POWER_CUTS = 4
LONGEST_S = 0.4
"""From the first acknowledgement on; the torture run goes on for longer in each round."""


@pytest.fixture
def on_loop(template: Path, short_tmp: Path) -> Iterator[tuple[Box, LoopDisk]]:
    """A mounted volume on a disk whose power can be cut."""
    with boxed(short_tmp) as box:
        try:
            with loop_disk(box.root, box.vault) as disk:
                shutil.copytree(template, box.vault, symlinks=True, dirs_exist_ok=True)
                box.mount()
                yield box, disk
                if box.is_mounted:
                    box.umount()
        except CannotMake as error:
            pytest.skip(str(error))


def power_cut(disk: LoopDisk) -> Crash:
    """The disk stops; then the daemon is killed, and the disk is there again with what it had."""

    def crash(box: Box, rng: random.Random) -> None:
        disk.cut_power()
        if mounts.daemon_of_mount(box.clear) is not None:
            box.kill_daemon()
        box.run("umount", box.clear, code=None)
        disk.umount()
        disk.mount()

    return crash


def test_the_daemon_is_killed(mounted: Box) -> None:
    rounds = Rounds(mounted, SEED, daemon_killed)
    for _ in range(KILLS):
        rounds.play(longest_s=LONGEST_S)
    assert rounds.acknowledged > 10 * KILLS
    assert " ERROR " not in mounted.log()


@pytest.mark.parametrize("crash", [agent_killed, both_killed])
def test_the_agent_is_killed(mounted: Box, crash: Crash) -> None:
    rounds = Rounds(mounted, SEED, crash)
    for _ in range(AGENT_KILLS):
        rounds.play(longest_s=LONGEST_S)
    assert rounds.acknowledged > 10 * AGENT_KILLS


def test_the_power_is_cut(on_loop: tuple[Box, LoopDisk]) -> None:
    box, disk = on_loop
    rounds = Rounds(box, SEED, power_cut(disk), stop_writers=True)
    for _ in range(POWER_CUTS):
        rounds.play(longest_s=LONGEST_S)
    assert rounds.acknowledged > 10 * POWER_CUTS


def test_the_daemon_is_killed_and_then_the_power_is_cut(on_loop: tuple[Box, LoopDisk]) -> None:
    """Between the two the next daemon has mounted what the first left in the page cache."""
    box, disk = on_loop
    cut_power = power_cut(disk)

    def crash(box: Box, rng: random.Random) -> None:
        box.kill_daemon()
        if rng.random() < 0.5:
            box.mount()
            list(box.clear.rglob("*"))
        cut_power(box, rng)

    rounds = Rounds(box, SEED, crash, stop_writers=True)
    for _ in range(POWER_CUTS // 2):
        rounds.play(longest_s=LONGEST_S)
    assert rounds.acknowledged > 20
