"""From a `volume` file and a secret to KEKs, and a new volume's file. Sync and slow: the server runs it in a thread.

Root keys come from injected providers; nothing here knows what a passphrase or a KMS is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cryptfs.agent.keyring import authenticate
from cryptfs.crypto.secret import Secret
from cryptfs.crypto.wrap import KEK_BYTES, ZERO_ID, volume_mac, wrap_keys, wrapping_key
from cryptfs.errors import CryptfsError, UnsupportedFormat, VolumeDamaged, WrongSecret
from cryptfs.format.volume import Protector, Volume, WrappedKey, encode_volume, parse_volume, protector_aad
from cryptfs.ports import Random, RootKey, RootProvider
from cryptfs.types import ID_BYTES, Purpose

Providers = Mapping[str, RootProvider]
"""By kind."""


@dataclass(frozen=True, slots=True)
class NewVolume:
    """What the caller chooses about a volume to be made; `block_size` in bytes, `cost` is low, normal or high."""

    block_size: int
    kind: str
    cost: str
    label: str
    created_s: int


@dataclass(frozen=True, slots=True)
class Unlocked:
    """A volume whose file is authentic, its bytes, and its KEKs by version (the receiver's to wipe)."""

    volume: Volume
    data: bytes
    keks: Mapping[int, Secret]


def create_volume(new: NewVolume, secret: Secret, providers: Providers, random: Random) -> Unlocked:
    """A new volume with one protector and KEK version 1.

    Raises `UnsupportedFormat` for an unknown kind, `UsageError` for an unknown cost, `ValueError` for parameters out of
    range, and whatever the root key's holder raises.
    """
    provider = _provider(providers, new.kind)
    volume_id, protector_id = random(ID_BYTES), random(ID_BYTES)
    params = provider.new_params(new.cost)
    kek = Secret(bytearray(random(KEK_BYTES)))
    root = provider.open(params, secret.view())
    try:
        aad = protector_aad(volume_id, protector_id, 1)
        wrapped = root.wrap(kek.view(), aad)
        # Before anything is encrypted under it: does the protector give back what it was given?
        with Secret(root.unwrap(wrapped, aad)) as again:
            if not again.equals(kek):
                raise CryptfsError("the root key does not unwrap what it wrapped")
    finally:
        root.close()
    volume_wrapper = wrapping_key(kek.view(), Purpose.VOLUME, volume_id, ZERO_ID, 1)
    volume = Volume(
        volume_id=volume_id,
        serial=1,
        created_s=new.created_s,
        block_size=new.block_size,
        features=(),
        root_dir_id=random(ID_BYTES),
        kek_version=1,
        volume_key=WrappedKey(1, wrap_keys(volume_wrapper, [random(KEK_BYTES)])),
        protectors=(Protector(protector_id, new.kind, new.label, new.created_s, params, (WrappedKey(1, wrapped),)),),
    )
    signed = encode_volume(volume)
    return Unlocked(volume, signed + volume_mac(kek.view(), volume_id, 1, signed), {1: kek})


def unlock_volume(data: bytes, secret: Secret, providers: Providers) -> Unlocked:
    """The KEKs of the volume whose file is `data`: every protector of a known kind is tried in turn.

    Raises `WrongSecret` if none opens; `VolumeDamaged` if one opens but the file is not what was written (its MAC does
    not match, or only some of the KEKs unwrap); `UnsupportedFormat` for another version or if no kind is known.
    """
    volume = parse_volume(data)
    known = [protector for protector in volume.protectors if protector.kind in providers]
    if not known:
        raise UnsupportedFormat("the volume has no protector of a kind this program knows")
    for protector in known:
        root = providers[protector.kind].open(protector.params, secret.view())
        try:
            keks = _unwrap_all(root, volume.volume_id, protector)
        finally:
            root.close()
        if keks is not None:
            authenticate(volume, data, keks)
            return Unlocked(volume, data, keks)
    raise WrongSecret("no protector of the volume opens with this secret")


def _unwrap_all(root: RootKey, volume_id: bytes, protector: Protector) -> dict[int, Secret] | None:
    """All KEK versions of a protector, or None if it is not this root key's."""
    keks: dict[int, Secret] = {}
    for kek in protector.keks:
        aad = protector_aad(volume_id, protector.protector_id, kek.kek_version)
        try:
            keks[kek.kek_version] = Secret(root.unwrap(kek.wrapped, aad))
        except WrongSecret:
            continue
    if keks and len(keks) < len(protector.keks):
        raise VolumeDamaged("the volume file was changed: a protector opens, but not all it holds")
    return keks or None


def _provider(providers: Providers, kind: str) -> RootProvider:
    provider = providers.get(kind)
    if provider is None:
        raise UnsupportedFormat(f"no protector kind {kind!r}; there are {', '.join(sorted(providers))}")
    return provider
