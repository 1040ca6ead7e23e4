"""The verbs of the data path: keys made, unwrapped and wrapped anew, for whoever has the volume unlocked.

They run without an `await`; only an `unwrap` may have to wait: the volume's first one for its freshness record, which
is on disk yet, others where the policy limits them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from cryptfs.agent import args as arg
from cryptfs.agent.args import Args
from cryptfs.agent.freshness import Records
from cryptfs.agent.keyring import UnwrapItem
from cryptfs.agent.recording import Peer
from cryptfs.agent.volumes import Volumes
from cryptfs.errors import VolumeLocked
from cryptfs.types import Purpose

_LOG_PURPOSES = frozenset({Purpose.LOG_FILE, Purpose.LOG_DIR})


class Keys:
    """`inline` by name; `unwrap_late` instead of ``unwrap`` where `must_wait` says so."""

    def __init__(self, volumes: Volumes, records: Records) -> None:
        self._volumes = volumes
        self._records = records
        self.inline: Mapping[str, Callable[[Args], dict[str, Any]]] = {
            "unwrap": self._unwrap,
            "rewrap": self._rewrap,
            "generate": self._generate,
            "kits": self._kits,
        }

    def must_wait(self, args: Args) -> bool:
        """Whether this ``unwrap`` cannot be answered on the spot."""
        volume_id = args.get("volume_id")
        if type(volume_id) is not bytes or not self._volumes.keyring.holds(volume_id):
            return False
        return self._records.get(volume_id) is None or self._is_limited(volume_id)

    def _unwrap(self, args: Args) -> dict[str, Any]:
        arg.expect(args, "volume_id", "items")
        volume_id, items = arg.get_id(args, "volume_id"), arg.get_items(args, "items")
        self._volumes.limits.take(volume_id, items)
        return self._unwrapped(volume_id, items)

    async def unwrap_late(self, peer: Peer, args: Args) -> dict[str, Any]:
        """The verb ``unwrap``, after its wait. Raises `VolumeLocked`, `FreshnessUnavailable`."""
        arg.expect(args, "volume_id", "items")
        volume_id, items = arg.get_id(args, "volume_id"), arg.get_items(args, "items")
        if not self._volumes.locks.serves(volume_id, peer):
            raise VolumeLocked("the volume is being locked")
        self._volumes.locks.used(volume_id)
        await self._records.opened(volume_id)
        if self._is_limited(volume_id):
            await self._volumes.limits.turn(volume_id, peer, items)
        else:
            self._volumes.limits.take(volume_id, items)
        if not self._volumes.locks.serves(volume_id, peer):
            raise VolumeLocked("the volume is being locked")
        return self._unwrapped(volume_id, items)

    def _unwrapped(self, volume_id: bytes, items: list[UnwrapItem]) -> dict[str, Any]:
        self._volumes.locks.used(volume_id)
        keys = self._volumes.keyring.unwrap(volume_id, items)
        record = self._records.get(volume_id)
        if record is None:
            raise VolumeLocked("the volume was locked meanwhile")
        floors = [record.floor(log_id) if purpose in _LOG_PURPOSES else 0 for log_id, purpose, _, _ in items]
        return {"keys": keys, "floors": floors}

    def _is_limited(self, volume_id: bytes) -> bool:
        return self._volumes.limits.must_wait(volume_id) and volume_id not in self._volumes.locks

    def _rewrap(self, args: Args) -> dict[str, Any]:
        arg.expect(args, "volume_id", "items")
        volume_id, items = arg.get_id(args, "volume_id"), arg.get_items(args, "items")
        self._volumes.locks.used(volume_id)
        kek_version, wrapped = self._volumes.keyring.rewrap(volume_id, items)
        return {"kek_version": kek_version, "wrapped": wrapped}

    def _generate(self, args: Args) -> dict[str, Any]:
        arg.expect(args, "volume_id", "id", "purpose", "count")
        self._volumes.locks.used(arg.get_id(args, "volume_id"))
        kek_version, keys, wrapped = self._volumes.keyring.generate(
            arg.get_id(args, "volume_id"),
            arg.get_id(args, "id"),
            arg.get_purpose(args, "purpose"),
            arg.get_int(args, "count", 1, arg.KEYS_MAX),
        )
        return {"kek_version": kek_version, "keys": keys, "wrapped": wrapped}

    def _kits(self, args: Args) -> dict[str, Any]:
        arg.expect(args, "volume_id", "directory", "count", "deks")
        volume_id = arg.get_id(args, "volume_id")
        self._volumes.locks.used(volume_id)
        count = arg.get_int(args, "count", 1, arg.KITS_MAX)
        deks = arg.get_int(args, "deks", 0, arg.KEYS_MAX // count)
        directory = arg.get_bool(args, "directory")
        kek_version, kits = self._volumes.keyring.kits(volume_id, directory=directory, count=count, deks=deks)
        return {"kek_version": kek_version, "kits": kits}
