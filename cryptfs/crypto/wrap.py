"""Wrapping and unwrapping of keys under a KEK (FORMAT.md §1). Only the agent imports this module.

A KEK never wraps a key itself. It yields one wrapping key per (purpose, id, KEK version) by HKDF-Expand (RFC 5869
§2.3; the extract step is skipped as §3.3 allows, the KEK being uniformly random), and AES-256 key wrap (RFC 3394,
NIST SP 800-38F KW) is done under that. So what a wrapped key is for is bound into it.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterable

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from cryptography.hazmat.primitives.keywrap import InvalidUnwrap, aes_key_unwrap, aes_key_wrap

from cryptfs.types import ID_BYTES, NAMES_KEY_BYTES, WRAPPED_BYTES, WRAPPED_NAMES_BYTES, Buffer, Purpose

KEK_BYTES = 32
VOLUME_MAC_BYTES = 32
ZERO_ID = bytes(ID_BYTES)
"""The id in `info` for keys that belong to the whole volume."""

_PREFIXES = {purpose: b"cryptfs/1/" + purpose.value.encode() + b"\0" for purpose in Purpose}
_SHA256 = SHA256()


def key_bytes(purpose: Purpose) -> int:
    """Length of a key of this purpose: 64 for names keys, 32 for all others."""
    return NAMES_KEY_BYTES if purpose is Purpose.NAMES else KEK_BYTES


def wrapped_bytes(purpose: Purpose) -> int:
    """Length of a wrapped key of this purpose: 72 for names keys, 40 for all others."""
    return WRAPPED_NAMES_BYTES if purpose is Purpose.NAMES else WRAPPED_BYTES


def info(purpose: Purpose, volume_id: bytes, log_id: bytes, kek_version: int) -> bytes:
    """HKDF's `info`: ``"cryptfs/1/" || purpose || 0x00 || volume_id[16] || id[16] || u32 version``.

    Raises `ValueError` unless both ids have 16 bytes; `OverflowError` if the version is no `u32`.
    """
    if len(volume_id) != ID_BYTES or len(log_id) != ID_BYTES:
        raise ValueError("ids have 16 bytes")
    return _PREFIXES[purpose] + volume_id + log_id + kek_version.to_bytes(4, "big")


def wrapping_key(kek: Buffer, purpose: Purpose, volume_id: bytes, log_id: bytes, kek_version: int) -> bytes:
    """The 32-byte key that wraps keys of this purpose and id under `kek` (32 bytes)."""
    return HKDFExpand(_SHA256, KEK_BYTES, info(purpose, volume_id, log_id, kek_version)).derive(kek)


def wrap_keys(wrapper: bytes, keys: Iterable[Buffer]) -> bytes:
    """All `keys` (32 or 64 bytes each) wrapped and joined: 8 bytes more for each."""
    return b"".join([aes_key_wrap(wrapper, key) for key in keys])


def unwrap_keys(wrapper: bytes, joined: bytes, width: int) -> bytes | None:
    """The keys behind `joined`, `width` (40 or 72) bytes each, joined; None if any of them is not authentic.

    Raises `ValueError` if `joined` is no whole number of wrapped keys.
    """
    if len(joined) % width:
        raise ValueError("not a whole number of wrapped keys")
    try:
        if len(joined) == width:
            return aes_key_unwrap(wrapper, joined)
        return b"".join(
            [aes_key_unwrap(wrapper, joined[start : start + width]) for start in range(0, len(joined), width)]
        )
    except InvalidUnwrap:
        return None


def volume_mac(kek: Buffer, volume_id: bytes, kek_version: int, signed: Buffer) -> bytes:
    """HMAC-SHA256 (32 bytes) of the `volume` file without its last 32 bytes, under the volume-mac key of this KEK."""
    return hmac.digest(wrapping_key(kek, Purpose.VOLUME_MAC, volume_id, ZERO_ID, kek_version), signed, "sha256")


def volume_mac_matches(kek: Buffer, volume_id: bytes, kek_version: int, signed: Buffer, mac: bytes) -> bool:
    """Whether `mac` authenticates `signed`, compared in constant time."""
    return hmac.compare_digest(volume_mac(kek, volume_id, kek_version, signed), mac)
