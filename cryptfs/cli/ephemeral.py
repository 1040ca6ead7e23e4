"""Ephemeral volumes: every mount makes a new one in the place of the last, whose key nobody has any more.

The old `volume` file stays until the new volume is whole, so that a directory in which this was interrupted is still
known for what it is, and the next mount begins again: leftovers, then a new volume, its file renamed over the old one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cryptfs.cli.leftovers import BESIDE_VOLUME, remove
from cryptfs.errors import StoreFailed, UnsupportedFormat, VolumeBusy

if TYPE_CHECKING:
    from pathlib import Path

    from cryptfs.cli.hold import Hold
    from cryptfs.format.volume import Volume


def renew(cipher_dir: Path, volume: Volume, hold: Hold) -> bool:
    """Make a new volume of the same block size in the place of an ephemeral one that nobody can open any more.

    The agent has its key as long as `hold` lasts. False, and nothing done, if the agent still has the key of the one
    there. Raises `VolumeBusy` if it is mounted, `StoreFailed`, `AgentUnavailable`.
    """
    from cryptfs.cli import key_agent
    from cryptfs.cli.daemon_process import remove_logs
    from cryptfs.keys.edit_requests import VolumeWish
    from cryptfs.store.local import LocalStore

    if not volume.ephemeral:
        raise UnsupportedFormat("only an ephemeral volume is made anew")
    if hold.join(volume.volume_id):
        return False
    store = LocalStore(cipher_dir)
    try:
        try:
            store.lock()
        except BlockingIOError:
            raise VolumeBusy("the volume is mounted or being changed by another process") from None
        _remove_leftovers(cipher_dir)
        remove_logs(volume.volume_id)
        key_agent.create_volume(cipher_dir, VolumeWish(volume.block_size, None), hold)
    finally:
        store.close_store()
    return True


def _remove_leftovers(cipher_dir: Path) -> None:
    for name in BESIDE_VOLUME:
        path = cipher_dir / name
        try:
            remove(path)
        except OSError as error:
            raise StoreFailed(f"{path}: {error.strerror}") from error
