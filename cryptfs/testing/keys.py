"""Keys without an agent: the real wraps (`crypto.wrap`) under a KEK that lies here in clear.

`FakeKek` is what the agent holds; `FakeDekProvider` offers it to the filesystem, `FakeUpstream` to `keys.cache`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

import trio

from cryptfs.crypto.wrap import key_bytes, unwrap_keys, wrap_keys, wrapped_bytes, wrapping_key
from cryptfs.errors import CryptfsError, Damaged
from cryptfs.ports import Clock, FreshKeys, KeyRun, Kit, Random, Rewrapped
from cryptfs.testing.freshness import FakeRecord
from cryptfs.types import ID_BYTES, Purpose

UnwrapItem = tuple[bytes, str, int, bytes, int]
KitBytes = tuple[bytes, bytes, bytes, bytes, bytes, bytes, bytes]

_DEKS_PER_KIT = 2


class FakeKek:
    """One volume's KEKs by version, and every wrap and unwrap under them. It begins with version 1."""

    def __init__(self, volume_id: bytes, random: Random) -> None:
        self.volume_id = volume_id
        self.random = random
        self.version = 1
        """The newest one's: what wraps every new key."""
        self.keks = {1: random(32)}
        self.least = 1
        """Older versions are as good as destroyed."""

    @property
    def kek(self) -> bytes:
        """The newest KEK."""
        return self.keks[self.version]

    def rotate(self) -> int:
        """Make a new version, which is the newest from now on."""
        self.version += 1
        self.keks[self.version] = self.random(32)
        return self.version

    def destroy_older(self) -> None:
        """Keep the newest only."""
        self.keks = {self.version: self.kek}

    def _wrapper(self, purpose: Purpose, log_id: bytes, version: int) -> bytes:
        return wrapping_key(self.keks[version], purpose, self.volume_id, log_id, version)

    def fresh(self, log_id: bytes, purpose: Purpose, count: int) -> tuple[bytes, bytes]:
        """`count` new keys and their wraps, each joined."""
        size = key_bytes(purpose)
        keys = self.random(size * count)
        return keys, wrap_keys(self._wrapper(purpose, log_id, self.version), _split(keys, size))

    def unwrap(self, log_id: bytes, purpose: Purpose, kek_version: int, joined: bytes) -> bytes | None:
        """The keys behind `joined`, joined; None if one is not authentic or its KEK version is not there."""
        if kek_version not in self.keks or kek_version < self.least:
            return None
        return unwrap_keys(self._wrapper(purpose, log_id, kek_version), joined, wrapped_bytes(purpose))

    def rewrap(self, log_id: bytes, purpose: Purpose, kek_version: int, joined: bytes) -> bytes | None:
        """The same keys under the newest KEK, joined; None as for `unwrap`."""
        keys = self.unwrap(log_id, purpose, kek_version, joined)
        if keys is None:
            return None
        return wrap_keys(self._wrapper(purpose, log_id, self.version), _split(keys, key_bytes(purpose)))

    def kit(self, *, directory: bool, deks: int) -> KitBytes:
        """A kit as the agent sends it."""
        log_id = self.random(ID_BYTES)
        log_key, log_wrapped = self.fresh(log_id, Purpose.LOG_DIR if directory else Purpose.LOG_FILE, 1)
        names_key, names_wrapped = self.fresh(log_id, Purpose.NAMES, 1) if directory else (b"", b"")
        keys, wraps = self.fresh(log_id, Purpose.BLOCK, deks) if deks else (b"", b"")
        return log_id, log_key, log_wrapped, names_key, names_wrapped, keys, wraps


class FakeDekProvider:
    """`ports.DekProvider` over a `FakeKek`: keys stay for `max_age_s` on `clock`, then they are overwritten.

    Set `failure` to have every round trip to the KEK end with it. `round_trips` counts them. `freshness` is what the
    machine has seen of the volume; without one given, this is the first it sees of it.
    """

    def __init__(
        self, kek: FakeKek, clock: Clock, max_age_s: float = 60.0, freshness: FakeRecord | None = None
    ) -> None:
        self.failure: CryptfsError | None = None
        self.round_trips = 0
        self.freshness = freshness or FakeRecord()
        self._kek = kek
        self._clock = clock
        self._max_age_s = max_age_s
        self._held: dict[bytes, tuple[float, bytearray]] = {}
        self._stocks: list[tuple[float, FreshKeys]] = []

    def peek(self, wrapped: bytes) -> memoryview | None:
        self._expire()
        held = self._held.get(wrapped)
        return memoryview(held[1]) if held is not None else None

    def peek_all(self, wraps: Sequence[bytes]) -> list[memoryview] | None:
        """See `DekProvider.peek_all`."""
        keys = [self.peek(w) for w in wraps]
        return None if None in keys else [k for k in keys if k is not None]

    async def unwrap(self, runs: Sequence[KeyRun]) -> list[list[memoryview]]:
        self._expire()
        if any(w not in self._held for run in runs for w in run.wrapped):
            await self._round_trip()
        out: list[list[memoryview]] = []
        for run in runs:
            views: list[memoryview] = []
            for wrapped in run.wrapped:
                if wrapped not in self._held:
                    key = self._kek.unwrap(run.log_id, run.purpose, run.kek_version, wrapped)
                    if key is None:
                        raise Damaged("wrap", f"{run.purpose.value} key, blocks from {run.first_block}")
                    self._hold(wrapped, key)
                views.append(memoryview(self._held[wrapped][1]))
            out.append(views)
        return out

    async def warm(self, runs: Sequence[KeyRun]) -> None:
        with suppress(CryptfsError):
            await self._round_trip()
            for run in runs:
                for wrapped in run.wrapped:
                    key = self._kek.unwrap(run.log_id, run.purpose, run.kek_version, wrapped)
                    if key is not None:
                        self._hold(wrapped, key)

    async def generate(self, log_id: bytes, purpose: Purpose, count: int) -> FreshKeys:
        await self._round_trip()
        keys, wraps = self._kek.fresh(log_id, purpose, count)
        return self._stock(_split(keys, key_bytes(purpose)), _split(wraps, wrapped_bytes(purpose)))

    async def rewrap(self, runs: Sequence[KeyRun]) -> Rewrapped:
        await self._round_trip()
        out: list[bytes] = []
        for run in runs:
            joined = self._kek.rewrap(run.log_id, run.purpose, run.kek_version, b"".join(run.wrapped))
            if joined is None:
                raise Damaged("wrap", f"{run.purpose.value} key, blocks from {run.first_block}")
            out.append(joined)
        return Rewrapped(self._kek.version, out)

    def renew(self, kek_version: int) -> None:
        for _, stock in self._stocks:
            stock.wiped = stock.wiped or stock.kek_version < kek_version

    def take_kit(self) -> Kit | None:
        return None

    async def make_kit(self, *, directory: bool) -> Kit:
        await self._round_trip()
        raw = self._kek.kit(directory=directory, deks=0 if directory else _DEKS_PER_KIT)
        log_id, log_key, log_wrapped, names_key, names_wrapped, keys, wraps = raw
        log_view = self._hold(log_wrapped, log_key)
        if directory:
            names_view = self._hold(names_wrapped, names_key)
            return Kit(log_id, self._kek.version, log_view, log_wrapped, names_view, names_wrapped, None)
        stock = self._stock(_split(keys, key_bytes(Purpose.BLOCK)), _split(wraps, wrapped_bytes(Purpose.BLOCK)))
        return Kit(log_id, self._kek.version, log_view, log_wrapped, None, None, stock)

    def floor(self, log_id: bytes) -> int:
        return self.freshness.floor(log_id)

    async def ask_floors(self, log_ids: Sequence[bytes]) -> list[int]:
        await self._round_trip()
        return [self.freshness.floor(log_id) for log_id in log_ids]

    async def begin(self, state_sequence: int) -> bool:
        await self._round_trip()
        return self.freshness.begin(state_sequence)

    async def record(
        self, logs: Mapping[bytes, int], gone: Sequence[bytes] = (), state_sequence: int | None = None
    ) -> None:
        await self._round_trip()
        self.freshness.record(logs, gone, state_sequence)

    async def accept(self, logs: Mapping[bytes, int]) -> None:
        await self._round_trip()
        self.freshness.accept(logs)

    def wipe(self) -> None:
        """Overwrite everything now, as if its time were up."""
        self._max_age_s, age_s = float("-inf"), self._max_age_s
        self._expire()
        self._max_age_s = age_s

    async def _round_trip(self) -> None:
        await trio.lowlevel.checkpoint()
        self.round_trips += 1
        if self.failure is not None:
            raise self.failure

    def _stock(self, keys: list[bytes], wraps: list[bytes]) -> FreshKeys:
        stock = FreshKeys(self._kek.version, [self._hold(w, k) for w, k in zip(wraps, keys, strict=True)], wraps)
        self._stocks.append((self._clock.monotonic(), stock))
        return stock

    def _hold(self, wrapped: bytes, key: bytes) -> memoryview:
        self._held[wrapped] = (self._clock.monotonic(), bytearray(key))
        return memoryview(self._held[wrapped][1])

    def _expire(self) -> None:
        oldest = self._clock.monotonic() - self._max_age_s
        for wrapped, (since, key) in list(self._held.items()):
            if since <= oldest:
                key[:] = bytes(len(key))
                del self._held[wrapped]
        for since, stock in self._stocks:
            stock.wiped = stock.wiped or since <= oldest
        self._stocks = [(since, stock) for since, stock in self._stocks if not stock.wiped]


class FakeUpstream:
    """What `keys.cache` asks, answered by a `FakeKek`.

    `requests` lists what was asked. Set `failure` to have every request fail, `gate` to have them wait for it first,
    `garble` to change the answers to unwraps.
    """

    def __init__(self, kek: FakeKek, freshness: FakeRecord | None = None) -> None:
        self.failure: CryptfsError | None = None
        self.freshness = freshness or FakeRecord()
        self.gate: trio.Event | None = None
        self.garble: Callable[[list[bytes | None]], list[bytes | None]] | None = None
        self.requests: list[str] = []
        self._kek = kek

    async def unwrap(self, items: Sequence[UnwrapItem]) -> tuple[list[bytes | None], list[int]]:
        """Keys of each item joined, None where one is not authentic; floors of log keys, 0 for others."""
        await self._asked(f"unwrap {len(items)}")
        out = [
            self._kek.unwrap(log_id, Purpose(purpose), version, joined) for log_id, purpose, version, joined, _ in items
        ]
        floors = [self.freshness.floor(log_id) if purpose.startswith("log-") else 0 for log_id, purpose, *_ in items]
        return self.garble(out) if self.garble is not None else out, floors

    async def rewrap(self, items: Sequence[UnwrapItem]) -> tuple[int, list[bytes | None]]:
        """(newest KEK version, each item's keys under it, joined; None where one is not authentic)."""
        await self._asked(f"rewrap {len(items)}")
        wrapped = [
            self._kek.rewrap(log_id, Purpose(purpose), version, joined) for log_id, purpose, version, joined, _ in items
        ]
        return self._kek.version, wrapped

    async def generate(self, log_id: bytes, purpose: str, count: int) -> tuple[int, bytes, bytes]:
        """(KEK version, keys joined, wraps joined)."""
        await self._asked(f"generate {count}")
        return (self._kek.version, *self._kek.fresh(log_id, Purpose(purpose), count))

    async def kits(self, *, directory: bool, count: int, deks: int) -> tuple[int, list[KitBytes]]:
        """(KEK version, kits)."""
        await self._asked(f"kits {count}")
        return self._kek.version, [self._kek.kit(directory=directory, deks=deks) for _ in range(count)]

    async def floors(self, log_ids: Sequence[bytes]) -> list[int]:
        await self._asked(f"floors {len(log_ids)}")
        return [self.freshness.floor(log_id) for log_id in log_ids]

    async def begin(self, state_sequence: int) -> bool:
        await self._asked("begin")
        return self.freshness.begin(state_sequence)

    async def record(self, logs: Mapping[bytes, int], gone: Sequence[bytes], state_sequence: int | None) -> None:
        await self._asked(f"record {len(logs)}")
        self.freshness.record(logs, gone, state_sequence)

    async def accept(self, logs: Mapping[bytes, int]) -> None:
        await self._asked(f"accept {len(logs)}")
        self.freshness.accept(logs)

    async def _asked(self, what: str) -> None:
        self.requests.append(what)
        await trio.lowlevel.checkpoint()
        if self.gate is not None:
            await self.gate.wait()
        if self.failure is not None:
            raise self.failure


def _split(joined: bytes, width: int) -> list[bytes]:
    return [joined[at : at + width] for at in range(0, len(joined), width)]
