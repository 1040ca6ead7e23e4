"""HMAC-SHA256 (RFC 2104) and SHA-256 (FIPS 180-4), by `cryptography` and `hashlib`."""

from __future__ import annotations

import hashlib
import hmac

from cryptfs.types import Buffer

MAC_BYTES = 32


def mac(key: Buffer, *parts: Buffer) -> bytes:
    """32 bytes: HMAC-SHA256 of the parts joined."""
    # One shot in C; `cryptography`'s HMAC object computes the same with three calls.
    return hmac.digest(key, b"".join(parts), "sha256")


def same(a: Buffer, b: Buffer) -> bool:
    """Comparison in constant time."""
    return hmac.compare_digest(a, b)


def sha256(data: Buffer) -> bytes:
    """32 bytes."""
    return hashlib.sha256(data).digest()
