"""Volumes that are unlocked for a connection: locked when it ends, unless others have them unlocked by then."""

from __future__ import annotations

import pytest

from cryptfs.errors import VolumeLocked
from cryptfs.format.volume import parse_volume
from cryptfs.keys.agent_client import AgentClient, open_agent
from cryptfs.keys.edit_requests import ProtectorWish, VolumeWish
from tests.agent.conftest import Served, ServeHere, settled

SECRET = b"right"


async def create(client: AgentClient, *, while_connected: bool = False) -> tuple[bytes, bytes]:
    new = VolumeWish(16384, ProtectorWish("fake", "mine", SECRET, {"cost": "low"}))
    data = await client.create(new, while_connected=while_connected)
    return parse_volume(data).volume_id, data


async def made(served: Served) -> tuple[bytes, bytes]:
    """A volume, locked."""
    async with open_agent(served.path) as client:
        volume_id, data = await create(client)
        await client.lock(volume_id)
    return volume_id, data


async def unlock(client: AgentClient, data: bytes, *, while_connected: bool) -> None:
    await client.unlock(volume=data, cipher_dir="/c", secret=SECRET, while_connected=while_connected)


async def is_unlocked(client: AgentClient, volume_id: bytes) -> bool:
    return any(each.volume_id == volume_id and each.state == "unlocked" for each in (await client.status()).volumes)


async def gone(served: Served, connections: int) -> None:
    """The agent has seen the end of all connections but so many."""
    await settled(lambda: len(served.server._connections) == connections)


@pytest.mark.parametrize("by", ["unlock", "create"])
async def test_what_is_unlocked_for_a_connection_is_locked_when_that_ends(serve_here: ServeHere, by: str) -> None:
    async with serve_here() as served, open_agent(served.path) as other:
        if by == "create":
            async with open_agent(served.path) as client:
                volume_id, _ = await create(client, while_connected=True)
                assert await is_unlocked(other, volume_id)
        else:
            volume_id, data = await made(served)
            async with open_agent(served.path) as client:
                await unlock(client, data, while_connected=True)
                assert await is_unlocked(other, volume_id)
        await gone(served, 1)
        assert not await is_unlocked(other, volume_id)
        with pytest.raises(VolumeLocked):
            await other.generate(volume_id, b"f" * 16, "block", 1)


async def test_release_locks_it_before_it_is_answered(serve_here: ServeHere) -> None:
    async with serve_here() as served, open_agent(served.path) as client:
        volume_id, data = await made(served)
        await unlock(client, data, while_connected=True)
        await client.request("release", {"volume_id": volume_id})
        assert not await is_unlocked(client, volume_id)
        await client.request("release", {"volume_id": volume_id})


@pytest.mark.parametrize("again", [False, True])
async def test_what_was_unlocked_for_good_stays(serve_here: ServeHere, again: bool) -> None:
    """`again`: with the secret, as by a command that asks for it whether it is needed or not."""
    async with serve_here() as served, open_agent(served.path) as other:
        volume_id, data = await made(served)
        await unlock(other, data, while_connected=False)
        async with open_agent(served.path) as client:
            if again:
                await unlock(client, data, while_connected=True)
            else:
                assert await client.hold(volume_id, while_connected=True)
            await client.request("release", {"volume_id": volume_id})
            assert await is_unlocked(other, volume_id)
        await gone(served, 1)
        assert await is_unlocked(other, volume_id)


@pytest.mark.parametrize("by", ["hold", "unlock"])
async def test_who_unlocks_it_for_good_meanwhile_keeps_it(serve_here: ServeHere, by: str) -> None:
    async with serve_here() as served, open_agent(served.path) as other:
        volume_id, data = await made(served)
        async with open_agent(served.path) as client:
            await unlock(client, data, while_connected=True)
            if by == "hold":
                assert await other.hold(volume_id, while_connected=False)
            else:
                await unlock(other, data, while_connected=False)
        await gone(served, 1)
        assert await is_unlocked(other, volume_id)


async def test_the_last_of_several_connections_locks_it(serve_here: ServeHere) -> None:
    async with serve_here() as served, open_agent(served.path) as other:
        volume_id, data = await made(served)
        async with open_agent(served.path) as second:
            async with open_agent(served.path) as first:
                await unlock(first, data, while_connected=True)
                assert await second.hold(volume_id, while_connected=True)
            await gone(served, 2)
            assert await is_unlocked(other, volume_id)
        await gone(served, 1)
        assert not await is_unlocked(other, volume_id)


async def test_a_daemon_that_attached_keeps_it_until_its_own_end(serve_here: ServeHere) -> None:
    async with serve_here() as served, open_agent(served.path) as other:
        volume_id, data = await made(served)
        async with open_agent(served.path, role="daemon") as daemon:
            async with open_agent(served.path) as client:
                await unlock(client, data, while_connected=True)
                await daemon.attach(volume_id=volume_id, cipher_dir="/c", mountpoint="/m", volume=data)
            await gone(served, 2)
            assert await is_unlocked(other, volume_id)
        await gone(served, 1)
        assert not await is_unlocked(other, volume_id)


async def test_an_attachment_that_ends_in_order_leaves_it_to_those_it_is_held_for(serve_here: ServeHere) -> None:
    """As a command does that looks into a volume while it has it unlocked."""
    async with serve_here() as served, open_agent(served.path) as other:
        volume_id, data = await made(served)
        async with open_agent(served.path) as client:
            await unlock(client, data, while_connected=True)
            async with open_agent(served.path) as reader:
                await reader.attach(volume_id=volume_id, cipher_dir="/c", mountpoint="", volume=data)
                await reader.detach(volume_id, keep=True)
            await gone(served, 2)
            assert await is_unlocked(other, volume_id)
        await gone(served, 1)
        assert not await is_unlocked(other, volume_id)


async def test_umount_with_keep_goes_before_who_holds_it(serve_here: ServeHere) -> None:
    async with serve_here() as served, open_agent(served.path) as other:
        volume_id, data = await made(served)
        async with open_agent(served.path) as client:
            await unlock(client, data, while_connected=True)
            async with open_agent(served.path, role="daemon") as daemon:
                await daemon.attach(volume_id=volume_id, cipher_dir="/c", mountpoint="/m", volume=data)
                assert await other.keep(volume_id, keep=True)
            await gone(served, 2)
        await gone(served, 1)
        assert await is_unlocked(other, volume_id)


async def test_a_locked_volume_is_held_for_nobody(serve_here: ServeHere) -> None:
    """Locked meanwhile and unlocked for good by somebody else, it is not the first one's to lock any more."""
    async with serve_here() as served, open_agent(served.path) as other:
        volume_id, data = await made(served)
        assert not await other.hold(volume_id, while_connected=True)
        async with open_agent(served.path) as client:
            await unlock(client, data, while_connected=True)
            await other.lock(volume_id)
            await unlock(other, data, while_connected=False)
        await gone(served, 1)
        assert await is_unlocked(other, volume_id)
