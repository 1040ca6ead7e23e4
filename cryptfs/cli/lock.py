"""`cryptfs lock DIR-or-MOUNTPOINT`: take a volume's or domain's keys out of agent and daemon, mounted or not."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cryptfs.cli import ui

if TYPE_CHECKING:
    from cryptfs.keys.agent_client import LockOutcome


@click.command()
@click.argument("dir_or_mountpoint", type=click.Path(path_type=Path, readable=False), required=False)
@click.option("--all", "everything", is_flag=True, help="Lock every volume that is unlocked.")
def lock(dir_or_mountpoint: Path | None, *, everything: bool) -> None:
    """Make every process forget the keys of a volume or domain, named by its directory or where it is mounted.

    With a volume, its domains are locked.

    A live mount stays: what programs wrote is written first, and nothing can be read, listed or written in it until
    `cryptfs unlock`.
    """
    from cryptfs.cli import lock_first
    from cryptfs.errors import UsageError

    if everything == (dir_or_mountpoint is not None):
        raise UsageError("name a volume, or give --all")
    mountinfo = lock_first.mountinfo()
    try:
        if dir_or_mountpoint is None:
            _lock_all()
        elif not _locked(_volume_id_of(dir_or_mountpoint)):
            ui.note("it was locked already")
    finally:
        _warn_of_detached(mountinfo)


def _warn_of_detached(mountinfo: bytes) -> None:
    """A lock takes names away, and with a name what was mounted on it. `mountinfo`: as it was before."""
    from collections import Counter

    from cryptfs.cli import mounts

    left = mounts.all_mounts()
    ours = {mount.mountpoint for mount in left if mount.is_ours}
    for gone in Counter(mounts.parse_mountinfo(os.fsdecode(mountinfo))) - Counter(left):
        if not ours.isdisjoint(gone.mountpoint.parents):
            ui.warning(
                f"{gone.mountpoint} ({gone.fstype}) was unmounted, as it lay inside the mount: "
                "mount it again after `cryptfs unlock`"
            )


def _lock_all() -> None:
    """All at once: none waits for another, whose disk may hang. Raises the first failure, after all have ended."""
    from concurrent.futures import ThreadPoolExecutor

    from cryptfs.cli import key_agent
    from cryptfs.errors import CryptfsError

    volumes = [volume for volume in key_agent.held() if volume.state != "locked"]
    failures: list[CryptfsError] = []
    with ui.waiting("locking"), ThreadPoolExecutor(max(1, len(volumes))) as pool:
        endings = [pool.submit(key_agent.lock, volume.volume_id) for volume in volumes]
    for volume, ending in zip(volumes, endings, strict=True):
        try:
            _check(volume.volume_id, volume.cipher_dir, ending.result())
        except CryptfsError as error:
            failures.append(error)
    for failure in failures[1:]:
        ui.warning(str(failure))
    if failures:
        raise failures[0]


def _locked(volume_id: bytes) -> bool:
    """Lock a volume; whether it was unlocked. Raises `StoreFailed` if not everything could be written."""
    from cryptfs.cli import key_agent

    with ui.waiting("locking"):
        outcome = key_agent.lock(volume_id)
    _check(volume_id, "the volume", outcome)
    return outcome.was_unlocked


def _check(volume_id: bytes, name: str, outcome: LockOutcome) -> None:
    """Raise `StoreFailed` if not everything could be written."""
    from cryptfs.cli.advice import hinted
    from cryptfs.errors import StoreFailed

    if outcome.unwritten is None:
        raise hinted(
            StoreFailed(f"{name} is locked, but its mount did not say in time that everything is written"),
            "what it could not write it keeps until `cryptfs unlock`" + _how_to_end_it(volume_id),
        )
    if outcome.unwritten:
        raise hinted(
            StoreFailed(f"{name} is locked, but changes of {outcome.unwritten} files could not be written"),
            "they wait in memory: make room, then `cryptfs unlock`",
        )


def _how_to_end_it(volume_id: bytes) -> str:
    """For a daemon that hangs: programs may still see what the kernel has cached."""
    from cryptfs.cli import key_agent

    volume = key_agent.find(volume_id)
    if volume is None or volume.daemon_pid is None:
        return ""
    return f"; if it hangs, `kill -9 {volume.daemon_pid}` ends all access at once, and what it keeps is lost"


def _volume_id_of(path: Path) -> bytes:
    from cryptfs.cli import key_agent, mounts
    from cryptfs.cli.located import cipher_dir_of
    from cryptfs.ops.domains import is_domain
    from cryptfs.ops.info import read_volume

    located = mounts.resolved(path)
    ahead, _ = key_agent.locked_ahead()
    if ahead is not None and mounts.mount_at(located) is not None:
        # Nobody knows better by now, if the daemon ended with the lock.
        return ahead
    held = key_agent.find_mounted_on(located)
    # A domain's is the path it had when it was opened: another may have it by now.
    if held is not None and not is_domain(Path(held.cipher_dir)):
        return held.volume_id
    return read_volume(cipher_dir_of(path)).volume_id
