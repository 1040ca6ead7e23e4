"""From a `volume` file and a secret to KEKs, and a new volume's file. Sync and slow: the server runs it in a thread.

Root keys come from injected providers; nothing here knows what a passphrase or a KMS is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cryptfs.agent.keyring import authenticate
from cryptfs.agent.reverify import Standing
from cryptfs.crypto.secret import Secret
from cryptfs.crypto.shred import shred_check, unwrap_kek, wrap_kek
from cryptfs.crypto.wrap import KEK_BYTES, ZERO_ID, volume_mac, wrap_keys, wrapping_key
from cryptfs.errors import CryptfsError, ShredSecretMissing, UnsupportedFormat, UsageError, VolumeDamaged, WrongSecret
from cryptfs.format.policy import Policy
from cryptfs.format.volume import (
    EPHEMERAL,
    ParamValue,
    Protector,
    ShredSecret,
    Volume,
    WrappedKey,
    encode_volume,
    parse_volume,
    protector_aad,
)
from cryptfs.ports import Random, RootKey, RootProvider
from cryptfs.types import ID_BYTES, Purpose

Providers = Mapping[str, RootProvider]
"""By kind."""


@dataclass(frozen=True, slots=True)
class NewProtector:
    """What the caller chooses about a protector to be made: `wish` is the kind's own (`RootProvider.new_params`)."""

    kind: str
    wish: Mapping[str, ParamValue]
    label: str
    created_s: int


@dataclass(frozen=True, slots=True)
class NewVolume:
    """What the caller chooses about a volume to be made; `block_size` in bytes.

    `protector` is None for an ephemeral volume. `shred_kind` says where its shred secret will lie; empty: it has none.
    """

    block_size: int
    protector: NewProtector | None
    created_s: int
    policy: Policy = field(default_factory=Policy)
    shred_kind: str = ""
    shred_params: Mapping[str, ParamValue] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Unlocked:
    """A volume whose file is authentic, its bytes, and its KEKs by version (the receiver's to wipe)."""

    volume: Volume
    data: bytes
    keks: Mapping[int, Secret]
    standing: Standing | None = None
    """The root key, still open, where it can be taken back (the receiver's to close)."""

    def discard(self) -> None:
        """Nobody receives it: wipe and close everything. May block."""
        for kek in self.keks.values():
            kek.wipe()
        if self.standing is not None:
            self.standing.close()


@dataclass(frozen=True, slots=True)
class Key:
    """A secret, and which protector it is for: all of `kind`, or of every kind if that is empty; or one by its id."""

    secret: Secret
    kind: str = ""
    protector_id: bytes = b""

    def fits(self, protector: Protector) -> bool:
        """Whether this protector is one to try it on."""
        return self.kind in {"", protector.kind} and self.protector_id in (b"", protector.protector_id)


def create_volume(
    new: NewVolume, secret: Secret, providers: Providers, random: Random, shred: Secret | None = None,
    volume_id: bytes | None = None,
) -> Unlocked:  # fmt: skip
    """A new volume with one protector, or none if it is ephemeral, and KEK version 1. `volume_id`: None: a new one.

    Raises `UnsupportedFormat` for an unknown kind, `UsageError` for a wish it cannot have, `ValueError` for parameters
    out of range, and whatever the root key's holder raises.
    """
    volume_id = volume_id or random(ID_BYTES)
    keks = {1: Secret(bytearray(random(KEK_BYTES)))}
    protectors: tuple[Protector, ...] = ()
    if new.protector is not None:
        protectors = (make_protector(new.protector, random(ID_BYTES), volume_id, keks, secret, providers, shred),)
    volume_wrapper = wrapping_key(keks[1].view(), Purpose.VOLUME, volume_id, ZERO_ID, 1)
    volume = Volume(
        volume_id=volume_id,
        serial=1,
        created_s=new.created_s,
        block_size=new.block_size,
        features=() if protectors else (EPHEMERAL,),
        root_dir_id=random(ID_BYTES),
        kek_version=1,
        volume_key=WrappedKey(1, wrap_keys(volume_wrapper, [random(KEK_BYTES)])),
        protectors=protectors,
        policy=new.policy,
        shred=None
        if shred is None
        else ShredSecret(new.shred_kind, new.shred_params, shred_check(shred.view(), volume_id)),
    )
    return sealed(volume, keks)


def sealed(volume: Volume, keks: Mapping[int, Secret]) -> Unlocked:
    """The volume with its file's bytes, MAC included. Raises `ValueError` if it is none that could be read again."""
    signed = encode_volume(volume)
    kek = keks[volume.kek_version]
    return Unlocked(volume, signed + volume_mac(kek.view(), volume.volume_id, volume.kek_version, signed), keks)


def make_protector(
    new: NewProtector, protector_id: bytes, volume_id: bytes, keks: Mapping[int, Secret], secret: Secret,
    providers: Providers, shred: Secret | None,
) -> Protector:  # fmt: skip
    """A protector that holds all of `keks`, each unwrapped once to see that it can be. Raises as `create_volume`.

    `shred` is the volume's (`check_shred`): what is sealed with another one, or with none, is not what `volume` says.
    """
    provider = _provider(providers, new.kind)
    params = provider.new_params(new.wish)
    root = provider.open(params, secret.view())
    try:
        wrapped = tuple(
            WrappedKey(version, seal_kek(root, keks[version], volume_id, protector_id, version, shred))
            for version in sorted(keks)
        )
    finally:
        root.close()
    return Protector(protector_id, new.kind, new.label, new.created_s, params, wrapped)


def seal_kek(
    root: RootKey, kek: Secret, volume_id: bytes, protector_id: bytes, version: int, shred: Secret | None
) -> bytes:
    """A KEK as a protector holds it. Raises `CryptfsError` if the root key does not give back what it was given."""
    aad = protector_aad(volume_id, protector_id, version)
    key = bytes(kek.view()) if shred is None else wrap_kek(shred.view(), volume_id, version, kek.view())
    wrapped = root.wrap(key, aad)
    with Secret(root.unwrap(wrapped, aad)) as again, Secret.of(key) as given:
        if not again.equals(given):
            raise CryptfsError("the root key does not unwrap what it wrapped")
    return wrapped


def unlock_volume(data: bytes, key: Key, providers: Providers, shred: Secret | None = None) -> Unlocked:
    """The KEKs of the volume whose file is `data`: every protector that the key may be for is tried in turn.

    Raises `WrongSecret` if none opens; `VolumeDamaged` if one opens but the file is not what was written (its MAC does
    not match, or only some of the KEKs unwrap); `UnsupportedFormat` for another version or if no such protector is
    known; `ShredSecretMissing` if there should be one and `shred` is not it.
    """
    volume = parse_volume(data)
    known = [protector for protector in volume.protectors if protector.kind in providers and key.fits(protector)]
    if not key.kind and not key.protector_id:
        # A secret that was given for no kind in particular is no PIN.
        known = [protector for protector in known if not providers[protector.kind].counts_wrong_secrets]
    if not known:
        raise UnsupportedFormat(_why_none(volume, key))
    check_shred(volume, shred)
    for protector in known:
        provider = providers[protector.kind]
        if provider.counts_wrong_secrets and not key.protector_id:
            raise UsageError(f"say which protector of kind {protector.kind} it is for: that kind counts wrong secrets")
        root = provider.open(protector.params, key.secret.view())
        standing = None
        try:
            keks = open_protector(root, volume.volume_id, protector, shred)
            if keks is not None:
                authenticate(volume, data, keks)
                if provider.revocable:
                    standing = _standing(root, volume.volume_id, protector)
        finally:
            if standing is None:
                root.close()
        if keks is not None:
            return Unlocked(volume, data, keks, standing)
    raise WrongSecret("no protector of the volume opens with this secret")


def _standing(root: RootKey, volume_id: bytes, protector: Protector) -> Standing:
    """What the root just unwrapped, to be asked of it again."""
    kek = protector.keks[-1]
    return Standing(root, kek.wrapped, protector_aad(volume_id, protector.protector_id, kek.kek_version))


def check_shred(volume: Volume, shred: Secret | None) -> None:
    """Raise `ShredSecretMissing` unless `shred` is the secret the volume's KEKs need, if they need one."""
    if volume.shred is None:
        return
    if shred is None:
        raise ShredSecretMissing("the volume's shred secret is not there: without it nothing opens the volume")
    if shred_check(shred.view(), volume.volume_id) != volume.shred.check:
        raise ShredSecretMissing("this is not the volume's shred secret")


def open_protector(
    root: RootKey, volume_id: bytes, protector: Protector, shred: Secret | None
) -> dict[int, Secret] | None:
    """All KEK versions of a protector, or None if it is not this root key's."""
    keks: dict[int, Secret] = {}
    for kek in protector.keks:
        aad = protector_aad(volume_id, protector.protector_id, kek.kek_version)
        try:
            opened = Secret(root.unwrap(kek.wrapped, aad))
        except WrongSecret:
            continue
        if shred is not None:
            with opened:
                inner = unwrap_kek(shred.view(), volume_id, kek.kek_version, opened.view())
            if inner is None:
                raise VolumeDamaged("the volume file was changed: a KEK is not wrapped under the shred secret")
            opened = Secret.of(inner)
        if len(opened) != KEK_BYTES:
            raise VolumeDamaged("the volume file was changed: a protector holds no KEK")
        keks[kek.kek_version] = opened
    if keks and len(keks) < len(protector.keks):
        raise VolumeDamaged("the volume file was changed: a protector opens, but not all it holds")
    return keks or None


def _why_none(volume: Volume, key: Key) -> str:
    if volume.ephemeral:
        return "an ephemeral volume cannot be unlocked: its key is gone with the agent that had it"
    if key.protector_id or any(key.fits(protector) for protector in volume.protectors):
        return "the volume has no protector of a kind this program knows"
    return f"the volume has no protector of kind {key.kind}"


def _provider(providers: Providers, kind: str) -> RootProvider:
    provider = providers.get(kind)
    if provider is None:
        raise UnsupportedFormat(f"no protector kind {kind!r}; there are {', '.join(sorted(providers))}")
    return provider


def check_label(volume: Volume, label: str) -> None:
    """Raise `UsageError` if a protector has that label already: commands name protectors by it."""
    if not label or any(protector.label == label for protector in volume.protectors):
        raise UsageError(f"a protector needs a label of its own; {label!r} is taken" if label else "a label is missing")
