"""The daemon's keys: handed out if they are here (`held_keys`), had from the agent if not.

One request per missing key: who misses one that is on its way waits for that. Kits are kept ready (`kits`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress

import trio

from cryptfs.crypto.secret import overwrite
from cryptfs.errors import AgentUnavailable, CryptfsError, Damaged
from cryptfs.keys.held_keys import HeldKeys
from cryptfs.keys.kits import ASKED_AGAIN, Kits
from cryptfs.keys.policy import SWEEP_INTERVAL_S, CachePolicy
from cryptfs.keys.stretches import contiguous, requests_of, split
from cryptfs.keys.upstream import Upstream
from cryptfs.ports import Clock, FreshKeys, KeyRun, Kit, Rewrapped
from cryptfs.types import DEK_BYTES, DELETED, NAMES_KEY_BYTES, WRAPPED_BYTES, WRAPPED_NAMES_BYTES, Purpose

_WARM_RUNS_MAX = 256

_LOG_PURPOSES = frozenset({Purpose.LOG_FILE, Purpose.LOG_DIR})


class KeyCache(HeldKeys):
    """`ports.DekProvider` over an `Upstream`.

    Run `serve` in the background: it sweeps and refills the stock of kits.
    """

    def __init__(self, upstream: Upstream, policy: CachePolicy, clock: Clock) -> None:
        super().__init__(policy, clock)
        self._upstream = upstream
        self._in_flight: dict[bytes, trio.Event] = {}
        self._kits = Kits(upstream, self)

    async def serve(self) -> None:
        """Sweep once a second and refill kits on demand, for ever."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._sweep_forever)
            await self._kits.serve()

    async def _sweep_forever(self) -> None:
        while True:
            await trio.sleep(SWEEP_INTERVAL_S)
            self.sweep()

    # had from the agent ----------------------------------------------------------------------------------------

    async def unwrap(self, runs: Sequence[KeyRun]) -> list[list[memoryview]]:
        """See `DekProvider.unwrap`."""
        again = False
        while True:
            self.check_open()
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
        views, batch = self.store(bytearray().join(clear), flat, widths)
        overwrite(clear)
        for (run, _), floor in zip(wanted, floors, strict=True):
            if run.purpose in _LOG_PURPOSES:
                self.know_floor(run.log_id, floor, batch)
        if strict and self.policy.max_uses is not None and self.policy.caching:
            for wrapped in flat:
                self._slots[wrapped].uses = 1
        return views

    async def generate(self, log_id: bytes, purpose: Purpose, count: int) -> FreshKeys:
        """See `DekProvider.generate`."""
        self.check_open()
        for _ in range(ASKED_AGAIN + 1):
            self.statistics.round_trips += 1
            kek_version, keys, joined = await self._upstream.generate(log_id, purpose.value, count)
            # An answer that was under way when the KEK was replaced is of the old one.
            if kek_version >= self.least_version:
                break
            overwrite([keys])
        else:
            raise AgentUnavailable("the key agent makes keys under a KEK that was replaced")
        names = purpose is Purpose.NAMES
        wraps = split(joined, WRAPPED_NAMES_BYTES if names else WRAPPED_BYTES)
        clear = bytearray(keys)
        overwrite([keys])
        views, batch = self.store(clear, wraps, [NAMES_KEY_BYTES if names else DEK_BYTES] * count)
        fresh = FreshKeys(kek_version, [views[w] for w in wraps], wraps)
        batch.stocks.append(fresh)
        if purpose in _LOG_PURPOSES:
            # A second key for a log that is known (a rotation's) must not make its floor forgotten.
            self.know_floor(log_id, self.floor(log_id), batch)
        return fresh

    async def rewrap(self, runs: Sequence[KeyRun]) -> Rewrapped:
        """See `DekProvider.rewrap`."""
        version, wrapped = 0, [bytearray() for _ in runs]
        for request in requests_of(runs):
            self.check_open()
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
                self.found_by(run.wrapped, split(answer, len(run.wrapped[0])))
        return Rewrapped(version, [bytes(joined) for joined in wrapped])

    def take_kit(self) -> Kit | None:
        """See `DekProvider.take_kit`."""
        return self._kits.take()

    async def make_kit(self, *, directory: bool) -> Kit:
        """See `DekProvider.make_kit`."""
        return await self._kits.make(directory=directory)

    def renew(self, kek_version: int) -> None:
        """See `DekProvider.renew`."""
        super().renew(kek_version)
        self._kits.renew()

    def wipe(self) -> None:
        """Overwrite everything."""
        super().wipe()
        self._kits.clear()

    # freshness -------------------------------------------------------------------------------------------------

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
            self.raise_floor(log_id, generation)
        for log_id in gone:
            self.set_floor(log_id, DELETED)

    async def accept(self, logs: Mapping[bytes, int]) -> None:
        """See `FreshnessRecord.accept`."""
        await self._upstream.accept(logs)
        for log_id, generation in logs.items():
            self.set_floor(log_id, generation)
