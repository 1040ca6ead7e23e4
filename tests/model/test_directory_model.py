"""The crash model of directories (docs/CRASH_MODEL.md): no crash state is wrong, and every wrong writer is caught.

CRYPTFS_MODEL_DEPTH=3 looks deeper (minutes).
"""

from __future__ import annotations

import os
import random

import pytest

from cryptfs.ports import RENAME_EXCHANGE
from cryptfs.store.disk_model import Order
from cryptfs.store.memory import MemoryStore
from tests.model import directory_model as model
from tests.model.directory_model import Credulous, EvidenceOnly, Look, Ops, Reader
from tests.model.explore_directories import NEW, OLD, Explorer, Findings, ops_of

DEPTH = int(os.environ.get("CRYPTFS_MODEL_DEPTH", "2"))
RIGHT = [Ops, model.CompactLazily, model.EvidenceFirst]


def assert_right(findings: Findings, at_least: int) -> None:
    assert findings.states >= at_least
    assert not findings.wrong, findings.examples


@pytest.mark.parametrize("start", [OLD, NEW])
@pytest.mark.parametrize("order", [Order.DIRECTORY, Order.JOURNAL])
def test_every_crash_of_every_short_history_leaves_names_of_the_history(
    order: Order, start: tuple[object, ...]
) -> None:
    explorer = Explorer(Ops, order=order, limit=12, start=start)  # type: ignore[arg-type]
    assert_right(explorer.exhaustive(DEPTH), 4000)


@pytest.mark.parametrize("make", RIGHT)
def test_longer_histories_sampled_with_a_second_crash(make: type[Ops]) -> None:
    assert_right(Explorer(make, limit=5, again=2, seed=2).sample(6 * DEPTH**2, length=5), 1500)


@pytest.mark.parametrize(
    ("make", "ops", "depth", "again"),
    [
        (model.NoArrivalSync, "rename x z", 1, 0),
        (model.NoPlaceSync, "mkdir m,rename d/y m/y", 2, 0),
        (model.FsyncWithoutDirectory, "create n,fsync_file n", 2, 0),
        (model.FsyncWithoutChildren, "mkdir m,fsync_dir /", 2, 0),
        (model.ClearanceNotSynced, "create L,rename x L", 1, 1),
        (model.DurableTooEarly, "rename x z,create x", 2, 0),
        (model.CompactUnsynced, "create n,compact /", 2, 0),
        (model.UnforgivingOps, "create n", 1, 0),
        (model.EvidenceOnlyOps, "unlink x", 1, 0),
    ],
)
def test_a_writer_that_breaks_one_rule_is_caught(make: type[Ops], ops: str, depth: int, again: int) -> None:
    explorer = Explorer(make, ops=ops_of(ops), limit=100, again=again, stop_at_first=True)
    assert explorer.exhaustive(depth).wrong
    assert not Explorer(Ops, ops=ops_of(ops), limit=100, again=again).exhaustive(depth).wrong, "the right one is not"


# -- what an attacker may do to it


def volume(crashes: int = 0) -> tuple[MemoryStore, int, frozenset[int]]:
    """A store with /x, /z and /d/y, after a clean unmount and then `crashes` epochs that touched only /d."""
    store = MemoryStore()
    fs = Ops(store)
    root = model.ROOT
    fs.create((root, "x"))
    fs.create((root, "z"))
    fs.mkdir((root, "d"))
    store.syncfs(store.root())
    epoch, crashed = fs.epoch, fs.crashed
    for _ in range(crashes):
        fs = Ops(store, epoch, crashed)
        fs.create((fs.names[root, "d"][1], f"n{fs.epoch}"))
        epoch, crashed = fs.epoch, crashed | {fs.epoch}
        store = next(iter(store.crash_states(random.Random(3), 1)))
        store.syncfs(store.root())
    return store, epoch, crashed


def look(store: MemoryStore, crashed: frozenset[int], reader: type[Reader]) -> Look:
    return reader(store, crashed).look()


def tree(store: MemoryStore) -> int:
    return store.open(store.root(), b"tree", os.O_RDONLY | os.O_DIRECTORY)


def test_without_a_crash_every_change_of_the_tree_is_damage() -> None:
    for change in ("exchange", "remove", "move", "add"):
        store, _, crashed = volume()
        assert not look(store, crashed, Reader).damage
        fd = tree(store)
        if change == "exchange":
            store.rename(fd, b"x", fd, b"z", RENAME_EXCHANGE)
        elif change == "remove":
            store.unlink(fd, b"x")
        elif change == "move":
            store.rename(fd, b"x", store.open(fd, b"d", os.O_RDONLY | os.O_DIRECTORY), b"x")
        else:
            store.link(fd, b"x", fd, b"w")
        assert look(store, crashed, Reader).damage, change


def test_after_a_crash_files_still_cannot_be_exchanged() -> None:
    store, _, crashed = volume(crashes=1)
    assert not look(store, crashed, Reader).damage
    store.rename(tree(store), b"x", tree(store), b"z", RENAME_EXCHANGE)
    assert look(store, crashed, Reader).damage
    assert not look(store, crashed, Credulous).damage, "a reader for whom the tree is simply right serves them"


def test_only_evidence_of_the_crash_tells_a_removal_from_it() -> None:
    """The gap of the rule without `EvidenceFirst`: one crash anywhere excuses removals everywhere."""
    store, _, crashed = volume(crashes=1)
    store.unlink(tree(store), b"x")
    assert not look(store, crashed, Reader).damage
    assert look(store, crashed, EvidenceOnly).damage
