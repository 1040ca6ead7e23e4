"""The cache of keys in clear: absolute age, bounded number, bounded uses; expired keys are overwritten, then dropped.

Keys are found by their wrapped form. It is unique to one key of one log, so a block that is written anew can never be
given its predecessor's key, and nothing ever has to be invalidated.

Keys arrive in batches and leave in batches: a batch is one buffer with one deadline. All of this runs on the loop
without an await between checking a key and handing it out, which is why a view is good until its holder's next await.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

import trio

from cryptfs.crypto.secret import overwrite
from cryptfs.errors import AgentUnavailable, CryptfsError, Damaged, VolumeLocked
from cryptfs.keys.policy import SWEEP_INTERVAL_S, CachePolicy
from cryptfs.keys.stretches import contiguous, requests_of
from cryptfs.ports import Clock, FreshKeys, KeyRun, Kit, Rewrapped
from cryptfs.types import DEK_BYTES, DELETED, NAMES_KEY_BYTES, WRAPPED_BYTES, WRAPPED_NAMES_BYTES, Purpose

_KITS_MAX = 256
_KITS_MIN = 8
_DEKS_PER_KIT = 2
_WARM_RUNS_MAX = 256
_ASKED_AGAIN = 1

_LOG_PURPOSES = frozenset({Purpose.LOG_FILE, Purpose.LOG_DIR})

UnwrapItem = tuple[bytes, str, int, bytes, int]
"""(log id, purpose, KEK version, wrapped keys joined, first block)."""
KitBytes = tuple[bytes, bytes, bytes, bytes, bytes, bytes, bytes]
"""(log id, log key, its wrap, names key, its wrap, DEKs, their wraps)."""


class Upstream(Protocol):
    """The agent, for one volume (`keys.link`)."""

    async def unwrap(self, items: Sequence[UnwrapItem]) -> tuple[list[bytes | None], list[int]]:
        """The keys of each item, joined; None where any of its wraps is not authentic. And its log's floor.

        Keys are the caller's to overwrite, here and below: nobody else may have the objects.
        """
        ...

    async def generate(self, log_id: bytes, purpose: str, count: int) -> tuple[int, bytes, bytes]:
        """KEK version, new keys joined, their wraps joined."""
        ...

    async def rewrap(self, items: Sequence[UnwrapItem]) -> tuple[int, list[bytes | None]]:
        """Newest KEK version, and each item's keys wrapped under it, joined; None where any is not authentic."""
        ...

    async def kits(self, *, directory: bool, count: int, deks: int) -> tuple[int, list[KitBytes]]:
        """KEK version and at most `count` kits."""
        ...

    async def floors(self, log_ids: Sequence[bytes]) -> list[int]:
        """The floors of logs."""
        ...

    async def begin(self, state_sequence: int) -> bool:
        """See `FreshnessRecord.begin`."""
        ...

    async def record(self, logs: Mapping[bytes, int], gone: Sequence[bytes], state_sequence: int | None) -> None:
        """See `FreshnessRecord.record`."""
        ...

    async def accept(self, logs: Mapping[bytes, int]) -> None:
        """See `FreshnessRecord.accept`."""
        ...


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
class _Batch:
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
    batch: _Batch
    uses: int = 0


class KeyCache:
    """`ports.DekProvider` over an `Upstream`.

    Run `serve` in the background: it sweeps and refills the stock of kits.
    """

    def __init__(self, upstream: Upstream, policy: CachePolicy, clock: Clock) -> None:
        self.policy = policy
        """To be changed by `set_policy`."""
        self.statistics = CacheStatistics()
        self._upstream = upstream
        self._monotonic = clock.monotonic
        self._slots: dict[bytes, _Slot] = {}
        self._batches: deque[_Batch] = deque()
        """In order of arrival, so nearly in order of deadline: all have the same age limit."""
        self._in_flight: dict[bytes, trio.Event] = {}
        self._floors: dict[bytes, tuple[int, _Batch]] = {}
        """By log: its floor and the newest batch that brought it, which outlives every key of the log in here."""
        self._kits: deque[tuple[Kit, _Batch]] = deque()
        self._kits_wanted = _KITS_MIN
        self._least_version = 0
        """Nothing made under an older KEK is handed out."""
        self._refill = trio.Event()
        self._refilling = trio.Lock()
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

    async def unwrap(self, runs: Sequence[KeyRun]) -> list[list[memoryview]]:
        """See `DekProvider.unwrap`."""
        again = False
        while True:
            self._check_open()
            missing = [(run, [w for w in run.wrapped if again or w not in self._slots]) for run in runs]
            flying = next((self._in_flight[w] for _, ws in missing for w in ws if w in self._in_flight), None)
            if flying is not None:
                await flying.wait()
                if self.policy.caching:
                    continue
                missing = [(run, list(run.wrapped)) for run in runs]
            got = await self._fetch([(run, wraps) for run, wraps in missing if wraps])
            # From here to the return there is no await.
            out: list[list[memoryview]] = []
            for run in runs:
                views = [got.get(w) or self.peek(w) for w in run.wrapped]
                out.append([v for v in views if v is not None])
            if all(len(o) == len(r.wrapped) for o, r in zip(out, runs, strict=True)):
                return out
            # A key expired between the look and the answer. Ask for all of them at once: where uses are counted,
            # looking again would use the others up, and where a key lives no longer than a round trip takes, asking
            # for the one would cost another, for ever.
            again = True

    async def warm(self, runs: Sequence[KeyRun]) -> None:
        """See `DekProvider.warm`."""
        if not self.policy.caching or self._closed:
            return
        slots, flying = self._slots, self._in_flight
        wanted = [(run, [w for w in run.wrapped if w not in slots and w not in flying]) for run in runs]
        with suppress(CryptfsError):
            await self._fetch([(run, wraps) for run, wraps in wanted if wraps][:_WARM_RUNS_MAX], strict=False)

    async def _fetch(self, wanted: list[tuple[KeyRun, list[bytes]]], *, strict: bool = True) -> dict[bytes, memoryview]:
        """One round trip for all of `wanted`; the keys, by wrapped form. Raises `Damaged("wrap")` if strict."""
        if not wanted:
            return {}
        event = trio.Event()
        wanted = contiguous(wanted)
        for _, wraps in wanted:
            self._in_flight.update(dict.fromkeys(wraps, event))
        try:
            items = [
                (run.log_id, run.purpose.value, run.kek_version, b"".join(wraps), run.first_block)
                for run, wraps in wanted
            ]
            # What is brought ahead was not missed.
            self.statistics.misses += strict * sum(len(wraps) for _, wraps in wanted)
            self.statistics.round_trips += 1
            answers, floors = await self._upstream.unwrap(items)
        finally:
            for _, wraps in wanted:
                for wrapped in wraps:
                    self._in_flight.pop(wrapped, None)
            event.set()
        clear: list[bytes] = []
        flat: list[bytes] = []
        widths: list[int] = []
        for (run, wraps), answer in zip(wanted, answers, strict=True):
            width = NAMES_KEY_BYTES if run.purpose is Purpose.NAMES else DEK_BYTES
            if answer is None or len(answer) != width * len(wraps):
                if not strict:
                    continue
                raise Damaged("wrap", f"{run.purpose.value} key, blocks from {run.first_block}")
            clear.append(answer)
            flat += wraps
            widths += [width] * len(wraps)
        self.statistics.unwraps += len(flat)
        views, batch = self._store(bytearray().join(clear), flat, widths)
        overwrite(clear)
        for (run, _), floor in zip(wanted, floors, strict=True):
            if run.purpose in _LOG_PURPOSES:
                self._know(run.log_id, floor, batch)
        if strict and self.policy.max_uses is not None and self.policy.caching:
            for wrapped in flat:
                self._slots[wrapped].uses = 1
        return views

    async def generate(self, log_id: bytes, purpose: Purpose, count: int) -> FreshKeys:
        """See `DekProvider.generate`."""
        self._check_open()
        for _ in range(_ASKED_AGAIN + 1):
            self.statistics.round_trips += 1
            kek_version, keys, joined = await self._upstream.generate(log_id, purpose.value, count)
            # An answer that was under way when the KEK was replaced is of the old one.
            if kek_version >= self._least_version:
                break
            overwrite([keys])
        else:
            raise AgentUnavailable("the key agent makes keys under a KEK that was replaced")
        names = purpose is Purpose.NAMES
        wraps = _split(joined, WRAPPED_NAMES_BYTES if names else WRAPPED_BYTES)
        clear = bytearray(keys)
        overwrite([keys])
        views, batch = self._store(clear, wraps, [NAMES_KEY_BYTES if names else DEK_BYTES] * count)
        fresh = FreshKeys(kek_version, [views[w] for w in wraps], wraps)
        batch.stocks.append(fresh)
        if purpose in _LOG_PURPOSES:
            # A second key for a log that is known (a rotation's) must not make its floor forgotten.
            self._know(log_id, self.floor(log_id), batch)
        return fresh

    async def rewrap(self, runs: Sequence[KeyRun]) -> Rewrapped:
        """See `DekProvider.rewrap`."""
        version, wrapped = 0, [bytearray() for _ in runs]
        for request in requests_of(runs):
            self._check_open()
            self.statistics.round_trips += 1
            items = [
                (run.log_id, run.purpose.value, run.kek_version, b"".join(run.wrapped), run.first_block)
                for _, run in request
            ]
            now, answers = await self._upstream.rewrap(items)
            if version not in (0, now):
                # The KEK was replaced once more meanwhile: all of it under the newest one.
                return await self.rewrap(runs)
            version = now
            for (number, run), item, answer in zip(request, items, answers, strict=True):
                if answer is None or len(answer) != len(item[3]):
                    raise Damaged("wrap", f"{run.purpose.value} key, blocks from {run.first_block}")
                wrapped[number] += answer
                self._rename(run.wrapped, _split(answer, len(run.wrapped[0])))
        return Rewrapped(version, [bytes(joined) for joined in wrapped])

    def _rename(self, old: Sequence[bytes], new: Sequence[bytes]) -> None:
        """Let keys that are here be found by their new wraps, too: until the same deadline."""
        if not self.policy.caching or self.policy.max_uses is not None:
            return
        for before, after in zip(old, new, strict=True):
            slot = self._slots.get(before)
            if slot is not None and slot.batch.deadline > self._monotonic():
                self._slots[after] = _Slot(slot.view, slot.batch)
                slot.batch.wraps.append(after)
        self._make_room()

    def renew(self, kek_version: int) -> None:
        """See `DekProvider.renew`."""
        self._least_version = max(self._least_version, kek_version)
        self._kits = deque(each for each in self._kits if each[0].kek_version >= self._least_version)
        for batch in self._batches:
            for stock in batch.stocks:
                stock.wiped = stock.wiped or stock.kek_version < self._least_version
        self._refill.set()

    # freshness -------------------------------------------------------------------------------------------------

    def _know(self, log_id: bytes, floor: int, batch: _Batch) -> None:
        self._floors[log_id] = (floor, batch)
        batch.logs.append(log_id)

    def floor(self, log_id: bytes) -> int:
        """See `FreshnessRecord.floor`."""
        known = self._floors.get(log_id)
        return known[0] if known is not None else 0

    async def ask_floors(self, log_ids: Sequence[bytes]) -> list[int]:
        """See `FreshnessRecord.ask_floors`."""
        return await self._upstream.floors(log_ids)

    async def begin(self, state_sequence: int) -> bool:
        """See `FreshnessRecord.begin`."""
        return await self._upstream.begin(state_sequence)

    async def record(
        self, logs: Mapping[bytes, int], gone: Sequence[bytes] = (), state_sequence: int | None = None
    ) -> None:
        """See `FreshnessRecord.record`. Floors that came with keys rise along: a cached key hides no rollback."""
        await self._upstream.record(logs, gone, state_sequence)
        for log_id, generation in logs.items():
            known = self._floors.get(log_id)
            if known is not None and DELETED != known[0] < generation:
                self._floors[log_id] = (generation, known[1])
        for log_id in gone:
            known = self._floors.get(log_id)
            if known is not None:
                self._floors[log_id] = (DELETED, known[1])

    async def accept(self, logs: Mapping[bytes, int]) -> None:
        """See `FreshnessRecord.accept`."""
        await self._upstream.accept(logs)
        for log_id, generation in logs.items():
            known = self._floors.get(log_id)
            if known is not None:
                self._floors[log_id] = (generation, known[1])

    # kits ------------------------------------------------------------------------------------------------------

    def take_kit(self) -> Kit | None:
        """See `DekProvider.take_kit`."""
        while self._kits:
            kit, batch = self._kits.popleft()
            if len(self._kits) * 2 < self._kits_wanted:
                self._refill.set()
            if batch.deadline > self._monotonic() and batch.buffer:
                return kit
        return None

    async def make_kit(self, *, directory: bool) -> Kit:
        """See `DekProvider.make_kit`."""
        if directory:
            return (await self._new_kits(1, directory=True))[0][0]
        while True:
            kit = self.take_kit()
            if kit is not None:
                return kit
            async with self._refilling:
                if not self._kits:
                    # Whoever creates this fast will create more.
                    self._kits_wanted = min(_KITS_MAX, self._kits_wanted * 2)
                    self._kits.extend(await self._new_kits(self._kits_wanted, directory=False))

    async def _fill_kits(self) -> None:
        async with self._refilling:
            count = self._kits_wanted - len(self._kits)
            if count > 0:
                self._kits.extend(await self._new_kits(count, directory=False))

    async def _new_kits(self, count: int, *, directory: bool) -> list[tuple[Kit, _Batch]]:
        self._check_open()
        deks = 0 if directory else _DEKS_PER_KIT
        for _ in range(_ASKED_AGAIN + 1):
            self.statistics.round_trips += 1
            kek_version, raw = await self._upstream.kits(directory=directory, count=count, deks=deks)
            if kek_version >= self._least_version:
                break
            overwrite(key for row in raw for key in (row[1], row[3], row[5]))
        else:
            raise AgentUnavailable("the key agent makes keys under a KEK that was replaced")
        clear: list[bytes] = []
        wraps: list[bytes] = []
        widths: list[int] = []
        for _, log_key, log_wrapped, names_key, names_wrapped, dek_keys, dek_wraps in raw:
            clear += [log_key, names_key, dek_keys]
            wraps.append(log_wrapped)
            widths.append(DEK_BYTES)
            if directory:
                assert len(names_wrapped) == WRAPPED_NAMES_BYTES
                wraps.append(names_wrapped)
                widths.append(NAMES_KEY_BYTES)
            wraps += _split(dek_wraps, WRAPPED_BYTES)
            widths += [DEK_BYTES] * deks
        views, batch = self._store(bytearray().join(clear), wraps, widths)
        overwrite(clear)
        out = []
        for log_id, _, log_wrapped, _, names_wrapped, _, dek_wraps in raw:
            self._know(log_id, 0, batch)
            ours = _split(dek_wraps, WRAPPED_BYTES)
            fresh = None if directory else FreshKeys(kek_version, [views[w] for w in ours], ours)
            if fresh is not None:
                batch.stocks.append(fresh)
            names_key_view = views[names_wrapped] if directory else None
            kit = Kit(
                log_id, kek_version, views[log_wrapped], log_wrapped, names_key_view, names_wrapped or None, fresh
            )
            out.append((kit, batch))
        return out

    # keeping and wiping ----------------------------------------------------------------------------------------

    def _store(
        self, clear: bytearray, wraps: Sequence[bytes], widths: Sequence[int]
    ) -> tuple[dict[bytes, memoryview], _Batch]:
        # What was asked for before the cache was closed is not kept when it comes after that.
        self._check_open()
        now = self._monotonic()
        caching = self.policy.caching
        batch = _Batch(clear, now, now + self.policy.lifetime_s, list(wraps))
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

    def _make_room(self) -> None:
        while len(self._slots) > self.policy.max_entries and self._batches:
            self.statistics.evictions += self._wipe(self._batches.popleft())

    def _use_up(self, wrapped: bytes, slot: _Slot) -> None:
        del self._slots[wrapped]
        slot.view[:] = bytes(len(slot.view))
        slot.batch.used_up += 1
        self.statistics.expiries += 1

    def _wipe(self, batch: _Batch) -> int:
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

    def wipe(self) -> None:
        """Overwrite everything."""
        while self._batches:
            self._wipe(self._batches.popleft())
        self._kits.clear()

    def close(self) -> None:
        """Overwrite everything, and neither keep nor hand out a key until `reopen`: `VolumeLocked` is the answer."""
        self._closed = True
        self.wipe()

    def reopen(self) -> None:
        """The reverse of `close`; the cache is empty."""
        self._closed = False

    def _check_open(self) -> None:
        if self._closed:
            raise VolumeLocked("the volume is locked")

    async def serve(self) -> None:
        """Sweep once a second and refill kits on demand, for ever.

        The agent being away is the next caller's problem, not this task's.
        """
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._sweep_forever)
            while True:
                await self._refill.wait()
                self._refill = trio.Event()
                try:
                    await self._fill_kits()
                except CryptfsError:
                    continue

    async def _sweep_forever(self) -> None:
        while True:
            await trio.sleep(SWEEP_INTERVAL_S)
            self.sweep()


def _split(joined: bytes, width: int) -> list[bytes]:
    return [joined[at : at + width] for at in range(0, len(joined), width)]
