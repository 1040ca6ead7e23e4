"""The crash model of one file (docs/CRASH_MODEL.md): no crash state is wrong, and every wrong writer is caught.

CRYPTFS_MODEL_DEPTH=4 looks deeper (minutes).
"""

from __future__ import annotations

import os

import pytest

from tests.model import file_model
from tests.model.explore import (
    ALL,
    CHANGES,
    COMPACT,
    FSYNC,
    KILL,
    REMOUNT,
    ROTATE,
    START,
    Explorer,
    Findings,
    tampered,
)
from tests.model.file_model import File, FrameAtFsync

DEPTH = int(os.environ.get("CRYPTFS_MODEL_DEPTH", "2"))
TWINS = (*START, CHANGES[5], FSYNC, CHANGES[0], FSYNC)
"""A start with blocks in both homes."""


def assert_right(findings: Findings, at_least: int) -> None:
    assert findings.states >= at_least
    assert not findings.wrong, findings.examples


@pytest.mark.parametrize("make", [File, FrameAtFsync])
def test_every_crash_of_every_short_history_leaves_a_state_of_the_history(make: type[File]) -> None:
    assert_right(Explorer(make, limit=64).run(DEPTH), 2000)
    assert_right(Explorer(make, limit=24).run(DEPTH, start=TWINS), 1500)


@pytest.mark.parametrize("make", [File, FrameAtFsync])
def test_so_does_a_second_crash_after_the_first(make: type[File]) -> None:
    assert_right(Explorer(make, limit=10, again=2).run(DEPTH), 3000)


@pytest.mark.parametrize("make", [File, FrameAtFsync])
def test_longer_histories_sampled(make: type[File]) -> None:
    assert_right(Explorer(make, limit=8, again=2).sample(40 * DEPTH**2, length=7), 5000)


@pytest.mark.parametrize(
    ("make", "ops"),
    [
        (file_model.NoMountSync, (*CHANGES, KILL)),
        (file_model.EpochNotDurable, ALL),
        (file_model.EagerCut, ALL),
        (file_model.DurableHome, ALL),
        (file_model.TailInPlace, ALL),
        (file_model.DurableTooEarly, ALL),
        (file_model.NameNotSynced, (*CHANGES[:3], FSYNC, COMPACT)),
        (file_model.CompactUnsynced, (*CHANGES[:3], FSYNC, COMPACT)),
        (file_model.CompactDirty, (*CHANGES[:3], FSYNC, COMPACT)),
        (file_model.RotateDirty, (*CHANGES[:3], FSYNC, ROTATE)),
        (file_model.CompactTrustsRename, (*CHANGES[:3], COMPACT)),
    ],
)
def test_a_writer_that_breaks_one_rule_is_caught(make: type[File], ops: tuple[object, ...]) -> None:
    explorer = Explorer(make, ops, limit=60, again=2, stop_at_first=True)  # type: ignore[arg-type]
    assert explorer.run(3).wrong


def test_tampering_with_a_clean_volume_never_serves_other_content() -> None:
    assert_right(tampered(2, forgive_always=False), 3000)


def test_a_reader_that_always_forgives_is_a_rollback_oracle() -> None:
    assert tampered(2, forgive_always=True).wrong


def test_a_remount_without_changes_changes_nothing() -> None:
    assert_right(Explorer(File, (REMOUNT, KILL), limit=100).run(3), 20)
