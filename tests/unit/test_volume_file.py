"""The `volume` file: round trips, one canonical form, and every way it can be wrong, by failure class."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cryptfs.errors import UnsupportedFormat, VolumeDamaged
from cryptfs.format import packing
from cryptfs.format.policy import BOUNDS, Policy
from cryptfs.format.volume import (
    BODY_MAX_BYTES,
    HEADER_BYTES,
    MAC_BYTES,
    MAGIC,
    PassphraseParams,
    Protector,
    ShredSecret,
    Volume,
    WrappedKey,
    encode_volume,
    parse_passphrase,
    parse_volume,
    protector_aad,
    split_mac,
)

MAC = bytes(range(MAC_BYTES))
PARAMS: dict[str, int | str | bytes] = {
    "kdf": "argon2id",
    "salt": bytes(16),
    "memory_kib": 65536,
    "iterations": 3,
    "lanes": 4,
}


def protector(**changes: object) -> Protector:
    base = Protector(b"p" * 16, "passphrase", "the first", 1_700_000_000, PARAMS, (WrappedKey(1, bytes(60)),))
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def volume(**changes: object) -> Volume:
    base = Volume(
        volume_id=b"v" * 16,
        serial=1,
        created_s=1_700_000_000,
        block_size=16384,
        features=(),
        root_dir_id=b"r" * 16,
        kek_version=1,
        volume_key=WrappedKey(1, bytes(40)),
        protectors=(protector(),),
    )
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def body() -> dict[str, Any]:
    """The body's map of a good file, to be spoiled."""
    good = volume()
    return {
        "volume_id": good.volume_id,
        "serial": 1,
        "created_s": 1,
        "block_size": 16384,
        "features": [],
        "root_dir_id": good.root_dir_id,
        "kek_version": 1,
        "volume_key": [1, bytes(40)],
        "policy": {},
        "shred": None,
        "protectors": [
            {
                "id": b"p" * 16,
                "kind": "passphrase",
                "label": "",
                "created_s": 1,
                "params": dict(PARAMS),
                "keks": [[1, bytes(60)]],
            }
        ],
    }


def file_of(packed: bytes) -> bytes:
    return MAGIC + b"\0\1\0\0" + len(packed).to_bytes(4, "big") + packed + MAC


GOOD = encode_volume(volume()) + MAC

ids = st.binary(min_size=16, max_size=16)
versions = st.lists(st.integers(1, 2**32 - 1), min_size=1, max_size=4, unique=True).map(sorted)


plain = st.dictionaries(
    st.text(max_size=8), st.integers(0, 2**63) | st.text(max_size=8) | st.binary(max_size=8), max_size=3
)
policies = st.fixed_dictionaries(
    {}, optional={name: st.integers(least, most) for name, (least, most) in BOUNDS.items()}
).map(lambda fields: Policy(**fields))


@st.composite
def volumes(draw: st.DrawFn) -> Volume:
    held = draw(versions)
    protector_ids = draw(st.lists(ids, min_size=1, max_size=3, unique=True))
    made = []
    for protector_id in protector_ids:
        passphrase = draw(st.booleans())
        made.append(
            Protector(
                protector_id,
                "passphrase" if passphrase else "kms",
                draw(st.text(max_size=20)),
                draw(st.integers(0, 2**40)),
                PARAMS if passphrase else draw(plain),
                tuple(
                    WrappedKey(
                        version,
                        draw(
                            st.sampled_from([60, 68]).flatmap(lambda n: st.binary(min_size=n, max_size=n))
                            if passphrase
                            else st.binary(min_size=1, max_size=90)
                        ),
                    )
                    for version in held
                ),
            )
        )
    return Volume(
        volume_id=draw(ids),
        serial=draw(st.integers(0, 2**63 - 1)),
        created_s=draw(st.integers(0, 2**40)),
        block_size=1 << draw(st.integers(12, 20)),
        features=(),
        root_dir_id=draw(ids),
        kek_version=held[-1],
        volume_key=WrappedKey(held[-1], draw(st.binary(min_size=40, max_size=40))),
        protectors=tuple(made),
        policy=draw(policies),
        shred=draw(st.none() | st.builds(ShredSecret, st.text(max_size=8), plain, ids)),
    )


@given(volumes())
def test_round_trip_and_one_encoding(made: Volume) -> None:
    signed = encode_volume(made)
    assert parse_volume(signed + MAC) == made
    assert encode_volume(parse_volume(signed + MAC)) == signed
    assert split_mac(signed + MAC) == (signed, MAC)


@given(st.binary(max_size=200))
def test_rubbish_is_damage(data: bytes) -> None:
    with pytest.raises(VolumeDamaged):
        parse_volume(data)


@given(st.binary(max_size=300))
def test_rubbish_in_a_proper_frame_is_damage(packed: bytes) -> None:
    with pytest.raises(VolumeDamaged):
        parse_volume(file_of(packed))


@given(st.integers(0, len(GOOD) - 1), st.integers(1, 255))
def test_a_changed_byte_is_refused_or_parsed_but_never_crashes(position: int, flip: int) -> None:
    changed = bytearray(GOOD)
    changed[position] ^= flip
    try:
        parsed = parse_volume(bytes(changed))
    except (VolumeDamaged, UnsupportedFormat):
        return
    # What still parses differs where the MAC will see it.
    assert encode_volume(parsed) != encode_volume(volume()) or bytes(changed)[-MAC_BYTES:] != MAC


@given(st.integers(0, len(GOOD) - 1))
def test_every_truncation_is_damage(length: int) -> None:
    with pytest.raises(VolumeDamaged):
        parse_volume(GOOD[:length])


def test_header_is_the_documents() -> None:
    assert GOOD[:8] == b"CRYPTFS\0"
    assert GOOD[8:12] == b"\0\1\0\0"
    assert int.from_bytes(GOOD[12:16], "big") == len(GOOD) - HEADER_BYTES - MAC_BYTES
    assert protector_aad(b"v" * 16, b"p" * 16, 7) == b"cryptfs/1/protector\0" + b"v" * 16 + b"p" * 16 + b"\0\0\0\7"


@pytest.mark.parametrize("version", [0, 2, 256, 0xFFFF])
def test_another_version_is_unsupported(version: int) -> None:
    with pytest.raises(UnsupportedFormat, match=f"version {version}"):
        parse_volume(GOOD[:8] + version.to_bytes(2, "big") + GOOD[10:])


def test_an_unknown_feature_is_unsupported_and_named() -> None:
    with pytest.raises(UnsupportedFormat, match="compression"):
        parse_volume(file_of(packing.pack(body() | {"features": ["compression"]})))


def test_an_unknown_policy_field_is_unsupported_and_named() -> None:
    with pytest.raises(UnsupportedFormat, match="max_moons"):
        parse_volume(file_of(packing.pack(body() | {"policy": {"max_moons": 1}})))


def test_protectors_with_different_kek_versions_are_damage() -> None:
    whole = body()
    other = dict(whole["protectors"][0], id=b"q" * 16, keks=[[1, bytes(60)], [2, bytes(60)]])
    whole["kek_version"] = 2
    whole["volume_key"] = [2, bytes(40)]
    whole["protectors"] = [other, dict(other, id=b"r" * 16, keks=[[2, bytes(60)]])]
    with pytest.raises(VolumeDamaged, match="protector"):
        parse_volume(file_of(packing.pack(whole)))


def test_an_ephemeral_volume_has_no_protectors() -> None:
    made = volume(features=("ephemeral",), protectors=())
    assert parse_volume(encode_volume(made) + MAC).ephemeral


def test_an_unknown_kdf_is_unsupported() -> None:
    with pytest.raises(UnsupportedFormat):
        parse_passphrase(PARAMS | {"kdf": "scrypt"})


def test_a_length_beyond_the_limit_is_refused_before_the_body_is_read() -> None:
    with pytest.raises(VolumeDamaged, match="length"):
        parse_volume(GOOD[:12] + (BODY_MAX_BYTES + 1).to_bytes(4, "big") + GOOD[16:])


def _protector(**changes: object) -> Callable[[dict[str, Any]], None]:
    return lambda whole: whole["protectors"][0].update(changes)


def _params(**changes: object) -> Callable[[dict[str, Any]], None]:
    return lambda whole: whole["protectors"][0]["params"].update(changes)


SPOILED: dict[str, Callable[[dict[str, Any]], object]] = {
    "extra key": lambda whole: whole.update(extra=1),
    "missing key": lambda whole: whole.pop("serial"),
    "short id": lambda whole: whole.update(volume_id=b"v" * 15),
    "id as text": lambda whole: whole.update(volume_id="v" * 16),
    "bool as int": lambda whole: whole.update(serial=True),
    "negative": lambda whole: whole.update(created_s=-1),
    "float": lambda whole: whole.update(created_s=1.0),
    "block size odd": lambda whole: whole.update(block_size=5000),
    "block size small": lambda whole: whole.update(block_size=2048),
    "block size large": lambda whole: whole.update(block_size=2 << 20),
    "features no list": lambda whole: whole.update(features="x"),
    "feature no text": lambda whole: whole.update(features=[1]),
    "kek version zero": lambda whole: whole.update(kek_version=0),
    "kek version nobody holds": lambda whole: whole.update(kek_version=2),
    "volume key short": lambda whole: whole.update(volume_key=[1, bytes(39)]),
    "volume key of a version nobody holds": lambda whole: whole.update(volume_key=[3, bytes(40)]),
    "volume key no pair": lambda whole: whole.update(volume_key=[1]),
    "policy no map": lambda whole: whole.update(policy=[]),
    "policy nil field": lambda whole: whole.update(policy={"for_s": None}),
    "policy out of bounds": lambda whole: whole.update(policy={"max_entries": 1}),
    "policy bool": lambda whole: whole.update(policy={"caching": True}),
    "policy unsorted": lambda whole: whole.update(policy={"idle_s": 9, "for_s": 9}),
    "shred no map": lambda whole: whole.update(shred=1),
    "shred lacks its check": lambda whole: whole.update(shred={"kind": "agent", "params": {}}),
    "shred check short": lambda whole: whole.update(shred={"kind": "agent", "params": {}, "check": b"x"}),
    "ephemeral with a protector": lambda whole: whole.update(features=["ephemeral"]),
    "a newer KEK than the newest": _protector(keks=[[1, bytes(60)], [2, bytes(60)]]),
    "no protector": lambda whole: whole.update(protectors=[]),
    "protector no map": lambda whole: whole.update(protectors=[1]),
    "too many protectors": lambda whole: whole.update(protectors=whole["protectors"] * 33),
    "two protectors of one id": lambda whole: whole.update(protectors=whole["protectors"] * 2),
    "protector extra key": _protector(extra=1),
    "protector kind no text": _protector(kind=1),
    "protector label long": _protector(label="x" * 201),
    "protector params no map": _protector(params=[]),
    "protector params nested": _protector(params={"a": []}),
    "protector without keks": _protector(keks=[]),
    "keks twice": _protector(keks=[[1, bytes(60)], [1, bytes(60)]]),
    "keks descending": _protector(keks=[[2, bytes(60)], [1, bytes(60)]]),
    "kek wrap short": _protector(keks=[[1, bytes(59)]]),
    "salt short": _params(salt=bytes(8)),
    "no lanes": _params(lanes=0),
    "many lanes": _params(lanes=17),
    "little memory": _params(memory_kib=8),
    "a tebibyte of memory": _params(memory_kib=1 << 30),
    "a thousand iterations": _params(iterations=1000),
    "much of both": _params(memory_kib=2 << 20, iterations=9),
    "params extra": _params(extra=1),
}


@pytest.mark.parametrize("what", SPOILED)
def test_spoiled_bodies_are_damage(what: str) -> None:
    whole = body()
    parse_volume(file_of(packing.pack(whole)))
    SPOILED[what](whole)
    with pytest.raises(VolumeDamaged):
        parse_volume(file_of(packing.pack(whole)))


@pytest.mark.parametrize(
    ("canonical", "other"),
    [
        (packing.pack("serial") + b"\x01", packing.pack("serial") + b"\xcc\x01"),
        (packing.pack("serial") + b"\x01", packing.pack("serial") + b"\x01" + packing.pack("serial") + b"\x01"),
        (b"\xc4\x10" + b"v" * 16, b"\xc5\x00\x10" + b"v" * 16),
    ],
    ids=["long integer", "key twice", "long length"],
)
def test_a_second_encoding_of_the_same_content_is_damage(canonical: bytes, other: bytes) -> None:
    packed = packing.pack(body())
    assert canonical in packed
    changed = packed.replace(canonical, other)
    if b"\x01" + packing.pack("serial") in other:
        changed = bytes([changed[0] + 1]) + changed[1:]
    with pytest.raises(VolumeDamaged, match="canonical"):
        parse_volume(file_of(changed))


def test_trailing_bytes_in_the_body_are_damage() -> None:
    with pytest.raises(VolumeDamaged):
        parse_volume(file_of(packing.pack(body()) + b"\xc0"))


def test_encode_refuses_what_parse_would() -> None:
    with pytest.raises(ValueError, match="block_size"):
        encode_volume(volume(block_size=1000))


def test_passphrase_params_are_checked_and_typed() -> None:
    assert parse_passphrase(PARAMS) == PassphraseParams(bytes(16), 65536, 3, 4)
