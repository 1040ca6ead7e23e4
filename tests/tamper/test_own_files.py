"""R2 for the volume's own files: every byte of `volume` and `state` changed, zeroed, cut off, or another volume's."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from cryptfs.agent.keyring import authenticate
from cryptfs.crypto.secret import Secret
from cryptfs.errors import UnsupportedFormat, VolumeDamaged
from cryptfs.format.state import SLOT_BYTES, State
from cryptfs.format.volume import Volume, parse_volume
from cryptfs.fs.epoch import read_state, sign_states, write_slot
from cryptfs.store.local import LocalStore
from cryptfs.testing.volumes import SampleVolume


def open_volume_file(sample: SampleVolume, data: bytes) -> Volume:
    """As the agent opens it, that holds the KEK of `sample`."""
    volume = parse_volume(data)
    if volume.volume_id != sample.volume_id:
        raise VolumeDamaged("the agent holds no such volume")
    authenticate(volume, data, {1: Secret(bytearray(sample.kek.kek))})
    return volume


def variants(raw: bytes, rng: random.Random) -> list[bytes]:
    """Each byte with one bit changed, and zeroed; cut at every length; lengthened; pieces moved."""
    out = [raw[:at] + bytes([raw[at] ^ 1 << rng.randrange(8)]) + raw[at + 1 :] for at in range(len(raw))]
    out += [raw[:at] + b"\0" + raw[at + 1 :] for at in range(len(raw)) if raw[at]]
    out += [raw[:at] for at in range(len(raw))]
    out += [raw + b"\0", raw * 2, bytes(len(raw)), raw[::-1]]
    for _ in range(200):
        at, to, count = rng.randrange(len(raw)), rng.randrange(len(raw)), rng.randrange(1, 40)
        piece = raw[at : at + count]
        out.append(raw[:to] + piece + raw[to + len(piece) :])
    return [changed for changed in out if changed != raw]


def test_every_change_of_the_volume_file_is_refused() -> None:
    sample = SampleVolume()
    raw = sample.volume_file
    assert open_volume_file(sample, raw).volume_id == sample.volume_id
    changed = variants(raw, random.Random(1))
    assert len(changed) > 800
    for data in changed:
        with pytest.raises((VolumeDamaged, UnsupportedFormat)):
            open_volume_file(sample, data)


def test_another_volumes_file_is_refused() -> None:
    sample, other = SampleVolume(seed=1), SampleVolume(seed=2)
    with pytest.raises(VolumeDamaged):
        open_volume_file(sample, other.volume_file)
    # The body of one under the MAC of the other, and one body with the other's identity.
    with pytest.raises(VolumeDamaged):
        open_volume_file(sample, sample.volume_file[:-32] + other.volume_file[-32:])
    with pytest.raises(VolumeDamaged):
        open_volume_file(sample, other.volume_file.replace(other.volume_id, sample.volume_id))


async def test_no_change_of_the_state_says_anything_but_what_a_slot_said(tmp_path: Path) -> None:
    """Each slot counts or does not. That the older one does is for the freshness record to find."""
    sample = SampleVolume()
    older = State(sequence=6, epoch=3, clean=False, unclean=((1, 1),))
    newest = older.ended()
    store = LocalStore(tmp_path)
    keys = sample.keys()
    try:
        for state in (older, newest):
            write_slot(store, state, *await sign_states(keys, sample.volume_id, state))
        path = tmp_path / "state"
        raw = path.read_bytes()
        assert len(raw) == 2 * SLOT_BYTES
        assert await read_state(store, keys, sample.volume_id) == newest
        said = set()
        for data in [*variants(raw, random.Random(2)), raw[SLOT_BYTES:] + raw[:SLOT_BYTES], raw[:SLOT_BYTES] * 2]:
            path.write_bytes(data)
            try:
                state = await read_state(store, keys, sample.volume_id)
            except VolumeDamaged:
                said.add("refused")
                continue
            assert state in (older, newest)
            said.add("newest" if state == newest else "older")
        assert said == {"refused", "newest", "older"}
        path.write_bytes(raw)
        with pytest.raises(VolumeDamaged):
            await read_state(store, keys, b"w" * 16)
        with pytest.raises(VolumeDamaged):
            await read_state(store, SampleVolume(seed=2).keys(), sample.volume_id)
    finally:
        store.close_store()


async def test_the_key_of_one_slot_is_no_other_slots_key(tmp_path: Path) -> None:
    """Nor does a slot count whose KEK the volume does not have any more."""
    sample = SampleVolume()
    older = State(sequence=6, epoch=3, clean=False)
    newest = older.ended()
    store = LocalStore(tmp_path)
    keys = sample.keys()
    try:
        (first,) = await sign_states(keys, sample.volume_id, older)
        sample.kek.rotate()
        (second,) = await sign_states(keys, sample.volume_id, newest)
        write_slot(store, older, first)
        write_slot(store, newest, second[:424] + first[424:468] + second[468:])
        assert await read_state(store, keys, sample.volume_id) == older
        write_slot(store, newest, second)
        assert await read_state(store, keys, sample.volume_id) == newest
        sample.kek.destroy_older()
        write_slot(store, newest, bytes(SLOT_BYTES))
        with pytest.raises(VolumeDamaged):
            await read_state(store, sample.keys(), sample.volume_id)
    finally:
        store.close_store()
