"""A root key of 32 bytes in this process's memory, and AES-256-GCM under it (FORMAT.md §3).

What kinds whose secret leads to a key right here have in common; each says how it gets there.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from cryptfs.crypto.secret import Secret
from cryptfs.errors import UsageError, WrongSecret
from cryptfs.format.protectors import SALT_BYTES
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


class SaltedProvider:
    """A kind whose secret is as good as random: a stored salt is all that its protectors have.

    What the kinds differ in: `kind`, `_info` (HKDF's), `_called` (for people), `_refusal`, and what `_salt` checks.
    """

    kind = ""
    needs_network = False
    counts_wrong_secrets = False
    revocable = False
    _info = b""
    _called = ""
    _refusal = ""

    def __init__(self, random: Random = os.urandom) -> None:
        self._random = random

    def new_params(self, wish: Mapping[str, int | str | bytes]) -> dict[str, int | str | bytes]:
        """A fresh salt. There is nothing to wish for: raises `UsageError` for anything."""
        if wish:
            raise UsageError(f"a {self._called}'s protector has no settings")
        return {"kdf": "hkdf-sha256", "salt": self._random(SALT_BYTES)}

    def open(self, params: Mapping[str, int | str | bytes], secret: Buffer) -> LocalRoot:
        """The root key. A wrong secret shows at `unwrap`.

        Raises `VolumeDamaged` or `UnsupportedFormat` for bad `params`, `WrongSecret` for a secret of another length.
        """
        salt = self._salt(params)
        self._check_length(len(secret))
        return LocalRoot(derived(secret, salt, self._info), self._random, self._refusal)

    def _salt(self, params: Mapping[str, int | str | bytes]) -> bytes:
        """The salt in checked `params`. Raises `VolumeDamaged`, `UnsupportedFormat`."""
        raise NotImplementedError

    def _check_length(self, count: int) -> None:
        """Raise `WrongSecret` unless a secret of the kind can have `count` bytes."""
        raise NotImplementedError
