"""Where shred secrets lie: with this agent, in a file of the owner's, or behind a key in a token (FORMAT.md §3).

Everything here may block: on a disk, on a token. A token keeps the secret wrapped under a key of its own that cannot
leave it; the wrapped secret stands in `volume`, and destroying the token's key destroys it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from cryptfs.agent.shred_store import KIND as AGENT
from cryptfs.agent.shred_store import ShredStore
from cryptfs.agent.unlocking import check_shred
from cryptfs.crypto.secret import Secret
from cryptfs.crypto.shred import SECRET_BYTES
from cryptfs.errors import CryptfsError, ProtocolError, UnsupportedFormat, WrongSecret
from cryptfs.format.volume import ParamValue, Volume
from cryptfs.ports import Random, RootKey, RootProvider
from cryptfs.types import Buffer

KEYFILE = "keyfile"
WRAPPED = "wrapped"
"""The name that the wrapped secret has among the params of a token's kind."""
_CONTEXT = b"cryptfs/1/shred-secret\0"


@runtime_checkable
class Destroyer(Protocol):
    """A root provider whose root keys can be destroyed for good."""

    def new_params(self, wish: Mapping[str, ParamValue]) -> dict[str, ParamValue]:
        """See `RootProvider`."""
        ...

    def open(self, params: Mapping[str, ParamValue], secret: Buffer) -> RootKey:
        """See `RootProvider`."""
        ...

    def destroy(self, params: Mapping[str, ParamValue], secret: Buffer) -> None:
        """Destroy the root key itself. Raises as `open`."""
        ...


class ShredPlaces:
    """All of them. `given`: what the command brought: the secret, or a token's PIN, or nothing."""

    def __init__(self, store: ShredStore, providers: Mapping[str, RootProvider], random: Random) -> None:
        self._store = store
        self._providers = providers
        self._random = random

    def make(
        self, kind: str, wish: Mapping[str, ParamValue], given: bytes, volume_id: bytes
    ) -> tuple[Secret, Mapping[str, ParamValue]]:
        """A new volume's secret, durable where it lies, and the params that lead to it.

        Raises `UnsupportedFormat` for a place this program does not know, and what the place raises.
        """
        if kind == KEYFILE:
            if len(given) != SECRET_BYTES:
                raise ProtocolError(f"a shred secret has {SECRET_BYTES} bytes")
            return Secret.of(given), wish
        secret = Secret.of(self._random(SECRET_BYTES))
        try:
            if kind == AGENT:
                self._store.put(volume_id, secret.view())
                return secret, {}
            return secret, self._wrapped(kind, wish, given, volume_id, secret)
        except BaseException:
            secret.wipe()
            raise

    def find(self, volume: Volume, given: bytes) -> Secret | None:
        """The volume's secret, for the caller to wipe; None if it has none, or it is not where it should be."""
        if volume.shred is None:
            return None
        if volume.shred.kind == AGENT:
            return self._store.get(volume.volume_id)
        if volume.shred.kind == KEYFILE:
            return Secret.of(given) if given else None
        params, wrapped = _split(volume.shred.params)
        root = self._destroyer(volume.shred.kind).open(params, given)
        try:
            return Secret(root.unwrap(wrapped, _CONTEXT + volume.volume_id))
        finally:
            root.close()

    def check(self, volume: Volume, given: bytes) -> bool:
        """Whether the volume's secret is there. Raises `ShredSecretMissing` if another one is, what a token raises."""
        found = self.find(volume, given)
        if found is None:
            return False
        with found:
            check_shred(volume, found)
        return True

    def destroy(self, volume: Volume, given: bytes) -> bool:
        """Destroy the secret, unless it lies in a file, which is the owner's to destroy; whether that was done.

        `volume` need not be authentic: what is destroyed is what opens this volume (`check`, raises as that).
        """
        if not self.check(volume, given) or volume.shred is None or volume.shred.kind == KEYFILE:
            return False
        if volume.shred.kind == AGENT:
            return self._store.destroy(volume.volume_id)
        params, _ = _split(volume.shred.params)
        self._destroyer(volume.shred.kind).destroy(params, given)
        return True

    def destroy_kept(self, volume_id: bytes) -> bool:
        """Destroy what this agent keeps for a volume whose file nobody can read any more; whether there was one."""
        return self._store.destroy(volume_id)

    def _wrapped(
        self, kind: str, wish: Mapping[str, ParamValue], given: bytes, volume_id: bytes, secret: Secret
    ) -> dict[str, ParamValue]:
        params = self._destroyer(kind).new_params(wish)
        root = self._destroyer(kind).open(params, given)
        try:
            wrapped = root.wrap(secret.view(), _CONTEXT + volume_id)
            with Secret(root.unwrap(wrapped, _CONTEXT + volume_id)) as again:
                if not again.equals(secret):
                    raise CryptfsError("the token does not unwrap what it wrapped")
        finally:
            root.close()
        return {**params, WRAPPED: wrapped}

    def _destroyer(self, kind: str) -> Destroyer:
        provider: object = self._providers.get(kind)
        if isinstance(provider, Destroyer):
            return provider
        raise UnsupportedFormat(f"a shred secret cannot be kept in {kind!r} on this machine")


def _split(params: Mapping[str, ParamValue]) -> tuple[dict[str, ParamValue], bytes]:
    rest = dict(params)
    wrapped = rest.pop(WRAPPED, b"")
    if type(wrapped) is not bytes or not wrapped:
        raise WrongSecret("the volume file names no wrapped shred secret")
    return rest, wrapped
