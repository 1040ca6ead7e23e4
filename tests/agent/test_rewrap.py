"""`rewrap`: the same keys under the newest KEK, on the record, without one of them leaving the agent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cryptfs.agent.keyring import Keyring
from cryptfs.crypto.secret import Secret
from cryptfs.crypto.wrap import wrap_keys, wrapping_key
from cryptfs.errors import AgentUnavailable, Damaged, ProtocolError, VolumeLocked
from cryptfs.format.volume import parse_volume
from cryptfs.keys.agent_client import open_agent
from cryptfs.keys.cache import KeyCache
from cryptfs.keys.edit_requests import ProtectorWish, VolumeWish
from cryptfs.keys.policy import CachePolicy
from cryptfs.keys.stretches import KEYS_AT_ONCE
from cryptfs.keys.volume_requests import VolumeRequests
from cryptfs.ports import KeyRun
from cryptfs.testing.clock import FakeClock
from cryptfs.types import Purpose
from tests.agent.conftest import ServeHere

VOLUME_ID = b"v" * 16
LOG_ID = b"f" * 16
KEKS = {1: bytes(range(32)), 2: bytes(range(32, 64))}


@pytest.fixture
def keyring() -> Keyring:
    ring = Keyring(os.urandom)
    ring.hold(VOLUME_ID, 2, {version: Secret.of(kek) for version, kek in KEKS.items()})
    return ring


def wrapped_under(version: int, purpose: Purpose, keys: list[bytes]) -> bytes:
    return wrap_keys(wrapping_key(KEKS[version], purpose, VOLUME_ID, LOG_ID, version), keys)


@pytest.mark.parametrize("purpose", [Purpose.BLOCK, Purpose.ATTR, Purpose.NAMES])
def test_the_same_keys_under_the_newest_kek(keyring: Keyring, purpose: Purpose) -> None:
    keys = [os.urandom(64 if purpose is Purpose.NAMES else 32) for _ in range(3)]
    old = wrapped_under(1, purpose, keys)
    version, [new] = keyring.rewrap(VOLUME_ID, [(LOG_ID, purpose, 1, old)])
    assert (version, new) == (2, wrapped_under(2, purpose, keys))
    assert keyring.rewrap(VOLUME_ID, [(LOG_ID, purpose, 2, new or b"")]) == (2, [new])


def test_what_is_not_authentic_is_not_wrapped(keyring: Keyring) -> None:
    old = wrapped_under(1, Purpose.BLOCK, [os.urandom(32), os.urandom(32)])
    items = [
        (LOG_ID, Purpose.BLOCK, 1, old[:-1] + bytes([old[-1] ^ 1])),
        (b"g" * 16, Purpose.BLOCK, 1, old),
        (LOG_ID, Purpose.ATTR, 1, old),
        (LOG_ID, Purpose.BLOCK, 2, old),
        (LOG_ID, Purpose.BLOCK, 3, old),
        (LOG_ID, Purpose.BLOCK, 1, old),
    ]
    version, wrapped = keyring.rewrap(VOLUME_ID, items)
    assert version == 2
    assert wrapped[:5] == [None] * 5
    assert wrapped[5] is not None
    keyring.forget(VOLUME_ID)
    with pytest.raises(VolumeLocked):
        keyring.rewrap(VOLUME_ID, items)


async def made(client_path: str) -> bytes:
    async with open_agent(client_path) as client:
        data = await client.create(VolumeWish(4096, ProtectorWish("fake", "", b"secret", {"cost": "low"})))

    return parse_volume(data).volume_id


async def test_over_the_socket_and_on_the_record(serve_here: ServeHere, short_tmp: Path) -> None:
    async with serve_here() as served:
        volume_id = await made(served.path)
        async with open_agent(served.path, role="daemon") as client:
            keys = KeyCache(VolumeRequests.over(client, volume_id), CachePolicy(), FakeClock())
            fresh = await keys.generate(LOG_ID, Purpose.BLOCK, 5)
            clear = [bytes(key) for key in fresh.keys]
            got = await keys.rewrap([KeyRun(LOG_ID, Purpose.BLOCK, 1, fresh.wrapped, 7)])
            assert got.kek_version == 1
            joined = got.wrapped[0]
            again = [joined[at : at + 40] for at in range(0, len(joined), 40)]
            keys.wipe()
            assert [bytes(k) for k in (await keys.unwrap([KeyRun(LOG_ID, Purpose.BLOCK, 1, again)]))[0]] == clear
            with pytest.raises(Damaged):
                await keys.rewrap([KeyRun(b"g" * 16, Purpose.BLOCK, 1, again)])
            many = [[LOG_ID, "block", 1, bytes(40 * (KEYS_AT_ONCE + 1)), 0]]
            with pytest.raises(ProtocolError):
                await client.request("rewrap", {"volume_id": volume_id, "items": many})
            await client.lock(volume_id)
            with pytest.raises(VolumeLocked):
                await keys.rewrap([KeyRun(LOG_ID, Purpose.BLOCK, 1, again)])
    lines = (short_tmp / "state" / "audit" / volume_id.hex() / "00000001.log").read_bytes()
    touched = b'"files":[{"id":"%s","purpose":"block","keys":5,"blocks":[[7,5]]}]' % LOG_ID.hex().encode()
    assert b'"verb":"rewrap","outcome":"ok"' in lines
    assert touched in lines
    assert b'"keys":5,"blocks":[[0,5]],"authentic":false' in lines


@pytest.mark.parametrize("answer", [{"kek_version": 1, "wrapped": []}, {"kek_version": 1, "wrapped": [b"short"]}])
async def test_a_wrong_answer_is_no_answer(
    serve_here: ServeHere, monkeypatch: pytest.MonkeyPatch, answer: dict[str, object]
) -> None:
    async with serve_here() as served:
        volume_id = await made(served.path)
        async with open_agent(served.path) as client:
            keys = KeyCache(VolumeRequests.over(client, volume_id), CachePolicy(), FakeClock())
            fresh = await keys.generate(LOG_ID, Purpose.BLOCK, 1)

            async def request(verb: str, args: object) -> dict[str, object]:
                return answer

            monkeypatch.setattr(client, "request", request)
            with pytest.raises(AgentUnavailable):
                await keys.rewrap([KeyRun(LOG_ID, Purpose.BLOCK, 1, fresh.wrapped)])
