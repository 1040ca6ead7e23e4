"""Keys that live as short as the port allows: what relies on one for longer fails here at once.

A view is good until its holder's next `await`. `FleetingKeys` overwrites everything it ever handed out at the next
call that could suspend its caller, whether it does or not; `expiring` does so at every step of every task.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import trio.abc
import trio.lowlevel

from cryptfs.ports import FreshKeys, KeyRun, Kit, Rewrapped
from cryptfs.testing.keys import FakeDekProvider
from cryptfs.types import Purpose


class FleetingKeys:
    """`ports.DekProvider` over another one: each call that is awaited first wipes what earlier ones gave."""

    def __init__(self, keys: FakeDekProvider) -> None:
        self._keys = keys

    def peek(self, wrapped: bytes) -> memoryview | None:
        return self._keys.peek(wrapped)

    def peek_all(self, wraps: Sequence[bytes]) -> list[memoryview] | None:
        return self._keys.peek_all(wraps)

    async def unwrap(self, runs: Sequence[KeyRun]) -> list[list[memoryview]]:
        self._keys.wipe()
        return await self._keys.unwrap(runs)

    async def warm(self, runs: Sequence[KeyRun]) -> None:
        self._keys.wipe()
        await self._keys.warm(runs)

    async def generate(self, log_id: bytes, purpose: Purpose, count: int) -> FreshKeys:
        self._keys.wipe()
        return await self._keys.generate(log_id, purpose, count)

    async def rewrap(self, runs: Sequence[KeyRun]) -> Rewrapped:
        self._keys.wipe()
        return await self._keys.rewrap(runs)

    def renew(self, kek_version: int) -> None:
        self._keys.renew(kek_version)

    def take_kit(self) -> Kit | None:
        return self._keys.take_kit()

    async def make_kit(self, *, directory: bool) -> Kit:
        self._keys.wipe()
        return await self._keys.make_kit(directory=directory)

    def floor(self, log_id: bytes) -> int:
        return self._keys.floor(log_id)

    async def ask_floors(self, log_ids: Sequence[bytes]) -> list[int]:
        self._keys.wipe()
        return await self._keys.ask_floors(log_ids)

    async def begin(self, state_sequence: int) -> bool:
        self._keys.wipe()
        return await self._keys.begin(state_sequence)

    async def record(
        self, logs: Mapping[bytes, int], gone: Sequence[bytes] = (), state_sequence: int | None = None
    ) -> None:
        self._keys.wipe()
        await self._keys.record(logs, gone, state_sequence)

    async def accept(self, logs: Mapping[bytes, int]) -> None:
        self._keys.wipe()
        await self._keys.accept(logs)


class _EveryStep(trio.abc.Instrument):
    def __init__(self, expire: Callable[[], None]) -> None:
        self._expire = expire

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        """What a task that was suspended finds when it goes on."""
        del task
        self._expire()


@contextmanager
def expiring(expire: Callable[[], None]) -> Iterator[None]:
    """Call `expire` whenever a task goes on after it was suspended."""
    instrument = _EveryStep(expire)
    trio.lowlevel.add_instrument(instrument)
    try:
        yield
    finally:
        trio.lowlevel.remove_instrument(instrument)
