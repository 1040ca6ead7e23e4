"""New volumes, and secrets tried on volume files: right, wrong, edited, unknown."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import pytest

from cryptfs.agent.unlocking import Key, NewProtector, NewVolume, Unlocked, create_volume, unlock_volume
from cryptfs.crypto.secret import Secret
from cryptfs.crypto.wrap import ZERO_ID, unwrap_keys, volume_mac, wrapping_key
from cryptfs.errors import AgentUnavailable, CryptfsError, UnsupportedFormat, UsageError, VolumeDamaged, WrongSecret
from cryptfs.format.volume import Protector, Volume, WrappedKey, encode_volume, parse_volume, protector_aad
from cryptfs.ports import RootProvider
from cryptfs.roots.passphrase import PassphraseProvider
from cryptfs.testing.roots import FakeProvider
from cryptfs.types import Purpose

PROVIDERS: dict[str, RootProvider] = {"fake": FakeProvider(), "passphrase": PassphraseProvider()}


def new(kind: str = "fake", cost: str = "low", block_size: int = 16384) -> NewVolume:
    protector = NewProtector(kind, {"cost": cost}, "mine", 1_700_000_000)
    return NewVolume(block_size=block_size, protector=protector, created_s=1_700_000_000)


def create(kind: str = "fake", secret: bytes = b"right") -> Unlocked:
    return create_volume(new(kind), Secret.of(secret), PROVIDERS, os.urandom)


def sealed(volume: Volume, kek: bytes | memoryview) -> bytes:
    signed = encode_volume(volume)
    return signed + volume_mac(kek, volume.volume_id, volume.kek_version, signed)


@pytest.mark.parametrize("kind", ["fake", "passphrase"])
def test_a_new_volume_opens_with_its_secret(kind: str) -> None:
    made = create(kind)
    again = unlock_volume(made.data, Key(Secret.of(b"right")), PROVIDERS)
    assert again.volume == made.volume == parse_volume(made.data)
    assert again.keks[1].equals(made.keks[1])
    volume = again.volume
    assert (volume.serial, volume.kek_version, volume.block_size, volume.created_s) == (1, 1, 16384, 1_700_000_000)
    [protector] = volume.protectors
    assert (protector.kind, protector.label) == (kind, "mine")
    wrapper = wrapping_key(again.keks[1].view(), Purpose.VOLUME, volume.volume_id, ZERO_ID, 1)
    volume_key = unwrap_keys(wrapper, volume.volume_key.wrapped, 40)
    assert volume_key is not None
    assert len(volume_key) == 32


def test_two_new_volumes_share_nothing() -> None:
    one, two = create(), create()
    assert one.volume.volume_id != two.volume.volume_id
    assert one.volume.root_dir_id != two.volume.root_dir_id
    assert not one.keks[1].equals(two.keks[1])


@pytest.mark.parametrize("kind", ["fake", "passphrase"])
@pytest.mark.parametrize("secret", [b"wrong", b"right ", b"r", "right\N{COMBINING ACUTE ACCENT}".encode()])
def test_another_secret_is_wrong(kind: str, secret: bytes) -> None:
    with pytest.raises(WrongSecret):
        unlock_volume(create(kind).data, Key(Secret.of(secret)), PROVIDERS)


EDITS: dict[str, Callable[[Volume], Volume]] = {
    "block size": lambda volume: dataclasses.replace(volume, block_size=4096),
    "serial": lambda volume: dataclasses.replace(volume, serial=0),
    "root directory": lambda volume: dataclasses.replace(volume, root_dir_id=bytes(16)),
    "volume key": lambda volume: dataclasses.replace(volume, volume_key=WrappedKey(1, bytes(40))),
    "label": lambda volume: dataclasses.replace(
        volume, protectors=(dataclasses.replace(volume.protectors[0], label="yours"),)
    ),
    "a protector more": lambda volume: dataclasses.replace(
        volume,
        protectors=(
            *volume.protectors,
            dataclasses.replace(volume.protectors[0], protector_id=bytes(16), label="a stranger's"),
        ),
    ),
}


@pytest.mark.parametrize("what", EDITS)
def test_an_edited_file_is_damaged_even_though_the_secret_is_right(what: str) -> None:
    made = create()
    edited = encode_volume(EDITS[what](made.volume)) + made.data[-32:]
    with pytest.raises(VolumeDamaged, match="MAC"):
        unlock_volume(edited, Key(Secret.of(b"right")), PROVIDERS)
    with pytest.raises(WrongSecret):
        unlock_volume(edited, Key(Secret.of(b"wrong")), PROVIDERS)


def test_a_protector_of_which_only_some_versions_open_is_damaged() -> None:
    made = create()
    [protector] = made.volume.protectors
    two = dataclasses.replace(protector, keks=(*protector.keks, WrappedKey(2, protector.keks[0].wrapped)))
    edited = sealed(
        dataclasses.replace(made.volume, kek_version=2, volume_key=WrappedKey(2, bytes(40)), protectors=(two,)),
        made.keks[1].view(),
    )
    with pytest.raises(VolumeDamaged, match="not all"):
        unlock_volume(edited, Key(Secret.of(b"right")), PROVIDERS)


def test_every_protector_is_tried_also_past_kinds_nobody_knows() -> None:
    made = create("passphrase")
    root = PROVIDERS["fake"].open({"region": "x"}, b"other")
    second_id = b"2" * 16
    kek = made.keks[1].view()
    second = Protector(
        second_id,
        "fake",
        "",
        1,
        {"region": "x"},
        (WrappedKey(1, root.wrap(kek, protector_aad(made.volume.volume_id, second_id, 1))),),
    )
    stranger = dataclasses.replace(second, protector_id=b"3" * 16, kind="abacus")
    data = sealed(dataclasses.replace(made.volume, protectors=(stranger, *made.volume.protectors, second)), kek)
    for secret in (b"right", b"other"):
        assert unlock_volume(data, Key(Secret.of(secret)), PROVIDERS).keks[1].equals(made.keks[1])
    with pytest.raises(WrongSecret):
        unlock_volume(data, Key(Secret.of(b"neither")), PROVIDERS)


def test_a_volume_of_unknown_kinds_only_is_unsupported() -> None:
    with pytest.raises(UnsupportedFormat):
        unlock_volume(create("passphrase").data, Key(Secret.of(b"right")), {"fake": PROVIDERS["fake"]})


def test_a_failing_root_holder_is_not_a_wrong_secret() -> None:
    made = create()
    failing = FakeProvider()
    failing.failure = AgentUnavailable("the KMS does not answer")
    with pytest.raises(AgentUnavailable):
        unlock_volume(made.data, Key(Secret.of(b"right")), {"fake": failing})


@pytest.mark.parametrize(
    ("changes", "error"),
    [({"kind": "abacus"}, UnsupportedFormat), ({"cost": "free"}, UsageError), ({"block_size": 5000}, ValueError)],
)
def test_bad_choices_for_a_new_volume(changes: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        create_volume(new(**changes), Secret.of(b"x"), PROVIDERS, os.urandom)


def test_a_root_key_that_does_not_give_back_what_it_got_makes_no_volume() -> None:
    class Forgetful(FakeProvider):
        def open(self, params: object, secret: object) -> object:  # type: ignore[override]
            root = super().open({"region": "x"}, b"x")
            root.unwrap = lambda wrapped, context: bytearray(32)  # type: ignore[method-assign]  # noqa: ARG005
            return root

    with pytest.raises(CryptfsError, match="does not unwrap"):
        create_volume(new(), Secret.of(b"x"), {"fake": Forgetful()}, os.urandom)  # type: ignore[dict-item]
