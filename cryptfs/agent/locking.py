"""When volumes are locked, and in which order: the daemon first, the KEK last, at the deadline in any case.

A volume without a daemon is locked at once. One with a daemon is *locking* first: its daemon is told, may go on asking
for keys to write back what programs wrote, and says `locked` when it has erased its own. Nobody else is served
meanwhile. Whoever asked for the lock waits for its end, but it goes on without them.

A volume is also locked when its time is up: so long after `unlock` (absolute), or so long after the last request that
needed its KEK (idle).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import trio

from cryptfs.agent.keyring import Keyring
from cryptfs.agent.recording import Attachment, Peer
from cryptfs.errors import ProtocolError
from cryptfs.format.agent_msg import encode_push
from cryptfs.ports import Clock

log = logging.getLogger(__name__)

DEADLINE_S = 10.0
"""How long a daemon may take to write everything back before the KEK is dropped all the same."""
LOOK_S = 1.0
"""How often times are looked at. Sleeping until they are due would not count the time the machine is asleep."""
TIME_MAX_S = 366 * 86400


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a lock ended. `unwritten`: files whose last changes wait in the daemon, None if it did not say in time."""

    was_unlocked: bool
    unwritten: int | None = 0


@dataclass(frozen=True, slots=True)
class Terms:
    """How long a volume stays unlocked; None: for ever. Seconds."""

    for_s: int | None = None
    idle_s: int | None = None

    def before(self, other: Terms) -> Terms:
        """These, and those of `other` where they say nothing."""
        return Terms(
            other.for_s if self.for_s is None else self.for_s, other.idle_s if self.idle_s is None else self.idle_s
        )


@dataclass(slots=True)
class _Timed:
    """`terms`: what `unlock` said, which goes before what the volume's `policy` says."""

    terms: Terms
    policy: Terms
    unlocked_at: float
    used_at: float

    @property
    def lock_at(self) -> float | None:
        for_s = self.terms.before(self.policy).for_s
        return None if for_s is None else self.unlocked_at + for_s

    @property
    def idle_s(self) -> int | None:
        return self.terms.before(self.policy).idle_s


@dataclass(slots=True)
class _Closing:
    deadline: float
    peer: Peer
    over: trio.Event = field(default_factory=trio.Event)
    unwritten: int | None = None


class Locks:
    """One per service. `forget` wipes a volume's KEKs and tells its daemon, if it has one, that they are gone.

    `domains` names the volumes that lie in another: they are locked with it.
    """

    def __init__(
        self, keyring: Keyring, attached: Mapping[bytes, Attachment], forget: Callable[[bytes], bool], clock: Clock,
        domains: Callable[[bytes], Sequence[bytes]] = lambda _: (),
    ) -> None:  # fmt: skip
        self._domains = domains
        self.deadline_s = DEADLINE_S
        self.on_begin: Callable[[bytes], None] = lambda _: None
        """Called when a volume begins to be locked."""
        self._keyring = keyring
        self._attached = attached
        self._forget = forget
        self._clock = clock
        self._closing: dict[bytes, _Closing] = {}
        self._timed: dict[bytes, _Timed] = {}
        self._wake = trio.Event()

    def __contains__(self, volume_id: bytes) -> bool:
        return volume_id in self._closing

    def __bool__(self) -> bool:
        return bool(self._closing)

    def serves(self, volume_id: object, peer: Peer) -> bool:
        """Whether this peer may still have keys of the volume, which is being locked or not."""
        closing = self._closing.get(volume_id) if type(volume_id) is bytes else None
        return closing is None or closing.peer is peer

    # locking ---------------------------------------------------------------------------------------------------

    def begin(self, volume_id: bytes, why: str) -> None:
        """Start locking a volume and its domains; nothing happens to those that are locked or being locked."""
        for domain_id in self._domains(volume_id):
            self.begin(domain_id, "the volume it is in is locked")
        if volume_id in self._closing or not self._keyring.holds(volume_id):
            return
        daemon = self._attached.get(volume_id)
        if daemon is None:
            log.info("locking volume %s: %s", volume_id.hex(), why)
            self._forget(volume_id)
            return
        log.info("locking volume %s (%s): waiting for process %d", volume_id.hex(), why, daemon.peer.pid)
        self._closing[volume_id] = _Closing(trio.current_time() + self.deadline_s, daemon.peer)
        self.on_begin(volume_id)
        daemon.peer.post(
            encode_push({"event": "locking", "volume_id": volume_id, "deadline_ms": int(self.deadline_s * 1000)})
        )
        self._wake.set()

    async def lock(self, volume_id: bytes, why: str) -> Outcome:
        """Lock a volume and its domains, and wait until they are. If the caller is cancelled, the locking goes on.

        What could not be written is counted for all of them.
        """
        was_unlocked = self._keyring.holds(volume_id)
        wanted = [volume_id, *self._domains(volume_id)]
        self.begin(volume_id, why)
        unwritten: int | None = 0
        for closing in [self._closing[each] for each in wanted if each in self._closing]:
            await closing.over.wait()
            unwritten = None if unwritten is None or closing.unwritten is None else unwritten + closing.unwritten
        return Outcome(was_unlocked, unwritten)

    async def settled(self, volume_id: bytes) -> None:
        """Wait while the volume is being locked."""
        while (closing := self._closing.get(volume_id)) is not None:
            await closing.over.wait()

    async def lock_all(self, why: str) -> None:
        """Lock every volume at the same time, and wait until all are."""
        for volume_id in self._keyring.volume_ids:
            self.begin(volume_id, why)
        for volume_id in list(self._closing):
            await self.settled(volume_id)

    def confirm(self, peer: Peer, volume_id: bytes, unwritten: int) -> None:
        """The daemon has erased its keys. Raises `ProtocolError` if the volume is not being locked with it."""
        closing = self._closing.get(volume_id)
        if closing is None or closing.peer is not peer:
            raise ProtocolError("the volume is not being locked")
        closing.unwritten = unwritten
        self._forget(volume_id)

    def forgotten(self, volume_id: bytes) -> None:
        """The KEK is gone, however that came about."""
        self._timed.pop(volume_id, None)
        closing = self._closing.pop(volume_id, None)
        if closing is not None:
            closing.over.set()

    # times -----------------------------------------------------------------------------------------------------

    def held(self, volume_id: bytes, terms: Terms) -> None:
        """The volume was unlocked (again): its times count from now."""
        now = self._clock.monotonic()
        self._timed[volume_id] = _Timed(terms, Terms(), now, now)
        self._wake.set()

    def set_terms(self, volume_id: bytes, policy: Terms) -> None:
        """What the policy of an unlocked volume says of its times; counts at once, from the same beginnings."""
        timed = self._timed.get(volume_id)
        if timed is not None and timed.policy != policy:
            if timed.idle_s is None:
                # Uses were not counted so far.
                timed.used_at = self._clock.monotonic()
            timed.policy = policy
            self._wake.set()

    def used(self, volume_id: bytes) -> None:
        """A request needed the KEK."""
        timed = self._timed.get(volume_id)
        if timed is not None and timed.idle_s is not None:
            timed.used_at = self._clock.monotonic()

    def locks_in_s(self, volume_id: bytes) -> int | None:
        """Seconds until the volume is locked if nothing happens; None: never."""
        timed = self._timed.get(volume_id)
        due = _due(timed) if timed is not None else None
        return None if due is None else max(0, round(due - self._clock.monotonic()))

    async def serve(self) -> None:
        """Lock what is due, for ever."""
        while True:
            timed = any(_due(t) is not None for t in self._timed.values())
            soonest = min((c.deadline - trio.current_time() for c in self._closing.values()), default=LOOK_S)
            if not timed and not self._closing:
                soonest = float("inf")
            with trio.move_on_after(max(0.0, min(soonest, LOOK_S if timed else soonest))):
                await self._wake.wait()
            self._wake = trio.Event()
            for volume_id, closing in list(self._closing.items()):
                if closing.deadline <= trio.current_time():
                    log.warning("volume %s: process %d is late, locked without it", volume_id.hex(), closing.peer.pid)
                    self._forget(volume_id)
            now = self._clock.monotonic()
            for volume_id, times in list(self._timed.items()):
                due = _due(times)
                if due is not None and due <= now:
                    self.begin(volume_id, "its time is up" if due == times.lock_at else "it was idle")


def _due(timed: _Timed) -> float | None:
    idle = None if timed.idle_s is None else timed.used_at + timed.idle_s
    dues = [due for due in (timed.lock_at, idle) if due is not None]
    return min(dues) if dues else None
