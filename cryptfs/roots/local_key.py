"""A root key of 32 bytes in this process's memory, and AES-256-GCM under it (FORMAT.md §3).

What kinds whose secret leads to a key right here have in common; each says how it gets there.
"""

from __future__ import annotations

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from cryptfs.crypto.secret import Secret
from cryptfs.errors import WrongSecret
from cryptfs.ports import Random
from cryptfs.types import Buffer

ROOT_KEY_BYTES = 32
NONCE_BYTES = 12
TAG_BYTES = 16
OVERHEAD_BYTES = NONCE_BYTES + TAG_BYTES


class LocalRoot:
    """A root key at hand, held until `close`."""

    def __init__(self, root_key: Secret, random: Random, refusal: str) -> None:
        """`root_key` (32 bytes) becomes this object's to wipe; `refusal` is said of what it did not wrap."""
        self._root_key = root_key
        self._random = random
        self._refusal = refusal

    def wrap(self, key: Buffer, context: bytes) -> bytes:
        """28 bytes more than `key`: `nonce[12] || ciphertext || tag[16]`."""
        # A random nonce is safe: one root key wraps a handful of keys in its life.
        nonce = self._random(NONCE_BYTES)
        return nonce + AESGCM(self._root_key.view()).encrypt(nonce, key, context)

    def unwrap(self, wrapped: bytes, context: bytes) -> bytearray:
        """What was wrapped. Raises `WrongSecret` if it is not authentic under this root key and context."""
        if len(wrapped) <= OVERHEAD_BYTES:
            raise WrongSecret(self._refusal)
        key = bytearray(len(wrapped) - OVERHEAD_BYTES)
        try:
            AESGCM(self._root_key.view()).decrypt_into(wrapped[:NONCE_BYTES], wrapped[NONCE_BYTES:], context, key)
        except InvalidTag:
            raise WrongSecret(self._refusal) from None
        return key

    def close(self) -> None:
        """Wipe the root key."""
        self._root_key.wipe()


def derived(secret: Buffer, salt: bytes, info: bytes) -> Secret:
    """A root key from a secret that is as good as uniformly random: HKDF-SHA256 (RFC 5869), extract and expand.

    The salt makes two protectors with one secret have different root keys; there is no cost to a guess, so a secret
    that somebody could think of has no place here.
    """
    root_key = bytearray(ROOT_KEY_BYTES)
    HKDF(algorithm=SHA256(), length=ROOT_KEY_BYTES, salt=salt, info=info).derive_into(bytes(secret), root_key)
    return Secret(root_key)
