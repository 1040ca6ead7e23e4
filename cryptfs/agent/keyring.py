"""The KEKs of unlocked volumes, and what is done under them. Sync, bytes in and bytes out, no sockets.

A KEK is in this process from `hold` to `forget`; nothing returns one. Wrapping keys are derived once per
(id, purpose, version) and request, and live no longer than the request.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cryptfs.crypto.secret import Secret
from cryptfs.crypto.secret_memory import SecretMemory
from cryptfs.crypto.wrap import key_bytes, unwrap_keys, volume_mac_matches, wrap_keys, wrapped_bytes, wrapping_key
from cryptfs.errors import VolumeDamaged, VolumeLocked
from cryptfs.format.volume import Volume, parse_volume, split_mac
from cryptfs.ports import Random
from cryptfs.types import ID_BYTES, Purpose

UnwrapItem = tuple[bytes, Purpose, int, bytes]
"""(id, purpose, KEK version, wrapped keys joined)"""

KitRow = tuple[bytes, bytes, bytes, bytes, bytes, bytes, bytes]
"""(id, log key, its wrap, names key, its wrap, DEKs joined, their wraps joined); names empty for files"""


@dataclass(slots=True)
class _Held:
    """One unlocked volume: its newest KEK version and all KEKs by version."""

    kek_version: int
    keks: Mapping[int, Secret] = field(repr=False)


class Keyring:
    """All KEKs the agent holds."""

    def __init__(self, random: Random, memory: SecretMemory | None = None) -> None:
        """`random` makes every key and id; KEKs are moved into `memory`."""
        self._random = random
        self._memory = memory
        self._held: dict[bytes, _Held] = {}

    @property
    def volume_ids(self) -> tuple[bytes, ...]:
        """The unlocked volumes."""
        return tuple(self._held)

    def hold(self, volume_id: bytes, kek_version: int, keks: Mapping[int, Secret]) -> None:
        """Take over `keks` (version -> 32 bytes); those held before for this volume are wiped."""
        self.forget(volume_id)
        memory = self._memory
        held = keks if memory is None else {version: memory.moved(kek) for version, kek in keks.items()}
        self._held[volume_id] = _Held(kek_version, held)

    def keks(self, volume_id: bytes) -> Mapping[int, Secret]:
        """The volume's KEKs, the keyring's to wipe. Raises `VolumeLocked`."""
        return self._of(volume_id).keks

    def pend(self, volume_id: bytes, kek_version: int, kek: Secret) -> None:
        """Take over a KEK version that is to be used once it is `settled`; one pending before is wiped.

        Raises `VolumeLocked`; `ValueError` if the version is in use.
        """
        held = self._of(volume_id)
        if kek_version <= held.kek_version:
            raise ValueError("a KEK version in use is not replaced")
        before = held.keks.get(kek_version)
        held.keks = {**held.keks, kek_version: kek if self._memory is None else self._memory.moved(kek)}
        if before is not None:
            before.wipe()

    def settle(self, volume_id: bytes, volume: Volume) -> None:
        """Use the KEK versions that the authenticated `volume` has, and wipe all others. Raises `VolumeLocked`."""
        held = self._of(volume_id)
        wanted = volume_versions(volume)
        gone = [kek for version, kek in held.keks.items() if version not in wanted]
        held.keks = {version: kek for version, kek in held.keks.items() if version in wanted}
        held.kek_version = volume.kek_version
        for kek in gone:
            kek.wipe()

    def forget(self, volume_id: bytes) -> bool:
        """Wipe the volume's KEKs; False if none were held."""
        held = self._held.pop(volume_id, None)
        if held is None:
            return False
        for kek in held.keks.values():
            kek.wipe()
        return True

    def forget_all(self) -> None:
        """Wipe every KEK."""
        for volume_id in self.volume_ids:
            self.forget(volume_id)

    def holds(self, volume_id: bytes) -> bool:
        """Whether the volume is unlocked."""
        return volume_id in self._held

    def check_file(self, data: bytes) -> Volume:
        """The parsed `volume` file, authenticated under the KEK held for it.

        Raises `VolumeLocked` if none is held; `VolumeDamaged` or `UnsupportedFormat` if it is not what was written.
        """
        volume = parse_volume(data)
        authenticate(volume, data, self._of(volume.volume_id).keks)
        return volume

    def generate(self, volume_id: bytes, log_id: bytes, purpose: Purpose, count: int) -> tuple[int, bytes, bytes]:
        """(KEK version, `count` new keys joined, their wraps joined). Raises `VolumeLocked`."""
        held = self._of(volume_id)
        keys, wrapped = self._fresh(held, volume_id, log_id, purpose, count)
        return held.kek_version, keys, wrapped

    def kits(self, volume_id: bytes, *, directory: bool, count: int, deks: int) -> tuple[int, list[KitRow]]:
        """(KEK version, `count` kits), each with a fresh random id and `deks` DEKs. Raises `VolumeLocked`."""
        held = self._of(volume_id)
        log_purpose = Purpose.LOG_DIR if directory else Purpose.LOG_FILE
        rows: list[KitRow] = []
        for _ in range(count):
            log_id = self._random(ID_BYTES)
            log_key, log_wrapped = self._fresh(held, volume_id, log_id, log_purpose, 1)
            names_key, names_wrapped = (
                self._fresh(held, volume_id, log_id, Purpose.NAMES, 1) if directory else (b"", b"")
            )
            dek_keys, deks_wrapped = self._fresh(held, volume_id, log_id, Purpose.BLOCK, deks) if deks else (b"", b"")
            rows.append((log_id, log_key, log_wrapped, names_key, names_wrapped, dek_keys, deks_wrapped))
        return held.kek_version, rows

    def unwrap(self, volume_id: bytes, items: Sequence[UnwrapItem]) -> list[bytes | None]:
        """The keys of each item joined; None where any of its wraps is not authentic or its KEK version is not there.

        Raises `VolumeLocked`; `ValueError` if an item is no whole number of wrapped keys.
        """
        keks = self._of(volume_id).keks
        wrappers: dict[tuple[bytes, Purpose, int], bytes] = {}
        keys: list[bytes | None] = []
        for log_id, purpose, kek_version, wrapped in items:
            which = (log_id, purpose, kek_version)
            wrapper = wrappers.get(which)
            if wrapper is None:
                kek = keks.get(kek_version)
                if kek is None:
                    keys.append(None)
                    continue
                wrapper = wrapping_key(kek.view(), purpose, volume_id, log_id, kek_version)
                wrappers[which] = wrapper
            keys.append(unwrap_keys(wrapper, wrapped, wrapped_bytes(purpose)))
        return keys

    def rewrap(self, volume_id: bytes, items: Sequence[UnwrapItem]) -> tuple[int, list[bytes | None]]:
        """(newest KEK version, the keys of each item wrapped under it, joined; None as for `unwrap`).

        Raises as `unwrap` does.
        """
        held = self._of(volume_id)
        version = held.kek_version
        kek = held.keks[version].view()
        wrappers: dict[tuple[bytes, Purpose], bytes] = {}
        wrapped: list[bytes | None] = []
        for (log_id, purpose, _, _), keys in zip(items, self.unwrap(volume_id, items), strict=True):
            if keys is None:
                wrapped.append(None)
                continue
            wrapper = wrappers.get((log_id, purpose))
            if wrapper is None:
                wrapper = wrappers[log_id, purpose] = wrapping_key(kek, purpose, volume_id, log_id, version)
            size = key_bytes(purpose)
            wrapped.append(wrap_keys(wrapper, [keys[at : at + size] for at in range(0, len(keys), size)]))
        return version, wrapped

    def _of(self, volume_id: bytes) -> _Held:
        held = self._held.get(volume_id)
        if held is None:
            raise VolumeLocked("the volume is locked")
        return held

    def _fresh(self, held: _Held, volume_id: bytes, log_id: bytes, purpose: Purpose, count: int) -> tuple[bytes, bytes]:
        size = key_bytes(purpose)
        keys = self._random(size * count)
        wrapper = wrapping_key(held.keks[held.kek_version].view(), purpose, volume_id, log_id, held.kek_version)
        return keys, wrap_keys(wrapper, [keys[start : start + size] for start in range(0, len(keys), size)])


def volume_versions(volume: Volume) -> frozenset[int]:
    """The KEK versions a volume's protectors hold; of an ephemeral one, the newest."""
    held = [kek.kek_version for kek in volume.protectors[0].keks] if volume.protectors else []
    return frozenset({*held, volume.kek_version})


def authenticate(volume: Volume, data: bytes, keks: Mapping[int, Secret]) -> None:
    """Check the MAC of a whole `volume` file. Raises `VolumeDamaged` if it does not match or its KEK is not there."""
    kek = keks.get(volume.kek_version)
    signed, mac = split_mac(data)
    if kek is None or not volume_mac_matches(kek.view(), volume.volume_id, volume.kek_version, signed, mac):
        raise VolumeDamaged("the volume file was changed: its MAC does not match")
