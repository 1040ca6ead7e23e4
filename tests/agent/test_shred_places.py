"""Shred secrets behind a key in a real token (SoftHSM 2)."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from cryptfs.agent.shred_places import KEYFILE, ShredPlaces
from cryptfs.agent.shred_store import KIND, ShredStore
from cryptfs.crypto.secret import Secret
from cryptfs.crypto.shred import shred_check
from cryptfs.errors import Denied, ShredSecretMissing, UnsupportedFormat, VolumeDamaged, WrongSecret
from cryptfs.format.volume import ParamValue, Protector, ShredSecret, Volume, WrappedKey
from cryptfs.roots.pkcs11 import Pkcs11Provider
from tests.softhsm import MODULE, MODULE_PATH, PIN, SoftHsm

WISH: dict[str, ParamValue] = {"module": MODULE, "token": "shredding"}


@pytest.fixture
def provider(short_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Pkcs11Provider:
    hsm = SoftHsm(short_tmp / "hsm").set_up()
    for name, value in hsm.environment.items():
        monkeypatch.setenv(name, value)
    hsm.make_token("shredding")
    return Pkcs11Provider({MODULE: MODULE_PATH})


@pytest.fixture
def places(short_tmp: Path, provider: Pkcs11Provider) -> ShredPlaces:
    return ShredPlaces(ShredStore(str(short_tmp / "state" / "shred")), {"pkcs11": provider}, os.urandom)


def volume_with(
    places: ShredPlaces, kind: str, given: bytes = b"", volume_id: bytes = b"v" * 16
) -> tuple[Volume, bytes]:
    secret, params = places.make(kind, WISH if kind == "pkcs11" else {}, given, volume_id)
    with secret:
        content = bytes(secret.view())
    shred = ShredSecret(kind, params, shred_check(content, volume_id))
    protector = Protector(b"p" * 16, "fake", "", 0, {}, (WrappedKey(1, b"x"),))
    return Volume(volume_id, 1, 0, 4096, (), b"r" * 16, 1, WrappedKey(1, bytes(40)), (protector,), shred=shred), content


def found(places: ShredPlaces, volume: Volume, given: bytes) -> bytes | None:
    secret = places.find(volume, given)
    if secret is None:
        return None
    with secret:
        return bytes(secret.view())


def test_a_tokens_key_gives_the_secret_back_until_it_is_destroyed(places: ShredPlaces) -> None:
    volume, content = volume_with(places, "pkcs11", PIN.encode())
    assert found(places, volume, PIN.encode()) == content
    with pytest.raises(WrongSecret):
        places.find(volume, b"000000")
    assert places.destroy(volume, PIN.encode())
    with pytest.raises(Denied):
        places.find(volume, PIN.encode())
    with pytest.raises(Denied):
        places.destroy(volume, PIN.encode())


def test_a_key_that_holds_another_volumes_secret_is_not_destroyed(places: ShredPlaces) -> None:
    """Whoever can edit a `volume` file must not choose which key of the token `shred` destroys."""
    mine, content = volume_with(places, "pkcs11", PIN.encode())
    other = replace(mine, volume_id=b"w" * 16)
    with pytest.raises(VolumeDamaged):
        places.destroy(other, PIN.encode())
    assert mine.shred is not None
    unchecked = replace(mine, shred=replace(mine.shred, check=bytes(16)))
    with pytest.raises(ShredSecretMissing):
        places.destroy(unchecked, PIN.encode())
    assert found(places, mine, PIN.encode()) == content


def test_the_agents_own_and_the_owners_file(places: ShredPlaces) -> None:
    volume, content = volume_with(places, KIND)
    assert found(places, volume, b"") == content
    assert places.destroy(volume, b"")
    assert found(places, volume, b"") is None
    assert not places.destroy(volume, b"")
    kept, content = volume_with(places, KEYFILE, bytes(range(32)))
    assert content == bytes(range(32))
    assert found(places, kept, bytes(range(32))) == content
    assert found(places, kept, b"") is None
    assert places.check(kept, bytes(range(32)))
    assert not places.destroy(kept, bytes(range(32)))


def test_only_the_volumes_own_secret_is_destroyed(places: ShredPlaces) -> None:
    kept, _ = volume_with(places, KEYFILE, bytes(range(32)))
    for call in (places.check, places.destroy):
        with pytest.raises(ShredSecretMissing, match="not the volume's"):
            call(kept, bytes(32))
    mine, content = volume_with(places, KIND)
    assert mine.shred is not None
    with pytest.raises(ShredSecretMissing, match="not the volume's"):
        places.destroy(replace(mine, shred=replace(mine.shred, check=bytes(16))), b"")
    assert found(places, mine, b"") == content


def test_a_place_this_machine_does_not_have(places: ShredPlaces) -> None:
    with pytest.raises(UnsupportedFormat):
        places.make("moon", {}, b"", b"v" * 16)
    volume, _ = volume_with(places, KIND)
    assert volume.shred is not None
    with pytest.raises(UnsupportedFormat):
        places.find(replace(volume, shred=replace(volume.shred, kind="moon", params={"wrapped": b"x"})), b"")


def test_a_file_of_zeros_or_a_short_one_is_no_secret(short_tmp: Path) -> None:
    store = ShredStore(str(short_tmp / "state" / "shred"))
    store.put(b"v" * 16, os.urandom(32))
    path = Path(store.directory) / (b"v" * 16).hex()
    assert path.stat().st_mode & 0o777 == 0o600
    path.write_bytes(bytes(32))  # what a crash in `destroy` leaves
    assert store.get(b"v" * 16) is None
    path.write_bytes(b"short")
    with pytest.raises(ShredSecretMissing, match="damaged"):
        store.get(b"v" * 16)
    (Path(store.directory) / (b"w" * 16).hex()).with_suffix(".new").write_bytes(b"what a crash in `put` leaves")
    with Secret.of(os.urandom(32)) as secret:
        store.put(b"w" * 16, secret.view())
        store.put(b"w" * 16, secret.view())
