"""`daemon.locking` without a mount, on two clocks: keys age while the machine is suspended, trio's clock stops."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import cast

import pytest
import trio
from trio.testing import MockClock

from cryptfs.daemon.locking import Locking, State
from cryptfs.daemon.policies import Policies
from cryptfs.errors import AgentUnavailable, VolumeLocked
from cryptfs.fs.volume import Volume
from cryptfs.fuse.forgetting import Forgetting
from cryptfs.fuse.gate import Gate
from cryptfs.keys.cache import KeyCache
from cryptfs.keys.link import AgentLink
from cryptfs.keys.policy import Overrides
from cryptfs.testing.clock import FakeClock

MAX_AGE_S = 100.0
LOOK_S = 1.0
"""Within which a machine that was asleep for too long has locked itself after it woke up."""


class AbsentAgent:
    """An `AgentLink` that reaches nobody."""

    connected = False
    apart = False

    async def attach(self) -> None:
        raise AgentUnavailable("nobody there")

    def interrupt(self) -> None:
        return


class PresentAgent(AbsentAgent):
    """One that is reached, and what it says when it is asked."""

    connected = True

    def __init__(self) -> None:
        self.unlocked = False
        self.hangs = False
        self.asked = 0

    async def is_unlocked(self, volume_id: bytes) -> bool:
        self.asked += 1
        if self.hangs:
            await trio.sleep_forever()
        return self.unlocked

    async def reattach(self) -> None:
        return


class Keys:
    """The cache, as far as it is told to overwrite everything."""

    closed = False

    def close(self) -> None:
        self.closed = True

    def reopen(self) -> None:
        self.closed = False


class SlowVolume:
    """Volume and its context in one: writing what is there takes for ever, and whether it was given up is seen."""

    def __init__(self) -> None:
        self.ctx = self.config = self
        self.volume_id = b"v" * 16
        self.writing = 0

    async def flush(self) -> None:
        self.writing += 1
        try:
            await trio.sleep_forever()
        finally:
            self.writing -= 1

    def forget_plaintext(self) -> None:
        return


class Kernel:
    """`Forgetting` with nothing to forget."""

    def expires_names(self) -> bool:
        return True

    async def drop_everything(self) -> None:
        return

    async def drop_files_in_use(self) -> None:
        return


class Served:
    """A `Locking` at work, and what it works on."""

    def __init__(self) -> None:
        self.clock, self.keys, self.volume, self.gate = FakeClock(), Keys(), SlowVolume(), Gate()
        self.locking = Locking(self.gate, Policies(Overrides(MAX_AGE_S, None, None, None)), self.clock)

    async def sleep_awake(self, seconds: float) -> None:
        """Time goes on for everybody, in steps shorter than anything here looks away."""
        for _ in range(round(seconds * 4)):
            await trio.sleep(0.25)
            self.clock.advance(0.25)

    async def suspend(self, seconds: float) -> None:
        """A machine that sleeps, and the time in which it must have noticed after it woke up."""
        self.clock.advance(seconds)
        await self.sleep_awake(1.5 * LOOK_S)


@asynccontextmanager
async def served(agent: AbsentAgent | None = None) -> AsyncIterator[Served]:
    at = Served()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(
            at.locking.serve,
            cast(AgentLink, agent or AbsentAgent()),
            cast(KeyCache, at.keys),
            cast(Volume, at.volume),
            cast(Forgetting, Kernel()),
        )
        await at.sleep_awake(LOOK_S)
        yield at
        nursery.cancel_scope.cancel()


async def test_without_an_agent_it_locks_when_the_last_key_is_too_old(autojump_clock: MockClock) -> None:
    async with served() as at:
        at.locking.on_event("gone", {})
        await at.sleep_awake(MAX_AGE_S - LOOK_S)
        assert (at.locking.state, at.keys.closed, at.volume.writing) == (State.ADRIFT, False, 1)
        await at.sleep_awake(2 * LOOK_S)
        assert (at.locking.state, at.keys.closed, at.gate.closed) == (State.LOCKED, True, True)
        assert at.volume.writing == 0, "and what was being written with these keys is given up"


async def test_time_asleep_counts(autojump_clock: MockClock) -> None:
    async with served() as at:
        at.locking.on_event("gone", {})
        await at.suspend(MAX_AGE_S - 2 * LOOK_S)
        assert at.locking.state is State.ADRIFT
        await at.suspend(MAX_AGE_S)
        assert (at.locking.state, at.keys.closed, at.volume.writing) == (State.LOCKED, True, 0)


async def test_an_agent_that_hung_while_the_machine_slept_was_heard_before_that(autojump_clock: MockClock) -> None:
    async with served() as at:
        heard_at = at.clock.monotonic()
        await at.suspend(MAX_AGE_S)
        assert at.locking.state is State.OPEN, "nobody has noticed that it hangs"
        at.locking.on_event("gone", {"heard_at": heard_at})
        await at.sleep_awake(LOOK_S)
        assert (at.locking.state, at.keys.closed) == (State.LOCKED, True)


async def test_a_machine_that_sleeps_with_its_agent_there_stays_unlocked(autojump_clock: MockClock) -> None:
    async with served() as at:
        await at.suspend(10 * MAX_AGE_S)
        assert (at.locking.state, at.keys.closed) == (State.OPEN, False)


@pytest.mark.parametrize("away_s", [MAX_AGE_S / 2, MAX_AGE_S - 2 * LOOK_S])
async def test_an_agent_that_comes_back_in_time_ends_it(autojump_clock: MockClock, away_s: float) -> None:
    async with served() as at:
        at.locking.on_event("gone", {})
        await at.suspend(away_s)
        at.locking.on_event("back", {})
        await at.suspend(MAX_AGE_S)
        assert (at.locking.state, at.keys.closed, at.gate.closed) == (State.OPEN, False, False)


async def test_who_comes_right_after_unlock_waits_for_the_agents_word(autojump_clock: MockClock) -> None:
    agent = PresentAgent()
    async with served(agent) as at:
        at.locking.on_event("locked", {})
        await at.sleep_awake(LOOK_S)
        with pytest.raises(VolumeLocked):
            await at.gate.knock()
        agent.unlocked = True
        async with trio.open_nursery() as nursery:
            nursery.start_soon(at.gate.knock)
            await trio.sleep(0.5)
            at.locking.on_event("unlocked", {})
        assert (at.locking.state, at.gate.closed) == (State.OPEN, False)


@pytest.mark.parametrize("hangs", [False, True])
async def test_nobody_waits_long_for_a_word_that_does_not_come(autojump_clock: MockClock, hangs: bool) -> None:
    agent = PresentAgent()
    async with served(agent) as at:
        at.locking.on_event("locked", {})
        await at.sleep_awake(LOOK_S)
        agent.unlocked, agent.hangs = True, hangs
        began = trio.current_time()
        with pytest.raises(VolumeLocked):
            await at.gate.knock()
        assert trio.current_time() - began <= (0.1 if hangs else 1.5)
        assert agent.asked == 1
