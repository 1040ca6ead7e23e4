"""Volumes that are unlocked for commands only: each is held for some connections, and locked when the last one ends.

So a command that is killed leaves nothing unlocked that was locked before. What somebody unlocked for good, or unlocks
for good meanwhile, is nobody's here. A daemon that attaches takes over: then its own end decides (`attach_verbs`).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Container, Mapping
from typing import Any

from cryptfs.agent import args as arg
from cryptfs.agent.args import Args
from cryptfs.agent.keyring import Keyring
from cryptfs.agent.locking import Locks
from cryptfs.agent.recording import Peer


class Holders:
    """The verbs `hold` and `release` (which waits). `attached`: the volumes that have a daemon."""

    def __init__(self, keyring: Keyring, locks: Locks, attached: Container[bytes]) -> None:
        self._keyring = keyring
        self._locks = locks
        self._attached = attached
        self._peers: dict[bytes, set[Peer]] = {}
        self.of_peer: Mapping[str, Callable[[Peer, Args], dict[str, Any]]] = {"hold": self._hold}
        self.slow: Mapping[str, Callable[[Peer, Args], Awaitable[dict[str, Any]]]] = {"release": self._release}

    def unlocked(self, volume_id: bytes, peer: Peer | None, *, was_locked: bool) -> None:
        """The volume was unlocked for `peer`'s connection; None: for good."""
        if peer is None:
            self._peers.pop(volume_id, None)
        elif was_locked or volume_id in self._peers:
            self._peers.setdefault(volume_id, set()).add(peer)

    def forgotten(self, volume_id: bytes) -> None:
        """The KEK is gone, or stays whoever ends: there is nothing left to be held for anybody."""
        self._peers.pop(volume_id, None)

    def holds_any(self, peer: Peer) -> bool:
        """Whether a volume would be locked, or might be, if this connection ended."""
        return any(peer in peers for peers in self._peers.values())

    def gone(self, peer: Peer) -> None:
        """The connection ended without a word."""
        for volume_id in [volume_id for volume_id, peers in self._peers.items() if peer in peers]:
            if self._was_last(volume_id, peer):
                self._locks.begin(volume_id, f"process {peer.pid}, for which it was unlocked, is gone")

    def _hold(self, peer: Peer, args: Args) -> dict[str, Any]:
        arg.expect(args, "volume_id", "while_connected")
        volume_id, while_connected = arg.get_id(args, "volume_id"), arg.get_bool(args, "while_connected")
        was_unlocked = self._keyring.holds(volume_id) and volume_id not in self._locks
        if was_unlocked:
            self.unlocked(volume_id, peer if while_connected else None, was_locked=False)
        return {"was_unlocked": was_unlocked}

    async def _release(self, peer: Peer, args: Args) -> dict[str, Any]:
        arg.expect(args, "volume_id")
        volume_id = arg.get_id(args, "volume_id")
        if self._was_last(volume_id, peer):
            await self._locks.lock(volume_id, f"process {peer.pid}, for which it was unlocked, is done")
        return {}

    def _was_last(self, volume_id: bytes, peer: Peer) -> bool:
        """Take the connection off the volume; whether nobody else is there who has it unlocked."""
        peers = self._peers.get(volume_id, set())
        if peer not in peers:
            return False
        peers.discard(peer)
        if peers:
            return False
        del self._peers[volume_id]
        return volume_id not in self._attached
