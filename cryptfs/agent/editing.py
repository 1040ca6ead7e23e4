"""New versions of a `volume` file: other protectors, another policy, another KEK version.

Pure, but slow where a KDF runs. Each takes the volume as it is, authenticated, with its KEKs, and returns it as it is
to be, its `serial` one higher. Nothing is written, and nothing of it counts before the file is in its place
(`ops.volume_file`, then `commit`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace

from cryptfs.agent.unlocking import (
    Key,
    NewProtector,
    Providers,
    Unlocked,
    check_label,
    check_shred,
    make_protector,
    open_protector,
    seal_kek,
    sealed,
)
from cryptfs.crypto.secret import Secret
from cryptfs.crypto.wrap import KEK_BYTES, ZERO_ID, unwrap_keys, wrap_keys, wrapping_key
from cryptfs.errors import CryptfsError, UnsupportedFormat, UsageError, VolumeDamaged, WrongSecret
from cryptfs.format.policy import Policy
from cryptfs.format.volume import DOMAINS, KEK_VERSIONS_MAX, PROTECTORS_MAX, Protector, Volume, WrappedKey
from cryptfs.ports import Random
from cryptfs.types import ID_BYTES, WRAPPED_BYTES, Purpose


def with_policy(now: Unlocked, policy: Policy) -> Unlocked:
    """Another policy."""
    return _edited(now, policy=policy)


def with_feature(now: Unlocked, feature: str) -> Unlocked:
    """One feature more that readers must know. Raises `UsageError` if the volume has it, or it is none to be added."""
    if feature != DOMAINS:
        raise UsageError("there is no such feature to be added")
    if feature in now.volume.features:
        raise UsageError("the volume has that feature")
    return _edited(now, features=tuple(sorted({*now.volume.features, feature})))


def with_protector(
    now: Unlocked, new: NewProtector, secret: Secret, providers: Providers, random: Random, shred: Secret | None
) -> Unlocked:
    """One protector more.

    Raises `UsageError` (label taken, too many, ephemeral), `ShredSecretMissing`, and as `make_protector` does.
    """
    volume = now.volume
    check_shred(volume, shred)
    if volume.ephemeral:
        raise UsageError("an ephemeral volume has no protectors: its key is never stored")
    check_label(volume, new.label)
    if len(volume.protectors) == PROTECTORS_MAX:
        raise UsageError(f"a volume has at most {PROTECTORS_MAX} protectors")
    made = make_protector(new, random(ID_BYTES), volume.volume_id, now.keks, secret, providers, shred)
    return _edited(now, protectors=(*volume.protectors, made))


def without_protector(now: Unlocked, protector_id: bytes) -> Unlocked:
    """One protector less. Raises `UsageError` if it is the last one or there is none of this id."""
    volume = now.volume
    gone = _named(volume, protector_id)
    if len(volume.protectors) == 1:
        raise UsageError("the last protector cannot be removed: nothing would open the volume any more")
    return _edited(now, protectors=tuple(p for p in volume.protectors if p is not gone))


def with_changed_protector(
    now: Unlocked, protector_id: bytes, new: NewProtector, secret: Secret, providers: Providers, shred: Secret | None
) -> Unlocked:
    """A protector of the same id and kind with another secret or root key, label and parameters as `new` says.

    Raises as `with_protector`.
    """
    volume = now.volume
    check_shred(volume, shred)
    old = _named(volume, protector_id)
    if new.kind != old.kind:
        raise UsageError(f"the protector {old.label!r} is of kind {old.kind}: add another one and remove this one")
    if new.label != old.label:
        check_label(volume, new.label)
    made = make_protector(new, protector_id, volume.volume_id, now.keks, secret, providers, shred)
    made = replace(made, created_s=old.created_s)
    return _edited(now, protectors=tuple(made if p is old else p for p in volume.protectors))


def with_new_kek(
    now: Unlocked, carried: Sequence[Key], providers: Providers, random: Random, shred: Secret | None
) -> Unlocked:
    """A new KEK version that wraps every new key; protectors that none of `carried` opens are left out.

    Each key must open the protector of its id, and wraps the new version there; the older versions stay until nothing
    needs them. Raises `WrongSecret`, `ShredSecretMissing`, `UsageError` (nothing is carried over, too many versions,
    ephemeral).
    """
    volume = now.volume
    if volume.ephemeral:
        # What is stored nowhere cannot be wrapped anew: the older versions would be lost, and all that is under them.
        raise UsageError("an ephemeral volume has a new key at every mount: there is nothing to rotate")
    check_shred(volume, shred)
    version = volume.kek_version + 1
    if len(now.keks) >= KEK_VERSIONS_MAX:
        raise UsageError(f"a volume has at most {KEK_VERSIONS_MAX} KEK versions: destroy the old ones first")
    keks = {**now.keks, version: Secret(bytearray(random(KEK_BYTES)))}
    protectors: list[Protector] = []
    for key in carried:
        old = _named(volume, key.protector_id)
        provider = providers.get(old.kind)
        if provider is None:
            raise UnsupportedFormat(f"the protector {old.label!r} is of a kind this program does not know")
        root = provider.open(old.params, key.secret.view())
        try:
            _check_opens(root_opens=open_protector(root, volume.volume_id, old, shred), now=now, label=old.label)
            wrapped = seal_kek(root, keks[version], volume.volume_id, old.protector_id, version, shred)
        finally:
            root.close()
        protectors.append(replace(old, keks=(*old.keks, WrappedKey(version, wrapped))))
    if not protectors:
        raise UsageError("no protector is carried over: nothing would open the volume any more")
    in_order = tuple(p for o in volume.protectors for p in protectors if p.protector_id == o.protector_id)
    return _edited(
        Unlocked(volume, now.data, keks), kek_version=version, protectors=in_order,
        volume_key=_rewrapped_volume_key(volume, keks, version),
    )  # fmt: skip


def without_old_keks(now: Unlocked) -> Unlocked:
    """Only the newest KEK version is left. Everything wrapped under an older one is noise afterwards."""
    version = now.volume.kek_version
    protectors = tuple(
        replace(p, keks=tuple(kek for kek in p.keks if kek.kek_version == version)) for p in now.volume.protectors
    )
    return _edited(Unlocked(now.volume, now.data, {version: now.keks[version]}), protectors=protectors)


def _edited(now: Unlocked, **changes: object) -> Unlocked:
    volume: Volume = replace(now.volume, serial=now.volume.serial + 1, **changes)  # type: ignore[arg-type]
    try:
        return sealed(volume, now.keks)
    except ValueError as error:
        raise UsageError(f"that is too much for a volume file: {error}") from error


def _named(volume: Volume, protector_id: bytes) -> Protector:
    for protector in volume.protectors:
        if protector.protector_id == protector_id:
            return protector
    raise UsageError("the volume has no such protector")


def _check_opens(root_opens: Mapping[int, Secret] | None, now: Unlocked, label: str) -> None:
    if root_opens is None:
        raise WrongSecret(f"the secret does not open the protector {label!r}")
    with ExitStack() as wiped:
        for opened in root_opens.values():
            wiped.enter_context(opened)
        if any(not opened.equals(now.keks[version]) for version, opened in root_opens.items()):
            raise VolumeDamaged("the volume file was changed: protectors hold different keys")


def _rewrapped_volume_key(volume: Volume, keks: Mapping[int, Secret], version: int) -> WrappedKey:
    """The same volume key: data files carry MACs under it, and are not rewritten."""
    old = volume.volume_key
    opener = wrapping_key(keks[old.kek_version].view(), Purpose.VOLUME, volume.volume_id, ZERO_ID, old.kek_version)
    key = unwrap_keys(opener, old.wrapped, WRAPPED_BYTES)
    if key is None:
        raise CryptfsError("the volume key does not unwrap")
    closer = wrapping_key(keks[version].view(), Purpose.VOLUME, volume.volume_id, ZERO_ID, version)
    return WrappedKey(version, wrap_keys(closer, [key]))
