"""`cryptfs umount MOUNTPOINT`: unmount; returns once the daemon is gone and the KEK forgotten."""

from __future__ import annotations

from pathlib import Path

import click

from cryptfs.cli import ui

DAEMON_END_S = 120.0
"""How long a daemon may take to write everything back and end."""
FORGET_S = 10.0


@click.command()
@click.argument("mountpoint", type=click.Path(path_type=Path))
@click.option("--keep-unlocked", is_flag=True, help="Leave the volume's key in the agent.")
def umount(mountpoint: Path, *, keep_unlocked: bool) -> None:
    """Unmount what is mounted on MOUNTPOINT; also clears a mount whose daemon was killed."""
    from cryptfs.cli import agent, mounts
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
    held = agent.find_mounted_on(located)
    daemon = next((daemon for daemon in mounts.running_daemons() if daemon.mountpoint == located), None)
    with mounts.watched(daemon) as watch:
        if held is not None and keep_unlocked:
            agent.keep(held.volume_id, keep=True)
        try:
            with ui.waiting(f"unmounting {located}"):
                mounts.unmount(located)
        except BaseException:
            if held is not None and keep_unlocked:
                agent.keep(held.volume_id, keep=False)
            raise
        with ui.waiting("waiting for everything to be on disk"):
            if daemon is not None and not watch.has_ended(DAEMON_END_S):
                slow = CryptfsError(f"{located} is unmounted, but its daemon (process {daemon.pid}) is still writing")
                raise hinted(slow, "wait for the process to end before you take the disk away")
    if (
        held is not None
        and not keep_unlocked
        and not mounts.wait_until(lambda: not agent.is_unlocked(held.volume_id), FORGET_S)
    ):
        agent.lock(held.volume_id)
