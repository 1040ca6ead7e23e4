"""Asking a root key's holder again, while a volume is unlocked, whether it still opens it.

A token can be pulled, a key in it destroyed, a login ended: then the volume must not stay open just because its KEKs
are here. Where a kind of root can be taken back like that (`RootProvider.revocable`), the root stays open after
`unlock`, and every so often it unwraps once more what it unwrapped then. If it refuses, the volume is locked at once;
if it cannot be reached, after a few tries. Fail closed: an answer that nobody foresaw is no "yes".

The bound (R5), from the moment the root says no: the interval, then what `lock` takes. If it only falls silent: the
interval, and TRIES times PATIENCE_S, and RETRY_S between them.

Everything here runs on the one loop, but for the calls into a root: they may block and are made in a thread, one at a
time for each volume. Between asking and hearing the answer the volume may be locked or unlocked anew: then the answer
is about a `Standing` that is not the volume's any more, and is dropped.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import trio

from cryptfs.crypto.secret import Secret
from cryptfs.errors import BackendUnavailable, CryptfsError
from cryptfs.format.policy import REVERIFY_DEFAULT_S
from cryptfs.ports import Clock, RootKey

log = logging.getLogger(__name__)

DEFAULT_EVERY_S = REVERIFY_DEFAULT_S
TRIES = 3
"""How often in a row a root may be out of reach before its volume is locked."""
RETRY_S = 5.0
PATIENCE_S = 10.0
"""How long one answer may take. The thread that waits for it cannot be ended, and is left to itself."""
LOOK_S = 1.0
"""How often times are looked at: sleeping until they are due would not count the time the machine is asleep."""


@dataclass(frozen=True, slots=True)
class Standing:
    """A root key that stays open, and what it must go on unwrapping: `wrapped`, bound to `context`."""

    root: RootKey
    wrapped: bytes
    context: bytes

    def ask(self) -> None:
        """Raises what the root raises unless it still unwraps. Blocks."""
        Secret(self.root.unwrap(self.wrapped, self.context)).wipe()

    def close(self) -> None:
        """End the root. Blocks."""
        self.root.close()


@dataclass(slots=True)
class _Watched:
    standing: Standing
    every_s: float
    due: float
    silent: int = 0
    asking: bool = False


Say = Callable[[bytes, str, str, str], None]
"""(volume id, outcome, why, what follows): for the audit log."""


class Reverifier:
    """One per service. `lock` begins locking a volume, giving a reason."""

    def __init__(self, lock: Callable[[bytes, str], None], say: Say, clock: Clock) -> None:
        self.retry_s = RETRY_S
        self.patience_s = PATIENCE_S
        self._lock = lock
        self._say = say
        self._clock = clock
        self._watched: dict[bytes, _Watched] = {}
        self._to_close: list[Standing] = []
        self._wake = trio.Event()

    def __contains__(self, volume_id: bytes) -> bool:
        return volume_id in self._watched

    def held(self, volume_id: bytes, standing: Standing | None, every_s: int | None = None) -> None:
        """The volume was unlocked (again), by a root that is to be asked every so often, or by one that is not.

        The root is this object's to close. One that was watched before for the volume is closed.
        """
        self.forgotten(volume_id)
        if standing is not None:
            every = float(DEFAULT_EVERY_S if every_s is None else every_s)
            self._watched[volume_id] = _Watched(standing, every, self._clock.monotonic() + every)
            self._wake.set()

    def set_interval(self, volume_id: bytes, every_s: int | None) -> None:
        """Another interval, None for the default; the next question comes no later than it would have."""
        watched = self._watched.get(volume_id)
        if watched is not None:
            watched.every_s = float(DEFAULT_EVERY_S if every_s is None else every_s)
            watched.due = min(watched.due, self._clock.monotonic() + watched.every_s)

    def forgotten(self, volume_id: bytes) -> None:
        """The volume is locked: its root is closed, soon and in a thread."""
        watched = self._watched.pop(volume_id, None)
        if watched is not None:
            self._to_close.append(watched.standing)
            self._wake.set()

    async def serve(self) -> None:
        """Ask whoever is due, for ever."""
        async with trio.open_nursery() as nursery:
            while True:
                with trio.move_on_after(LOOK_S if self._watched else float("inf")):
                    await self._wake.wait()
                self._wake = trio.Event()
                closing, self._to_close = self._to_close, []
                for standing in closing:
                    nursery.start_soon(self._close, standing)
                now = self._clock.monotonic()
                for volume_id, watched in self._watched.items():
                    if watched.due <= now and not watched.asking:
                        watched.asking = True
                        nursery.start_soon(self._ask, volume_id, watched)

    async def _ask(self, volume_id: bytes, watched: _Watched) -> None:
        failure: CryptfsError | None = BackendUnavailable("it does not answer")
        with trio.move_on_after(self.patience_s):
            failure = await trio.to_thread.run_sync(_answer, watched.standing, abandon_on_cancel=True)
        watched.asking = False
        if self._watched.get(volume_id) is not watched:
            return
        if failure is None:
            watched.silent = 0
            watched.due = self._clock.monotonic() + watched.every_s
            return
        if isinstance(failure, BackendUnavailable):
            watched.silent += 1
            if watched.silent < TRIES:
                log.warning("volume %s: its root key cannot be reached: %s", volume_id.hex(), failure)
                self._say(volume_id, "backend", str(failure), f"try {watched.silent} of {TRIES}")
                watched.due = self._clock.monotonic() + min(self.retry_s, watched.every_s)
                return
            self._end(volume_id, "backend", f"its root key cannot be reached: {failure}")
        else:
            self._end(volume_id, "denied", f"its root key refuses: {failure}")

    def _end(self, volume_id: bytes, outcome: str, why: str) -> None:
        log.warning("volume %s is locked: %s", volume_id.hex(), why)
        self._say(volume_id, outcome, why, "locked")
        # Locking may take the daemon a while: the root is not asked meanwhile, the answer is known.
        self.forgotten(volume_id)
        self._lock(volume_id, why)

    async def _close(self, standing: Standing) -> None:
        try:
            with trio.move_on_after(self.patience_s):
                await trio.to_thread.run_sync(standing.close, abandon_on_cancel=True)
        except Exception as error:  # noqa: BLE001 - the volume is locked; nothing is left to do about it
            log.warning("a root key's holder failed at its end: %s", type(error).__name__)


def _answer(standing: Standing) -> CryptfsError | None:
    """What is wrong, or None. An error nobody foresaw is a refusal, by its kind only: its text may hold anything."""
    try:
        standing.ask()
    except CryptfsError as error:
        return error
    except Exception as error:  # noqa: BLE001 - fail closed
        return CryptfsError(f"it failed: {type(error).__name__}")
    return None
