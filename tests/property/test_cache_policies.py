"""A cache under policies that change at any moment: never a wrong key, never one that is too old, none too many."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from cryptfs.keys.cache import KeyCache
from cryptfs.keys.policy import SWEEP_INTERVAL_S, CachePolicy
from cryptfs.ports import FreshKeys, KeyRun
from cryptfs.testing.clock import FakeClock
from cryptfs.testing.keys import FakeKek, FakeUpstream
from cryptfs.testing.randomness import SeededRandom
from cryptfs.types import DEK_BYTES, WRAPPED_BYTES, Purpose

T = TypeVar("T")

LOG_ID, BLOCKS = b"L" * 16, 30
BLOCK = st.integers(0, BLOCKS - 1)
POLICY = st.builds(
    CachePolicy,
    max_age_s=st.sampled_from((0.5, 1, 5, 20, 60)),
    max_entries=st.sampled_from((1024, 2048)),
    max_uses=st.sampled_from((None, None, 1, 2)),
    caching=st.sampled_from((True, True, True, False)),
)


class Held:
    """A view that came at `born`; `until`: the latest moment any policy since then allows."""

    def __init__(self, view: memoryview, born: float, until: float) -> None:
        self.view, self.born, self.until = view, born, until


class Policies(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.clock = FakeClock()
        self.kek = FakeKek(b"V" * 16, SeededRandom(3))
        self.policy = CachePolicy()
        self.cache = KeyCache(FakeUpstream(self.kek), self.policy, self.clock)
        keys, wraps = self.kek.fresh(LOG_ID, Purpose.BLOCK, BLOCKS)
        self.deks = [keys[at : at + DEK_BYTES] for at in range(0, len(keys), DEK_BYTES)]
        self.wraps = [wraps[at : at + WRAPPED_BYTES] for at in range(0, len(wraps), WRAPPED_BYTES)]
        self.held: list[Held] = []
        self.stocks: list[tuple[FreshKeys, Held]] = []

    def run(self, call: Callable[[], Awaitable[T]]) -> T:
        return trio.run(call)

    def hold(self, views: list[memoryview]) -> list[Held]:
        now = self.clock.monotonic()
        held = [Held(view, now, now + self.policy.lifetime_s) for view in views]
        self.held += held
        return held

    @rule(policy=POLICY)
    def change(self, policy: CachePolicy) -> None:
        self.policy = policy
        for held in self.held:
            held.until = min(held.until, held.born + policy.lifetime_s) if policy.caching else float("-inf")
        self.cache.set_policy(policy)
        self.nothing_is_too_old()

    @rule(first=BLOCK, count=st.integers(1, 8))
    def unwrap(self, first: int, count: int) -> None:
        blocks = range(first, min(first + count, BLOCKS))
        known = {block for block in blocks if self.wraps[block] in self.cache._slots}
        run = KeyRun(LOG_ID, Purpose.BLOCK, 1, [self.wraps[block] for block in blocks], first)
        (views,) = self.run(lambda: self.cache.unwrap([run]))
        assert [bytes(view) for view in views] == [self.deks[block] for block in blocks]
        self.hold([view for block, view in zip(blocks, views, strict=True) if block not in known])

    @rule(first=BLOCK, count=st.integers(1, 8))
    def peek(self, first: int, count: int) -> None:
        blocks = range(first, min(first + count, BLOCKS))
        views = self.cache.peek_all([self.wraps[block] for block in blocks])
        if views is not None:
            assert self.policy.caching
            assert [bytes(view) for view in views] == [self.deks[block] for block in blocks]

    @rule(count=st.sampled_from((2, 700)))
    def generate(self, count: int) -> None:
        fresh = self.run(lambda: self.cache.generate(LOG_ID, Purpose.BLOCK, count))
        assert not fresh.wiped
        (held,) = self.hold([fresh.keys[0]])
        self.stocks.append((fresh, held))

    @rule(first=BLOCK)
    def warm(self, first: int) -> None:
        run = KeyRun(LOG_ID, Purpose.BLOCK, 1, [self.wraps[first]], first)
        self.run(lambda: self.cache.warm([run]))

    @rule()
    def take_a_kit(self) -> None:
        kit = self.run(lambda: self.cache.make_kit(directory=False))
        assert any(kit.log_key)
        assert kit.deks is not None
        assert not kit.deks.wiped

    @rule(seconds=st.sampled_from((0.25, 1, 4, 30)))
    def let_time_pass(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.cache.sweep()
        self.nothing_is_too_old()

    def nothing_is_too_old(self) -> None:
        now = self.clock.monotonic()
        for held in self.held:
            assert held.until > now or not any(held.view), f"{now - held.born} s old"
        for stock, held in self.stocks:
            assert stock.wiped or any(held.view), "a stock whose keys are gone does not say so"
        self.held = [held for held in self.held if any(held.view)]
        self.stocks = [(stock, held) for stock, held in self.stocks if not stock.wiped]

    @invariant()
    def there_are_not_too_many(self) -> None:
        assert len(self.cache) <= (self.policy.max_entries if self.policy.caching else 0)
        assert all(count >= 0 for count in (self.cache.statistics.expiries, self.cache.statistics.evictions))
        assert self.policy.lifetime_s <= (60 if self.policy.caching else SWEEP_INTERVAL_S)


TestPolicies = Policies.TestCase
TestPolicies.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
