"""Floors beside the keys of logs: a key that stays in the cache never hides that its log became newer."""

from __future__ import annotations

import pytest

from cryptfs.keys.cache import KeyCache
from cryptfs.keys.policy import CachePolicy
from cryptfs.ports import KeyRun
from cryptfs.testing.clock import FakeClock
from cryptfs.testing.freshness import FakeRecord
from cryptfs.testing.keys import FakeKek, FakeUpstream
from cryptfs.testing.randomness import SeededRandom
from cryptfs.types import DELETED, Purpose

LOG_ID = b"L" * 16


class Setup:
    def __init__(self, policy: CachePolicy | None = None) -> None:
        self.clock = FakeClock()
        self.kek = FakeKek(b"V" * 16, SeededRandom(1))
        self.record = FakeRecord()
        self.cache = KeyCache(FakeUpstream(self.kek, self.record), policy or CachePolicy(), self.clock)
        self.wrapped = self.kek.fresh(LOG_ID, Purpose.LOG_FILE, 1)[1]

    async def fetch(self, purpose: Purpose = Purpose.LOG_FILE) -> None:
        await self.cache.unwrap([KeyRun(LOG_ID, purpose, 1, (self.wrapped,))])


@pytest.mark.parametrize("policy", [CachePolicy(), CachePolicy(caching=False), CachePolicy(max_uses=1)])
async def test_a_floor_comes_with_its_key(policy: CachePolicy) -> None:
    s = Setup(policy)
    s.record.floors[LOG_ID] = 5
    await s.fetch()
    assert s.cache.floor(LOG_ID) == 5


async def test_a_cached_key_hides_nothing_that_was_recorded_since() -> None:
    s = Setup()
    await s.fetch()
    assert s.cache.floor(LOG_ID) == 0
    await s.cache.record({LOG_ID: 9})
    assert s.cache.floor(LOG_ID) == 9
    await s.cache.record({LOG_ID: 8})
    assert s.cache.floor(LOG_ID) == 9
    await s.cache.record({}, [LOG_ID])
    assert s.cache.floor(LOG_ID) == DELETED
    await s.cache.record({LOG_ID: 10})
    assert s.cache.floor(LOG_ID) == DELETED
    await s.cache.accept({LOG_ID: 3})
    assert s.cache.floor(LOG_ID) == 3


@pytest.mark.parametrize("directory", [True, False])
async def test_nor_does_the_key_of_a_kit(directory: bool) -> None:
    s = Setup()
    kit = await s.cache.make_kit(directory=directory)
    await s.cache.record({kit.log_id: 7})
    assert s.cache.peek(kit.log_wrapped) is not None
    assert s.cache.floor(kit.log_id) == 7


async def test_nor_that_of_a_log_made_anew() -> None:
    s = Setup()
    made = await s.cache.generate(LOG_ID, Purpose.LOG_FILE, 1)
    await s.cache.record({LOG_ID: 7})
    assert s.cache.peek(made.wrapped[0]) is not None
    assert s.cache.floor(LOG_ID) == 7


async def test_floors_go_with_the_last_key_and_not_before() -> None:
    s = Setup(CachePolicy(max_age_s=60))
    await s.fetch()
    s.clock.advance(30)
    # Another key of the same log comes later: the older one's end does not take the floor along.
    other = s.kek.fresh(LOG_ID, Purpose.LOG_FILE, 1)[1]
    s.record.floors[LOG_ID] = 4
    await s.cache.unwrap([KeyRun(LOG_ID, Purpose.LOG_FILE, 1, (other,))])
    s.clock.advance(31)
    s.cache.sweep()
    assert s.cache.peek(s.wrapped) is None
    assert s.cache.floor(LOG_ID) == 4
    s.clock.advance(30)
    s.cache.sweep()
    assert s.cache._floors == {}


async def test_many_recorded_logs_cost_the_cache_nothing() -> None:
    s = Setup()
    await s.fetch()
    await s.cache.record({b"%016d" % number: 1 for number in range(1000)})
    assert len(s.cache._floors) == 1


async def test_a_second_key_for_a_log_does_not_make_its_floor_forgotten() -> None:
    s = Setup()
    s.record.floors[LOG_ID] = 7
    await s.cache.unwrap([KeyRun(LOG_ID, Purpose.LOG_FILE, 1, (s.wrapped,))])
    assert s.cache.floor(LOG_ID) == 7
    await s.cache.generate(LOG_ID, Purpose.LOG_FILE, 1)
    assert s.cache.floor(LOG_ID) == 7
