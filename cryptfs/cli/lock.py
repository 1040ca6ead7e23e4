"""`cryptfs lock DIR-or-MOUNTPOINT`: make the agent forget a volume's KEK, mounted or not."""

from __future__ import annotations

from pathlib import Path

import click

from cryptfs.cli import ui


@click.command()
@click.argument("dir_or_mountpoint", type=click.Path(path_type=Path))
def lock(dir_or_mountpoint: Path) -> None:
    """Make the agent forget the key of a volume, named by its directory or where it is mounted.

    A live mount stays, and what needs the key fails there until `cryptfs unlock`.
    """
    from cryptfs.cli import key_agent

    if not key_agent.lock(_volume_id_of(dir_or_mountpoint)):
        ui.note("it was locked already")


def _volume_id_of(path: Path) -> bytes:
    from cryptfs.cli import key_agent, mounts
    from cryptfs.ops.info import read_volume

    located = mounts.resolved(path)
    if (held := key_agent.find_mounted_on(located)) is not None:
        return held.volume_id
    daemon = mounts.daemon_of_mount(located)
    return read_volume(daemon.cipher_dir if daemon else located).volume_id
