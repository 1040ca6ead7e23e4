"""Each unlocked volume's policy: where the agent obeys it, and that its daemon hears of it.

It comes from the `volume` file, which nobody without the KEK can change: from every file that was authenticated, the
newest (by serial) counts. What an `unlock` said for itself (`--for`, `--idle`) goes before it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from cryptfs.agent.audit import Auditor
from cryptfs.agent.limits import Limits
from cryptfs.agent.locking import Locks, Terms
from cryptfs.agent.recording import Attachment
from cryptfs.agent.reverify import Reverifier
from cryptfs.format.agent_msg import encode_push
from cryptfs.format.policy import NO_POLICY, Policy


class Policies:
    """One per service; `attached` is the service's own table, by volume id."""

    def __init__(
        self, attached: Mapping[bytes, Attachment], locks: Locks, limits: Limits, reverifier: Reverifier, audit: Auditor
    ) -> None:
        self._attached = attached
        self._locks = locks
        self._limits = limits
        self._reverifier = reverifier
        self._audit = audit
        self._known: dict[bytes, tuple[int, Policy]] = {}

    def learn(self, volume_id: bytes, serial: int, policy: Policy) -> None:
        """What an authentic `volume` file of a volume that is unlocked says; nothing happens if it is an older one.

        A change counts at once, and is on the record with what it was before.
        """
        before = self._known.get(volume_id)
        if before is not None and serial < before[0]:
            return
        self._known[volume_id] = (serial, policy)
        self._locks.set_terms(volume_id, terms_of(policy))
        self._limits.set(volume_id, policy.unwraps_per_s)
        self._reverifier.set_interval(volume_id, policy.reverify_s)
        if before is None or before[1] == policy:
            return
        self._audit.event(
            "policy", volume_id=volume_id, detail={"serial": serial, "before": _text(before[1]), "after": _text(policy)}
        )
        attachment = self._attached.get(volume_id)
        if attachment is not None:
            attachment.peer.post(encode_push({"event": "policy", "volume_id": volume_id, **self.told(volume_id)}))

    def told(self, volume_id: bytes) -> dict[str, Any]:
        """What a daemon is told: serial and policy."""
        serial, policy = self._known.get(volume_id, (0, NO_POLICY))
        return {"serial": serial, "policy": policy.encode()}

    def of(self, volume_id: bytes) -> Policy | None:
        """The policy of a volume that is unlocked."""
        known = self._known.get(volume_id)
        return None if known is None else known[1]

    def forgotten(self, volume_id: bytes) -> None:
        """The KEK is gone."""
        self._known.pop(volume_id, None)
        self._limits.forgotten(volume_id)


def terms_of(policy: Policy) -> Terms:
    """What a policy says of a volume's times."""
    return Terms(policy.for_s, policy.idle_s)


def _text(policy: Policy) -> str:
    return json.dumps(policy.encode(), separators=(",", ":"), sort_keys=True)
