"""The shred secret's part in wrapping a KEK (FORMAT.md §3). Only the agent imports this module.

A KEK is wrapped twice: inside under a key derived from the shred secret (AES-256 key wrap, RFC 3394), outside by the
protector's root key. Whoever has a copy of the `volume` file and every passphrase still lacks the inner key once the
secret, which never lies in the cipher directory, is destroyed.
"""

from __future__ import annotations

import hmac

from cryptography.hazmat.primitives.keywrap import InvalidUnwrap, aes_key_unwrap, aes_key_wrap

from cryptfs.crypto.wrap import ZERO_ID, wrapping_key
from cryptfs.types import Buffer, Purpose

SECRET_BYTES = 32
_CHECK = b"cryptfs/1/shred-check\0"


def shred_check(secret: Buffer, volume_id: bytes) -> bytes:
    """16 bytes that tell this secret from another; they lead to nothing else, the secret being random."""
    return hmac.digest(bytes(secret), _CHECK + volume_id, "sha256")[:16]


def wrap_kek(secret: Buffer, volume_id: bytes, kek_version: int, kek: Buffer) -> bytes:
    """`kek` (32 bytes) wrapped under the shred secret: 40 bytes."""
    return aes_key_wrap(wrapping_key(secret, Purpose.SHRED, volume_id, ZERO_ID, kek_version), bytes(kek))


def unwrap_kek(secret: Buffer, volume_id: bytes, kek_version: int, wrapped: Buffer) -> bytes | None:
    """The KEK (32 bytes) behind 40 bytes; None if it is not authentic under this secret."""
    try:
        return aes_key_unwrap(wrapping_key(secret, Purpose.SHRED, volume_id, ZERO_ID, kek_version), bytes(wrapped))
    except InvalidUnwrap:
        return None
