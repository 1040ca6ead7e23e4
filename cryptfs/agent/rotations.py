"""What daemons say of the rotations they are at, and the owner's word to begin or end one.

The daemon does the work and knows by itself when there is any (the `volume` file names several KEK versions). Here is
only its last report, for whoever asks; nothing of it is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cryptfs.agent import args as arg
from cryptfs.agent.args import Args
from cryptfs.agent.recording import Attachment, Peer
from cryptfs.errors import ProtocolError, VolumeBusy
from cryptfs.format.agent_msg import encode_push
from cryptfs.types import ID_BYTES

STATES = frozenset({"running", "waiting", "cancelled", "stopped", "done"})
STATE_MAX_CHARS = 32
MESSAGE_MAX_CHARS = 300


@dataclass(frozen=True, slots=True)
class _Report:
    peer: Peer
    said: Mapping[str, Any]


class Rotations:
    """The verbs; `attached` is the service's own table."""

    def __init__(self, attached: Mapping[bytes, Attachment]) -> None:
        self._attached = attached
        self._reports: dict[bytes, _Report] = {}
        self.inline: Mapping[str, Callable[[Args], dict[str, Any]]] = {
            "rotation-get": self._get,
            "rotate-start": self._start,
            "rotate-cancel": self._cancel,
        }

    def report(self, peer: Peer, args: Args) -> dict[str, Any]:
        """The verb `rotation`: how far the attached daemon is."""
        arg.expect(args, "volume_id", "kek_version", "state", "done", "total", "failed", "left", "message", "ids")
        volume_id = arg.get_id(args, "volume_id")
        attachment = self._attached.get(volume_id)
        if attachment is None or attachment.peer is not peer:
            raise ProtocolError("this connection is not attached to the volume")
        if arg.get_text(args, "state", STATE_MAX_CHARS) not in STATES:
            raise ProtocolError(f"state must be one of {', '.join(sorted(STATES))}")
        said: dict[str, Any] = {"state": args["state"]}
        said["kek_version"] = arg.get_int(args, "kek_version", 1, arg.VERSION_MAX)
        for name in ("done", "total", "failed", "left"):
            said[name] = arg.get_int(args, name, 0, arg.SEQUENCE_MAX)
        said["message"] = arg.get_text(args, "message", MESSAGE_MAX_CHARS)
        said["ids"] = arg.get_packed(args, "ids", ID_BYTES)
        self._reports[volume_id] = _Report(peer, said)
        return {}

    def _get(self, args: Args) -> dict[str, Any]:
        arg.expect(args, "volume_id")
        volume_id = arg.get_id(args, "volume_id")
        attachment, last = self._attached.get(volume_id), self._reports.get(volume_id)
        if attachment is None or (last is not None and last.peer is not attachment.peer):
            # What a daemon said goes with it.
            self._reports.pop(volume_id, None)
            last = None
        return {"attached": attachment is not None, "report": None if last is None else dict(last.said)}

    def _start(self, args: Args) -> dict[str, Any]:
        arg.expect(args, "volume_id")
        volume_id = arg.get_id(args, "volume_id")
        last = self._reports.get(volume_id)
        attachment = self._attached.get(volume_id)
        if attachment is not None and last is not None and last.peer is attachment.peer:
            if last.said["state"] == "running":
                raise VolumeBusy("everything is being rewritten already")
            del self._reports[volume_id]
        return {"was_attached": self._tell(volume_id, "rotate-start")}

    def _cancel(self, args: Args) -> dict[str, Any]:
        arg.expect(args, "volume_id")
        return {"was_attached": self._tell(arg.get_id(args, "volume_id"), "rotate-cancel")}

    def _tell(self, volume_id: bytes, event: str) -> bool:
        attachment = self._attached.get(volume_id)
        if attachment is None:
            return False
        attachment.peer.post(encode_push({"event": event, "volume_id": volume_id}))
        return True
