"""Locking a mounted volume and unlocking it again: when, and in which order.

Locking: programs get nothing more → requests that wait for the agent are given up, those of programs that write are
made again → the kernel writes back what it has and forgets it → frames and syncs → writes are refused, and what came
meanwhile is written → the kernel forgets that, too → keys and plaintext are overwritten → the agent is told, and drops
the KEK.
Until keys are overwritten the agent goes on serving this process; if that takes too long they go all the same.

When the agent is gone, everything is written at once with the keys at hand. What needs no new key goes on, until the
last key is too old; then the volume is locked as above, without the agent. Writes that need a key wait for it until
then. An agent that comes back with the KEK in time ends that; later, the first request that finds the gate closed does.

An agent that hangs is one that is gone, from when it was heard last: no key came later. From then on nothing here may
wait for it: locking asks for no key, and who finds the gate closed waits for it a moment, once, not for each request.
"""

from __future__ import annotations

import enum
import logging
import math
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import trio

from cryptfs.daemon.policies import Policies
from cryptfs.errors import CryptfsError
from cryptfs.fs.volume import Volume
from cryptfs.fuse.forgetting import Forgetting
from cryptfs.fuse.gate import NAMES_MAX_S, Gate
from cryptfs.keys.cache import KeyCache
from cryptfs.keys.link import AgentLink
from cryptfs.ports import Clock

log = logging.getLogger("cryptfs")

_DEADLINE_S = 10.0
_MARGIN_S = 1.0
"""Kept from the agent's deadline for what comes after writing back."""
_SECOND_LOOK_S = 1.0
_RETRY_S = 0.5
_LOOK_S = 1.0
"""How often to look whether keys are too old: trio's clock stands still while the machine is suspended, ages do not."""
_KNOCK_S = 1.0
"""How often a missing agent is looked for while keys are still good."""
_ATTACH_S, _SHORTLY_S = 2.0, 0.05
"""How long an attempt to attach again is waited for by those who find the gate closed, from its beginning; and how long
if it takes longer than that, as it does where the agent hangs."""
_WORD_S = 1.0
"""The same for the word of an agent that says, when it is asked, that the volume is unlocked."""


class State(enum.Enum):
    """Of the mount."""

    OPEN = "open"
    ADRIFT = "adrift"
    CLOSING = "closing"
    LOCKED = "locked"


class Locking:
    """One per mount. `on_event` is the link's; run `serve` beside the mount."""

    def __init__(self, gate: Gate, policies: Policies, clock: Clock) -> None:
        """`clock`: the one that keys age by."""
        self.state = State.OPEN
        self._gate = gate
        self._policies = policies
        self._clock = clock
        self._send, self._events = trio.open_memory_channel[tuple[str, Mapping[str, Any]]](math.inf)
        self._adrift_until = math.inf
        self._writing: set[trio.CancelScope] = set()
        self._attaching: trio.Event | None = None
        self._attaching_since = 0.0
        self._refused_send, self._refused = trio.open_memory_channel[tuple[int, int, int]](math.inf)

    def on_event(self, kind: str, event: Mapping[str, Any]) -> None:
        """See `AgentLink`. Never blocks."""
        if kind == "gone":
            heard_at = event.get("heard_at")
            self._lost(self._clock.monotonic() if heard_at is None else heard_at)
        self._send.send_nowait((kind, event))

    def _lost(self, since: float) -> None:
        """No key came after `since` (`Clock.monotonic`)."""
        if self.state is State.OPEN:
            self.state = State.ADRIFT
            self._adrift_until = since + self._policies.now.lifetime_s

    def _short(self) -> None:
        """A write could not have its key."""
        if self.state is State.OPEN:
            self._lost(self._clock.monotonic())
            self._send.send_nowait(("gone", {}))

    async def serve(self, link: AgentLink, keys: KeyCache, volume: Volume, session: Forgetting) -> None:
        """For ever: do what the agent says, and what its absence asks for."""
        self._link, self._keys, self._volume, self._session = link, keys, volume, session
        gate = self._gate
        gate.on_knock, gate.on_short = self._knock, self._short
        gate.on_refused = lambda *where: self._refused_send.send_nowait(where)
        if not session.expires_names():
            self._policies.on_change = self._bound_names
            self._bound_names()
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._drop_refused)
            while True:
                if self._clock.monotonic() >= self._adrift_until:
                    log.warning("the key agent is away for longer than any key may be kept: the volume is locked")
                    for scope in self._writing:
                        scope.cancel()
                    await self._close(math.inf, agent=False)
                with trio.move_on_after(self._next_look_s()) as waiting:
                    kind, event = await self._events.receive()
                if waiting.cancelled_caught:
                    continue
                if kind == "locking":
                    deadline_ms = event.get("deadline_ms")
                    within_s = deadline_ms / 1000 if type(deadline_ms) is int else _DEADLINE_S
                    await self._close(within_s - _MARGIN_S, agent=True)
                elif kind == "locked":
                    await self._close(0, agent=False)
                elif kind == "gone":
                    self._drift()
                elif kind in ("back", "unlocked"):
                    await self._reopen()

    def _next_look_s(self) -> float:
        left_s = self._adrift_until - self._clock.monotonic()
        return left_s if left_s == math.inf else max(0.0, min(left_s, _LOOK_S))

    def _bound_names(self) -> None:
        """Where the kernel cannot be told to forget names, it must not believe them for longer than a key may stay."""
        self._gate.entry_timeout_s = min(NAMES_MAX_S, self._policies.now.max_age_s)

    # without the agent -----------------------------------------------------------------------------------------

    def _drift(self) -> None:
        """The agent is gone: write everything with the keys at hand, and look for it until they are too old."""
        if self.state is not State.ADRIFT:
            return
        log.warning("the key agent is gone; flushing with the keys at hand")
        self._nursery.start_soon(self._write_all)
        self._nursery.start_soon(self._look_for_agent)

    async def _write_all(self) -> None:
        with suppress(OSError), trio.CancelScope() as scope:
            self._writing.add(scope)
            try:
                await self._volume.flush()
                await self._session.sync()
                await self._volume.flush()
            finally:
                self._writing.discard(scope)

    async def _look_for_agent(self) -> None:
        while self.state is State.ADRIFT:
            # A connection that comes about is an event of its own.
            with suppress(CryptfsError):
                await self._link.attach()
            await trio.sleep(_KNOCK_S)

    async def _knock(self) -> None:
        """Somebody finds the gate closed: is there an agent again, with the KEK?"""
        if self.state is not State.LOCKED:
            return
        if self._link.connected:
            await self._await_word()
            return
        now = trio.current_time()
        if self._attaching is None:
            self._attaching, self._attaching_since = trio.Event(), now
            self._nursery.start_soon(self._attach_again, self._attaching)
        with trio.move_on_at(max(self._attaching_since + _ATTACH_S, now + _SHORTLY_S)):
            await self._attaching.wait()

    async def _await_word(self) -> None:
        """`unlock` returned before this request came, perhaps, and its word is not seen yet: it comes before an answer.

        Everything here is bounded, and an agent that hangs costs each request no more than that.
        """
        unlocked = False
        with trio.move_on_after(_SHORTLY_S), suppress(CryptfsError):
            unlocked = await self._link.is_unlocked(self._volume.ctx.config.volume_id)
        if unlocked:
            with trio.move_on_after(_WORD_S):
                await self._gate.opened()

    async def _attach_again(self, over: trio.Event) -> None:
        """One attempt at a time, however many knock: it goes on when they are refused, and a hung agent may wake up."""
        try:
            with suppress(CryptfsError):
                await self._link.attach()
                await self._reopen()
        finally:
            self._attaching = None
            over.set()

    # closing and opening ---------------------------------------------------------------------------------------

    async def _close(self, within_s: float, *, agent: bool) -> None:
        if self.state is State.LOCKED:
            if agent:
                await self._confirm()
            return
        started = trio.current_time()
        log.info("locking the volume")
        self.state, self._adrift_until = State.CLOSING, math.inf
        # Without the agent no write can be helped any more, and the kernel would wait for it.
        self._gate.set(closed=True, refusing=not agent)
        self._link.apart = not agent
        self._link.interrupt()
        with trio.move_on_after(within_s if agent else _DEADLINE_S):
            await self._session.drop_everything()
            if agent:
                await self._write_back()
        self._gate.set(closed=True, refusing=True)
        with trio.move_on_after(_SECOND_LOOK_S):
            await self._session.drop_files_in_use()
        self._keys.close()
        self._volume.ctx.forget_plaintext()
        self.state = State.LOCKED
        log.info("the volume is locked, after %.2f s", trio.current_time() - started)
        if agent:
            await self._confirm()

    async def _write_back(self) -> None:
        """Until everything is written; again and again if the disk is full, for as long as there is time."""
        done = trio.Event()

        async def flush() -> None:
            # Not cancelled with its waiter: what a sync on a thread did must be known.
            await self._volume.flush()
            done.set()

        self._nursery.start_soon(flush)
        await done.wait()
        # Programs went on meanwhile. What they write from here on is refused; what was taken is written, too.
        self._gate.set(closed=True, refusing=True)
        await self._volume.flush()
        while self._volume.unwritten():
            await trio.sleep(_RETRY_S)
            await self._volume.flush()

    async def _confirm(self) -> None:
        unwritten = self._volume.unwritten()
        if unwritten:
            log.error("locked with changes of %d files in memory only: written after `unlock`", unwritten)
        with suppress(CryptfsError):
            await self._link.locked(unwritten)

    async def _reopen(self) -> None:
        if self.state in (State.OPEN, State.CLOSING):
            return
        if self.state is State.LOCKED:
            try:
                await self._link.reattach()
            except CryptfsError as error:
                log.error("the volume stays locked: %s", error)  # noqa: TRY400 - no fault of ours
                return
            self._keys.reopen()
        self.state, self._adrift_until, self._link.apart = State.OPEN, math.inf, False
        log.info("the volume is unlocked")
        self._gate.set(closed=False, refusing=False)

    async def _drop_refused(self) -> None:
        """Pages that were not written are no content: nobody must find them in the file once it can be read again."""
        async for ino, offset, length in self._refused:
            await self._session.drop_range(ino, offset, length)
