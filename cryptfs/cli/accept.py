"""`cryptfs check DIR --accept PATH` and `--accept-all`: what is there now is right, on the owner's word."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cryptfs.cli import ui
from cryptfs.cli.protectors import Given

if TYPE_CHECKING:
    from cryptfs.cli.volume_access import Reached
    from cryptfs.keys.agent_client import AgentClient
    from cryptfs.ops.accept import Outcome

_SAID = {
    "older": "older than seen before",
    "deleted": "seen deleted before",
    "removed": "no longer there",
    "added": "not there before",
    "replaced": "another one than before",
}


def accept(cipher_dir: Path, given: Given, paths: tuple[str, ...]) -> Outcome:
    """Accept what is at `paths` in the volume, and below. Raises as `ops.accept.accept_paths` and `with_volume` do."""
    from cryptfs.cli.volume_access import with_volume
    from cryptfs.ops.accept import accept_paths

    async def work(reached: Reached) -> Outcome:
        return await accept_paths(reached.access, [os.fsencode(path) for path in paths])

    return with_volume(cipher_dir, given, work, exclusive=True)


def accept_all(cipher_dir: Path, given: Given) -> None:
    """Accept the whole volume as it is. Raises as `ops.accept.accept_volume` and `with_volume` do."""
    import trio

    from cryptfs import paths
    from cryptfs.cli import mounts
    from cryptfs.cli.located import cipher_dir_of
    from cryptfs.cli.unlock import unlocked
    from cryptfs.errors import VolumeBusy
    from cryptfs.keys.agent_client import open_agent
    from cryptfs.ops.info import read_volume_file
    from cryptfs.ops.init import config_of

    cipher_dir = cipher_dir_of(cipher_dir)
    volume_file = read_volume_file(cipher_dir)
    volume_id = config_of(volume_file).volume_id
    daemon = mounts.daemon_of_volume(cipher_dir)
    if daemon is not None and not mounts.is_leaving(daemon):
        raise VolumeBusy(f"the volume is mounted on {daemon.mountpoint}")

    async def run() -> None:
        async with open_agent(paths.agent_socket()) as client:
            await _accept_volume(client, cipher_dir, volume_file)

    with unlocked(cipher_dir, volume_id, given):
        trio.run(run)


async def _accept_volume(client: AgentClient, cipher_dir: Path, volume_file: bytes) -> None:
    """Not attached to the agent: it would refuse an older `volume` file."""
    from cryptfs.keys.cache import KeyCache
    from cryptfs.keys.clock import SystemClock
    from cryptfs.keys.policy import CachePolicy
    from cryptfs.keys.volume_requests import VolumeRequests
    from cryptfs.ops.accept import accept_volume
    from cryptfs.ops.init import config_of
    from cryptfs.ops.offline import Access
    from cryptfs.ports import Store
    from cryptfs.store.local import LocalStore
    from cryptfs.store.owner import local_store

    config, clock = config_of(volume_file), SystemClock()
    requests = VolumeRequests.over(client, config.volume_id)
    keys = KeyCache(requests, CachePolicy(), clock)

    def make_store() -> Store:
        return local_store(cipher_dir)

    def close_store(store: Store) -> None:
        assert isinstance(store, LocalStore)
        store.close_store()

    async def tell(state_sequence: int) -> tuple[int, int]:
        return await requests.accept_volume(volume_file, state_sequence)

    try:
        await accept_volume(Access(config, make_store, close_store, keys, clock, os.urandom), tell)
    finally:
        keys.wipe()


def show(outcome: Outcome) -> None:
    """For people."""
    for change in outcome.accepted:
        ui.out(ui.printable(f"accepted: {os.fsdecode(change.path)}: {_SAID[change.what]}"))
    for change in outcome.refused:
        ui.out(ui.printable(f"refused: {os.fsdecode(change.path)}: damaged: {change.what}"))
    if not outcome.accepted and not outcome.refused:
        ui.note("there was nothing to accept")


def as_json(outcome: Outcome) -> dict[str, Any]:
    """As docs/CLI_ABI.md lists it."""
    return {
        name: [
            {"path": os.fsdecode(change.path), "what": change.what, "id": change.log_id.hex() or None}
            for change in changes
        ]
        for name, changes in (("accepted", outcome.accepted), ("refused", outcome.refused))
    }
