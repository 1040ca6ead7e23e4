"""The agent's verbs about rotations: what a daemon says of its own, and what the command line asks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cryptfs.errors import ProtocolError
from cryptfs.keys.agent_answers import get_bin, get_bool, get_int
from cryptfs.types import ID_BYTES

IDS_MAX = 64
"""Ids of logs that could not be rewritten, of which a report tells: enough to look at, and a short message."""
MESSAGE_MAX_CHARS = 300
_STATES = frozenset({"running", "waiting", "cancelled", "stopped", "done"})


@dataclass(frozen=True, slots=True)
class Report:
    """How far a rotation to `kek_version` is, in logs.

    `state`: ``running``; ``waiting`` (the volume is locked, or the agent away); ``cancelled``; ``stopped`` (`message`
    says by what); ``done`` (`left`: how many still need an older KEK; `ids`: which, the first few).
    """

    kek_version: int
    state: str
    done: int = 0
    total: int = 0
    failed: int = 0
    left: int = 0
    message: str = ""
    ids: tuple[bytes, ...] = ()

    def args(self, volume_id: bytes) -> dict[str, Any]:
        """As arguments of the request `rotation`."""
        return {
            "volume_id": volume_id, "kek_version": self.kek_version, "state": self.state, "done": self.done,
            "total": self.total, "failed": self.failed, "left": self.left,
            "message": self.message[:MESSAGE_MAX_CHARS], "ids": b"".join(self.ids[:IDS_MAX]),
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Known:
    """What the agent knows: whether the volume is mounted, and what its daemon said last."""

    attached: bool
    report: Report | None


def get_known(result: Mapping[str, Any]) -> Known:
    """The result of `rotation-get`. Raises `ProtocolError` for anything of another shape."""
    said = result.get("report")
    if said is None:
        return Known(get_bool(result, "attached"), None)
    if not isinstance(said, dict) or said.get("state") not in _STATES or type(said.get("message")) is not str:
        raise ProtocolError("a rotation's report is no map with a state and a message")
    ids = get_bin(said, "ids")
    report = Report(
        get_int(said, "kek_version"), said["state"], get_int(said, "done"), get_int(said, "total"),
        get_int(said, "failed"), get_int(said, "left"), said["message"],
        tuple(ids[at : at + ID_BYTES] for at in range(0, len(ids) - ID_BYTES + 1, ID_BYTES)),
    )  # fmt: skip
    return Known(get_bool(result, "attached"), report)


def get_was_attached(result: Mapping[str, Any]) -> bool:
    """The result of `rotate-start` and `rotate-cancel`."""
    return get_bool(result, "was_attached")
