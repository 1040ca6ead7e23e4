"""Where KDFs run and roots outside are waited for: how many at a time, and for how long.

A KDF may take a gigabyte; a root outside (a token) needs little memory and may hang. So neither waits for the other's
places.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import trio

from cryptfs.agent.handing_over import in_thread
from cryptfs.agent.unlocking import Providers, Unlocked
from cryptfs.crypto.secret import Secret
from cryptfs.errors import BackendUnavailable
from cryptfs.format.volume import Volume

T = TypeVar("T")

KDF_AT_ONCE = 1
"""A KDF may take a gigabyte: one at a time, the others wait."""
ROOTS_AT_ONCE = 8
"""Roots outside that are being waited for."""
ROOT_PATIENCE_S = 60.0
"""How long such a root may take; somebody may have to press a key on it."""


class Threads:
    """One per service."""

    def __init__(self, providers: Providers) -> None:
        self._providers = providers
        self.kdf_limit = trio.CapacityLimiter(KDF_AT_ONCE)
        self.root_limit = trio.CapacityLimiter(ROOTS_AT_ONCE)
        self.root_patience_s = ROOT_PATIENCE_S

    async def open_with(
        self, secret: Secret, work: Callable[[], Unlocked], limit: trio.CapacityLimiter | None = None
    ) -> Unlocked:
        """What `work` unlocks with `secret`, which is wiped; undone if the caller leaves. `limit`: see `limit_of`.

        Raises as `work`, and `BackendUnavailable` if a root outside does not answer in time.
        """

        def with_it() -> Unlocked:
            # Wiped by the thread: if the client leaves, the thread outlives the request.
            with secret:
                return work()

        with trio.move_on_after(float("inf") if limit is None else self.root_patience_s):
            return await in_thread(with_it, Unlocked.discard, limit or self.kdf_limit)
        raise BackendUnavailable(f"the root key's holder has not answered for {self.root_patience_s:.0f} s")

    def limit_of(self, volume: Volume, kind: str, protector_id: bytes) -> trio.CapacityLimiter | None:
        """Roots outside need little memory and may hang: they do not share the KDFs' one place (None)."""
        kinds = {kind} | {p.kind for p in volume.protectors if p.protector_id == protector_id}
        kinds |= {volume.shred.kind} if volume.shred is not None else set()
        outside = any(kind in self._providers and self._providers[kind].revocable for kind in kinds)
        return self.root_limit if outside else None

    async def run_kdf(self, work: Callable[[], T]) -> T:
        """`work`'s result; if the caller leaves, nobody hears of it. Raises as `work`."""
        return await trio.to_thread.run_sync(work, abandon_on_cancel=True, limiter=self.kdf_limit)

    async def ask_root(self, work: Callable[[], T]) -> T:
        """`work`'s result, waited for to its end. Raises as `work`."""
        return await trio.to_thread.run_sync(work, limiter=self.root_limit)
