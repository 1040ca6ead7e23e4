"""The key cache on a clock turned by hand: what it keeps, for how long, and that it really overwrites."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from cryptfs.errors import AgentUnavailable, CryptfsError, Damaged, UsageError, VolumeLocked
from cryptfs.keys.cache import KeyCache
from cryptfs.keys.policy import CachePolicy
from cryptfs.ports import FreshKeys, KeyRun
from cryptfs.testing.clock import FakeClock, TrioClock
from cryptfs.testing.keys import FakeKek, FakeUpstream, KitBytes
from cryptfs.testing.randomness import SeededRandom
from cryptfs.types import DEK_BYTES, WRAPPED_BYTES, Purpose

LOG_ID = b"L" * 16
ZEROS = bytes(DEK_BYTES)


def wiped(stock: FreshKeys) -> bool:
    return stock.wiped


class Setup:
    """A cache, its fake upstream and its clock; `blocks` of one file's DEKs are known outside."""

    def __init__(self, policy: CachePolicy | None = None, blocks: int = 8) -> None:
        self.clock = FakeClock()
        self.kek = FakeKek(b"V" * 16, SeededRandom(1))
        self.upstream = FakeUpstream(self.kek)
        self.cache = KeyCache(self.upstream, policy or CachePolicy(), self.clock)
        keys, wraps = self.kek.fresh(LOG_ID, Purpose.BLOCK, blocks)
        self.deks = [keys[at : at + DEK_BYTES] for at in range(0, len(keys), DEK_BYTES)]
        self.wraps = [wraps[at : at + WRAPPED_BYTES] for at in range(0, len(wraps), WRAPPED_BYTES)]

    def run(self, *blocks: int) -> KeyRun:
        return KeyRun(LOG_ID, Purpose.BLOCK, 1, [self.wraps[b] for b in blocks], blocks[0])

    async def unwrap(self, *blocks: int) -> list[memoryview]:
        return (await self.cache.unwrap([self.run(*blocks)]))[0]

    @property
    def asked(self) -> int:
        return len(self.upstream.requests)


async def test_a_key_is_asked_for_once_and_then_at_hand() -> None:
    s = Setup()
    assert s.cache.peek(s.wraps[0]) is None
    assert [bytes(v) for v in await s.unwrap(0, 1)] == s.deks[:2]
    assert [bytes(v) for v in await s.unwrap(1, 0)] == [s.deks[1], s.deks[0]]
    assert bytes(s.cache.peek(s.wraps[1]) or b"") == s.deks[1]
    assert s.asked == 1
    # A batch of which a part is here asks for the rest only.
    await s.unwrap(0, 1, 2)
    assert s.asked == 2
    assert s.cache.statistics.unwraps == 3
    assert s.cache.statistics.round_trips == 2
    assert len(s.cache) == 3


async def test_use_does_not_make_a_key_live_longer() -> None:
    s = Setup(CachePolicy(max_age_s=60))
    (view,) = await s.unwrap(0)
    for _ in range(59):
        s.clock.advance(1)
        assert s.cache.peek(s.wraps[0]) is not None
        await s.unwrap(0)
    assert s.asked == 1
    s.clock.advance(1)
    assert s.cache.peek(s.wraps[0]) is None
    assert bytes(view) == ZEROS
    assert [bytes(v) for v in await s.unwrap(0)] == s.deks[:1]
    assert s.asked == 2


async def test_an_expired_key_is_asked_for_again_by_unwrap_itself() -> None:
    s = Setup(CachePolicy(max_age_s=60))
    await s.unwrap(0)
    s.clock.advance(30)
    await s.unwrap(1)
    s.clock.advance(30)
    assert [bytes(v) for v in await s.unwrap(0, 1)] == s.deks[:2]
    assert s.asked == 3


async def test_the_sweep_overwrites_what_nobody_asks_for() -> None:
    s = Setup(CachePolicy(max_age_s=10))
    old = await s.unwrap(0, 1)
    s.clock.advance(5)
    young = await s.unwrap(2)
    s.clock.advance(5)
    s.cache.sweep()
    assert [bytes(v) for v in old] == [ZEROS, ZEROS]
    assert bytes(young[0]) == s.deks[2]
    assert len(s.cache) == 1
    assert s.cache.statistics.expiries == 2


async def test_wipe_overwrites_everything() -> None:
    s = Setup()
    views = await s.unwrap(0, 1)
    fresh = await s.cache.generate(LOG_ID, Purpose.BLOCK, 3)
    kit = await s.cache.make_kit(directory=False)
    directory = await s.cache.make_kit(directory=True)
    assert kit.deks is not None
    assert directory.names_key is not None
    held = [*views, *fresh.keys, kit.log_key, *kit.deks.keys, directory.log_key, directory.names_key]
    assert all(any(view) for view in held)
    s.cache.wipe()
    assert not any(any(view) for view in held)
    assert wiped(fresh)
    assert wiped(kit.deks)
    assert len(s.cache) == 0
    assert s.cache.take_kit() is None
    assert [bytes(v) for v in await s.unwrap(0)] == s.deks[:1]


@pytest.mark.parametrize("limit", [1, 2, 5])
async def test_a_key_serves_as_often_as_it_may(limit: int) -> None:
    s = Setup(CachePolicy(max_uses=limit))
    (view,) = await s.unwrap(0)
    for _ in range(limit - 1):
        assert s.cache.peek(s.wraps[0]) is not None
    assert bytes(view) == s.deks[0]
    assert s.cache.peek(s.wraps[0]) is None
    assert bytes(view) == ZEROS
    assert s.asked == 1


async def test_with_one_use_per_key_batches_still_get_all_their_keys() -> None:
    s = Setup(CachePolicy(max_uses=1))
    for _ in range(3):
        assert [bytes(v) for v in await s.unwrap(0, 1, 2)] == s.deks[:3]
        assert [bytes(v) for v in await s.unwrap(2, 3)] == s.deks[2:4]
        await s.unwrap(1)


async def test_a_key_brought_ahead_has_all_its_uses_left() -> None:
    s = Setup(CachePolicy(max_uses=1))
    await s.cache.warm([s.run(0, 1)])
    assert [bytes(v) for v in await s.unwrap(0, 1)] == s.deks[:2]
    assert s.asked == 1
    assert s.cache.peek(s.wraps[0]) is None


async def test_mode_none_brings_nothing_ahead() -> None:
    s = Setup(CachePolicy(caching=False))
    await s.cache.warm([s.run(0)])
    assert s.asked == 0


async def test_more_than_the_limit_pushes_the_oldest_batch_out() -> None:
    s = Setup(CachePolicy(max_entries=1024))
    (oldest,) = await s.unwrap(0)
    (second,) = await s.unwrap(1)
    fresh = await s.cache.generate(LOG_ID, Purpose.BLOCK, 1023)
    assert bytes(oldest) == ZEROS
    assert bytes(second) == s.deks[1]
    assert len(s.cache) == 1024
    assert not wiped(fresh)
    await s.cache.generate(LOG_ID, Purpose.BLOCK, 1024)
    assert wiped(fresh)
    assert bytes(second) == ZEROS
    assert len(s.cache) == 1024


async def test_mode_none_keeps_nothing_and_overwrites_at_the_next_sweep() -> None:
    s = Setup(CachePolicy(caching=False))
    (view,) = await s.unwrap(0)
    assert bytes(view) == s.deks[0]
    assert s.cache.peek(s.wraps[0]) is None
    assert len(s.cache) == 0
    await s.unwrap(0)
    assert s.asked == 2
    fresh = await s.cache.generate(LOG_ID, Purpose.BLOCK, 2)
    s.clock.advance(1)
    s.cache.sweep()
    assert bytes(view) == ZEROS
    assert wiped(fresh)
    assert not any(any(key) for key in fresh.keys)


async def test_mode_none_never_shares_an_answer() -> None:
    s = Setup(CachePolicy(caching=False))
    s.upstream.gate = trio.Event()
    got: list[memoryview] = []

    async def ask() -> None:
        got.extend(await s.unwrap(0))

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(ask)
        await wait_all_tasks_blocked()
        s.upstream.gate.set()
    assert [bytes(v) for v in got] == [s.deks[0]] * 3
    assert s.asked == 3


async def test_misses_at_the_same_time_make_one_request() -> None:
    s = Setup()
    s.upstream.gate = trio.Event()
    got: dict[int, list[bytes]] = {}

    async def ask(who: int, *blocks: int) -> None:
        got[who] = [bytes(v) for v in await s.unwrap(*blocks)]

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask, 0, 0, 1)
        await wait_all_tasks_blocked()
        nursery.start_soon(ask, 1, 1)
        nursery.start_soon(ask, 2, 0)
        nursery.start_soon(ask, 3, 5)
        await wait_all_tasks_blocked()
        assert s.asked == 2
        s.upstream.gate.set()
    assert s.asked == 2
    assert got == {0: s.deks[:2], 1: s.deks[1:2], 2: s.deks[:1], 3: s.deks[5:6]}


async def test_those_who_waited_for_a_request_that_failed_ask_themselves() -> None:
    s = Setup()
    s.upstream.gate = trio.Event()
    s.upstream.failure = AgentUnavailable("gone")
    outcomes: list[str] = []

    async def ask() -> None:
        try:
            await s.unwrap(0)
        except AgentUnavailable:
            outcomes.append("unavailable")
            s.upstream.failure = None
        else:
            outcomes.append("served")

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(ask)
        await wait_all_tasks_blocked()
        assert s.asked == 1
        s.upstream.gate.set()
    assert sorted(outcomes) == ["served", "served", "unavailable"]
    assert s.asked == 2


async def test_those_who_waited_for_a_request_that_was_cancelled_ask_themselves() -> None:
    s = Setup()
    s.upstream.gate = trio.Event()
    served: list[bytes] = []
    first = trio.CancelScope()

    async def ask(scope: trio.CancelScope) -> None:
        with scope:
            served.extend(bytes(v) for v in await s.unwrap(0))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask, first)
        await wait_all_tasks_blocked()
        nursery.start_soon(ask, trio.CancelScope())
        await wait_all_tasks_blocked()
        first.cancel()
        await wait_all_tasks_blocked()
        s.upstream.gate.set()
    assert served == s.deks[:1]


@pytest.mark.parametrize("error", [AgentUnavailable("gone"), VolumeLocked("locked")])
async def test_the_agents_failure_reaches_the_caller_and_is_not_remembered(error: CryptfsError) -> None:
    s = Setup()
    calls: list[Callable[[], Awaitable[object]]] = [
        lambda: s.unwrap(0),
        lambda: s.cache.generate(LOG_ID, Purpose.BLOCK, 1),
        lambda: s.cache.make_kit(directory=False),
        lambda: s.cache.make_kit(directory=True),
    ]
    for call in calls:
        s.upstream.failure = error
        with pytest.raises(type(error)):
            await call()
        s.upstream.failure = None
        await call()


async def test_while_the_agent_is_away_what_is_cached_still_serves() -> None:
    s = Setup(CachePolicy(max_age_s=60))
    await s.unwrap(0)
    s.upstream.failure = AgentUnavailable("gone")
    assert [bytes(v) for v in await s.unwrap(0)] == s.deks[:1]
    with pytest.raises(AgentUnavailable):
        await s.unwrap(0, 1)
    s.clock.advance(60)
    with pytest.raises(AgentUnavailable):
        await s.unwrap(0)


async def test_a_wrap_that_is_not_authentic_is_damage_and_leaves_nothing() -> None:
    s = Setup()
    bad = KeyRun(b"M" * 16, Purpose.BLOCK, 1, s.wraps[:1], 3)
    with pytest.raises(Damaged) as caught:
        await s.cache.unwrap([s.run(1), bad])
    assert caught.value.reason == "wrap"
    assert len(s.cache) == 0
    assert [bytes(v) for v in await s.unwrap(0, 1)] == s.deks[:2]


@pytest.mark.parametrize("answer", [b"", b"k" * 31, b"k" * 64])
async def test_an_answer_of_the_wrong_length_is_damage(answer: bytes) -> None:
    s = Setup()
    s.upstream.garble = lambda _: [answer]
    with pytest.raises(Damaged):
        await s.unwrap(0)
    assert len(s.cache) == 0


async def test_generated_keys_are_in_the_cache_under_their_wraps() -> None:
    s = Setup()
    fresh = await s.cache.generate(LOG_ID, Purpose.BLOCK, 3)
    assert fresh.kek_version == 1
    assert len({bytes(key) for key in fresh.keys}) == 3
    for key, wrapped in zip(fresh.keys, fresh.wrapped, strict=True):
        assert bytes(s.cache.peek(wrapped) or b"") == bytes(key)
        assert s.kek.unwrap(LOG_ID, Purpose.BLOCK, 1, wrapped) == bytes(key)
    assert s.asked == 1


async def test_a_stock_says_when_its_keys_are_gone() -> None:
    s = Setup(CachePolicy(max_age_s=60))
    fresh = await s.cache.generate(LOG_ID, Purpose.BLOCK, 2)
    kit = await s.cache.make_kit(directory=False)
    assert kit.deks is not None
    s.clock.advance(59)
    s.cache.sweep()
    assert not wiped(fresh)
    assert not wiped(kit.deks)
    s.clock.advance(1)
    s.cache.sweep()
    assert wiped(fresh)
    assert wiped(kit.deks)
    assert not any(any(key) for key in [*fresh.keys, *kit.deks.keys, kit.log_key])


async def test_no_kit_is_given_out_twice_and_none_that_has_expired() -> None:
    s = Setup(CachePolicy(max_age_s=60))
    kits = [await s.cache.make_kit(directory=False) for _ in range(50)]
    assert len({kit.log_id for kit in kits}) == 50
    assert len({wrapped for kit in kits for wrapped in (kit.deks.wrapped if kit.deks else ())}) == 100
    s.clock.advance(60)
    assert s.cache.take_kit() is None
    late = await s.cache.make_kit(directory=False)
    assert late.log_id not in {kit.log_id for kit in kits}
    assert any(late.log_key)


async def test_whoever_makes_many_files_asks_less_and_less_often() -> None:
    s = Setup()
    for _ in range(1000):
        await s.cache.make_kit(directory=False)
    assert s.asked < 12


async def test_makers_at_the_same_time_share_one_refill() -> None:
    s = Setup()
    s.upstream.gate = trio.Event()
    ids: set[bytes] = set()

    async def make() -> None:
        ids.add((await s.cache.make_kit(directory=False)).log_id)

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(make)
        await wait_all_tasks_blocked()
        s.upstream.gate.set()
    assert len(ids) == 5
    assert s.asked == 1


async def test_the_background_refills_the_stock_before_it_is_empty() -> None:
    s = Setup()
    await s.cache.make_kit(directory=False)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(s.cache.serve)
        taken = 0
        for _ in range(200):
            taken += s.cache.take_kit() is not None
            await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert taken == 200


async def test_the_background_survives_an_agent_that_is_away() -> None:
    s = Setup()
    await s.cache.make_kit(directory=False)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(s.cache.serve)
        s.upstream.failure = AgentUnavailable("gone")
        while s.cache.take_kit() is not None:
            await wait_all_tasks_blocked()
        s.upstream.failure = None
        await s.cache.make_kit(directory=False)
        asked = s.asked
        while s.asked == asked:
            assert s.cache.take_kit() is not None
            await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()


async def test_the_background_sweeps(autojump_clock: MockClock) -> None:
    kek = FakeKek(b"V" * 16, SeededRandom(1))
    cache = KeyCache(FakeUpstream(kek), CachePolicy(max_age_s=5), TrioClock())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(cache.serve)
        fresh = await cache.generate(LOG_ID, Purpose.BLOCK, 1)
        await trio.sleep(4)
        assert any(fresh.keys[0])
        await trio.sleep(2.5)
        assert wiped(fresh)
        assert not any(fresh.keys[0])
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    "bad",
    [
        {"max_age_s": 0}, {"max_age_s": -1}, {"max_age_s": 8 * 86400}, {"max_age_s": float("nan")},
        {"max_entries": 1023}, {"max_uses": 0},
    ],
)  # fmt: skip
def test_policies_that_mean_nothing_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        CachePolicy(**bad)  # type: ignore[arg-type]


class Late(FakeUpstream):
    """Its answers are made at once and come when `gate` is set."""

    async def generate(self, log_id: bytes, purpose: str, count: int) -> tuple[int, bytes, bytes]:
        answer = self._kek.version, *self._kek.fresh(log_id, Purpose(purpose), count)
        await self._asked(f"generate {count}")
        return answer

    async def kits(self, *, directory: bool, count: int, deks: int) -> tuple[int, list[KitBytes]]:
        answer = self._kek.version, [self._kek.kit(directory=directory, deks=deks) for _ in range(count)]
        await self._asked(f"kits {count}")
        return answer


async def test_an_answer_of_the_old_kek_that_was_under_way_is_asked_for_again() -> None:
    kek = FakeKek(b"V" * 16, SeededRandom(1))
    upstream = Late(kek)
    cache = KeyCache(upstream, CachePolicy(), FakeClock())
    gate = upstream.gate = trio.Event()
    got: list[int] = []

    async def generate() -> None:
        got.append((await cache.generate(LOG_ID, Purpose.BLOCK, 1)).kek_version)

    async def kit() -> None:
        got.append((await cache.make_kit(directory=False)).kek_version)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(generate)
        nursery.start_soon(kit)
        await wait_all_tasks_blocked()
        cache.renew(kek.rotate())
        gate.set()
    assert got == [2, 2]
    # One that never has the new KEK is not asked for ever.
    cache.renew(3)
    for call in (generate, kit):
        with pytest.raises(AgentUnavailable):
            await call()
