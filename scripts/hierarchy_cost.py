"""What a key per block costs beside a key per file: `python -m scripts.hierarchy_cost`.

Both ways of reading the same ciphertext, without disk, mount and socket, so that nothing but keys and ciphers counts:

- per block: 64 wrapped DEKs are unwrapped in one batch as the agent does it, each block is decrypted under its own;
- per file: one DEK is unwrapped, then each block is decrypted under it with a nonce of its own.

Interleaved, medians, and the ratio of medians. Prints one JSON object.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from cryptfs.crypto.wrap import unwrap_keys, wrap_keys, wrapping_key
from cryptfs.types import DEK_BYTES, ID_BYTES, WRAPPED_BYTES, Purpose

ROUNDS = 400
BLOCK_BYTES = 16384
BLOCKS = 64
AAD = bytes(56)
NONCE = bytes(12)


def main() -> None:
    """Measure and print."""
    kek, volume_id, file_id = os.urandom(32), os.urandom(ID_BYTES), os.urandom(ID_BYTES)
    deks = [os.urandom(DEK_BYTES) for _ in range(BLOCKS)]
    wrapper = wrapping_key(kek, Purpose.BLOCK, volume_id, file_id, 1)
    wraps = wrap_keys(wrapper, deks)
    plain = os.urandom(BLOCK_BYTES)
    own = [AESGCM(dek).encrypt(NONCE, plain, AAD) for dek in deks]
    nonces = [number.to_bytes(12, "big") for number in range(BLOCKS)]
    shared = [AESGCM(deks[0]).encrypt(nonce, plain, AAD) for nonce in nonces]
    out = bytearray(BLOCK_BYTES)

    def unwrap(joined: bytes) -> bytes:
        keys = unwrap_keys(wrapping_key(kek, Purpose.BLOCK, volume_id, file_id, 1), joined, WRAPPED_BYTES)
        assert keys is not None
        return keys

    def per_block() -> None:
        keys = memoryview(unwrap(wraps))
        for at, cipher in enumerate(own):
            AESGCM(keys[at * DEK_BYTES : (at + 1) * DEK_BYTES]).decrypt_into(NONCE, cipher, AAD, out)

    def per_file() -> None:
        key = AESGCM(unwrap(wraps[:WRAPPED_BYTES]))
        for nonce, cipher in zip(nonces, shared, strict=True):
            key.decrypt_into(nonce, cipher, AAD, out)

    block_us, file_us = _interleaved(per_block, per_file)
    print(
        json.dumps(
            {
                "bytes": BLOCKS * BLOCK_BYTES,
                "per_block_us": round(block_us, 1),
                "per_file_us": round(file_us, 1),
                "ratio": round(block_us / file_us, 2),
                "extra_ns_per_block": round((block_us - file_us) * 1000 / BLOCKS),
                "sidecar_bytes_per_block": {"per_block": WRAPPED_BYTES + 16, "per_file": 12 + 16},
            }
        )
    )


def _interleaved(*ways: Callable[[], None]) -> list[float]:
    """Median time of each in microseconds."""
    times: list[list[float]] = [[] for _ in ways]
    for _ in range(ROUNDS):
        for way, into in zip(ways, times, strict=True):
            began = time.perf_counter()
            way()
            into.append((time.perf_counter() - began) * 1e6)
    return [statistics.median(each) for each in times]


if __name__ == "__main__":
    main()
