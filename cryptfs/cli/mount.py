"""`cryptfs mount DIR MOUNTPOINT`: show a volume in the clear; returns once the mount answers."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cryptfs.cli import protectors, ui
from cryptfs.cli.protectors import Given

if TYPE_CHECKING:
    from cryptfs.cli.daemon_process import MountOptions
    from cryptfs.cli.processes import Starting


@click.command()
@click.argument("dir", type=click.Path(path_type=Path, readable=False))
@click.argument("mountpoint", type=click.Path(path_type=Path, readable=False))
@click.option("-f", "--foreground", is_flag=True, help="Stay until it is unmounted; Ctrl-C or SIGTERM unmounts.")
@click.option(
    "-o", "fuse_options", metavar="OPT[,OPT...]", multiple=True, help="Mount options, for example allow_other."
)
@click.option("--read-only", is_flag=True, help="Refuse every change.")
@click.option(
    "--force-owner",
    metavar="UID:GID",
    help="Show everything as this user's and group's; chown is refused, new files are the mounting user's below.",
)
@click.option(
    "--max-age",
    metavar="S",
    type=click.FloatRange(min=0, min_open=True, max=7 * 86400),
    help="Seconds a block's key may stay with the daemon (at most 7 days), whatever the volume's policy says.",
)
@click.option(
    "--max-entries", metavar="N", type=click.IntRange(min=1024), help="Most keys the daemon may hold (at least 1024)."
)
@click.option("--max-uses", metavar="N", type=click.IntRange(min=1), help="Uses after which a key is asked for again.")
@click.option("--cache/--no-cache", "caching", default=None, help="Whether a key may serve more than one request.")
@protectors.options
def mount(  # noqa: PLR0913  one parameter per option
    dir: Path,  # noqa: A002
    mountpoint: Path,
    *,
    foreground: bool,
    fuse_options: tuple[str, ...],
    read_only: bool,
    force_owner: str | None,
    max_age: float | None,
    max_entries: int | None,
    max_uses: int | None,
    caching: bool | None,
    given: Given,
) -> int:
    """Mount the volume DIR on the empty directory MOUNTPOINT, unlocking it if needed."""
    from cryptfs.cli.daemon_process import MountOptions

    options = MountOptions(read_only, max_age, max_entries, max_uses, caching, fuse_options, force_owner)
    return _mount(dir, mountpoint, options, given, foreground=foreground)


def _mount(cipher_dir: Path, mountpoint: Path, options: MountOptions, given: Given, *, foreground: bool) -> int:
    from cryptfs.cli import daemon_process, ephemeral, mounts, processes
    from cryptfs.cli.hold import Hold
    from cryptfs.cli.unlock import unlock_volume
    from cryptfs.errors import VolumeBusy
    from cryptfs.ops.info import read_volume

    daemon_process.check(options)
    volume = read_volume(cipher_dir)
    cipher_dir, mountpoint = Path(os.path.realpath(cipher_dir)), mounts.resolved(mountpoint)
    daemon = mounts.daemon_of_volume(cipher_dir)
    if daemon is not None and not mounts.is_leaving(daemon):
        raise VolumeBusy(f"the volume is mounted already, on {daemon.mountpoint}")
    mounts.check_usable(mountpoint, cipher_dir)
    mounts.check_dependencies()
    launch = daemon_process.Launch(cipher_dir, mountpoint, volume.volume_id, options, foreground)
    with Hold() as hold:
        if volume.ephemeral:
            with ui.waiting("making the ephemeral volume"):
                ephemeral.renew(cipher_dir, volume, hold)
            launch.volume_id = read_volume(cipher_dir).volume_id
        else:
            # Much of the time it takes to mount goes into loading programs: the daemon's is loaded beside the agent's.
            unlock_volume(cipher_dir, given, hold=hold, beside=launch.ahead)
        try:
            with ui.waiting(f"mounting {cipher_dir}"):
                starting = launch.mounted()
        finally:
            # From here on the daemon has it unlocked, if it started.
            hold.release(launch.volume_id)
    with processes.ended_unless_left(starting):
        _warn_of_damage(cipher_dir, mountpoint)
        if foreground:
            return _stay(starting, f"{cipher_dir} is mounted on {mountpoint}")
        starting.leave()
    ui.done(f"{cipher_dir} is mounted on {mountpoint}")
    return 0


def _warn_of_damage(cipher_dir: Path, mountpoint: Path) -> None:
    """Say it if the volume's root directory is damaged: the mount is there, and shows nothing."""
    try:
        with os.scandir(mountpoint) as entries:
            next(entries, None)
    except OSError as error:
        if error.errno == errno.EIO:
            ui.warning(
                f"the root directory of {cipher_dir} is damaged, nothing in it can be shown; "
                "unmount it and run `cryptfs check --repair`"
            )


def _stay(daemon: Starting, said: str) -> int:
    """Wait for the daemon's end, handing signals on to it; its exit code."""
    from cryptfs.cli import processes

    with processes.signals_passed_on(daemon.process):
        ui.done(said)
        return daemon.process.wait()
