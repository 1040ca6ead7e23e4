"""The root key that a key file leads to: HKDF-SHA256 over the file's bytes and a stored salt (FORMAT.md §3).

The file's content is the secret, its path is nowhere recorded. It is taken for uniformly random: there is no cost to a
guess as there is for a passphrase.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from cryptfs.errors import UsageError, WrongSecret
from cryptfs.format.protectors import KEYFILE, KEYFILE_MAX_BYTES, KEYFILE_MIN_BYTES, SALT_BYTES, parse_keyfile
from cryptfs.ports import Random
from cryptfs.roots.local_key import LocalRoot, derived
from cryptfs.types import Buffer

_INFO = b"cryptfs/1/keyfile"
_REFUSAL = "the key file does not open this protector"


class KeyfileProvider:
    """Protectors of kind `keyfile`."""

    kind = KEYFILE
    needs_network = False
    counts_wrong_secrets = False
    revocable = False

    def __init__(self, random: Random = os.urandom) -> None:
        self._random = random

    def new_params(self, wish: Mapping[str, int | str | bytes]) -> dict[str, int | str | bytes]:
        """A fresh salt. There is nothing to wish for: raises `UsageError` for anything."""
        if wish:
            raise UsageError("a key file's protector has no settings")
        return {"kdf": "hkdf-sha256", "salt": self._random(SALT_BYTES)}

    def open(self, params: Mapping[str, int | str | bytes], secret: Buffer) -> LocalRoot:
        """The root key; `secret` is the whole file, 32 … 65536 bytes. A wrong file shows at `unwrap`.

        Raises `VolumeDamaged` or `UnsupportedFormat` for bad `params`, `WrongSecret` for a file of another length.
        """
        salt = parse_keyfile(params)
        if not KEYFILE_MIN_BYTES <= len(secret) <= KEYFILE_MAX_BYTES:
            raise WrongSecret(f"a key file has {KEYFILE_MIN_BYTES} to {KEYFILE_MAX_BYTES} bytes")
        return LocalRoot(derived(secret, salt, _INFO), self._random, _REFUSAL)

    def describe(self, params: Mapping[str, int | str | bytes]) -> str:
        """``hkdf-sha256``."""
        parse_keyfile(params)
        return "hkdf-sha256"
