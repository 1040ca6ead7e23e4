"""The limit of unwraps: who waits, how long, and what ends it; on a clock that goes with trio's, and over a socket."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from cryptfs.agent.audit import Auditor
from cryptfs.agent.audit_log import AGENT_LOG
from cryptfs.agent.limits import ALIVE_S, Limits
from cryptfs.agent.server import Server
from cryptfs.errors import AgentUnavailable, VolumeLocked
from cryptfs.format.agent_msg import AnswerDecoder, Push
from cryptfs.format.policy import Policy
from cryptfs.keys import agent_connection
from cryptfs.keys.agent_client import AgentClient, open_agent
from cryptfs.testing.clock import FakeClock, TrioClock
from cryptfs.testing.roots import FakeProvider
from cryptfs.types import Purpose
from tests.agent.conftest import ServeHere, settled
from tests.agent.test_server import attach, create

VOLUME, OTHER, LOG_ID = b"V" * 16, b"W" * 16, b"f" * 16


class FakePeer:
    """A connection that keeps what it is sent."""

    pid = 1
    audit_json = "null"

    def __init__(self) -> None:
        self.pushed: list[Mapping[str, Any]] = []

    def says_it_is(self, role: str) -> None:
        raise AssertionError(role)

    def post(self, message: bytes) -> None:
        [answer] = AnswerDecoder().feed(message)
        assert isinstance(answer, Push)
        self.pushed.append(answer.event)


def items(count: int, purpose: Purpose = Purpose.BLOCK) -> list[tuple[bytes, Purpose, int, bytes]]:
    return [(LOG_ID, purpose, 1, bytes((72 if purpose is Purpose.NAMES else 40) * count))]


@pytest.fixture
async def audit(short_tmp: Path) -> AsyncIterator[Auditor]:
    auditor = Auditor(str(short_tmp / "audit"), os.urandom, TrioClock())
    yield auditor
    auditor.close()


@pytest.fixture
async def limits(audit: Auditor) -> Limits:
    return Limits(audit, TrioClock())


def told_in_audit(audit: Auditor) -> int:
    files = Path(audit.directory, AGENT_LOG).glob("*.log")
    return sum(file.read_bytes().count(b'"verb":"limit"') for file in files)


async def ask(limits: Limits, peer: FakePeer, count: int, volume_id: bytes = VOLUME) -> float:
    """Ask as the service does; the time it took."""
    start = trio.current_time()
    if limits.must_wait(volume_id):
        await limits.turn(volume_id, peer, items(count))
    else:
        limits.take(volume_id, items(count))
    return trio.current_time() - start


async def test_without_a_limit_nobody_waits(autojump_clock: MockClock, limits: Limits) -> None:
    for _ in range(1000):
        assert await ask(limits, FakePeer(), 4096) == 0


async def test_in_the_long_run_there_are_as_many_keys_as_the_limit_says(
    autojump_clock: MockClock, limits: Limits
) -> None:
    limits.set(VOLUME, 100)
    peer, start, keys = FakePeer(), trio.current_time(), 0
    while keys < 10_000:
        await ask(limits, peer, 64)
        keys += 64
    took = trio.current_time() - start
    # A second's worth is in the bucket at first, and the last request is not yet paid for.
    assert (keys - 64 - 100) / 100 <= took <= keys / 100


async def test_a_burst_of_a_second_is_free_and_a_request_larger_than_the_limit_is_served(
    autojump_clock: MockClock, limits: Limits
) -> None:
    limits.set(VOLUME, 100)
    peer = FakePeer()
    assert await ask(limits, peer, 60) == 0
    assert await ask(limits, peer, 1000) == 0
    assert await ask(limits, peer, 1) == pytest.approx(9.61)
    await trio.sleep(1000)
    assert await ask(limits, peer, 100) == 0
    assert await ask(limits, peer, 1) == pytest.approx(0.01)


async def test_a_names_key_is_one_key(autojump_clock: MockClock, limits: Limits) -> None:
    limits.set(VOLUME, 10)
    limits.take(VOLUME, items(9, Purpose.NAMES))
    assert not limits.must_wait(VOLUME)
    limits.take(VOLUME, items(1, Purpose.NAMES))
    assert limits.must_wait(VOLUME)


async def test_requests_are_served_in_the_order_they_came(autojump_clock: MockClock, limits: Limits) -> None:
    limits.set(VOLUME, 10)
    limits.take(VOLUME, items(20))
    order: list[int] = []

    async def one(number: int) -> None:
        await limits.turn(VOLUME, FakePeer(), items(5))
        order.append(number)

    async with trio.open_nursery() as nursery:
        for number in range(8):
            nursery.start_soon(one, number)
            await wait_all_tasks_blocked()
    assert order == list(range(8))


async def test_another_volume_does_not_wait(autojump_clock: MockClock, limits: Limits) -> None:
    limits.set(VOLUME, 1)
    limits.set(OTHER, 1000)
    limits.take(VOLUME, items(500))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask, limits, FakePeer(), 1)
        await wait_all_tasks_blocked()
        assert await ask(limits, FakePeer(), 100, OTHER) == 0
        nursery.cancel_scope.cancel()


async def test_who_waits_when_it_is_locked_is_refused_at_once_also_in_the_line(
    autojump_clock: MockClock, limits: Limits
) -> None:
    limits.set(VOLUME, 1)
    limits.take(VOLUME, items(500))
    refused: list[float] = []

    async def one() -> None:
        with pytest.raises(VolumeLocked):
            await limits.turn(VOLUME, FakePeer(), items(1))
        refused.append(trio.current_time())

    start = trio.current_time()
    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(one)
        await trio.sleep(3)
        limits.refuse(VOLUME)
    assert refused == [start + 3] * 5
    # Nothing of it is left: the next one waits for its own turn only.
    assert await ask(limits, FakePeer(), 1) == pytest.approx(497)


async def test_a_client_that_leaves_gives_its_place_up(autojump_clock: MockClock, limits: Limits) -> None:
    limits.set(VOLUME, 10)
    limits.take(VOLUME, items(20))
    first = trio.CancelScope()
    took: list[float] = []

    async def leaves() -> None:
        with first:
            await limits.turn(VOLUME, FakePeer(), items(1000))

    async def stays() -> None:
        took.append(await ask(limits, FakePeer(), 1))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(leaves)
        await wait_all_tasks_blocked()
        nursery.start_soon(stays)
        await wait_all_tasks_blocked()
        first.cancel()
    assert took == [pytest.approx(1.1)]


@pytest.mark.parametrize(("to", "took"), [(None, 0.5), (1000, 0.515), (5, 3.5), (10, 2.0)])
async def test_another_limit_counts_for_who_waits_already(
    autojump_clock: MockClock, limits: Limits, to: int | None, took: float
) -> None:
    limits.set(VOLUME, 10)
    limits.take(VOLUME, items(29))
    async with trio.open_nursery() as nursery:
        result: list[float] = []

        async def one() -> None:
            result.append(await ask(limits, FakePeer(), 1))

        nursery.start_soon(one)
        await trio.sleep(0.5)
        limits.set(VOLUME, to)
    assert result[0] == pytest.approx(took)


async def test_waiting_clients_are_told_and_nobody_else(autojump_clock: MockClock, limits: Limits) -> None:
    limits.set(VOLUME, 1)
    limits.take(VOLUME, items(20))
    waiting, other = FakePeer(), FakePeer()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(limits.serve)
        await ask(limits, other, 1, OTHER)
        async with trio.open_nursery() as inner:
            inner.start_soon(ask, limits, waiting, 1)
            inner.start_soon(ask, limits, waiting, 1)
        told = len(waiting.pushed)
        await trio.sleep(10 * ALIVE_S)
        assert len(waiting.pushed) == told, "nobody waits any more"
        nursery.cancel_scope.cancel()
    assert waiting.pushed == [{"event": "waiting", "volume_id": VOLUME}] * int(21 // ALIVE_S)
    assert other.pushed == []


async def test_a_burst_is_on_the_record_once(autojump_clock: MockClock, limits: Limits, audit: Auditor) -> None:
    limits.set(VOLUME, 10)
    peer = FakePeer()
    for _ in range(20):
        await ask(limits, peer, 10)
    assert told_in_audit(audit) == 1
    await trio.sleep(100)
    for _ in range(20):
        await ask(limits, peer, 10)
    assert told_in_audit(audit) == 2


# over a socket ---------------------------------------------------------------------------------------------------


def limit(server: Server, volume_id: bytes, keys_per_s: int | None) -> None:
    server.policies.learn(volume_id, 99, Policy(unwraps_per_s=keys_per_s))


async def in_the_background(nursery: trio.Nursery, client: AgentClient, volume_id: bytes, wrapped: bytes) -> list[str]:
    """Unwrap without waiting; the list says how it ended."""
    outcome: list[str] = []

    async def one() -> None:
        try:
            await client.unwrap(volume_id, [(LOG_ID, "block", 1, wrapped, 0)])
        except (VolumeLocked, AgentUnavailable) as error:
            outcome.append(type(error).__name__)
        else:
            outcome.append("served")

    nursery.start_soon(one)
    await trio.sleep(0.05)
    return outcome


async def test_only_unwraps_of_that_volume_wait(short_tmp: Path) -> None:
    clock = FakeClock()
    provider = FakeProvider()
    server = Server(providers={provider.kind: provider}, state_dir=str(short_tmp / "s"), random=os.urandom, clock=clock)
    path = str(short_tmp / "a.sock")
    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve, path)
        async with open_agent(path, linger=False) as client, open_agent(path, linger=False) as another:
            volume_id, _ = await create(client)
            other_id, _ = await create(client)
            _, keys, wrapped = await client.generate(volume_id, LOG_ID, "block", 1)
            _, _, others = await client.generate(other_id, LOG_ID, "block", 4)
            limit(server, volume_id, 10)
            for _ in range(10):
                await client.unwrap(volume_id, [(LOG_ID, "block", 1, wrapped, 0)])
            ended = await in_the_background(nursery, client, volume_id, wrapped)
            behind = await in_the_background(nursery, another, volume_id, wrapped)
            assert (ended, behind) == ([], [])
            for each in (client, another):
                # Neither its keys to be made nor its kits, nor anything of another volume.
                await each.generate(volume_id, LOG_ID, "block", 4096)
                await each.kits(volume_id, directory=False, count=8, deks=2)
                await each.unwrap(other_id, [(LOG_ID, "block", 1, others, 0)])
                assert len((await each.status()).volumes) == 2
            assert (ended, behind) == ([], [])
            clock.advance(0.2)
            await settled(lambda: ended == ["served"] and behind == ["served"])
            # A volume that is locked while somebody waits.
            for _ in range(2):
                clock.advance(0.1)
                await client.unwrap(volume_id, [(LOG_ID, "block", 1, wrapped, 0)])
            ended = await in_the_background(nursery, client, volume_id, wrapped)
            assert ended == []
            await another.lock(volume_id)
            await settled(lambda: ended == ["VolumeLocked"])
            assert keys
        nursery.cancel_scope.cancel()


async def test_while_it_is_locked_its_daemon_is_not_limited(serve_here: ServeHere) -> None:
    events: list[Mapping[str, Any]] = []
    async with serve_here(lock_deadline_s=60) as served, open_agent(served.path) as client, trio.open_nursery() as n:
        volume_id, data = await create(client)
        async with open_agent(served.path, role="daemon", on_push=events.append) as daemon:
            await attach(daemon, volume_id, data)
            _, keys, wrapped = await daemon.generate(volume_id, LOG_ID, "block", 2)
            limit(served.server, volume_id, 1)
            item = (LOG_ID, "block", 1, wrapped, 0)
            await daemon.unwrap(volume_id, [item])
            ended = await in_the_background(n, daemon, volume_id, wrapped)
            stranger = await in_the_background(n, client, volume_id, wrapped)
            assert (ended, stranger) == ([], [])
            n.start_soon(client.lock, volume_id)
            await settled(lambda: ended == stranger == ["VolumeLocked"])
            for _ in range(5):
                assert await daemon.unwrap(volume_id, [item]) == ([keys], [0])
            with pytest.raises(VolumeLocked):
                await client.unwrap(volume_id, [item])
            await daemon.locked(volume_id, 0)


async def test_a_daemon_that_leaves_takes_its_waiting_requests_along(serve_here: ServeHere) -> None:
    async with serve_here() as served, open_agent(served.path, linger=False) as client, trio.open_nursery() as n:
        volume_id, data = await create(client)
        await client.keep(volume_id, keep=True)
        _, _, wrapped = await client.generate(volume_id, LOG_ID, "block", 2)
        limit(served.server, volume_id, 1)
        async with open_agent(served.path, role="daemon", linger=False) as daemon:
            await attach(daemon, volume_id, data)
            await client.keep(volume_id, keep=True)
            await daemon.unwrap(volume_id, [(LOG_ID, "block", 1, wrapped, 0)])
            ended = [await in_the_background(n, daemon, volume_id, wrapped) for _ in range(3)]
        await settled(lambda: served.server.connections == 1)
        await settled(lambda: ended == [["AgentUnavailable"]] * 3)
        mine = await in_the_background(n, client, volume_id, wrapped)
        assert mine == []
        limit(served.server, volume_id, None)
        await settled(lambda: mine == ["served"])


async def test_more_requests_may_wait_than_a_daemon_ever_has(serve_here: ServeHere) -> None:
    async with serve_here() as served, open_agent(served.path) as client:
        volume_id, _ = await create(client)
        _, _, wrapped = await client.generate(volume_id, LOG_ID, "block", 1)
        limit(served.server, volume_id, 1)
        ended = 0

        async def one() -> None:
            nonlocal ended
            await client.unwrap(volume_id, [(LOG_ID, "block", 1, wrapped, 0)])
            ended += 1

        async with trio.open_nursery() as nursery:
            for _ in range(400):
                nursery.start_soon(one)
            await settled(lambda: ended == 1)
            # Verbs that wait for a thread have their places still.
            assert await client.request("floors", {"volume_id": volume_id, "ids": b""}) == {"floors": []}
            limit(served.server, volume_id, None)
        assert ended == 400


@pytest.mark.parametrize("told", [True, False])
async def test_a_client_waits_as_long_as_it_is_told_that_it_does(
    serve_here: ServeHere, monkeypatch: pytest.MonkeyPatch, told: bool
) -> None:
    monkeypatch.setattr("cryptfs.agent.limits.ALIVE_S", 0.02 if told else 60)
    async with serve_here() as served, open_agent(served.path) as client, trio.open_nursery() as nursery:
        volume_id, _ = await create(client)
        _, _, wrapped = await client.generate(volume_id, LOG_ID, "block", 2)
        limit(served.server, volume_id, 1)
        await client.unwrap(volume_id, [(LOG_ID, "block", 1, wrapped, 0)])
        monkeypatch.setattr(agent_connection, "TICK_S", 0.1)
        async with open_agent(served.path, linger=False) as hasty:
            ended = await in_the_background(nursery, hasty, volume_id, wrapped)
            if told:
                await trio.sleep(1)
                assert ended == []
                limit(served.server, volume_id, None)
                await settled(lambda: ended == ["served"])
            else:
                await settled(lambda: ended == ["AgentUnavailable"])
