"""The verbs by which a connection becomes a volume's daemon, and what happens when it is one no more.

An attachment ends with `detach` or with the connection. The KEK goes with it, unless the daemon or the user (`keep`)
said otherwise, and never stays for a volume that is being locked.
"""

from __future__ import annotations

import logging
import os
from typing import Any

from cryptfs.agent import args as arg
from cryptfs.agent.args import Args
from cryptfs.agent.freshness import Records
from cryptfs.agent.recording import Attachment, Peer, check_file
from cryptfs.agent.reports import Reports
from cryptfs.agent.volumes import Volumes
from cryptfs.errors import Denied, ProtocolError, VolumeBusy, VolumeLocked
from cryptfs.format.volume import FILE_MAX_BYTES

log = logging.getLogger(__name__)


class Attaching:
    """The verbs `attach` (which waits for a record), `detach` and `keep`."""

    def __init__(self, volumes: Volumes, records: Records, reports: Reports) -> None:
        self._volumes = volumes
        self._records = records
        self._reports = reports
        self._kept: set[bytes] = set()
        """Mounted volumes that stay unlocked when their daemon goes."""

    async def attach(self, peer: Peer, args: Args) -> dict[str, Any]:
        """The verb `attach`. Raises as `_attachment`, and `RolledBack`, `FreshnessUnavailable`."""
        volume_id, attachment = self._attachment(peer, args)
        record = await self._records.opened(volume_id)
        # Once more: while the record was opened, the volume may have been locked or attached to.
        volume_id, attachment = self._attachment(peer, args)
        record.seen.refuse_older(attachment.serial, attachment.kek_version)
        self._volumes.attached[volume_id] = attachment
        self._kept.discard(volume_id)
        self._volumes.policies.learn(volume_id, attachment.serial, attachment.policy)
        return {"kek_version": attachment.kek_version, **self._volumes.policies.told(volume_id)}

    def _attachment(self, peer: Peer, args: Args) -> tuple[bytes, Attachment]:
        arg.expect(args, "volume_id", "cipher_dir", "mountpoint", "volume")
        volume_id = arg.get_id(args, "volume_id")
        cipher_dir, mountpoint = arg.get_path(args, "cipher_dir"), arg.get_path(args, "mountpoint")
        volume = check_file(self._volumes.keyring, volume_id, arg.get_bytes(args, "volume", 0, FILE_MAX_BYTES))
        if self._records.would_vanish_under(os.fsdecode(mountpoint)):
            raise Denied(f"a mount on {os.fsdecode(mountpoint)} would hide the key agent's state directory")
        if not self._volumes.locks.serves(volume_id, peer):
            raise VolumeLocked("the volume is being locked")
        other = self._volumes.attached.get(volume_id)
        if other is not None and other.peer is not peer:
            raise VolumeBusy(f"the volume is mounted already, by process {other.peer.pid}")
        return volume_id, Attachment(peer, cipher_dir, mountpoint, volume.serial, volume.kek_version, volume.policy)

    def detach(self, peer: Peer, args: Args) -> dict[str, Any]:
        """The verb `detach`. Raises `ProtocolError`."""
        arg.expect(args, "volume_id", "keep")
        volume_id, keep = arg.get_id(args, "volume_id"), arg.get_bool(args, "keep")
        attachment = self._volumes.attached.get(volume_id)
        if attachment is None or attachment.peer is not peer:
            raise ProtocolError("this connection is not attached to the volume")
        self._unattach(volume_id, keep=keep)
        return {}

    def keep(self, args: Args) -> dict[str, Any]:
        """The verb `keep`."""
        arg.expect(args, "volume_id", "keep")
        volume_id, keep = arg.get_id(args, "volume_id"), arg.get_bool(args, "keep")
        attached = volume_id in self._volumes.attached
        if keep and attached:
            self._kept.add(volume_id)
        else:
            self._kept.discard(volume_id)
        return {"was_attached": attached}

    def is_attached(self, peer: Peer) -> bool:
        """Whether the connection stands for a daemon."""
        return any(attachment.peer is peer for attachment in self._volumes.attached.values())

    def gone(self, peer: Peer) -> None:
        """The connection ended: what it was attached to and did not detach is forgotten, unless it is to be kept."""
        for volume_id in [volume_id for volume_id, at in self._volumes.attached.items() if at.peer is peer]:
            log.info("the daemon of volume %s is gone", volume_id.hex())
            self._unattach(volume_id, keep=False)
        self._volumes.changed()

    def _unattach(self, volume_id: bytes, *, keep: bool) -> None:
        """The volume's daemon is done: forget the KEK, unless it or the user (the verb `keep`) says otherwise."""
        attachment = self._volumes.attached.pop(volume_id)
        self._reports.gone(volume_id)
        if (not keep and volume_id not in self._kept) or volume_id in self._volumes.locks:
            self._volumes.forget(volume_id)
        elif self._volumes.keyring.holds(volume_id):
            self._volumes.lies_at(volume_id, attachment.cipher_dir)
            if volume_id in self._kept:
                self._volumes.holders.forgotten(volume_id)
        self._kept.discard(volume_id)
