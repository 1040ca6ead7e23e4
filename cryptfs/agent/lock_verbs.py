"""The verbs that lock: one volume, all of them and the agent's end, one for good; and the daemon's word that it did.

When and in which order is `locking`'s affair.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import trio

from cryptfs.agent import args as arg
from cryptfs.agent.args import Args
from cryptfs.agent.recording import Peer
from cryptfs.agent.shred_places import ShredPlaces
from cryptfs.agent.threads import Threads
from cryptfs.agent.volume_args import get_shred_secret
from cryptfs.agent.volumes import Volumes
from cryptfs.errors import ProtocolError, VolumeBusy
from cryptfs.format.volume import FILE_MAX_BYTES, Volume, parse_volume


class Locking:
    """`verbs` by name; `locked` is the one that does not wait."""

    def __init__(self, volumes: Volumes, places: ShredPlaces, threads: Threads, stopping: trio.Event) -> None:
        """`stopping` is set when the agent is to end."""
        self._volumes = volumes
        self._places = places
        self._threads = threads
        self._stopping = stopping
        self.verbs: Mapping[str, Callable[[Peer, Args], Awaitable[dict[str, Any]]]] = {
            "lock": self._lock,
            "lock-path": self._lock_path,
            "shred": self._shred_volume,
            "shred-check": self._shred_check,
            "shred-id": self._shred_id,
            "stop": self._stop,
        }

    async def _lock(self, peer: Peer, args: Args) -> dict[str, Any]:
        arg.expect(args, "volume_id")
        outcome = await self._volumes.locks.lock(arg.get_id(args, "volume_id"), f"process {peer.pid} asked for it")
        return {"was_unlocked": outcome.was_unlocked, "unwritten": outcome.unwritten}

    async def _lock_path(self, peer: Peer, args: Args) -> dict[str, Any]:
        arg.expect(args, "path")
        path = arg.get_path(args, "path")
        if not path:
            raise ProtocolError("path must not be empty")
        volume_id = self._volumes.at(path)
        if volume_id is None:
            return {"volume_id": None, "was_unlocked": False, "unwritten": 0}
        outcome = await self._volumes.locks.lock(volume_id, f"process {peer.pid} asked for it")
        return {"volume_id": volume_id, "was_unlocked": outcome.was_unlocked, "unwritten": outcome.unwritten}

    def locked(self, peer: Peer, args: Args) -> dict[str, Any]:
        """The verb `locked`. Raises `ProtocolError`."""
        arg.expect(args, "volume_id", "unwritten")
        self._volumes.locks.confirm(
            peer, arg.get_id(args, "volume_id"), arg.get_int(args, "unwritten", 0, arg.VERSION_MAX)
        )
        return {}

    async def _shred_volume(self, peer: Peer, args: Args) -> dict[str, Any]:
        """Destroy the volume's shred secret where that is the agent's to do, and lock the volume."""
        volume, given = self._to_shred(args)
        return await self._destroyed(peer, volume.volume_id, lambda: self._places.destroy(volume, given))

    async def _shred_check(self, _peer: Peer, args: Args) -> dict[str, Any]:
        """Whether `shred` would have a secret to destroy, for which it is read, and no more."""
        volume, given = self._to_shred(args)
        return {"there": await self._threads.ask_root(lambda: self._places.check(volume, given))}

    async def _shred_id(self, peer: Peer, args: Args) -> dict[str, Any]:
        """The same for a volume of which only the id is known, if its secret lies here."""
        arg.expect(args, "volume_id")
        volume_id = arg.get_id(args, "volume_id")
        return await self._destroyed(peer, volume_id, lambda: self._places.destroy_kept(volume_id))

    def _to_shred(self, args: Args) -> tuple[Volume, bytes]:
        arg.expect(args, "volume", "shred_secret")
        return parse_volume(arg.get_bytes(args, "volume", 0, FILE_MAX_BYTES)), get_shred_secret(args)

    async def _destroyed(self, peer: Peer, volume_id: bytes, destroy: Callable[[], bool]) -> dict[str, Any]:
        if volume_id in self._volumes.attached and self._volumes.keyring.holds(volume_id):
            raise VolumeBusy("the volume is mounted, and not locked")
        # Before the lock: if we die in between, the secret is gone and so is the agent's memory.
        destroyed = await self._threads.ask_root(destroy)
        await self._volumes.locks.lock(volume_id, f"process {peer.pid} shreds it")
        return {"destroyed": destroyed}

    async def _stop(self, peer: Peer, args: Args) -> dict[str, Any]:
        arg.expect(args)
        await self._volumes.locks.lock_all(f"process {peer.pid} ends the agent")
        self._stopping.set()
        return {}
