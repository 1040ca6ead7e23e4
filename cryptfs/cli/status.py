"""`cryptfs status`: the volumes that are unlocked or mounted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cryptfs.cli import ui


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print a JSON document: a list of volumes.")
def status(*, as_json: bool) -> None:
    """List the volumes that the agent holds a key for, and those mounted without one."""
    volumes = _volumes()
    if as_json:
        ui.out_json(volumes)
    elif volumes:
        rows = [
            [
                volume["volume_id"] or "unknown",
                volume["state"],
                volume["cipher_dir"] or "-",
                volume["mountpoint"] or "-",
                str(volume["daemon_pid"] or "-"),
            ]
            for volume in volumes
        ]
        ui.table(["volume", "state", "directory", "mount point", "process"], rows)
        for volume in volumes:
            if volume["cache"] is not None:
                ui.out(f"{(volume['volume_id'] or 'unknown')[:8]}: {_cache_line(volume)}")
    else:
        ui.note("no volume is unlocked or mounted")
    if not as_json:
        for mountpoint in _dead():
            ui.warning(f"the daemon of {mountpoint} is gone: `cryptfs umount {mountpoint}` clears what it left")


def _dead() -> list[Path]:
    """Mounts of ours that nobody serves. One that does not answer at all is not known to be."""
    from contextlib import suppress

    from cryptfs.cli import mounts
    from cryptfs.errors import MountpointUnusable

    served = {daemon.mountpoint for daemon in mounts.running_daemons()}
    dead = []
    for mountpoint in {mount.mountpoint for mount in mounts.all_mounts() if mount.is_ours} - served:
        with suppress(MountpointUnusable):
            if mounts.is_dead(mountpoint):
                dead.append(mountpoint)
    return sorted(dead)


def _cache_line(volume: dict[str, Any]) -> str:
    cache = volume["cache"]
    line = (
        f"{cache['entries']} keys in the cache; {cache['hits']} hits, {cache['misses']} misses, "
        f"{cache['unwraps']} unwrapped, {cache['expiries']} expired, {cache['evictions']} pushed out, "
        f"{cache['round_trips']} round trips"
    )
    if volume["overridden"]:
        from cryptfs.cli.policy_fields import LABELS, shown

        said = [f"{LABELS[name]} {shown(name, volume['policy'][name])}" for name in volume["overridden"]]
        line += f"; {', '.join(said)} by the mount's options"
    return line


def _volumes() -> list[dict[str, Any]]:
    """As docs/CLI_ABI.md lists it: what the agent knows, and what it does not know of running daemons.

    A daemon is unknown to an agent that came after it, until something in the mount next needs a key.
    """
    from cryptfs import paths
    from cryptfs.cli import key_agent, mounts

    volumes = [
        {
            "volume_id": volume.volume_id.hex(),
            "cipher_dir": volume.cipher_dir or None,
            "mountpoint": volume.mountpoint or None,
            "state": volume.state,
            "daemon_pid": volume.daemon_pid,
            "locks_in_s": volume.locks_in_s,
        }
        for volume in key_agent.held()
    ]
    for daemon in mounts.running_daemons():
        if daemon.agent_socket != Path(paths.agent_socket()):
            continue
        volume_id = _volume_id(daemon.cipher_dir)
        row = next((volume for volume in volumes if volume["volume_id"] == volume_id), None)
        if row is None:
            row = {"volume_id": volume_id, "state": "locked", "locks_in_s": None}
            volumes.append(row)
        row |= {"cipher_dir": str(daemon.cipher_dir), "mountpoint": str(daemon.mountpoint), "daemon_pid": daemon.pid}
    _add_reports(volumes)
    return volumes


def _add_reports(volumes: list[dict[str, Any]]) -> None:
    """What the agent and the daemons say of policies and caches."""
    from cryptfs.cli import key_agent
    from cryptfs.cli.policy_fields import effective
    from cryptfs.format.policy import NO_POLICY

    reports = key_agent.reports() if volumes else {}
    for volume in volumes:
        policy, report = reports.get(bytes.fromhex(volume["volume_id"] or ""), (None, None))
        known = policy is not None or report is not None
        volume["policy"] = effective(policy or NO_POLICY, report) if known else None
        volume["overridden"] = list(report.overridden) if report is not None else []
        volume["cache"] = dict(report.cache) if report is not None else None


def _volume_id(cipher_dir: Path) -> str | None:
    from cryptfs.errors import CryptfsError
    from cryptfs.ops.info import read_volume

    try:
        return read_volume(cipher_dir).volume_id.hex()
    except CryptfsError:
        return None  # mounted, and its file cannot be read any more: still worth a line
