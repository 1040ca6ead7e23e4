"""The root key that a recovery key leads to: HKDF-SHA256 over its 25 random bytes and a stored salt (FORMAT.md §3).

The 25 bytes come from `format.recovery_key`, which turns them into what a person writes down and back.
"""

from __future__ import annotations

from collections.abc import Mapping

from cryptfs.errors import WrongSecret
from cryptfs.format.protectors import RECOVERY, parse_recovery
from cryptfs.format.recovery_key import KEY_BYTES
from cryptfs.roots.local_key import SaltedProvider


class RecoveryProvider(SaltedProvider):
    """Protectors of kind `recovery`; a secret is the recovery key's 25 bytes."""

    kind = RECOVERY
    _info = b"cryptfs/1/recovery"
    _called = "recovery key"
    _refusal = "the recovery key does not open this protector"

    def describe(self, params: Mapping[str, int | str | bytes]) -> str:
        """``200 bits, hkdf-sha256``."""
        parse_recovery(params)
        return f"{8 * KEY_BYTES} bits, hkdf-sha256"

    def _salt(self, params: Mapping[str, int | str | bytes]) -> bytes:
        return parse_recovery(params)

    def _check_length(self, count: int) -> None:
        if count != KEY_BYTES:
            raise WrongSecret(self._refusal)
