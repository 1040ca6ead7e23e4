"""The `volume` file as bytes and as frozen dataclasses (FORMAT.md §3). No cryptography here.

`parse_volume` checks everything that can be checked without a key. Whether the file is authentic only its MAC
says, which takes the KEK and so is checked by the agent: until then every field is what some stranger may have
written, and the bounds here (above all those on the KDF's cost) are what protects the reader.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import msgpack

from cryptfs.errors import UnsupportedFormat, VolumeDamaged
from cryptfs.format.policy import NO_POLICY, Policy, parse_policy
from cryptfs.types import ID_BYTES, WRAPPED_BYTES

MAGIC = b"CRYPTFS\0"
FORMAT_VERSION = 1
HEADER_BYTES = 16
MAC_BYTES = 32
BODY_MAX_BYTES = 1 << 20
FILE_MAX_BYTES = HEADER_BYTES + BODY_MAX_BYTES + MAC_BYTES
BLOCK_SIZE_MIN = 4096
BLOCK_SIZE_MAX = 1 << 20
EPHEMERAL = "ephemeral"
"""The feature of a volume without protectors: its KEK is never stored."""
DOMAINS = "domains"
"""The feature of a volume that has, or had, domains (FORMAT.md §6)."""
KNOWN_FEATURES: frozenset[str] = frozenset({EPHEMERAL, DOMAINS})

PASSPHRASE = "passphrase"  # noqa: S105 - the protector kind's name
SEALED_KEK_BYTES = frozenset({32, 40})
"""What a root key wraps: a KEK, or one that is wrapped under the shred secret (RFC 3394) before."""
PASSPHRASE_OVERHEAD_BYTES = 28
"""Nonce and tag."""
SHRED_CHECK_BYTES = 16
SALT_BYTES = 16
MEMORY_KIB_MAX = 2 << 20
"""2 GiB: a volume that asks for more is refused before the KDF runs."""
ITERATIONS_MAX = 256
LANES_MAX = 16
WORK_KIB_MAX = 16 << 20
"""Most memory times iterations: about half a minute on a slow machine."""

PROTECTORS_MAX = 32
KEK_VERSIONS_MAX = 64
LABEL_MAX_CHARS = 200
WRAPPED_MAX_BYTES = 4096
U32_MAX = (1 << 32) - 1
U63_MAX = (1 << 63) - 1

ParamValue = int | str | bytes

_VOLUME_KEYS = (
    "volume_id",
    "serial",
    "created_s",
    "block_size",
    "features",
    "root_dir_id",
    "kek_version",
    "volume_key",
    "policy",
    "shred",
    "protectors",
)
_SHRED_KEYS = ("kind", "params", "check")
_PROTECTOR_KEYS = ("id", "kind", "label", "created_s", "params", "keks")


@dataclass(frozen=True, slots=True)
class WrappedKey:
    """A wrapped key. The KEK version is, in a protector, the one it holds; elsewhere, the one it is wrapped under."""

    kek_version: int
    wrapped: bytes


@dataclass(frozen=True, slots=True)
class PassphraseParams:
    """Cost and salt of Argon2id (RFC 9106); `memory_kib` in KiB, `salt` 16 bytes."""

    salt: bytes
    memory_kib: int
    iterations: int
    lanes: int


@dataclass(frozen=True, slots=True)
class Protector:
    """One way to the KEKs: `keks` holds each version wrapped under the root key that `kind` and `params` lead to."""

    protector_id: bytes
    kind: str
    label: str
    created_s: int
    params: Mapping[str, ParamValue]
    keks: tuple[WrappedKey, ...]


@dataclass(frozen=True, slots=True)
class ShredSecret:
    """Where the secret lies that every KEK needs besides a protector; `check` (16 bytes) tells it from others."""

    kind: str
    params: Mapping[str, ParamValue]
    check: bytes


@dataclass(frozen=True, slots=True)
class Volume:
    """What the `volume` file says. Ids have 16 bytes, `block_size` is in bytes, `created_s` Unix time.

    `protectors` is empty for an ephemeral volume only. `shred` is None if a protector alone leads to the KEKs.
    """

    volume_id: bytes
    serial: int
    created_s: int
    block_size: int
    features: tuple[str, ...]
    root_dir_id: bytes
    kek_version: int
    volume_key: WrappedKey
    protectors: tuple[Protector, ...]
    policy: Policy = NO_POLICY
    shred: ShredSecret | None = None

    @property
    def ephemeral(self) -> bool:
        """Whether the KEK is never stored."""
        return EPHEMERAL in self.features


def is_destroyed(data: bytes | None) -> bool:
    """Whether there is no `volume` file (None), or one of zeros, as a crash leaves of its destruction.

    A domain was shredded if that is so, and `DOMAIN_SHREDDED` beside it says so.
    """
    return not any(data or b"")


def split_mac(data: bytes) -> tuple[bytes, bytes]:
    """(the bytes the MAC covers, the MAC of 32 bytes) of a whole file that `parse_volume` accepted."""
    return data[:-MAC_BYTES], data[-MAC_BYTES:]


def encode_volume(volume: Volume) -> bytes:
    """The file without its MAC, which is to be made over exactly these bytes and appended.

    Raises `ValueError` if what came out would not be accepted by `parse_volume`.
    """
    body = msgpack.packb(
        {
            "volume_id": volume.volume_id,
            "serial": volume.serial,
            "created_s": volume.created_s,
            "block_size": volume.block_size,
            "features": list(volume.features),
            "root_dir_id": volume.root_dir_id,
            "kek_version": volume.kek_version,
            "volume_key": [volume.volume_key.kek_version, volume.volume_key.wrapped],
            "policy": volume.policy.encode(),
            "shred": None
            if volume.shred is None
            else {"kind": volume.shred.kind, "params": dict(volume.shred.params), "check": volume.shred.check},
            "protectors": [
                {
                    "id": protector.protector_id,
                    "kind": protector.kind,
                    "label": protector.label,
                    "created_s": protector.created_s,
                    "params": dict(protector.params),
                    "keks": [[kek.kek_version, kek.wrapped] for kek in protector.keks],
                }
                for protector in volume.protectors
            ],
        },
        use_bin_type=True,
    )
    signed = MAGIC + FORMAT_VERSION.to_bytes(2, "big") + bytes(2) + len(body).to_bytes(4, "big") + bytes(body)
    try:
        parse_volume(signed + bytes(MAC_BYTES))
    except (VolumeDamaged, UnsupportedFormat) as error:
        raise ValueError(f"not a valid volume: {error}") from error
    return signed


def parse_volume(data: bytes) -> Volume:
    """The contents of a whole `volume` file, MAC included but not verified (that takes the KEK).

    Raises `UnsupportedFormat` for another format version or an unknown feature; `VolumeDamaged` for anything else.
    """
    _require(len(data) >= HEADER_BYTES + MAC_BYTES, "it is too short")
    _require(data[:8] == MAGIC, "it does not begin as a volume file does")
    version = int.from_bytes(data[8:10], "big")
    if version != FORMAT_VERSION:
        raise UnsupportedFormat(f"the volume has format version {version}; this program knows {FORMAT_VERSION}")
    _require(data[10:12] == b"\0\0", "reserved bytes are set")
    length = int.from_bytes(data[12:16], "big")
    _require(length <= BODY_MAX_BYTES, "its length is out of range")
    _require(len(data) == HEADER_BYTES + length + MAC_BYTES, "it is cut short or has bytes left over")
    return _volume(_unpack(data[HEADER_BYTES : HEADER_BYTES + length]))


def parse_passphrase(params: Mapping[str, ParamValue]) -> PassphraseParams:
    """The checked parameters of a protector of kind `passphrase`.

    Raises `VolumeDamaged` if they are not exactly those of FORMAT.md §3 or ask for an absurd cost.
    """
    _keys(params, ("kdf", "salt", "memory_kib", "iterations", "lanes"), "a passphrase protector")
    if params["kdf"] != "argon2id":
        raise UnsupportedFormat("a passphrase protector with a KDF other than argon2id")
    salt = _bytes(params["salt"], SALT_BYTES, "a salt")
    lanes = _int(params["lanes"], 1, LANES_MAX, "lanes")
    memory_kib = _int(params["memory_kib"], 8 * lanes, MEMORY_KIB_MAX, "memory_kib")
    iterations = _int(params["iterations"], 1, ITERATIONS_MAX, "iterations")
    _require(memory_kib * iterations <= WORK_KIB_MAX, "its KDF cost is out of range")
    return PassphraseParams(salt, memory_kib, iterations, lanes)


def protector_aad(volume_id: bytes, protector_id: bytes, kek_version: int) -> bytes:
    """The AAD of a protector's wrap: ``"cryptfs/1/protector" || 0x00 || volume id || protector id || u32 version``."""
    return b"cryptfs/1/protector\0" + volume_id + protector_id + kek_version.to_bytes(4, "big")


def _volume(body: dict[str, Any]) -> Volume:
    _keys(body, _VOLUME_KEYS, "the body")
    features = body["features"]
    _require(type(features) is list and all(type(name) is str for name in features), "features is no list of names")
    unknown = sorted(set(features) - KNOWN_FEATURES)
    if unknown:
        raise UnsupportedFormat(f"the volume uses features this program does not know: {', '.join(unknown)}"[:200])
    block_size = _int(body["block_size"], BLOCK_SIZE_MIN, BLOCK_SIZE_MAX, "block_size")
    _require(block_size.bit_count() == 1, "block_size is no power of two")
    protectors = body["protectors"]
    least = 0 if EPHEMERAL in features else 1
    _require(type(protectors) is list and len(protectors) <= PROTECTORS_MAX, "protectors is no list of them")
    _require(least <= len(protectors) <= PROTECTORS_MAX * least, "it has protectors where it must not, or none")
    volume = Volume(
        volume_id=_bytes(body["volume_id"], ID_BYTES, "volume_id"),
        serial=_int(body["serial"], 0, U63_MAX, "serial"),
        created_s=_int(body["created_s"], 0, U63_MAX, "created_s"),
        block_size=block_size,
        features=tuple(features),
        root_dir_id=_bytes(body["root_dir_id"], ID_BYTES, "root_dir_id"),
        kek_version=_int(body["kek_version"], 1, U32_MAX, "kek_version"),
        volume_key=_wrapped_key(body["volume_key"], WRAPPED_BYTES, WRAPPED_BYTES, "volume_key"),
        protectors=tuple(_protector(protector) for protector in protectors),
        policy=parse_policy(body["policy"]),
        shred=_shred(body["shred"]),
    )
    _require(
        len({protector.protector_id for protector in volume.protectors}) == len(volume.protectors),
        "two protectors have one id",
    )
    # One number to compare with: what the root directory names must not be later than either.
    _require(volume.volume_key.kek_version == volume.kek_version, "the volume key is not under the newest KEK")
    for protector in volume.protectors:
        versions = [kek.kek_version for kek in protector.keks]
        _require(
            versions[-1] == volume.kek_version, "a protector lacks the newest KEK, or has one that is not in use yet"
        )
        _require(
            versions == [kek.kek_version for kek in volume.protectors[0].keks], "protectors hold different KEK versions"
        )
    return volume


def _shred(body: object) -> ShredSecret | None:
    if body is None:
        return None
    if not isinstance(body, dict):
        raise VolumeDamaged("the volume file is damaged: shred is no map")
    _keys(body, _SHRED_KEYS, "shred")
    return ShredSecret(
        _text(body["kind"], "shred's kind"),
        _params(body["params"], "shred's params"),
        _bytes(body["check"], SHRED_CHECK_BYTES, "shred's check"),
    )


def _params(value: object, what: str) -> Mapping[str, ParamValue]:
    plain = (int, str, bytes)
    if not isinstance(value, dict) or any(type(k) is not str or type(v) not in plain for k, v in value.items()):
        raise VolumeDamaged(f"the volume file is damaged: {what} are no map of plain values")
    return MappingProxyType(value)


def _protector(body: object) -> Protector:
    where = "a protector"
    if not isinstance(body, dict):
        raise VolumeDamaged("the volume file is damaged: a protector is no map")
    _keys(body, _PROTECTOR_KEYS, where)
    keks = body["keks"]
    _require(type(keks) is list and 1 <= len(keks) <= KEK_VERSIONS_MAX, "a protector's keks are no list of them")
    protector = Protector(
        protector_id=_bytes(body["id"], ID_BYTES, "a protector's id"),
        kind=_text(body["kind"], "a protector's kind"),
        label=_text(body["label"], "a protector's label"),
        created_s=_int(body["created_s"], 0, U63_MAX, "a protector's created_s"),
        params=_params(body["params"], "a protector's params"),
        keks=tuple(_wrapped_key(kek, 1, WRAPPED_MAX_BYTES, "a wrapped KEK") for kek in keks),
    )
    versions = [kek.kek_version for kek in protector.keks]
    _require(versions == sorted(set(versions)), "a protector's KEK versions do not ascend")
    if protector.kind == PASSPHRASE:
        parse_passphrase(protector.params)
        _require(
            all(len(kek.wrapped) - PASSPHRASE_OVERHEAD_BYTES in SEALED_KEK_BYTES for kek in protector.keks),
            "a wrapped KEK has a wrong length",
        )
    return protector


def _unpack(body: bytes) -> dict[str, Any]:
    try:
        value = msgpack.unpackb(body, raw=False, max_array_len=1024, max_map_len=64, max_ext_len=0)
        # Packing again finds what unpacking forgives: keys given twice, lengths and integers not in shortest form.
        canonical = msgpack.packb(value, use_bin_type=True)
    except Exception:  # noqa: BLE001 - msgpack raises its own, ValueError and others; all mean the same here
        raise VolumeDamaged("the volume file is damaged: its body is not msgpack") from None
    _require(canonical == body, "its body is not in the canonical encoding")
    if not isinstance(value, dict):
        raise VolumeDamaged("the volume file is damaged: its body is no map")
    return value


def _require(condition: bool, what: str) -> None:  # noqa: FBT001 - reads as a sentence
    if not condition:
        raise VolumeDamaged(f"the volume file is damaged: {what}")


def _keys(body: Mapping[Any, object], keys: tuple[str, ...], where: str) -> None:
    _require(body.keys() == set(keys), f"{where} lacks a field or has one too many")


def _bytes(value: object, size: int, what: str) -> bytes:
    if type(value) is not bytes or len(value) != size:
        raise VolumeDamaged(f"the volume file is damaged: {what} is not {size} bytes long")
    return value


def _int(value: object, least: int, most: int, what: str) -> int:
    if type(value) is not int or not least <= value <= most:
        raise VolumeDamaged(f"the volume file is damaged: {what} is out of range")
    return value


def _text(value: object, what: str) -> str:
    if type(value) is not str or len(value) > LABEL_MAX_CHARS:
        raise VolumeDamaged(f"the volume file is damaged: {what} is no short text")
    return value


def _wrapped_key(value: object, least: int, most: int, what: str) -> WrappedKey:
    if type(value) is not list or len(value) != 2:
        raise VolumeDamaged(f"the volume file is damaged: {what} is no pair")
    version = _int(value[0], 1, U32_MAX, f"the version of {what}")
    wrapped = value[1]
    if type(wrapped) is not bytes or not least <= len(wrapped) <= most:
        raise VolumeDamaged(f"the volume file is damaged: {what} has a wrong length")
    return WrappedKey(version, wrapped)
