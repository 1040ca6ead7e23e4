"""How fast background work goes: its share of the time beside programs, all of it by several tasks without them."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from cryptfs.daemon.rotating import QUIET_S, Quiet
from cryptfs.fs.pace import Pace, Turn
from cryptfs.fuse.gate import Traffic


async def pieces(pace: Pace, count: int, most: list[int]) -> None:
    """`count` pieces of one second; `most` becomes how many were under way at the same time."""
    at_work = 0

    async def piece(turn: Turn) -> None:
        nonlocal at_work
        async with turn:
            at_work += 1
            most[0] = max(most[0], at_work)
            await trio.sleep(1)
            at_work -= 1

    async with trio.open_nursery() as nursery:
        for _ in range(count):
            nursery.start_soon(piece, await pace.turn())


async def test_one_at_a_time_with_a_rest_beside_programs(autojump_clock: MockClock) -> None:
    began, most = trio.current_time(), [0]
    await pieces(Pace(0.2, 8, lambda: False), 6, most)
    assert trio.current_time() - began == pytest.approx(30, abs=1)
    assert most == [1]


@pytest.mark.parametrize("pace", [Pace(workers=4), Pace(0.1, 4, lambda: True)])
async def test_several_at_a_time_without_a_rest_alone(autojump_clock: MockClock, pace: Pace) -> None:
    began, most = trio.current_time(), [0]
    await pieces(pace, 12, most)
    assert trio.current_time() - began == pytest.approx(3)
    assert most == [4]


async def test_a_rest_ends_when_programs_are_gone_and_turns_when_they_come_back(autojump_clock: MockClock) -> None:
    quiet, most = True, [0]
    pace = Pace(0.01, 3, lambda: quiet)

    async def program() -> None:
        nonlocal quiet
        await trio.sleep(1.5)
        quiet = False
        await trio.sleep(10)
        quiet = True

    async with trio.open_nursery() as nursery:
        nursery.start_soon(program)
        began = trio.current_time()
        await pieces(pace, 6, most)
        # Three, and three that had begun when it came; they rest until it is gone.
        assert trio.current_time() - began == pytest.approx(11.5, abs=0.2)
    assert most == [3]


async def test_a_turn_that_fails_or_is_cancelled_frees_its_place_at_once(autojump_clock: MockClock) -> None:
    pace = Pace(0.001)
    with pytest.raises(OSError, match="full"):
        async with await pace.turn():
            raise OSError("full")
    with trio.move_on_after(1):
        async with await pace.turn():
            await trio.sleep_forever()
    began = trio.current_time()
    turn = await pace.turn()
    assert trio.current_time() == began
    with trio.CancelScope() as scope:
        async with turn:
            scope.cancel()
    await pace.turn()


async def test_a_mount_is_quiet_a_while_after_its_last_answer(autojump_clock: MockClock) -> None:
    traffic = Traffic()
    quiet = Quiet(traffic)
    assert not quiet.lasts()
    await trio.sleep(QUIET_S)
    assert quiet.lasts()
    traffic.begun += 1
    for _ in range(10):
        # One that takes long goes on being there.
        assert not quiet.lasts()
        await trio.sleep(QUIET_S)
    assert not quiet.lasts()
    traffic.answered += 1
    await trio.sleep(QUIET_S / 2)
    traffic.begun += 1
    traffic.answered += 1
    assert not quiet.lasts()
    await trio.sleep(QUIET_S / 2)
    assert not quiet.lasts()
    await trio.sleep(QUIET_S / 2)
    assert quiet.lasts()
