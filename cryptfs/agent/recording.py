"""The verbs that read and write what this machine has seen of a volume (docs/FRESHNESS.md), and who may use them.

Reading and raising: whoever has the volume unlocked or mounted. Lowering (`accept`, `accept-volume`) is the owner's
alone: it takes the KEK, and is logged.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from cryptfs.agent import args as arg
from cryptfs.agent.args import Args
from cryptfs.agent.freshness import GENERATION_BYTES, Changes, Record, Records, Seen, split_ids, split_logs
from cryptfs.agent.keyring import Keyring
from cryptfs.errors import RolledBack, VolumeBusy, VolumeDamaged, VolumeLocked
from cryptfs.format.policy import Policy
from cryptfs.format.volume import FILE_MAX_BYTES, Volume
from cryptfs.types import DELETED, ID_BYTES

log = logging.getLogger(__name__)

_LOG_BYTES = ID_BYTES + GENERATION_BYTES


class Peer(Protocol):
    """What the verbs know of a connection."""

    @property
    def pid(self) -> int:
        """The process that connected, as the kernel says."""
        ...

    @property
    def audit_json(self) -> str:
        """Who that is, as the audit log's lines have it."""
        ...

    def says_it_is(self, role: str) -> None:
        """What the peer calls itself."""
        ...

    def post(self, message: bytes) -> None:
        """Queue an encoded message; never blocks and never raises."""
        ...


@dataclass(frozen=True, slots=True)
class Attachment:
    """A volume's daemon: its connection, and what it said and showed when it attached."""

    peer: Peer
    cipher_dir: bytes
    mountpoint: bytes
    serial: int
    kek_version: int
    policy: Policy


class Recording:
    """`verbs` by name; `attached` is the service's own table, by volume id."""

    def __init__(self, keyring: Keyring, records: Records, attached: Mapping[bytes, Attachment]) -> None:
        self._keyring = keyring
        self._records = records
        self._attached = attached
        self.verbs: Mapping[str, Callable[[Peer, Args], Awaitable[dict[str, Any]]]] = {
            "begin": self._begin,
            "floors": self._floors,
            "record": self._record,
            "accept": self._accept,
            "accept-volume": self._accept_volume,
        }

    async def _opened(self, volume_id: bytes, *, mounted_will_do: bool = True) -> Record:
        if not self._keyring.holds(volume_id) and not (mounted_will_do and volume_id in self._attached):
            raise VolumeLocked("the volume is locked")
        return await self._records.opened(volume_id)

    async def _begin(self, _peer: Peer, args: Args) -> dict[str, Any]:
        arg.expect(args, "volume_id", "state_sequence")
        volume_id, sequence = arg.get_id(args, "volume_id"), arg.get_sequence(args, "state_sequence")
        record = await self._opened(volume_id)
        floor = record.seen.state_sequence
        if sequence < floor:
            log.warning("volume %s is rolled back: state %d, seen %d", volume_id.hex(), sequence, floor)
            raise RolledBack("an older state of the volume than this machine has seen")
        return {"first_sight": record.first_sight}

    async def _floors(self, _peer: Peer, args: Args) -> dict[str, Any]:
        arg.expect(args, "volume_id", "ids")
        ids = split_ids(arg.get_packed(args, "ids", ID_BYTES))
        record = await self._opened(arg.get_id(args, "volume_id"))
        return {"floors": [record.floor(log_id) for log_id in ids]}

    async def _record(self, _peer: Peer, args: Args) -> dict[str, Any]:
        arg.expect(args, "volume_id", "logs", "gone", "state_sequence")
        volume_id = arg.get_id(args, "volume_id")
        logs = split_logs(arg.get_packed(args, "logs", _LOG_BYTES))
        gone = split_ids(arg.get_packed(args, "gone", ID_BYTES))
        seen = None
        if args["state_sequence"] is not None:
            # The file system was synced since the daemon attached: the `volume` file it showed then is durable too.
            daemon = self._attached.get(volume_id)
            file = (daemon.serial, daemon.kek_version) if daemon is not None else (0, 0)
            seen = Seen(*file, arg.get_sequence(args, "state_sequence"))
        await self._opened(volume_id)
        await self._records.change(volume_id, Changes(logs, gone, seen))
        return {}

    async def _accept(self, peer: Peer, args: Args) -> dict[str, Any]:
        arg.expect(args, "volume_id", "logs")
        volume_id = arg.get_id(args, "volume_id")
        logs = split_logs(arg.get_packed(args, "logs", _LOG_BYTES))
        record = await self._opened(volume_id, mounted_will_do=False)
        for log_id, generation in logs:
            floor = record.floor(log_id)
            log.warning(
                "volume %s: log %s accepted at generation %d, seen %s, on the word of process %d",
                volume_id.hex(), log_id.hex(), int.from_bytes(generation, "big"),
                "deleted" if floor == DELETED else floor, peer.pid,
            )  # fmt: skip
        await self._records.change(volume_id, Changes(logs, exactly=True))
        return {}

    async def _accept_volume(self, peer: Peer, args: Args) -> dict[str, Any]:
        arg.expect(args, "volume_id", "volume", "state_sequence")
        volume_id = arg.get_id(args, "volume_id")
        volume = check_file(self._keyring, volume_id, arg.get_bytes(args, "volume", 0, FILE_MAX_BYTES))
        now = Seen(volume.serial, volume.kek_version, arg.get_sequence(args, "state_sequence"))
        record = await self._opened(volume_id, mounted_will_do=False)
        newest_epoch = await self._records.newest_epoch(volume_id)
        if volume_id in self._attached:
            raise VolumeBusy("the volume is mounted")
        before = record.seen
        log.warning(
            "volume %s: accepted as it is (%s), seen %s, on the word of process %d",
            volume_id.hex(), now, before, peer.pid,
        )  # fmt: skip
        await self._records.change(volume_id, Changes(seen=now, afresh=True))
        return {"state_sequence": before.state_sequence, "epoch": newest_epoch}


def check_file(keyring: Keyring, volume_id: bytes, data: bytes) -> Volume:
    """The `volume` file `data`, authenticated. Raises `VolumeLocked`, `VolumeDamaged`, `UnsupportedFormat`."""
    if not keyring.holds(volume_id):
        raise VolumeLocked("the volume is locked")
    volume = keyring.check_file(data)
    if volume.volume_id != volume_id:
        raise VolumeDamaged("the volume file is that of another volume")
    return volume
