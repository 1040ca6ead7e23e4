"""Memory is given back in proportion to what the kernel forgets."""

from __future__ import annotations

import sys

import pytest
import trio
import trio.testing

from cryptfs.daemon import memory
from cryptfs.daemon.memory import GivingBack
from cryptfs.fs.inodes import InodeTable
from cryptfs.types import Kind
from tests.fs.tree import Tree


def meet(inodes: InodeTable, count: int) -> None:
    """The kernel looks up `count` files."""
    for number in range(count):
        inodes.meet(10**6 + number, Kind.FILE, number.to_bytes(16, "big"), inodes.root, b"%d" % number).lookups += 1


def forget(inodes: InodeTable, first: int, count: int) -> None:
    for number in range(first, first + count):
        inodes.forget(10**6 + number, 1)


@pytest.fixture
def trims(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What malloc_trim was called with."""
    called: list[int] = []

    class Library:
        def malloc_trim(self, pad: int) -> int:
            called.append(pad)
            return 1

    monkeypatch.setattr("cryptfs.daemon.memory.ctypes.CDLL", lambda _: Library())
    return called


async def test_it_is_due_when_many_are_gone_and_no_fewer_than_are_left(tree: Tree, trims: list[int]) -> None:
    inodes = tree.volume.inodes
    giving = GivingBack(inodes)
    meet(inodes, 10_000)
    forget(inodes, 0, 4_000)
    assert not giving.is_due()
    forget(inodes, 4_000, 1_001)
    assert giving.is_due()
    await giving.give_back()
    assert trims == [0]
    assert not giving.is_due()
    forget(inodes, 5_001, 4_999)
    assert len(inodes) == 1
    assert giving.is_due()


async def test_once_more_when_what_was_cached_meanwhile_has_expired(
    tree: Tree, trims: list[int], mock_clock: trio.testing.MockClock
) -> None:
    inodes = tree.volume.inodes
    giving = GivingBack(inodes)
    meet(inodes, 3_000)
    forget(inodes, 0, 3_000)
    assert giving.is_due()
    await giving.give_back()
    mock_clock.jump(memory.AFTERWARDS_S - 1)
    assert not giving.is_due()
    mock_clock.jump(2)
    assert giving.is_due()
    await giving.give_back()
    mock_clock.jump(1000)
    assert not giving.is_due(), "and no more"
    assert trims == [0, 0]


async def test_the_table_itself_shrinks(tree: Tree, trims: list[int]) -> None:
    inodes = tree.volume.inodes
    meet(inodes, 10_000)
    large = sys.getsizeof(inodes._inodes)
    forget(inodes, 0, 9_990)
    assert sys.getsizeof(inodes._inodes) == large, "nothing would have to be done"
    await GivingBack(inodes).give_back()
    assert sys.getsizeof(inodes._inodes) < large / 100
    assert [inodes.get(10**6 + number).lookups for number in range(9_990, 10_000)] == [1] * 10
    forget(inodes, 9_990, 10)


async def test_in_the_background(tree: Tree, trims: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "INTERVAL_S", 0.001)
    inodes = tree.volume.inodes
    async with trio.open_nursery() as nursery:
        nursery.start_soon(GivingBack(inodes).serve)
        meet(inodes, 3_000)
        await trio.sleep(0.05)
        assert trims == []
        forget(inodes, 0, 3_000)
        for _ in range(3000):
            if trims:
                break
            await trio.sleep(0.01)
        await trio.sleep(0.05)
        assert trims == [0], "once"
        nursery.cancel_scope.cancel()


async def test_a_library_that_cannot_is_no_error(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cryptfs.daemon.memory.ctypes.CDLL", lambda _: object())
    await GivingBack(tree.volume.inodes).give_back()
