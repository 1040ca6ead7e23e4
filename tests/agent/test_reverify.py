"""When a root key's holder is asked again, and what follows from its answers. On a clock turned by hand."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
import trio
import trio.testing

from cryptfs.agent import reverify
from cryptfs.agent.reverify import Reverifier, Standing
from cryptfs.errors import BackendUnavailable, CryptfsError, Denied, VolumeDamaged, WrongSecret
from cryptfs.testing.clock import FakeClock
from tests.agent.conftest import settled

VOLUME = bytes(16)


@dataclass
class Root:
    """Answers as it is told."""

    failure: Exception | None = None
    asked: int = 0
    closed: int = 0
    hangs: threading.Event | None = None
    unwrapped: bytearray = field(default_factory=lambda: bytearray(b"k" * 32))

    def wrap(self, key: object, context: bytes) -> bytes:
        raise AssertionError("nothing is wrapped here")

    def unwrap(self, wrapped: bytes, context: bytes) -> bytearray:
        assert (wrapped, context) == (b"wrapped", b"context")
        self.asked += 1
        if self.hangs is not None:
            self.hangs.wait(30)
        if self.failure is not None:
            raise self.failure
        return self.unwrapped

    def close(self) -> None:
        self.closed += 1


@dataclass
class World:
    clock: FakeClock
    reverifier: Reverifier
    locked: list[str]
    said: list[tuple[str, str]]

    async def at(self, seconds: float, *, answered: bool = True) -> None:
        """So much later; whoever is due was asked, and has answered."""
        self.clock.advance(seconds)
        self.reverifier._wake.set()
        await trio.testing.wait_all_tasks_blocked(0.01)
        if answered:
            await settled(lambda: not any(each.asking for each in self.reverifier._watched.values()))


@asynccontextmanager
async def world() -> AsyncIterator[World]:
    clock = FakeClock()
    locked: list[str] = []
    said: list[tuple[str, str]] = []

    def lock(volume_id: bytes, why: str) -> None:
        assert volume_id == VOLUME
        locked.append(why)

    reverifier = Reverifier(lock, lambda _id, outcome, _why, then: said.append((outcome, then)), clock)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(reverifier.serve)
        yield World(clock, reverifier, locked, said)
        nursery.cancel_scope.cancel()


def standing(root: Root) -> Standing:
    return Standing(root, b"wrapped", b"context")


async def test_a_root_that_goes_on_is_asked_at_every_interval_and_its_answer_wiped() -> None:
    async with world() as w:
        root = Root()
        w.reverifier.held(VOLUME, standing(root), 60)
        await w.at(59)
        assert root.asked == 0
        for times in (1, 2, 3):
            await w.at(61)
            assert root.asked == times
        assert root.unwrapped == bytes(32)
        assert not w.locked
        assert not w.said
        assert VOLUME in w.reverifier


async def test_the_interval_is_a_minute_unless_said_otherwise() -> None:
    async with world() as w:
        root = Root()
        w.reverifier.held(VOLUME, standing(root))
        await w.at(59)
        assert root.asked == 0
        await w.at(2)
        assert root.asked == 1


@pytest.mark.parametrize(
    "failure", [Denied("gone"), WrongSecret("no"), VolumeDamaged("other"), CryptfsError("what"), ValueError("secret")]
)
async def test_a_refusal_locks_at_once(failure: Exception) -> None:
    async with world() as w:
        root = Root(failure)
        w.reverifier.held(VOLUME, standing(root), 5)
        await w.at(6)
        assert root.asked == 1
        assert len(w.locked) == 1
        assert "refuses" in w.locked[0]
        assert "secret" not in w.locked[0]
        assert w.said == [("denied", "locked")]
        await settled(lambda: root.closed == 1)


async def test_silence_locks_after_a_few_tries_and_an_answer_between_them_counts() -> None:
    async with world() as w:
        root = Root(BackendUnavailable("unplugged"))
        w.reverifier.held(VOLUME, standing(root), 60)
        await w.at(61)
        await w.at(6)
        assert (root.asked, w.locked) == (2, [])
        root.failure = None
        await w.at(6)
        assert (root.asked, w.locked) == (3, [])
        root.failure = BackendUnavailable("unplugged")
        await w.at(61)
        await w.at(6)
        assert not w.locked
        await w.at(6)
        assert len(w.locked) == 1
        assert "unplugged" in w.locked[0]
        assert [then for _, then in w.said] == ["try 1 of 3", "try 2 of 3", "try 1 of 3", "try 2 of 3", "locked"]


async def test_a_root_that_hangs_is_silent_and_holds_nobody_up() -> None:
    async with world() as w:
        root = Root(hangs=threading.Event())
        assert root.hangs is not None
        w.reverifier.patience_s = 0.05
        w.reverifier.held(VOLUME, standing(root), 5)
        try:
            for tries in range(1, reverify.TRIES + 1):
                assert not w.locked
                await w.at(6, answered=False)
                await settled(lambda: len(w.said) == tries)  # noqa: B023 - awaited here
            assert len(w.locked) == 1
        finally:
            root.hangs.set()
        await settled(lambda: root.closed == 1)


async def test_an_answer_about_an_earlier_unlock_is_dropped() -> None:
    async with world() as w:
        old, new = Root(Denied("gone"), hangs=threading.Event()), Root()
        assert old.hangs is not None
        w.reverifier.held(VOLUME, standing(old), 5)
        await w.at(6, answered=False)
        await settled(lambda: old.asked == 1)
        w.reverifier.held(VOLUME, standing(new), 5)
        old.hangs.set()
        await settled(lambda: old.closed == 1)
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert not w.locked
        assert VOLUME in w.reverifier


async def test_unlocked_without_such_a_root_nothing_is_asked() -> None:
    async with world() as w:
        root = Root()
        w.reverifier.held(VOLUME, standing(root), 5)
        w.reverifier.held(VOLUME, None)
        await settled(lambda: root.closed == 1)
        await w.at(600)
        assert root.asked == 0
        assert VOLUME not in w.reverifier
        w.reverifier.forgotten(VOLUME)


async def test_another_interval_counts_from_now_on() -> None:
    async with world() as w:
        root = Root()
        w.reverifier.held(VOLUME, Standing(root, b"wrapped", b"context"), 1000)
        w.reverifier.set_interval(VOLUME, 30)
        await w.at(29)
        assert root.asked == 0
        await w.at(1)
        assert root.asked == 1
        # A longer one does not put off what is due.
        w.reverifier.set_interval(VOLUME, 1000)
        await w.at(30)
        assert root.asked == 2
        await w.at(999)
        assert root.asked == 2
        w.reverifier.set_interval(VOLUME, None)
        await w.at(1)
        assert root.asked == 3
        await w.at(reverify.DEFAULT_EVERY_S)
        assert root.asked == 4
        w.reverifier.set_interval(bytes(15) + b"x", 5)  # nothing is asked about it
