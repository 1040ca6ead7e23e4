"""The root key that a recovery key leads to: HKDF-SHA256 over its 25 random bytes and a stored salt (FORMAT.md §3).

The 25 bytes come from `format.recovery_key`, which turns them into what a person writes down and back.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from cryptfs.errors import UsageError, WrongSecret
from cryptfs.format.protectors import RECOVERY, SALT_BYTES, parse_recovery
from cryptfs.format.recovery_key import KEY_BYTES
from cryptfs.ports import Random
from cryptfs.roots.local_key import LocalRoot, derived
from cryptfs.types import Buffer

_INFO = b"cryptfs/1/recovery"
_REFUSAL = "the recovery key does not open this protector"


class RecoveryProvider:
    """Protectors of kind `recovery`."""

    kind = RECOVERY
    needs_network = False
    counts_wrong_secrets = False
    revocable = False

    def __init__(self, random: Random = os.urandom) -> None:
        self._random = random

    def new_params(self, wish: Mapping[str, int | str | bytes]) -> dict[str, int | str | bytes]:
        """A fresh salt. There is nothing to wish for: raises `UsageError` for anything."""
        if wish:
            raise UsageError("a recovery key's protector has no settings")
        return {"kdf": "hkdf-sha256", "salt": self._random(SALT_BYTES)}

    def open(self, params: Mapping[str, int | str | bytes], secret: Buffer) -> LocalRoot:
        """The root key; `secret` is the recovery key's 25 bytes. A wrong one shows at `unwrap`.

        Raises `VolumeDamaged` or `UnsupportedFormat` for bad `params`, `WrongSecret` for another length.
        """
        salt = parse_recovery(params)
        if len(secret) != KEY_BYTES:
            raise WrongSecret(_REFUSAL)
        return LocalRoot(derived(secret, salt, _INFO), self._random, _REFUSAL)

    def describe(self, params: Mapping[str, int | str | bytes]) -> str:
        """``200 bits, hkdf-sha256``."""
        parse_recovery(params)
        return f"{8 * KEY_BYTES} bits, hkdf-sha256"
