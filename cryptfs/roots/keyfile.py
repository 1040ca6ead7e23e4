"""The root key that a key file leads to: HKDF-SHA256 over the file's bytes and a stored salt (FORMAT.md §3).

The file's content is the secret, its path is nowhere recorded. It is taken for uniformly random: there is no cost to a
guess as there is for a passphrase.
"""

from __future__ import annotations

from collections.abc import Mapping

from cryptfs.errors import WrongSecret
from cryptfs.format.protectors import KEYFILE, KEYFILE_MAX_BYTES, KEYFILE_MIN_BYTES, parse_keyfile
from cryptfs.roots.local_key import SaltedProvider


class KeyfileProvider(SaltedProvider):
    """Protectors of kind `keyfile`; a secret is the whole file, 32 … 65536 bytes."""

    kind = KEYFILE
    _info = b"cryptfs/1/keyfile"
    _called = "key file"
    _refusal = "the key file does not open this protector"

    def describe(self, params: Mapping[str, int | str | bytes]) -> str:
        """``hkdf-sha256``."""
        parse_keyfile(params)
        return "hkdf-sha256"

    def _salt(self, params: Mapping[str, int | str | bytes]) -> bytes:
        return parse_keyfile(params)

    def _check_length(self, count: int) -> None:
        if not KEYFILE_MIN_BYTES <= count <= KEYFILE_MAX_BYTES:
            raise WrongSecret(f"a key file has {KEYFILE_MIN_BYTES} to {KEYFILE_MAX_BYTES} bytes")
