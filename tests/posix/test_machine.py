"""The state machine, bounded here and long in `make torture`."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.mount.box import Box
from tests.posix.machine import Machine

pytestmark = [pytest.mark.mount, pytest.mark.usefixtures("root")]


@pytest.fixture
def other() -> Iterator[Path]:
    """An empty directory on tmpfs."""
    if not os.path.isdir("/dev/shm"):
        pytest.skip("needs /dev/shm")
    path = Path(tempfile.mkdtemp(dir="/dev/shm"))
    yield path
    shutil.rmtree(path)


def drive(box: Box, other: Path, *, examples: int, steps: int, random: bool) -> int:
    """Run the machine; how many operations were compared."""

    class OnThisMount(Machine):
        roots = (box.clear, other)
        remount = box.remount

    run_state_machine_as_test(
        OnThisMount,
        settings=settings(
            max_examples=examples, stateful_step_count=steps, deadline=None, derandomize=not random,
            suppress_health_check=list(HealthCheck), database=None,
        ),
    )  # fmt: skip
    assert "unexpectedly" not in box.log(), box.log()
    return OnThisMount.steps


def test_a_mount_is_a_tmpfs_to_random_operations(mounted: Box, other: Path) -> None:
    assert drive(mounted, other, examples=12, steps=60, random=False) > 300


@pytest.mark.torture
def test_twenty_thousand_steps(mounted: Box, other: Path) -> None:
    done = 0
    while done < 20_000:
        done += drive(mounted, other, examples=50, steps=150, random=True)
    sys.stdout.write(f"{done} steps\n")
