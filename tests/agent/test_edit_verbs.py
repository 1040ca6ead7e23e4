"""Edits and `commit` over a socket: what counts when, and what an older file meets."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import trio

from cryptfs.agent import attempts
from cryptfs.errors import (
    ProtocolError,
    RolledBack,
    ShredSecretMissing,
    UsageError,
    VolumeDamaged,
    VolumeLocked,
    WrongSecret,
)
from cryptfs.format.volume import parse_volume
from cryptfs.keys import edit_requests as edits
from cryptfs.keys.agent_client import AgentClient, open_agent
from cryptfs.keys.edit_requests import ProtectorWish, VolumeWish
from tests.agent.conftest import ServeHere

FIRST = ProtectorWish("fake", "first", b"one", {"cost": "low"})
SECOND = ProtectorWish("fake", "second", b"two", {"cost": "low"})
FILE = b"f" * 16


async def created(client: AgentClient, **more: object) -> tuple[bytes, bytes]:
    data = await client.create(VolumeWish(4096, FIRST, **more))  # type: ignore[arg-type]
    return parse_volume(data).volume_id, data


async def test_new_keys_are_under_the_new_kek_only_once_it_is_committed(serve_here: ServeHere) -> None:
    async with serve_here() as served, open_agent(served.path) as client:
        volume_id, data = await created(client)
        first = parse_volume(data).protectors[0].protector_id
        version, keys, wrapped = await client.generate(volume_id, FILE, "block", 1)
        turned = await edits.rotate_kek(client, volume_id, data, [(first, b"one")])
        assert (await client.generate(volume_id, FILE, "block", 1))[0] == version == 1
        assert await edits.commit(client, volume_id, turned) == 2
        assert (await client.generate(volume_id, FILE, "block", 1))[0] == 2
        got, _ = await client.unwrap(volume_id, [(FILE, "block", 1, wrapped, 0)])
        assert got == [keys]
        assert await edits.commit(client, volume_id, turned) == 2, "it may be said again"
        with pytest.raises(RolledBack):
            await edits.commit(client, volume_id, data)
        with pytest.raises(RolledBack):
            await client.attach(volume_id=volume_id, cipher_dir="/c", mountpoint="/m", volume=data)
        alone = await edits.destroy_keks(client, volume_id, turned)
        assert await edits.commit(client, volume_id, alone) == 2
        got, _ = await client.unwrap(volume_id, [(FILE, "block", 1, wrapped, 0)])
        assert got == [None]
        await client.lock(volume_id)
        await client.unlock(volume=alone, cipher_dir="/c", secret=b"one")
        with pytest.raises(VolumeDamaged):
            await edits.commit(client, volume_id, turned)


async def test_a_rotation_that_was_never_committed_leaves_nothing(serve_here: ServeHere) -> None:
    async with serve_here() as served, open_agent(served.path) as client:
        volume_id, data = await created(client)
        first = parse_volume(data).protectors[0].protector_id
        lost = await edits.rotate_kek(client, volume_id, data, [(first, b"one")])
        turned = await edits.rotate_kek(client, volume_id, data, [(first, b"one")])
        assert await edits.commit(client, volume_id, turned) == 2
        with pytest.raises(VolumeDamaged):
            await edits.commit(client, volume_id, lost)


async def test_the_daemon_is_told_of_a_committed_file(serve_here: ServeHere) -> None:
    async with serve_here() as served, open_agent(served.path) as client:
        volume_id, data = await created(client)
        events: list[object] = []
        told = trio.Event()

        def on_push(event: Mapping[str, object]) -> None:
            events.append(event["event"])
            told.set()

        async with open_agent(served.path, role="daemon", on_push=on_push) as daemon:
            await daemon.attach(volume_id=volume_id, cipher_dir="/c", mountpoint="/m", volume=data)
            changed = await edits.set_policy(client, volume_id, data, {"max_age_s": 5})
            await daemon.status()
            assert events == []
            await edits.commit(client, volume_id, changed)
            with trio.fail_after(5):
                await told.wait()
            assert events == ["changed", "policy"]
            await daemon.detach(volume_id, keep=True)


async def test_protectors_come_and_go(serve_here: ServeHere) -> None:
    async with serve_here() as served, open_agent(served.path) as client:
        volume_id, data = await created(client)
        both = await edits.add_protector(client, volume_id, data, SECOND)
        first, second = (protector.protector_id for protector in parse_volume(both).protectors)
        await edits.commit(client, volume_id, both)
        third = ProtectorWish("fake", "second", b"three", {})
        changed = await edits.change_protector(client, volume_id, both, second, third)
        await edits.commit(client, volume_id, changed)
        left = await edits.remove_protector(client, volume_id, changed, first)
        await edits.commit(client, volume_id, left)
        await client.lock(volume_id)
        for secret in (b"one", b"two"):
            with pytest.raises(WrongSecret):
                await client.unlock(volume=left, cipher_dir="/c", secret=secret)
        await client.unlock(volume=left, cipher_dir="/c", secret=b"three", kind="fake", protector_id=second)
        with pytest.raises(UsageError):
            await edits.remove_protector(client, volume_id, left, second)


async def test_a_locked_volume_or_an_edited_file_is_not_edited(serve_here: ServeHere) -> None:
    async with serve_here() as served, open_agent(served.path) as client:
        volume_id, data = await created(client)
        with pytest.raises(VolumeDamaged):
            await edits.set_policy(client, volume_id, data[:-1] + bytes([data[-1] ^ 1]), {})
        with pytest.raises(UsageError):
            await edits.set_policy(client, volume_id, data, {"max_age_s": 0})
        with pytest.raises(UsageError):
            await edits.set_policy(client, volume_id, data, {"max_moons": 1})
        with pytest.raises(ProtocolError):
            await edits.set_policy(client, volume_id, data, {"max_age_s": "long"})  # type: ignore[dict-item]
        await client.lock(volume_id)
        with pytest.raises(VolumeLocked):
            await edits.set_policy(client, volume_id, data, {"max_age_s": 5})


async def test_nothing_is_made_of_an_older_file(serve_here: ServeHere) -> None:
    """It would be newer than any, and bring back the protector that was removed."""
    async with serve_here() as served, open_agent(served.path) as client:
        volume_id, data = await created(client)
        both = await edits.add_protector(client, volume_id, data, SECOND)
        await edits.commit(client, volume_id, both)
        first = parse_volume(both).protectors[0].protector_id
        left = await edits.remove_protector(client, volume_id, both, first)
        await edits.commit(client, volume_id, left)
        for edit in (
            edits.set_policy(client, volume_id, both, {"max_age_s": 5}),
            edits.add_protector(client, volume_id, both, ProtectorWish("fake", "third", b"three", {"cost": "low"})),
            edits.rotate_kek(client, volume_id, both, [(first, b"one")]),
            edits.destroy_keks(client, volume_id, both),
        ):
            with pytest.raises(RolledBack):
                await edit
        await edits.set_policy(client, volume_id, left, {"max_age_s": 5})


async def test_a_shred_secret_kept_by_the_agent(serve_here: ServeHere) -> None:
    async with serve_here() as served, open_agent(served.path) as client:
        volume_id, data = await created(client, shred_kind="agent")
        both = await edits.add_protector(client, volume_id, data, SECOND)
        await edits.commit(client, volume_id, both)
        await client.lock(volume_id)
        await client.unlock(volume=both, cipher_dir="/c", secret=b"two")
        assert await edits.check_shred(client, both)
        assert await edits.shred(client, both)
        assert not await edits.check_shred(client, both)
        for file, secret in ((data, b"one"), (both, b"one"), (both, b"two")):
            with pytest.raises(ShredSecretMissing):
                await client.unlock(volume=file, cipher_dir="/c", secret=secret)
        assert not await edits.shred(client, both)
        other_id, other = await created(client, shred_kind="agent")
        await client.lock(other_id)
        assert await edits.shred_id(client, other_id)
        assert not await edits.shred_id(client, other_id)
        with pytest.raises(ShredSecretMissing):
            await client.unlock(volume=other, cipher_dir="/c", secret=b"one")


async def test_the_policys_times_hold_unless_others_are_given(serve_here: ServeHere) -> None:
    async with serve_here() as served, open_agent(served.path) as client:
        volume_id, data = await created(client, policy={"for_s": 3600})
        await client.lock(volume_id)
        await client.unlock(volume=data, cipher_dir="/c", secret=b"one")
        [volume] = (await client.status()).volumes
        assert volume.locks_in_s is not None
        assert 3500 < volume.locks_in_s <= 3600


async def test_secrets_are_not_guessed_faster_by_edits_than_by_unlock(
    serve_here: ServeHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempts, "DELAY_MAX_S", 0.2)
    async with serve_here() as served, open_agent(served.path) as client:
        volume_id, data = await created(client)
        first = parse_volume(data).protectors[0].protector_id
        began = trio.current_time()
        for _ in range(attempts.FREE):
            with pytest.raises(WrongSecret):
                await edits.rotate_kek(client, volume_id, data, [(first, b"guess")])
        for _ in range(2):
            before = trio.current_time()
            with pytest.raises(WrongSecret):
                await edits.rotate_kek(client, volume_id, data, [(first, b"guess")])
            assert trio.current_time() - before >= 0.2
        # Neither a protector of one's own nor its secret ends the count.
        both = await edits.add_protector(client, volume_id, data, SECOND)
        await edits.commit(client, volume_id, both)
        second = parse_volume(both).protectors[1].protector_id
        await edits.rotate_kek(client, volume_id, both, [(second, b"two")])
        before = trio.current_time()
        with pytest.raises(WrongSecret):
            await client.unlock(volume=data, cipher_dir="/c", secret=b"guess")
        assert trio.current_time() - before >= 0.2
        assert trio.current_time() - began < 20


async def test_a_file_that_is_not_in_its_place_does_not_count(serve_here: ServeHere, short_tmp: Path) -> None:
    place = short_tmp / "vault"
    place.mkdir()
    file = place / "volume"
    async with serve_here() as served, open_agent(served.path) as client:
        volume_id, data = await created(client, policy={"unwraps_per_s": 5})
        file.write_bytes(data)
        await client.unlock(volume=data, cipher_dir=str(place), secret=b"one")
        lifted = await edits.set_policy(client, volume_id, data, {})
        with pytest.raises(UsageError, match="another volume file"):
            await edits.commit(client, volume_id, lifted)
        # Neither the policy nor the floor has moved.
        assert served.server.policies.of(volume_id) == parse_volume(data).policy
        await client.attach(volume_id=volume_id, cipher_dir=str(place), mountpoint="/m", volume=data)
        file.write_bytes(lifted)
        await edits.commit(client, volume_id, lifted)
        assert served.server.policies.of(volume_id) == parse_volume(lifted).policy
        # What lies there is another volume's, or none: it was moved, and the command is believed.
        other_id, other = await created(client)
        file.write_bytes(other)
        await edits.commit(client, volume_id, lifted)
        file.write_bytes(b"")
        await edits.commit(client, volume_id, lifted)
        assert other_id != volume_id
