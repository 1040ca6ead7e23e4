"""The shared lock: who waits, who goes first, and what a cancelled waiter leaves."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing
from trio.testing import MockClock, wait_all_tasks_blocked

from cryptfs.fs.locks import SharedLock


class Log:
    """Tasks that take the lock one after another, and the order in which they got it."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.lock = SharedLock()
        self.order: list[str] = []
        self.leave: dict[str, trio.Event] = {}
        self.scopes: dict[str, trio.CancelScope] = {}
        self._nursery = nursery

    async def enter(self, name: str) -> None:
        """Start a reader (`r…`) or writer (`w…`) and let it get as far as it can."""
        self.leave[name] = trio.Event()
        self.scopes[name] = trio.CancelScope()
        self._nursery.start_soon(self._task, name)
        await wait_all_tasks_blocked()

    async def _task(self, name: str) -> None:
        form = self.lock.exclusive if name.startswith("w") else self.lock.shared
        with self.scopes[name]:
            async with form():
                self.order.append(name)
                await self.leave[name].wait()

    async def finish(self, *names: str) -> None:
        for name in names:
            self.leave[name].set()
        await wait_all_tasks_blocked()


def scenario(test: Callable[[Log], Awaitable[None]]) -> Callable[[MockClock], Awaitable[None]]:
    async def run(mock_clock: MockClock) -> None:
        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                log = Log(nursery)
                await test(log)
                assert log.lock.idle

    run.__name__ = run.__qualname__ = test.__name__
    return run


@scenario
async def test_readers_share(log: Log) -> None:
    await log.enter("r1")
    await log.enter("r2")
    assert log.order == ["r1", "r2"]
    assert not log.lock.idle
    await log.finish("r2", "r1")


@scenario
async def test_a_writer_is_alone(log: Log) -> None:
    await log.enter("w1")
    await log.enter("w2")
    await log.enter("r3")
    assert log.order == ["w1"]
    await log.finish("w1")
    assert log.order == ["w1", "w2"]
    await log.finish("w2")
    assert log.order == ["w1", "w2", "r3"]
    await log.finish("r3")


@scenario
async def test_a_reader_does_not_overtake_a_waiting_writer(log: Log) -> None:
    await log.enter("r1")
    await log.enter("w2")
    await log.enter("r3")
    await log.enter("r4")
    await log.enter("w5")
    assert log.order == ["r1"]
    await log.finish("r1")
    assert log.order == ["r1", "w2"]
    await log.finish("w2")
    assert log.order[:2] == ["r1", "w2"]
    assert sorted(log.order[2:]) == ["r3", "r4"]
    await log.finish("r3")
    assert len(log.order) == 4
    await log.finish("r4")
    assert log.order[4:] == ["w5"]
    await log.finish("w5")


@scenario
async def test_a_cancelled_writer_lets_the_readers_behind_it_in(log: Log) -> None:
    await log.enter("r1")
    await log.enter("w2")
    await log.enter("r3")
    log.scopes["w2"].cancel()
    await wait_all_tasks_blocked()
    assert log.order == ["r1", "r3"]
    await log.finish("r1", "r3")


@scenario
async def test_a_cancelled_reader_is_not_waited_for(log: Log) -> None:
    await log.enter("w1")
    await log.enter("r2")
    await log.enter("w3")
    log.scopes["r2"].cancel()
    await log.finish("w1")
    assert log.order == ["w1", "w3"]
    await log.finish("w3")


@scenario
async def test_a_holder_that_is_cancelled_lets_go(log: Log) -> None:
    await log.enter("w1")
    await log.enter("w2")
    log.scopes["w1"].cancel()
    await wait_all_tasks_blocked()
    assert log.order == ["w1", "w2"]
    await log.finish("w2")


@scenario
async def test_cancelled_in_the_moment_the_lock_was_handed_over_it_is_handed_on(log: Log) -> None:
    for waiter in ("w2", "r2"):
        await log.enter("w1")
        await log.enter(waiter)
        await log.enter("w3")
        # Handed over and cancelled before the waiter runs again.
        log.leave["w1"].set()
        await trio.lowlevel.checkpoint()
        log.scopes[waiter].cancel()
        await wait_all_tasks_blocked()
        await log.finish(waiter, "w3")
        assert log.order[-1] == "w3"
        assert log.lock.idle


async def test_an_acquired_but_cancelled_waiter_gives_the_lock_back(mock_clock: MockClock) -> None:
    for exclusive in (True, False):
        lock = SharedLock()
        await lock.acquire_exclusive()
        scope = trio.CancelScope()

        async def wait(lock: SharedLock = lock, scope: trio.CancelScope = scope, exclusive: bool = exclusive) -> None:
            with scope:
                await (lock.acquire_exclusive() if exclusive else lock.acquire_shared())
                raise AssertionError("not cancelled")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await wait_all_tasks_blocked()
            # The cancellation is delivered first, then the lock is handed on in the same breath.
            scope.cancel()
            lock.release_exclusive()
        assert lock.idle


@scenario
async def test_downgrade_lets_waiting_readers_in_and_no_writer(log: Log) -> None:
    lock = log.lock
    await lock.acquire_exclusive()
    await log.enter("r1")
    await log.enter("w2")
    await log.enter("r3")
    lock.downgrade()
    await wait_all_tasks_blocked()
    assert log.order == ["r1"]
    await log.finish("r1")
    assert log.order == ["r1"]
    lock.release_shared()
    await wait_all_tasks_blocked()
    assert log.order == ["r1", "w2"]
    await log.finish("w2", "r3")
    assert log.order == ["r1", "w2", "r3"]


async def test_a_free_lock_costs_no_checkpoint() -> None:
    lock = SharedLock()
    with trio.testing.assert_no_checkpoints():
        await lock.acquire_exclusive()
        lock.release_exclusive()
        await lock.acquire_shared()
        await lock.acquire_shared()
        lock.release_shared()
        lock.release_shared()
    assert lock.idle


@pytest.mark.parametrize("seed", range(8))
async def test_writers_are_alone_whatever_is_cancelled(seed: int, autojump_clock: MockClock) -> None:
    from cryptfs.testing.randomness import SeededRandom

    random = SeededRandom(seed)
    lock = SharedLock()
    readers = writers = done = 0

    async def task(plan: bytes) -> None:
        nonlocal readers, writers, done
        exclusive, before, inside, patience = plan[0] & 1, plan[1] % 20, plan[2] % 5, plan[3] % 30
        await trio.sleep(before)
        with trio.move_on_after(patience):
            if exclusive:
                async with lock.exclusive():
                    assert readers == writers == 0
                    writers += 1
                    try:
                        await trio.sleep(inside)
                    finally:
                        writers -= 1
            else:
                async with lock.shared():
                    assert writers == 0
                    readers += 1
                    try:
                        await trio.sleep(inside)
                    finally:
                        readers -= 1
            done += 1

    async with trio.open_nursery() as nursery:
        for _ in range(40):
            nursery.start_soon(task, random(4))
    assert lock.idle
    assert done > 0
