"""The keys in clear: absolute age, bounded number, bounded uses; expired keys are overwritten, then dropped.

Keys are found by their wrapped form. It is unique to one key of one log, so a block that is written anew can never be
given its predecessor's key, and nothing ever has to be invalidated.

Keys arrive in batches and leave in batches: a batch is one buffer with one deadline. All of this runs on the loop
without an await between checking a key and handing it out, which is why a view is good until its holder's next await.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from cryptfs.errors import VolumeLocked
from cryptfs.keys.policy import CachePolicy
from cryptfs.ports import Clock, FreshKeys
from cryptfs.types import DELETED


@dataclass(slots=True)
class CacheStatistics:
    """Keys counted since the mount, and `round_trips` to the agent for keys.

    `hits` and `misses`: wanted, and at hand or not; `unwraps`: had from the agent, those brought ahead too; `expiries`:
    overwritten as their age or uses were up; `evictions`: as there were too many.
    """

    hits: int = 0
    misses: int = 0
    unwraps: int = 0
    expiries: int = 0
    evictions: int = 0
    round_trips: int = 0


@dataclass(slots=True)
class Batch:
    """Keys that came together. `buffer` is the only copy this process keeps on purpose."""

    buffer: bytearray
    born: float
    deadline: float
    wraps: list[bytes]
    stocks: list[FreshKeys] = field(default_factory=list)
    logs: list[bytes] = field(default_factory=list)
    """Logs whose floors came with it."""
    used_up: int = 0
    """Keys that were overwritten before their time."""


@dataclass(slots=True)
class _Slot:
    view: memoryview
    batch: Batch
    uses: int = 0


class HeldKeys:
    """The storage of `cache.KeyCache`, and the policy it obeys."""

    def __init__(self, policy: CachePolicy, clock: Clock) -> None:
        self.policy = policy
        """To be changed by `set_policy`."""
        self.statistics = CacheStatistics()
        self.least_version = 0
        """Nothing made under an older KEK is handed out."""
        self._monotonic = clock.monotonic
        self._slots: dict[bytes, _Slot] = {}
        self._batches: deque[Batch] = deque()
        """In order of arrival, so nearly in order of deadline: all have the same age limit."""
        self._floors: dict[bytes, tuple[int, Batch]] = {}
        """By log: its floor and the newest batch that brought it, which outlives every key of the log in here."""
        self._closed = False

    def __len__(self) -> int:
        return len(self._slots)

    # handing out -----------------------------------------------------------------------------------------------

    def peek(self, wrapped: bytes) -> memoryview | None:
        """See `DekProvider.peek`."""
        slot = self._slots.get(wrapped)
        if slot is None:
            return None
        if slot.batch.deadline <= self._monotonic():
            self.statistics.expiries += self._wipe(slot.batch)
            return None
        limit = self.policy.max_uses
        if limit is not None:
            if slot.uses >= limit:
                self._use_up(wrapped, slot)
                return None
            slot.uses += 1
        self.statistics.hits += 1
        return slot.view

    def peek_all(self, wraps: Sequence[bytes]) -> list[memoryview] | None:
        """See `DekProvider.peek_all`."""
        if self.policy.max_uses is not None:
            if any(w not in self._slots for w in wraps):
                return None
            keys = [self.peek(w) for w in wraps]
            return None if None in keys else [k for k in keys if k is not None]
        slots, now, out = self._slots, self._monotonic(), []
        for wrapped in wraps:
            slot = slots.get(wrapped)
            if slot is None or slot.batch.deadline <= now:
                return None
            out.append(slot.view)
        self.statistics.hits += len(out)
        return out

    def is_good(self, batch: Batch) -> bool:
        """Whether its keys may still be handed out."""
        return batch.deadline > self._monotonic() and bool(batch.buffer)

    def check_open(self) -> None:
        """Raises `VolumeLocked` while the cache is closed."""
        if self._closed:
            raise VolumeLocked("the volume is locked")

    # keeping ---------------------------------------------------------------------------------------------------

    def store(
        self, clear: bytearray, wraps: Sequence[bytes], widths: Sequence[int]
    ) -> tuple[dict[bytes, memoryview], Batch]:
        """Keep keys that came together: `clear` (the buffer from now on) holds them in order, as wide as `widths` say.

        Their views by wrapped form, and the batch. Raises `VolumeLocked`.
        """
        # What was asked for before the cache was closed is not kept when it comes after that.
        self.check_open()
        now = self._monotonic()
        caching = self.policy.caching
        batch = Batch(clear, now, now + self.policy.lifetime_s, list(wraps))
        view = memoryview(batch.buffer)
        views: dict[bytes, memoryview] = {}
        at = 0
        for wrapped, width in zip(wraps, widths, strict=True):
            views[wrapped] = view[at : at + width]
            at += width
        if caching:
            for wrapped, key in views.items():
                self._slots[wrapped] = _Slot(key, batch)
            self._make_room()
        self._batches.append(batch)
        return views, batch

    def found_by(self, old: Sequence[bytes], new: Sequence[bytes]) -> None:
        """Let keys that are here be found by their new wraps, too: until the same deadline."""
        if not self.policy.caching or self.policy.max_uses is not None:
            return
        for before, after in zip(old, new, strict=True):
            slot = self._slots.get(before)
            if slot is not None and slot.batch.deadline > self._monotonic():
                self._slots[after] = _Slot(slot.view, slot.batch)
                slot.batch.wraps.append(after)
        self._make_room()

    def know_floor(self, log_id: bytes, floor: int, batch: Batch) -> None:
        """A log's floor, which came with keys; kept as long as they are."""
        self._floors[log_id] = (floor, batch)
        batch.logs.append(log_id)

    def floor(self, log_id: bytes) -> int:
        """See `FreshnessRecord.floor`."""
        known = self._floors.get(log_id)
        return known[0] if known is not None else 0

    def raise_floor(self, log_id: bytes, generation: int) -> None:
        """Unless it is higher or `DELETED` already. Nothing happens to a log without keys here."""
        known = self._floors.get(log_id)
        if known is not None and DELETED != known[0] < generation:
            self._floors[log_id] = (generation, known[1])

    def set_floor(self, log_id: bytes, generation: int) -> None:
        """Whatever it was. Nothing happens to a log without keys here."""
        known = self._floors.get(log_id)
        if known is not None:
            self._floors[log_id] = (generation, known[1])

    # wiping ----------------------------------------------------------------------------------------------------

    def _make_room(self) -> None:
        while len(self._slots) > self.policy.max_entries and self._batches:
            self.statistics.evictions += self._wipe(self._batches.popleft())

    def _use_up(self, wrapped: bytes, slot: _Slot) -> None:
        del self._slots[wrapped]
        slot.view[:] = bytes(len(slot.view))
        slot.batch.used_up += 1
        self.statistics.expiries += 1

    def _wipe(self, batch: Batch) -> int:
        """Overwrite a batch and forget it; how many keys that were.

        Views that are still held read zeros from now on, and stocks say so.
        """
        if batch.deadline == float("-inf"):
            return 0
        batch.buffer[:] = bytes(len(batch.buffer))
        for stock in batch.stocks:
            stock.wiped = True
        for wrapped in batch.wraps:
            slot = self._slots.get(wrapped)
            if slot is not None and slot.batch is batch:
                del self._slots[wrapped]
        for log_id in batch.logs:
            if self._floors.get(log_id, (0, None))[1] is batch:
                del self._floors[log_id]
        count, batch.wraps = len(batch.wraps) - batch.used_up, []
        batch.deadline = float("-inf")
        return count

    def sweep(self) -> None:
        """Overwrite everything whose time is up."""
        now = self._monotonic()
        while self._batches and (self._batches[0].deadline <= now):
            self.statistics.expiries += self._wipe(self._batches.popleft())

    def set_policy(self, policy: CachePolicy) -> None:
        """Obey another policy from now on: what it does not allow is overwritten at once. No deadline moves back.

        Under a new limit of uses, keys that came without one have had none.
        """
        self.policy = policy
        if not policy.caching:
            self.wipe()
            return
        for batch in self._batches:
            # In order of arrival they stay in order of deadline: every policy in force so far counts for the older one.
            batch.deadline = min(batch.deadline, batch.born + policy.lifetime_s)
        self.sweep()
        self._make_room()
        if policy.max_uses is not None:
            for wrapped, slot in list(self._slots.items()):
                if slot.uses >= policy.max_uses:
                    self._use_up(wrapped, slot)

    def renew(self, kek_version: int) -> None:
        """See `DekProvider.renew`."""
        self.least_version = max(self.least_version, kek_version)
        for batch in self._batches:
            for stock in batch.stocks:
                stock.wiped = stock.wiped or stock.kek_version < self.least_version

    def wipe(self) -> None:
        """Overwrite everything."""
        while self._batches:
            self._wipe(self._batches.popleft())

    def close(self) -> None:
        """Overwrite everything, and neither keep nor hand out a key until `reopen`: `VolumeLocked` is the answer."""
        self._closed = True
        self.wipe()

    def reopen(self) -> None:
        """The reverse of `close`; the cache is empty."""
        self._closed = False
