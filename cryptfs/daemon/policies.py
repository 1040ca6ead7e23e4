"""Which policy the mount's cache obeys: the volume's, as the agent tells it, but for what the mount's options say.

Nothing here awaits but the answer to the agent's `report`, so a change counts between two steps of everything else.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import trio

from cryptfs.errors import CryptfsError, UnsupportedFormat, VolumeDamaged
from cryptfs.format.policy import NO_POLICY, parse_policy
from cryptfs.keys.cache import KeyCache
from cryptfs.keys.link import AgentLink
from cryptfs.keys.policy import CachePolicy, Overrides

log = logging.getLogger("cryptfs")


class Policies:
    """One per mount. `rule` the cache as soon as there is one; run `serve` beside the mount."""

    def __init__(self, overrides: Overrides) -> None:
        self._overrides = overrides
        self.now: CachePolicy = overrides.over(NO_POLICY)
        self.on_change: Callable[[], None] = lambda: None
        self._serial = 0
        self._keys: KeyCache | None = None
        self._asked = trio.Event()

    def rule(self, keys: KeyCache) -> None:
        """Have the cache obey from now on."""
        self._keys = keys
        keys.set_policy(self.now)

    def on_event(self, kind: str, event: Mapping[str, Any]) -> bool:
        """See `AgentLink`; whether it was about policies. Never blocks."""
        if kind == "policy":
            self._told(event)
        elif kind == "report":
            self._asked.set()
        else:
            return False
        return True

    def _told(self, event: Mapping[str, Any]) -> None:
        serial = event.get("serial")
        # What is told when attaching may come to be heard after a change that was made meanwhile.
        if type(serial) is not int or serial < self._serial:
            return
        try:
            now = self._overrides.over(parse_policy(event.get("policy")))
        except (UnsupportedFormat, VolumeDamaged) as error:
            log.error("the agent's word on the policy makes no sense: %s", error)  # noqa: TRY400 - no fault of ours
            return
        self._serial = serial
        if now == self.now:
            return
        log.info("the cache obeys another policy: %s", now)
        self.now = now
        if self._keys is not None:
            self._keys.set_policy(now)
        self.on_change()

    async def serve(self, link: AgentLink) -> None:
        """Tell the agent about the cache whenever it asks, for ever."""
        while True:
            await self._asked.wait()
            self._asked = trio.Event()
            keys, now = self._keys, self.now
            if keys is None:
                continue
            cache = asdict(keys.statistics) | {"entries": len(keys)}
            policy = {
                "caching": int(now.caching), "max_age_ms": max(1, round(now.max_age_s * 1000)),
                "max_entries": now.max_entries, "max_uses": now.max_uses,
            }  # fmt: skip
            # An agent that is gone asks again when it is back.
            with suppress(CryptfsError):
                await link.report(cache, policy, self._overrides.names)
