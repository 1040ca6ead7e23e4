"""`cryptfs umount MOUNTPOINT`: unmount; returns once the daemon is gone and the KEK forgotten."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from cryptfs.cli import ui

if TYPE_CHECKING:
    from cryptfs.cli.mounts import Daemon

DAEMON_END_S = 120.0
"""How long a daemon may take to write everything back and end."""


@click.command()
@click.argument("mountpoint", type=click.Path(path_type=Path, readable=False))
@click.option("--keep-unlocked", is_flag=True, help="Leave the volume's key in the agent.")
def umount(mountpoint: Path, *, keep_unlocked: bool) -> None:
    """Unmount what is mounted on MOUNTPOINT; also clears a mount whose daemon was killed."""
    from cryptfs.cli import key_agent, mounts
    from cryptfs.cli.advice import hinted
    from cryptfs.errors import CryptfsError, MountpointUnusable

    located = mounts.resolved(mountpoint)
    mount = mounts.mount_at(located)
    if mount is None or not mount.is_ours:
        what = f"it is a file system of type {mount.fstype}" if mount else "nothing is mounted there"
        raise MountpointUnusable(f"{located} is no cryptfs mount: {what}")
    if mounts.clear_dead(located):
        ui.note(f"the daemon of {located} was gone; cleared what it left")
        return
    daemon = mounts.daemon_of_mount(located)
    volume_id = _volume_id(located, daemon)
    with mounts.watched(daemon) as watch:
        kept = _with_domains(volume_id) if volume_id and keep_unlocked else []
        for each in kept:
            key_agent.keep(each, keep=True)
        try:
            with ui.waiting(f"unmounting {located}"):
                mounts.unmount(located)
        except BaseException:
            for each in kept:
                key_agent.keep(each, keep=False)
            raise
        with ui.waiting("waiting for everything to be on disk"):
            if daemon is not None and not watch.has_ended(DAEMON_END_S):
                slow = CryptfsError(f"{located} is unmounted, but its daemon (process {daemon.pid}) is still writing")
                raise hinted(slow, "wait for the process to end before you take the disk away")
    if volume_id and not keep_unlocked:
        # The daemon has told the agent to forget; this is for one that could not, as the agent came after it.
        key_agent.lock(volume_id)


def _with_domains(volume_id: bytes) -> list[bytes]:
    """The volume's id and those of its domains that the agent knows of."""
    from cryptfs.cli import key_agent
    from cryptfs.types import DOMAINS_DIR

    held = key_agent.held()
    own = next((volume.cipher_dir for volume in held if volume.volume_id == volume_id), "")
    below = str(Path(own, DOMAINS_DIR))
    return [volume_id, *(each.volume_id for each in held if own and str(Path(each.cipher_dir).parent) == below)]


def _volume_id(mountpoint: Path, daemon: Daemon | None) -> bytes | None:
    """The id of the volume mounted there, from the agent or, if that does not know, from the volume itself."""
    from cryptfs.cli import key_agent
    from cryptfs.errors import CryptfsError
    from cryptfs.ops.info import read_volume

    held = key_agent.find_mounted_on(mountpoint)
    if held is not None or daemon is None:
        return held.volume_id if held else None
    try:
        return read_volume(daemon.cipher_dir).volume_id
    except CryptfsError:
        return None  # the volume is damaged or gone by now; that must not keep it mounted
