"""AES-256-GCM for blocks and attributes (NIST SP 800-38D), by `cryptography`.

Every key here encrypts exactly one plaintext once: a DEK belongs to one version of one block, an attribute key to one
version of one value. GCM needs (key, nonce) pairs to be unique, so with a key that is never used twice the nonce may
be constant, and there is none to store or to get wrong.
"""

from __future__ import annotations

import struct

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from cryptfs.errors import Damaged
from cryptfs.types import TAG_BYTES, Buffer

NONCE = bytes(12)

_BLOCK_AAD = struct.Struct(">8s16s16sQQI")
_ATTR_AAD = struct.Struct(">8s1s16s16sQ")

ATTR_XATTRS, ATTR_TARGET = b"x", b"t"


def block_aad(volume_id: bytes, file_id: bytes, index: int, version: int, length: int) -> bytes:
    """60 bytes that bind a block's ciphertext to its place, version and length (FORMAT.md §7)."""
    return _BLOCK_AAD.pack(b"CFBLOCK1", volume_id, file_id, index, version, length)


def seal_into(dek: Buffer, aad: bytes, plain: Buffer, out: memoryview) -> None:
    """Encrypt `plain` (n bytes) into `out` (n + 16 bytes: ciphertext, tag). The DEK must not have been used before."""
    AESGCM(dek).encrypt_into(NONCE, plain, aad, out)


def open_into(dek: Buffer, aad: bytes, sealed: memoryview, out: memoryview) -> bool:
    """Decrypt `sealed` (n + 16 bytes) into `out` (n bytes); False, and `out` undefined, if it is not authentic."""
    try:
        AESGCM(dek).decrypt_into(NONCE, sealed, aad, out)
    except InvalidTag:
        return False
    return True


def seal_attr(key: Buffer, what: bytes, volume_id: bytes, log_id: bytes, generation: int, plain: bytes) -> bytes:
    """A symlink's target or xattr set: n + 16 bytes. The key must not have been used before."""
    return AESGCM(key).encrypt(NONCE, plain, _ATTR_AAD.pack(b"CFATTR0\0", what, volume_id, log_id, generation))


def open_attr(key: Buffer, what: bytes, volume_id: bytes, log_id: bytes, generation: int, sealed: bytes) -> bytes:
    """The reverse of `seal_attr`; raises `Damaged("attr")`."""
    if len(sealed) < TAG_BYTES:
        raise Damaged("attr", "too short")
    aad = _ATTR_AAD.pack(b"CFATTR0\0", what, volume_id, log_id, generation)
    try:
        return AESGCM(key).decrypt(NONCE, sealed, aad)
    except InvalidTag:
        raise Damaged("attr", "not authentic") from None
