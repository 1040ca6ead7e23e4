"""The root key that a passphrase leads to: Argon2id (RFC 9106), then AES-256-GCM around each KEK (FORMAT.md §3).

The only place in cryptfs that runs a password KDF; only the agent's process loads it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

from cryptfs.crypto.secret import Secret
from cryptfs.errors import CryptfsError, UsageError
from cryptfs.format.volume import PASSPHRASE, SALT_BYTES, PassphraseParams, parse_passphrase
from cryptfs.ports import Random
from cryptfs.roots.local_key import ROOT_KEY_BYTES, LocalRoot
from cryptfs.types import Buffer

_REFUSAL = "the passphrase does not open this protector"


@dataclass(frozen=True, slots=True)
class Cost:
    """What one guess costs: memory in KiB, passes over it, lanes computed in parallel."""

    memory_kib: int
    iterations: int
    lanes: int


COSTS: Mapping[str, Cost] = {
    # For tests: below any recommendation, and said so by `info`.
    "low": Cost(memory_kib=8 << 10, iterations=1, lanes=1),
    # About a second on two cores; memory well above the 64 MiB of RFC 9106's second recommended option.
    "normal": Cost(memory_kib=256 << 10, iterations=4, lanes=4),
    # About eight times as much.
    "high": Cost(memory_kib=1 << 20, iterations=8, lanes=4),
}


class PassphraseProvider:
    """Protectors of kind `passphrase`."""

    kind = PASSPHRASE
    needs_network = False
    counts_wrong_secrets = False
    revocable = False

    def __init__(self, random: Random = os.urandom) -> None:
        self._random = random

    def new_params(self, wish: Mapping[str, int | str | bytes]) -> dict[str, int | str | bytes]:
        """A fresh salt and the costs of ``wish["cost"]`` (a key of `COSTS`). Raises `UsageError` for anything else."""
        chosen = COSTS.get(str(wish.get("cost", "normal")))
        if chosen is None or wish.keys() - {"cost"}:
            raise UsageError(f"no such KDF cost; there are {', '.join(COSTS)}")
        return {
            "kdf": "argon2id",
            "salt": self._random(SALT_BYTES),
            "memory_kib": chosen.memory_kib,
            "iterations": chosen.iterations,
            "lanes": chosen.lanes,
        }

    def open(self, params: Mapping[str, int | str | bytes], secret: Buffer) -> LocalRoot:
        """Derive the root key; takes as long and as much memory as `params` say. A wrong passphrase shows at `unwrap`.

        Raises `VolumeDamaged` or `UnsupportedFormat` for bad `params`; `CryptfsError` if memory is short.
        """
        checked = parse_passphrase(params)
        return LocalRoot(_derive(checked, secret), self._random, _REFUSAL)

    def describe(self, params: Mapping[str, int | str | bytes]) -> str:
        """For example ``argon2id, 256 MiB, 4 iterations, 4 lanes``."""
        checked = parse_passphrase(params)
        mib = checked.memory_kib / 1024
        return f"argon2id, {mib:g} MiB, {checked.iterations} iterations, {checked.lanes} lanes"


def _derive(params: PassphraseParams, secret: Buffer) -> Secret:
    root_key = bytearray(ROOT_KEY_BYTES)
    kdf = Argon2id(
        salt=params.salt,
        length=ROOT_KEY_BYTES,
        iterations=params.iterations,
        lanes=params.lanes,
        memory_cost=params.memory_kib,
    )
    try:
        kdf.derive_into(bytes(secret), root_key)
    except MemoryError:
        raise CryptfsError(f"the KDF needs {params.memory_kib // 1024} MiB of memory, which there is not") from None
    return Secret(root_key)
