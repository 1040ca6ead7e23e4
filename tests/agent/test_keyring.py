"""KEKs held and used: batches, purposes, versions, and nothing left after `forget`."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cryptfs.agent.keyring import Keyring
from cryptfs.agent.unlocking import NewProtector, NewVolume, Unlocked, create_volume
from cryptfs.crypto.secret import Secret
from cryptfs.crypto.wrap import unwrap_keys, wrapping_key
from cryptfs.errors import VolumeDamaged, VolumeLocked
from cryptfs.format.volume import MAC_BYTES
from cryptfs.testing.roots import FakeProvider
from cryptfs.types import Purpose

VOLUME_ID = b"v" * 16
OTHER_ID = b"w" * 16
LOG_ID = b"f" * 16
KEKS = {1: bytes(range(32)), 2: bytes(range(32, 64))}


@pytest.fixture
def keyring() -> Keyring:
    ring = Keyring(os.urandom)
    ring.hold(VOLUME_ID, 2, {version: Secret.of(kek) for version, kek in KEKS.items()})
    return ring


def test_generated_keys_unwrap_to_themselves_under_the_newest_kek(keyring: Keyring) -> None:
    version, keys, wrapped = keyring.generate(VOLUME_ID, LOG_ID, Purpose.BLOCK, 5)
    assert version == 2
    assert len(keys) == 5 * 32
    assert len({keys[i : i + 32] for i in range(0, 160, 32)}) == 5
    assert keyring.unwrap(VOLUME_ID, [(LOG_ID, Purpose.BLOCK, 2, wrapped)]) == [keys]
    outside = wrapping_key(KEKS[2], Purpose.BLOCK, VOLUME_ID, LOG_ID, 2)
    assert unwrap_keys(outside, wrapped, 40) == keys


def test_names_keys_have_64_bytes(keyring: Keyring) -> None:
    _, keys, wrapped = keyring.generate(VOLUME_ID, LOG_ID, Purpose.NAMES, 2)
    assert (len(keys), len(wrapped)) == (128, 144)
    assert keyring.unwrap(VOLUME_ID, [(LOG_ID, Purpose.NAMES, 2, wrapped)]) == [keys]


def test_an_item_that_is_not_authentic_costs_only_itself(keyring: Keyring) -> None:
    _, keys, wrapped = keyring.generate(VOLUME_ID, LOG_ID, Purpose.BLOCK, 2)
    spoiled = wrapped[:50] + bytes([wrapped[50] ^ 1]) + wrapped[51:]
    right = (LOG_ID, Purpose.BLOCK, 2, wrapped)
    wrong = [
        (LOG_ID, Purpose.BLOCK, 2, spoiled),
        (LOG_ID, Purpose.ATTR, 2, wrapped),
        (b"g" * 16, Purpose.BLOCK, 2, wrapped),
        (LOG_ID, Purpose.BLOCK, 1, wrapped),
        (LOG_ID, Purpose.BLOCK, 3, wrapped),
    ]
    assert keyring.unwrap(VOLUME_ID, [right, *wrong, right]) == [keys, None, None, None, None, None, keys]


def test_file_kits_open_in_their_own_log_only(keyring: Keyring) -> None:
    version, kits = keyring.kits(VOLUME_ID, directory=False, count=3, deks=4)
    assert version == 2
    assert len({kit[0] for kit in kits}) == 3
    for log_id, log_key, log_wrapped, names_key, names_wrapped, deks, deks_wrapped in kits:
        assert names_key == names_wrapped == b""
        items = [(log_id, Purpose.LOG_FILE, 2, log_wrapped), (log_id, Purpose.BLOCK, 2, deks_wrapped)]
        assert keyring.unwrap(VOLUME_ID, items) == [log_key, deks]
        assert keyring.unwrap(VOLUME_ID, [(log_id, Purpose.LOG_DIR, 2, log_wrapped)]) == [None]


def test_directory_kits_have_names_keys_and_no_deks(keyring: Keyring) -> None:
    _, [kit] = keyring.kits(VOLUME_ID, directory=True, count=1, deks=0)
    log_id, log_key, log_wrapped, names_key, names_wrapped, deks, deks_wrapped = kit
    assert (len(names_key), len(names_wrapped), deks, deks_wrapped) == (64, 72, b"", b"")
    items = [(log_id, Purpose.LOG_DIR, 2, log_wrapped), (log_id, Purpose.NAMES, 2, names_wrapped)]
    assert keyring.unwrap(VOLUME_ID, items) == [log_key, names_key]


def test_a_volume_that_is_not_held_is_locked(keyring: Keyring) -> None:
    with pytest.raises(VolumeLocked):
        keyring.generate(OTHER_ID, LOG_ID, Purpose.BLOCK, 1)
    with pytest.raises(VolumeLocked):
        keyring.kits(OTHER_ID, directory=False, count=1, deks=1)
    with pytest.raises(VolumeLocked):
        keyring.unwrap(OTHER_ID, [])


def test_forget_wipes_and_so_does_holding_anew() -> None:
    ring = Keyring(os.urandom)
    first, second = Secret.of(KEKS[1]), Secret.of(KEKS[1])
    ring.hold(VOLUME_ID, 1, {1: first})
    ring.hold(VOLUME_ID, 1, {1: second})
    assert [first.wiped, second.wiped] == [True, False]
    assert ring.forget(VOLUME_ID)
    assert not ring.forget(VOLUME_ID)
    assert [first.wiped, second.wiped] == [True, True]
    assert not ring.holds(VOLUME_ID)


def test_forget_all_forgets_every_volume(keyring: Keyring) -> None:
    keyring.hold(OTHER_ID, 1, {1: Secret.of(KEKS[1])})
    keyring.forget_all()
    assert keyring.volume_ids == ()


def _created() -> Unlocked:
    provider = FakeProvider()
    new = NewVolume(block_size=4096, protector=NewProtector("fake", {"cost": "low"}, "", 1), created_s=1)
    return create_volume(new, Secret.of(b"pw"), {"fake": provider}, os.urandom)


def test_check_file_takes_the_volumes_own_file_only() -> None:
    made = _created()
    ring = Keyring(os.urandom)
    with pytest.raises(VolumeLocked):
        ring.check_file(made.data)
    ring.hold(made.volume.volume_id, 1, made.keks)
    assert ring.check_file(made.data) == made.volume


@given(st.data())
def test_check_file_notices_every_changed_bit(data: st.DataObject) -> None:
    made = _created()
    ring = Keyring(os.urandom)
    ring.hold(made.volume.volume_id, 1, made.keks)
    changed = bytearray(made.data)
    # Not the volume id: with another id it is a file of another, locked, volume.
    where = made.data.index(made.volume.volume_id)
    position = data.draw(st.integers(12, len(changed) - 1).filter(lambda at: not where <= at < where + 16))
    changed[position] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(VolumeDamaged):
        ring.check_file(bytes(changed))


def test_a_zeroed_mac_is_noticed() -> None:
    made = _created()
    ring = Keyring(os.urandom)
    ring.hold(made.volume.volume_id, 1, made.keks)
    with pytest.raises(VolumeDamaged):
        ring.check_file(made.data[:-MAC_BYTES] + bytes(MAC_BYTES))


def test_no_repr_shows_a_kek(keyring: Keyring) -> None:
    held = repr(keyring._held)
    assert repr(KEKS[1])[2:-1] not in held
    assert "Secret" not in held
