"""A cache whose policy changes while it is used, and what it counts; on a clock turned by hand."""

from __future__ import annotations

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from cryptfs.errors import UsageError
from cryptfs.format.policy import Policy
from cryptfs.keys.policy import CachePolicy, Overrides
from cryptfs.types import Purpose
from tests.unit.test_cache import LOG_ID, ZEROS, Setup, wiped


async def test_a_shorter_age_expires_at_once_what_is_too_old_and_nothing_else() -> None:
    s = Setup(CachePolicy(max_age_s=60))
    (old,) = await s.unwrap(0)
    stock = await s.cache.generate(LOG_ID, Purpose.BLOCK, 1)
    s.clock.advance(20)
    (young,) = await s.unwrap(1)
    s.clock.advance(5)
    s.cache.set_policy(CachePolicy(max_age_s=10))
    assert bytes(old) == ZEROS
    assert wiped(stock)
    assert bytes(young) == s.deks[1]
    s.clock.advance(5)
    assert s.cache.peek(s.wraps[1]) is None
    assert bytes(young) == ZEROS


async def test_a_longer_age_is_not_for_keys_that_came_before() -> None:
    s = Setup(CachePolicy(max_age_s=10))
    (old,) = await s.unwrap(0)
    s.cache.set_policy(CachePolicy(max_age_s=100))
    (young,) = await s.unwrap(1)
    s.clock.advance(10)
    s.cache.sweep()
    assert bytes(old) == ZEROS
    s.clock.advance(89)
    s.cache.sweep()
    assert bytes(young) == s.deks[1]


async def test_after_any_changes_the_sweep_misses_none() -> None:
    s = Setup(CachePolicy(max_age_s=60), blocks=40)
    ages = [60.0, 7.0, 30.0, 100.0, 3.0, 50.0]
    born: dict[int, float] = {}
    due: dict[int, float] = {}
    views: dict[int, memoryview] = {}
    for block in range(40):
        age = ages[block % len(ages)]
        s.cache.set_policy(CachePolicy(max_age_s=age))
        now = s.clock.monotonic()
        (views[block],) = await s.unwrap(block)
        born[block], due[block] = now, now + age
        due = {each: min(due[each], born[each] + age) for each in due}
        s.clock.advance(1)
        s.cache.sweep()
        for each, view in views.items():
            assert any(view) == (due[each] > s.clock.monotonic()), each


async def test_none_drops_everything_and_keeps_nothing_until_it_is_taken_back() -> None:
    s = Setup()
    held = await s.unwrap(0, 1)
    stock = await s.cache.generate(LOG_ID, Purpose.BLOCK, 2)
    kit = await s.cache.make_kit(directory=False)
    s.cache.set_policy(CachePolicy(caching=False))
    assert not any(any(view) for view in [*held, *stock.keys, kit.log_key])
    assert wiped(stock)
    assert s.cache.take_kit() is None
    asked = s.asked
    await s.unwrap(0)
    await s.unwrap(0)
    assert s.asked == asked + 2
    s.cache.set_policy(CachePolicy())
    await s.unwrap(0)
    await s.unwrap(0)
    assert s.asked == asked + 3


async def test_an_answer_on_its_way_comes_under_the_policy_it_finds() -> None:
    s = Setup()
    s.upstream.gate = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(s.unwrap, 0)
        await wait_all_tasks_blocked()
        s.cache.set_policy(CachePolicy(caching=False))
        s.upstream.gate.set()
    assert s.cache.peek(s.wraps[0]) is None
    assert len(s.cache) == 0


async def test_fewer_entries_push_out_the_oldest() -> None:
    s = Setup(blocks=8)
    (oldest,) = await s.unwrap(0)
    await s.cache.generate(LOG_ID, Purpose.BLOCK, 1024)
    assert len(s.cache) == 1025
    s.cache.set_policy(CachePolicy(max_entries=1024))
    assert bytes(oldest) == ZEROS
    assert len(s.cache) == 1024
    assert s.cache.statistics.evictions == 1
    assert s.cache.statistics.expiries == 0


async def test_fewer_uses_overwrite_what_was_used_as_often() -> None:
    s = Setup(CachePolicy(max_uses=5))
    often, seldom = await s.unwrap(0, 1)
    for _ in range(2):
        s.cache.peek(s.wraps[0])
    s.cache.set_policy(CachePolicy(max_uses=2))
    assert bytes(often) == ZEROS
    assert bytes(seldom) == s.deks[1]
    assert s.cache.peek(s.wraps[1]) is not None
    assert s.cache.peek(s.wraps[1]) is None


async def test_a_closed_cache_takes_another_policy_and_stays_closed() -> None:
    s = Setup()
    s.cache.close()
    s.cache.set_policy(CachePolicy(max_age_s=5))
    s.cache.reopen()
    (view,) = await s.unwrap(0)
    s.clock.advance(5)
    s.cache.sweep()
    assert bytes(view) == ZEROS


async def test_what_is_counted() -> None:
    s = Setup(CachePolicy(max_age_s=60))
    count = s.cache.statistics
    await s.unwrap(0, 1, 2)
    assert (count.hits, count.misses, count.unwraps, count.round_trips) == (0, 3, 3, 1)
    await s.unwrap(0, 1)
    s.cache.peek(s.wraps[2])
    s.cache.peek_all(s.wraps[:3])
    assert s.cache.peek(s.wraps[3]) is None
    assert (count.hits, count.misses, count.unwraps, count.round_trips) == (6, 3, 3, 1)
    await s.cache.warm([s.run(3, 4)])
    assert (count.hits, count.misses, count.unwraps, count.round_trips) == (6, 3, 5, 2)
    await s.unwrap(3, 4, 5)
    assert (count.hits, count.misses, count.unwraps, count.round_trips) == (8, 4, 6, 3)
    await s.cache.generate(LOG_ID, Purpose.BLOCK, 2)
    assert (count.hits, count.misses, count.unwraps, count.round_trips) == (8, 4, 6, 4)
    assert count.expiries == 0
    s.clock.advance(60)
    assert s.cache.peek(s.wraps[0]) is None
    assert count.expiries == 3
    s.cache.sweep()
    assert count.expiries == 8
    await s.unwrap(0)
    s.cache.wipe()
    assert (count.expiries, count.evictions, len(s.cache)) == (8, 0, 0)


async def test_a_key_that_was_used_up_expires_once() -> None:
    s = Setup(CachePolicy(max_uses=1))
    await s.unwrap(0, 1)
    assert s.cache.peek(s.wraps[0]) is None
    assert s.cache.statistics.expiries == 1
    s.clock.advance(60)
    s.cache.sweep()
    assert s.cache.statistics.expiries == 2


def test_what_a_mount_says_goes_before_what_the_volume_says() -> None:
    policy = Policy(max_age_s=5, max_entries=2048, max_uses=3, caching=0, idle_s=9)
    assert Overrides().over(policy) == CachePolicy(5, 2048, 3, caching=False)
    assert Overrides().over(Policy()) == CachePolicy()
    overrides = Overrides(max_age_s=0.5, caching=True)
    assert overrides.over(policy) == CachePolicy(0.5, 2048, 3, caching=True)
    assert overrides.names == ["caching", "max_age_s"]
    assert Overrides(max_entries=1024, max_uses=1).over(policy) == CachePolicy(5, 1024, 1, caching=False)
    for bad in (Overrides(max_age_s=0), Overrides(max_entries=5), Overrides(max_uses=0)):
        with pytest.raises(UsageError):
            bad.over(policy)
