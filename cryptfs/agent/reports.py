"""What daemons say of their caches: asked by a push, answered by the request `report`, waited for a moment only.

A daemon that is busy, hangs or is just leaving costs whoever asks `REPORT_S` and no more; its volume has no report
then.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import trio

from cryptfs.agent import args as arg
from cryptfs.agent.args import Args
from cryptfs.agent.recording import Attachment, Peer
from cryptfs.errors import ProtocolError
from cryptfs.format.agent_msg import encode_push
from cryptfs.format.policy import BOUNDS

REPORT_S = 2.0

COUNTERS = ("hits", "misses", "unwraps", "expiries", "evictions", "round_trips", "entries")
_COUNTER_MAX = (1 << 63) - 1
_CACHE_FIELDS = ("caching", "max_age_ms", "max_entries", "max_uses")
_MAYBE = frozenset({"max_uses"})


@dataclass(slots=True)
class _Asked:
    report: dict[str, Any] | None = None
    over: trio.Event = field(default_factory=trio.Event)


class Reports:
    """One per service; `attached` is the service's own table, by volume id."""

    def __init__(self, attached: Mapping[bytes, Attachment]) -> None:
        self._attached = attached
        self._asked: dict[bytes, _Asked] = {}

    async def ask(self) -> dict[bytes, dict[str, Any] | None]:
        """The report of each attached daemon; None: it did not answer in time. Who asks at the same time shares it."""
        asked: dict[bytes, _Asked] = {}
        for volume_id, attachment in self._attached.items():
            if volume_id not in self._asked:
                self._asked[volume_id] = _Asked()
                attachment.peer.post(encode_push({"event": "report", "volume_id": volume_id}))
            asked[volume_id] = self._asked[volume_id]
        with trio.move_on_after(REPORT_S) as scope:
            for each in asked.values():
                await each.over.wait()
        if scope.cancelled_caught:
            for volume_id, each in asked.items():
                if self._asked.get(volume_id) is each:
                    self.gone(volume_id)
        return {volume_id: each.report for volume_id, each in asked.items()}

    def gone(self, volume_id: bytes) -> None:
        """No answer will come from the volume's daemon, or none that is waited for."""
        asked = self._asked.pop(volume_id, None)
        if asked is not None:
            asked.over.set()

    def answered(self, peer: Peer, args: Args) -> dict[str, Any]:
        """The verb `report`. One that comes too late is dropped. Raises `ProtocolError`."""
        arg.expect(args, "volume_id", "cache", "policy", "overridden")
        volume_id = arg.get_id(args, "volume_id")
        attachment = self._attached.get(volume_id)
        if attachment is None or attachment.peer is not peer:
            raise ProtocolError("this connection is not attached to the volume")
        report = {"cache": _cache(args["cache"]), "policy": _policy(args["policy"]), "overridden": args["overridden"]}
        if type(report["overridden"]) is not list or any(name not in tuple(BOUNDS) for name in report["overridden"]):
            raise ProtocolError("overridden must be an array of a policy's fields")
        asked = self._asked.pop(volume_id, None)
        if asked is not None:
            asked.report = report
            asked.over.set()
        return {}


def _cache(value: object) -> dict[str, int]:
    if type(value) is not dict or value.keys() != set(COUNTERS):
        raise ProtocolError("cache must be a map of its counters")
    return {name: arg.get_int(value, name, 0, _COUNTER_MAX) for name in COUNTERS}


def _policy(value: object) -> dict[str, int | None]:
    if type(value) is not dict or value.keys() != set(_CACHE_FIELDS):
        raise ProtocolError("policy must be a map of what a cache obeys")
    return {
        name: None if name in _MAYBE and value[name] is None else arg.get_int(value, name, 0, _COUNTER_MAX)
        for name in _CACHE_FIELDS
    }
