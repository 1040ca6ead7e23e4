"""Whether requests are let through: what handlers look at, what the daemon sets when keys come and go."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from cryptfs.errors import VolumeLocked

NAMES_MAX_S = 3600.0
"""How long the kernel may believe a name if nothing asks for less."""


class Traffic:
    """Counts the requests of a mount: how many were begun and how many answered, since it began."""

    __slots__ = ("answered", "begun")

    def __init__(self) -> None:
        self.begun = 0
        self.answered = 0


class Gate:
    """One per mount. Open until `close`; nothing here awaits but `knock` and `keys_back`.

    `closed`: nothing is shown any more, no names, no content. `refusing`: nothing is written any more either.
    `entry_timeout_s`: how long the kernel may believe a name.
    """

    __slots__ = ("_changed", "closed", "entry_timeout_s", "on_knock", "on_refused", "on_short", "refusing", "traffic")

    def __init__(self) -> None:
        self.closed = False
        self.refusing = False
        self.entry_timeout_s = NAMES_MAX_S
        self.traffic = Traffic()
        """Of all gates of a mount the same."""
        self._changed = trio.Event()
        self.on_knock: Callable[[], Awaitable[None]] | None = None
        """Called before a request is refused: keys may be there again."""
        self.on_short: Callable[[], None] | None = None
        """Called when a key that was needed could not be had."""
        self.on_refused: Callable[[int, int, int], None] | None = None
        """Called with inode, offset and length (bytes) of pages that were not written."""

    @property
    def name_timeout_s(self) -> float:
        """For an answer that is given now."""
        return 0.0 if self.closed else self.entry_timeout_s

    async def knock(self) -> None:
        """For whoever finds the gate closed. Raises `VolumeLocked` if it stays so."""
        if self.on_knock is not None:
            await self.on_knock()
        self.check()

    def check(self) -> None:
        """Before anything is handed out that was found while the gate was open. Raises `VolumeLocked`."""
        if self.closed:
            raise VolumeLocked("the volume is locked")

    def set(self, *, closed: bool, refusing: bool) -> None:
        """Open or close it; whoever waits looks again."""
        self.closed = closed
        self.refusing = refusing
        self._changed.set()
        self._changed = trio.Event()

    async def opened(self) -> None:
        """Until it is open."""
        while self.closed:
            await self._changed.wait()

    async def keys_back(self) -> None:
        """Keys could not be had, and a program's data is at stake: wait until trying again makes sense.

        The wait is bounded: without keys the gate closes when the last ones are too old.
        """
        if self.on_short is None:
            raise VolumeLocked("the volume is locked")
        self.on_short()
        if self.closed:
            # Asking for keys was interrupted, or the agent has a lot to do: it goes on serving us.
            await trio.sleep(_AGAIN_S)
        else:
            await self._changed.wait()


_AGAIN_S = 0.02
