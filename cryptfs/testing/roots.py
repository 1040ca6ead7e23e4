"""A root key without a KDF or a KMS: instant, and made to fail on demand. It protects nothing."""

from __future__ import annotations

import hmac
from collections.abc import Mapping

from cryptfs.crypto.mac import mac
from cryptfs.crypto.secret import Secret
from cryptfs.errors import CryptfsError, UsageError, VolumeDamaged, WrongSecret
from cryptfs.types import Buffer

_MAC_BYTES = 32


class FakeRoot:
    """Wraps by XOR with an HMAC of the context, and adds an HMAC of the result."""

    def __init__(self, root_key: Secret) -> None:
        self._root_key = root_key

    def wrap(self, key: Buffer, context: bytes) -> bytes:
        hidden = self._hide(key, context)
        return hidden + mac(self._root_key.view(), b"tag", context, hidden)

    def unwrap(self, wrapped: bytes, context: bytes) -> bytearray:
        hidden, tag = wrapped[:-_MAC_BYTES], wrapped[-_MAC_BYTES:]
        if not hmac.compare_digest(tag, mac(self._root_key.view(), b"tag", context, hidden)):
            raise WrongSecret("not this root key's")
        return bytearray(self._hide(hidden, context))

    def close(self) -> None:
        self._root_key.wipe()

    def _hide(self, data: Buffer, context: bytes) -> bytes:
        stream = mac(self._root_key.view(), b"hide", context) + mac(self._root_key.view(), b"more", context)
        return bytes(a ^ b for a, b in zip(bytes(data), stream, strict=False))


class FakeProvider:
    """Protectors of kind `fake`. Set `failure` to have every root key's holder fail with it."""

    kind = "fake"
    needs_network = False
    counts_wrong_secrets = False
    revocable = False

    def __init__(self) -> None:
        self.failure: CryptfsError | None = None

    def new_params(self, wish: Mapping[str, int | str | bytes]) -> dict[str, int | str | bytes]:
        if wish.keys() - {"cost"} or wish.get("cost", "low") not in ("low", "normal", "high"):
            raise UsageError("no such cost")
        return {"region": "nowhere-1"}

    def open(self, params: Mapping[str, int | str | bytes], secret: Buffer) -> FakeRoot:
        if params.keys() != {"region"}:
            raise VolumeDamaged("the volume file is damaged: not the parameters of a fake")
        if self.failure is not None:
            raise self.failure
        return FakeRoot(Secret(bytearray(mac(b"fake root", bytes(secret)))))

    def describe(self, params: Mapping[str, int | str | bytes]) -> str:
        return f"fake, in {params['region']!r}"
