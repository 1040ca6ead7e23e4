"""Random operations with a model beside them, on several block sizes; the model itself against a plain directory."""

from __future__ import annotations

import random
from contextlib import closing
from pathlib import Path

import pytest

from tests.mount.box import Box, boxed
from tests.mount.exerciser import Exerciser

pytestmark = [pytest.mark.mount, pytest.mark.slow]

OPERATIONS = 900
SIZE_MAX = 400_000


def test_the_exerciser_agrees_with_the_kernels_own_filesystem(tmp_path: Path) -> None:
    with closing(Exerciser(tmp_path / "file", 1, size_max=SIZE_MAX)) as exerciser:
        exerciser.run(OPERATIONS)


@pytest.mark.parametrize("seed", [1])
def test_random_operations(mounted: Box, seed: int) -> None:
    with closing(Exerciser(mounted.clear / "file", seed, size_max=SIZE_MAX, remount=mounted.remount)) as exerciser:
        exerciser.run(OPERATIONS)
    assert " ERROR " not in mounted.log()


@pytest.mark.parametrize(("block_size", "seed"), [("4K", 3), ("1M", 4)])
def test_random_operations_on_other_block_sizes(short_tmp: Path, fuse: None, block_size: str, seed: int) -> None:
    with boxed(short_tmp) as box:
        box.init("--block-size", block_size)
        box.mount()
        size_max = {"4K": 200_000, "1M": 5_000_000}[block_size]
        with closing(Exerciser(box.clear / "file", seed, size_max=size_max, remount=box.remount)) as exerciser:
            exerciser.run(OPERATIONS)
        assert " ERROR " not in box.log()


def test_random_operations_with_a_cache_that_keeps_nothing(box: Box) -> None:
    options = ("--no-cache",)
    box.mount(*options)
    with closing(
        Exerciser(box.clear / "file", 5, size_max=SIZE_MAX, remount=lambda: box.remount(*options))
    ) as exerciser:
        exerciser.run(OPERATIONS // 3)
    assert " ERROR " not in box.log()


@pytest.mark.torture
def test_many_random_operations(mounted: Box) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    with closing(Exerciser(mounted.clear / "file", seed, size_max=SIZE_MAX, remount=mounted.remount)) as exerciser:
        exerciser.run(40_000)
    assert " ERROR " not in mounted.log()
