"""How many keys a second may be unwrapped, per volume: a token bucket that holds one second's worth.

A request is served as long as the bucket is not empty and takes its keys out, below zero if need be; what comes after
it waits until that is made up for, one request after the other in the order they came. Requests wait, they do not
fail; nobody waits for another volume's, nor for anything but `unwrap` (`rewrap` lets no key out of the agent). While
they wait, their clients are told so every few seconds: a client gives up an agent that says nothing.

Whoever waits when the volume is locked is refused at once. While it is being locked its daemon is not limited: it has
a deadline, and what programs wrote is at stake.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import trio

from cryptfs.agent.audit import Auditor
from cryptfs.agent.keyring import UnwrapItem
from cryptfs.agent.recording import Peer
from cryptfs.crypto.wrap import wrapped_bytes
from cryptfs.errors import VolumeLocked
from cryptfs.format.agent_msg import encode_push
from cryptfs.ports import Clock

ALIVE_S = 5.0
"""How often a client whose request waits is told so: well below its patience, 20 s (`keys.agent_client`)."""
ROUNDING = 1e-3
LOOK_S = 1.0
"""Longest sleep between two looks at the clock, which may have jumped."""


@dataclass(slots=True)
class _Bucket:
    volume_id: bytes
    keys_per_s: int | None
    """None: the limit was lifted while somebody waits."""
    level: float
    filled_at: float
    turn: trio.Lock = field(default_factory=trio.Lock)
    changed: trio.Event = field(default_factory=trio.Event)
    waiting: dict[trio.CancelScope, Peer] = field(default_factory=dict)
    limiting: bool = False
    """A request had to wait and the bucket has not been full since: the same burst."""

    def short_s(self, now: float) -> float:
        """Seconds until a request is served."""
        if self.keys_per_s is None:
            return 0.0
        self.level = min(self.keys_per_s, self.level + max(0.0, now - self.filled_at) * self.keys_per_s)
        self.filled_at = now
        if self.level >= self.keys_per_s and not self.waiting:
            self.limiting = False
        # Part of a key is none, but for what the clock's own rounding takes: sleeping that short would not end.
        missing = 1 - self.level
        return 0.0 if missing < ROUNDING else missing / self.keys_per_s


class Limits:
    """One per service."""

    def __init__(self, audit: Auditor, clock: Clock) -> None:
        self._audit = audit
        self._clock = clock
        self._buckets: dict[bytes, _Bucket] = {}
        self._anybody = trio.Event()

    def set(self, volume_id: bytes, keys_per_s: int | None) -> None:
        """Limit a volume's unwraps, or lift the limit (None); counts for whoever waits now, too."""
        bucket = self._buckets.get(volume_id)
        if bucket is None:
            if keys_per_s is not None:
                self._buckets[volume_id] = _Bucket(volume_id, keys_per_s, keys_per_s, self._clock.monotonic())
            return
        if keys_per_s is None:
            del self._buckets[volume_id]
        bucket.short_s(self._clock.monotonic())  # what has run in until now did so at the old rate
        bucket.keys_per_s = keys_per_s
        bucket.changed.set()
        bucket.changed = trio.Event()

    def must_wait(self, volume_id: bytes) -> bool:
        """Whether a request that came now would have to."""
        bucket = self._buckets.get(volume_id)
        return bucket is not None and (bool(bucket.waiting) or bucket.short_s(self._clock.monotonic()) > 0)

    def take(self, volume_id: bytes, items: Sequence[UnwrapItem]) -> None:
        """Count the keys of a request that is served now."""
        bucket = self._buckets.get(volume_id)
        if bucket is not None:
            bucket.level -= _keys(items)

    async def turn(self, volume_id: bytes, peer: Peer, items: Sequence[UnwrapItem]) -> None:
        """Wait until a request may be served, and count its keys. Raises `VolumeLocked` if it is locked meanwhile."""
        bucket = self._buckets.get(volume_id)
        if bucket is None:
            return
        if not bucket.limiting:
            bucket.limiting = True
            self._audit.event(
                "limit", volume_id=volume_id, peer=peer.audit_json, detail={"unwraps-per-s": bucket.keys_per_s or 0}
            )
        with trio.CancelScope() as scope:
            bucket.waiting[scope] = peer
            self._anybody.set()
            try:
                # Fair: who came first is served first. If the client leaves, its place in the line is gone.
                async with bucket.turn:
                    while (short_s := bucket.short_s(self._clock.monotonic())) > 0:
                        with trio.move_on_after(min(short_s, LOOK_S)):
                            await bucket.changed.wait()
                    bucket.level -= _keys(items)
            finally:
                del bucket.waiting[scope]
        if scope.cancelled_caught:
            raise VolumeLocked("the volume is being locked")

    def refuse(self, volume_id: bytes) -> None:
        """The volume is being locked: whoever waits is refused now."""
        bucket = self._buckets.get(volume_id)
        if bucket is not None:
            for scope in bucket.waiting:
                scope.cancel()

    def forgotten(self, volume_id: bytes) -> None:
        """The KEK is gone."""
        self.refuse(volume_id)
        self._buckets.pop(volume_id, None)

    async def serve(self) -> None:
        """Tell clients whose requests wait that they do, for ever."""
        while True:
            await self._anybody.wait()
            await trio.sleep(ALIVE_S)
            anybody = False
            for bucket in list(self._buckets.values()):
                for peer in set(bucket.waiting.values()):
                    peer.post(encode_push({"event": "waiting", "volume_id": bucket.volume_id}))
                anybody = anybody or bool(bucket.waiting)
            if not anybody:
                self._anybody = trio.Event()


def _keys(items: Sequence[UnwrapItem]) -> int:
    return sum(len(wrapped) // wrapped_bytes(purpose) for _, purpose, _, wrapped in items)
