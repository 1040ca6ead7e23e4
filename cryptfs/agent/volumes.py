"""The volumes that are unlocked or mounted: where each lies, who its daemon is, and what comes and goes with its KEK.

A volume comes into the keyring by `hold` and leaves it by `forget`, and no other way. All else that governs how long it
may be used (times, limits, its root being asked again, its policy) begins and ends there with it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

import trio

from cryptfs.agent.audit import Auditor
from cryptfs.agent.holders import Holders
from cryptfs.agent.keyring import Keyring
from cryptfs.agent.limits import Limits
from cryptfs.agent.locking import Locks, Terms
from cryptfs.agent.policies import Policies
from cryptfs.agent.recording import Attachment, Peer
from cryptfs.agent.reverify import Reverifier
from cryptfs.agent.unlocking import Unlocked
from cryptfs.format.agent_msg import encode_push
from cryptfs.ports import Clock
from cryptfs.types import DOMAINS_DIR

log = logging.getLogger(__name__)


class Volumes:
    """One per service."""

    def __init__(self, keyring: Keyring, audit: Auditor, clock: Clock, changed: Callable[[], None]) -> None:
        """`changed` is called after the set of unlocked volumes may have changed."""
        self.keyring = keyring
        self._audit = audit
        self.changed = changed
        self.attached: dict[bytes, Attachment] = {}
        self._cipher_dirs: dict[bytes, bytes] = {}
        """As `unlock` said; what a daemon says when it attaches goes before it."""
        self.locks = Locks(keyring, self.attached, self.forget, clock, self._domains_of)
        self.holders = Holders(keyring, self.locks, self.attached)
        self.limits = Limits(audit, clock)
        self.locks.on_begin = self.limits.refuse
        self.reverifier = Reverifier(self.locks.begin, self._say_reverified, clock)
        self.policies = Policies(self.attached, self.locks, self.limits, self.reverifier, audit)

    async def serve(self) -> None:
        """Lock what is due, ask roots again, let limited unwraps through; for ever."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.locks.serve)
            nursery.start_soon(self.reverifier.serve)
            nursery.start_soon(self.limits.serve)

    @property
    def known(self) -> set[bytes]:
        """The ids of all that are unlocked or mounted."""
        return {*self.keyring.volume_ids, *self.attached}

    def state(self, volume_id: bytes) -> str:
        """``locking``, ``unlocked`` or ``locked``."""
        if volume_id in self.locks:
            return "locking"
        return "unlocked" if self.keyring.holds(volume_id) else "locked"

    # in and out ------------------------------------------------------------------------------------------------

    def hold(self, unlocked: Unlocked, cipher_dir: bytes, terms: Terms, holder: Peer | None) -> None:
        """Keep what was unlocked, and tell its daemon, if it has one. `holder`: only while this connection lasts."""
        volume = unlocked.volume
        was_locked = not self.keyring.holds(volume.volume_id)
        self.keyring.hold(volume.volume_id, volume.kek_version, unlocked.keks)
        self._audit.reseal(volume.volume_id, volume.kek_version, self.keyring.keks(volume.volume_id))
        self._cipher_dirs[volume.volume_id] = cipher_dir
        self.locks.held(volume.volume_id, terms)
        self.holders.unlocked(volume.volume_id, holder, was_locked=was_locked)
        self.reverifier.held(volume.volume_id, unlocked.standing, volume.policy.reverify_s)
        self.policies.learn(volume.volume_id, volume.serial, volume.policy)
        log.info("volume %s is unlocked", volume.volume_id.hex())
        attachment = self.attached.get(volume.volume_id)
        if attachment is not None:
            attachment.peer.post(encode_push({"event": "unlocked", "volume_id": volume.volume_id}))
        self.changed()

    def forget(self, volume_id: bytes) -> bool:
        """Wipe a volume's KEKs, tell its daemon, and begin to lock the domains in it; whether it was unlocked."""
        if self.keyring.holds(volume_id):
            self._audit.close_volume(volume_id, "forget")
        was_unlocked = self.keyring.forget(volume_id)
        self.locks.forgotten(volume_id)
        self.holders.forgotten(volume_id)
        self.reverifier.forgotten(volume_id)
        self.policies.forgotten(volume_id)
        cipher_dir = self.cipher_dir(volume_id)
        self._cipher_dirs.pop(volume_id, None)
        attachment = self.attached.get(volume_id)
        for domain_id in self._in(cipher_dir) if was_unlocked and cipher_dir else ():
            self.locks.begin(domain_id, "the volume it is in is locked")
        if was_unlocked:
            log.info("volume %s is locked", volume_id.hex())
            if attachment is not None:
                attachment.peer.post(encode_push({"event": "locked", "volume_id": volume_id}))
            self.changed()
        return was_unlocked

    def forget_all(self) -> None:
        """Wipe every KEK and tell the daemons."""
        for volume_id in self.keyring.volume_ids:
            self.forget(volume_id)

    def _say_reverified(self, volume_id: bytes, outcome: str, why: str, then: str) -> None:
        self._audit.event("reverify", outcome, volume_id=volume_id, detail={"message": why[:200], "then": then})

    # places ----------------------------------------------------------------------------------------------------

    def lies_at(self, volume_id: bytes, cipher_dir: bytes) -> None:
        """Where an unlocked volume lies whose daemon is gone."""
        self._cipher_dirs[volume_id] = cipher_dir

    def cipher_dir(self, volume_id: bytes) -> bytes:
        """Where the volume lies; empty if nobody said."""
        attachment = self.attached.get(volume_id)
        return attachment.cipher_dir if attachment else self._cipher_dirs.get(volume_id, b"")

    def at(self, path: bytes) -> bytes | None:
        """The volume (no domain) mounted on `path`, else the one whose cipher directory it is, as far as we know."""
        for name in ("mountpoint", "cipher_dir"):
            for volume_id, attachment in self.attached.items():
                # A domain's directory may have been renamed since we were told.
                is_sure = name == "cipher_dir" or not _is_domain(attachment.cipher_dir)
                if getattr(attachment, name) == path and is_sure:
                    return volume_id
        return next((volume_id for volume_id, at in self._cipher_dirs.items() if at == path), None)

    def _domains_of(self, volume_id: bytes) -> list[bytes]:
        """Volumes that are unlocked and lie in this one (FORMAT.md §2)."""
        cipher_dir = self.cipher_dir(volume_id)
        return self._in(cipher_dir) if cipher_dir else []

    def _in(self, cipher_dir: bytes) -> list[bytes]:
        domains = os.path.join(cipher_dir, DOMAINS_DIR.encode())
        return [held for held in self.keyring.volume_ids if os.path.dirname(self.cipher_dir(held)) == domains]


def _is_domain(cipher_dir: bytes) -> bool:
    """Whether it is called as a domain's is (FORMAT.md §2)."""
    return os.path.basename(os.path.dirname(cipher_dir)) == DOMAINS_DIR.encode()
