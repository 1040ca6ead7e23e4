"""Locking with a daemon: who is served meanwhile, what ends it, and volumes that lock themselves."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import trio

from cryptfs.agent.server import Server
from cryptfs.errors import ProtocolError, VolumeLocked
from cryptfs.format.volume import parse_volume
from cryptfs.keys.agent_answers import LockOutcome, get_located_lock
from cryptfs.keys.agent_client import AgentClient, open_agent
from cryptfs.keys.edit_requests import ProtectorWish, VolumeWish
from cryptfs.testing.clock import FakeClock
from cryptfs.testing.roots import FakeProvider
from tests.agent.conftest import ServeHere, settled

LOG_ID = b"f" * 16


async def create(client: AgentClient) -> tuple[bytes, bytes]:
    data = await client.create(VolumeWish(16384, ProtectorWish("fake", "mine", b"right", {"cost": "low"})))
    return parse_volume(data).volume_id, data


async def attach(client: AgentClient, volume_id: bytes, data: bytes) -> None:
    await client.attach(volume_id=volume_id, cipher_dir="/c", mountpoint="/m", volume=data)


async def state(client: AgentClient) -> str:
    [volume] = (await client.status()).volumes
    return volume.state


async def test_while_a_volume_is_being_locked_its_daemon_alone_is_served(serve_here: ServeHere) -> None:
    events: list[Mapping[str, Any]] = []
    outcomes: list[LockOutcome] = []
    async with serve_here(lock_deadline_s=60) as served, open_agent(served.path) as client:
        volume_id, data = await create(client)
        async with open_agent(served.path, role="daemon", on_push=events.append) as daemon:
            await attach(daemon, volume_id, data)

            async def lock() -> None:
                outcomes.append(await client.lock_told(volume_id))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(lock)
                nursery.start_soon(lock)
                await settled(lambda: bool(events))
                assert await state(client) == "locking"
                await daemon.generate(volume_id, LOG_ID, "block", 1)
                with pytest.raises(VolumeLocked):
                    await client.generate(volume_id, LOG_ID, "block", 1)
                with pytest.raises(VolumeLocked):
                    await attach(client, volume_id, data)
                with pytest.raises(ProtocolError):
                    await client.locked(volume_id, 0)
                await daemon.locked(volume_id, 3)
            assert outcomes == [LockOutcome(True, 3)] * 2
            assert len([e for e in events if e["event"] == "locking"]) == 1
            with pytest.raises(VolumeLocked):
                await daemon.generate(volume_id, LOG_ID, "block", 1)
            with pytest.raises(ProtocolError):
                await daemon.locked(volume_id, 0)


async def test_the_lock_goes_on_without_who_asked_for_it_and_unlock_waits_for_its_end(serve_here: ServeHere) -> None:
    events: list[Mapping[str, Any]] = []
    async with serve_here(lock_deadline_s=60) as served, open_agent(served.path) as client:
        volume_id, data = await create(client)
        async with open_agent(served.path, role="daemon", on_push=events.append) as daemon:
            await attach(daemon, volume_id, data)
            async with open_agent(served.path) as hasty, trio.open_nursery() as nursery:
                nursery.start_soon(hasty.lock, volume_id)
                await settled(lambda: bool(events))
                nursery.cancel_scope.cancel()
            unlocked = trio.Event()

            async def unlock() -> None:
                await client.unlock(volume=data, cipher_dir="/c", secret=b"right")
                unlocked.set()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(unlock)
                assert await state(daemon) == "locking"
                assert not unlocked.is_set()
                await daemon.locked(volume_id, 0)
            await settled(lambda: events[-1]["event"] == "unlocked")
            assert await state(client) == "unlocked"


async def test_a_daemon_that_says_nothing_is_not_waited_for_beyond_the_deadline(serve_here: ServeHere) -> None:
    async with serve_here(lock_deadline_s=0.05) as served, open_agent(served.path) as client:
        volume_id, data = await create(client)
        async with open_agent(served.path, role="daemon") as daemon:
            await attach(daemon, volume_id, data)
            assert await client.lock_told(volume_id) == LockOutcome(True, None)
            assert await state(client) == "locked"


async def test_a_daemon_that_goes_while_it_is_waited_for_ends_the_lock_even_if_the_key_was_to_be_kept(
    serve_here: ServeHere,
) -> None:
    async with serve_here(lock_deadline_s=60) as served, open_agent(served.path) as client:
        volume_id, data = await create(client)
        events: list[Mapping[str, Any]] = []
        async with (
            trio.open_nursery() as nursery,
            open_agent(served.path, role="daemon", on_push=events.append) as daemon,
        ):
            await attach(daemon, volume_id, data)
            await client.keep(volume_id, keep=True)
            nursery.start_soon(client.lock, volume_id)
            await settled(lambda: bool(events))
        assert (await client.status()).volumes == ()


async def test_stop_waits_for_daemons(serve_here: ServeHere) -> None:
    events: list[Mapping[str, Any]] = []
    async with serve_here(lock_deadline_s=60) as served, open_agent(served.path) as client:
        volume_id, data = await create(client)
        async with open_agent(served.path, role="daemon", on_push=events.append) as daemon:
            await attach(daemon, volume_id, data)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(client.stop)
                await settled(lambda: bool(events))
                await daemon.generate(volume_id, LOG_ID, "block", 1)
                await daemon.locked(volume_id, 0)
            await served.ended.wait()


async def test_a_volumes_domains_are_locked_with_it(serve_here: ServeHere) -> None:
    events: list[Mapping[str, Any]] = []
    outcomes: list[LockOutcome] = []
    async with serve_here(lock_deadline_s=60) as served, open_agent(served.path) as client:
        (parent, data), (inner, inner_data), (other, other_data) = [await create(client) for _ in range(3)]
        async with (
            open_agent(served.path, role="daemon", on_push=events.append) as daemon,
            open_agent(served.path, role="daemon", on_push=events.append) as inner_daemon,
            open_agent(served.path, role="daemon", on_push=events.append) as other_daemon,
        ):
            await attach(daemon, parent, data)
            # "/c-2/domains" only looks as if it lay in "/c".
            for link, volume_id, file, at in (
                (inner_daemon, inner, inner_data, "/c/domains/"),
                (other_daemon, other, other_data, "/c-2/domains/"),
            ):
                await link.attach(volume_id=volume_id, cipher_dir=at + volume_id.hex(), mountpoint="/m/x", volume=file)

            async def lock() -> None:
                outcomes.append(await client.lock_told(parent))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(lock)
                await settled(lambda: len(events) == 2)
                assert {e["volume_id"] for e in events} == {parent, inner}
                await daemon.locked(parent, 1)
                assert not outcomes, "its domain is not locked yet"
                await inner_daemon.locked(inner, 2)
            assert outcomes == [LockOutcome(True, 3)]
            states = {volume.volume_id: volume.state for volume in (await client.status()).volumes}
            assert states == {parent: "locked", inner: "locked", other: "unlocked"}


async def test_a_domain_is_locked_when_its_volumes_daemon_is_gone(serve_here: ServeHere) -> None:
    async with serve_here() as served, open_agent(served.path) as client:
        (parent, data), (inner, inner_data) = await create(client), await create(client)
        at = f"/c/domains/{inner.hex()}"
        for volume_id, file, cipher_dir in ((parent, data, "/c"), (inner, inner_data, at)):
            await client.unlock(volume=file, cipher_dir=cipher_dir, secret=b"right")
            assert volume_id in {volume.volume_id for volume in (await client.status()).volumes}
        async with open_agent(served.path, role="daemon") as daemon:
            await attach(daemon, parent, data)
        for _ in range(500):
            if not (await client.status()).volumes:
                break
            await trio.sleep(0.01)
        assert not (await client.status()).volumes


@pytest.mark.parametrize(("for_s", "idle_s"), [(100, None), (None, 100), (100, 50), (50, 100)])
async def test_volumes_lock_themselves(
    short_tmp: Path, autojump_clock: trio.testing.MockClock, for_s: int | None, idle_s: int | None
) -> None:
    clock = FakeClock()
    provider = FakeProvider()
    server = Server(providers={provider.kind: provider}, state_dir=str(short_tmp / "s"), random=os.urandom, clock=clock)
    locks = server.locks
    path = str(short_tmp / "a.sock")
    autojump_clock.autojump_threshold = float("inf")
    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve, path)
        async with open_agent(path) as client:
            volume_id, data = await create(client)
            assert locks.locks_in_s(volume_id) is None
            await client.unlock(volume=data, cipher_dir="/c", secret=b"right", for_s=for_s, idle_s=idle_s)
            first = min(t for t in (for_s, idle_s) if t is not None)
            assert locks.locks_in_s(volume_id) == first
            clock.advance(first - 1)
            await client.generate(volume_id, LOG_ID, "block", 1)
            assert locks.locks_in_s(volume_id) == (1 if for_s == first else idle_s)
            clock.advance(2)
            autojump_clock.jump(2)
            await client.status()
            held = [v.volume_id for v in (await client.status()).volumes]
            assert held == ([] if for_s == first else [volume_id])
            clock.advance(99)
            autojump_clock.jump(2)
            await client.status()
            assert (await client.status()).volumes == ()
        nursery.cancel_scope.cancel()


async def test_lock_by_path_is_by_what_the_agent_was_told(serve_here: ServeHere) -> None:
    """A volume's own directory, or where its daemon says it is mounted; anything else is nobody's."""
    events: list[Mapping[str, Any]] = []
    async with serve_here(lock_deadline_s=60) as served, open_agent(served.path) as client:
        volume_id, data = await create(client)
        await client.unlock(volume=data, cipher_dir="/vault", secret=b"right")

        async def lock(path: bytes) -> tuple[bytes | None, LockOutcome]:
            return get_located_lock(await client.request("lock-path", {"path": path}))

        for path in (b"/", b"/vault/x", b"/vaul", b"relative", b"/m"):
            assert await lock(path) == (None, LockOutcome(was_unlocked=False, unwritten=0))
        assert await state(client) == "unlocked"
        assert await lock(b"/vault") == (volume_id, LockOutcome(was_unlocked=True, unwritten=0))
        assert (await client.status()).volumes == ()
        await client.unlock(volume=data, cipher_dir="/vault", secret=b"right")
        async with open_agent(served.path, role="daemon", on_push=events.append) as daemon:
            await attach(daemon, volume_id, data)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(lock, b"/m")
                await settled(lambda: bool(events))
                await daemon.locked(volume_id, 0)
            assert await state(client) == "locked"
        for path in (b"", b"with\0zero", b"x" * 4097):
            with pytest.raises(ProtocolError):
                await lock(path)
