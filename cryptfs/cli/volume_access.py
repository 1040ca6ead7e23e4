"""Reading a volume in this process, mounted or not: keys from the agent, the cipher directory straight from disk.

The composition root of `check` and `export`. Like the daemon it holds DEKs and plaintext, and no KEK.
"""

from __future__ import annotations

import logging
import os
import resource
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import trio

from cryptfs import paths
from cryptfs.cli import mounts, ui
from cryptfs.cli.located import cipher_dir_of
from cryptfs.cli.protectors import Given
from cryptfs.errors import CryptfsError, Damaged, NotAVolume, StoreFailed, VolumeBusy, VolumeDamaged
from cryptfs.fs.domain import was_shredded
from cryptfs.keys.agent_client import AgentClient, open_agent
from cryptfs.keys.cache import KeyCache
from cryptfs.keys.clock import SystemClock
from cryptfs.keys.policy import CachePolicy
from cryptfs.keys.volume_requests import VolumeRequests
from cryptfs.ops.domains import domain_dir, is_domain
from cryptfs.ops.info import read_volume_file
from cryptfs.ops.init import config_of
from cryptfs.ops.offline import Access, Settle
from cryptfs.ports import Store
from cryptfs.store.local import LocalStore
from cryptfs.store.owner import local_store

T = TypeVar("T")

MAX_ENTRIES = 32_768
"""Keys held at a time: enough for what is under way; nothing is read twice."""
SETTLE_S = 10.0


@dataclass(frozen=True, slots=True)
class Reached:
    """A volume whose key is at hand. `settle` is there if a daemon of this user has it mounted.

    `domain` reaches a domain, given its volume id and the path of its place; None if it is locked or shredded. Raises
    `Damaged` if it is not there or is another volume.
    """

    access: Access
    settle: Settle | None
    domain: Callable[[bytes, bytes], AbstractAsyncContextManager[Reached | None]]


Work = Callable[[Reached], Awaitable[T]]


def with_volume(cipher_dir: Path, given: Given, work: Work[T], *, exclusive: bool) -> T:
    """Run `work` on the volume in `cipher_dir`, unlocking it for as long as that takes if it is locked.

    Raises `NotAVolume`, `VolumeDamaged`, `WrongSecret`, `AgentUnavailable`, `VolumeBusy` (if `exclusive`: it is
    mounted), and what `work` raises.
    """
    from cryptfs.agent.hardening import harden
    from cryptfs.cli.unlock import unlocked

    cipher_dir = cipher_dir_of(cipher_dir)
    volume_file = read_volume_file(cipher_dir)
    volume_id = config_of(volume_file).volume_id
    daemon = mounts.daemon_of_volume(cipher_dir)
    if daemon is not None and mounts.mount_at(daemon.mountpoint) is None and mounts.is_leaving(daemon):
        daemon = None
    if daemon is not None and exclusive:
        raise VolumeBusy(f"the volume is mounted on {daemon.mountpoint}")
    mounted = _seen_at(cipher_dir, volume_id, daemon)
    with unlocked(cipher_dir, volume_id, given):
        # Only now: an agent that was just started inherits none of this.
        harden()
        os.umask(0)  # modes are those of the volume's entries
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        _say_what_is_settled(aloud=exclusive)

        async def run() -> T:
            async with _reached(cipher_dir, volume_file, daemon, mounted, exclusive=exclusive) as reached:
                return await work(reached)

        return trio.run(run, restrict_keyboard_interrupt_to_checkpoints=True)


def _seen_at(cipher_dir: Path, volume_id: bytes, daemon: mounts.Daemon | None) -> str | None:
    """Where the volume's root is seen in a mount, a domain's where it was when it was opened."""
    from cryptfs.cli import key_agent

    if daemon is None and is_domain(cipher_dir) and (held := key_agent.find(volume_id)) is not None:
        return held.mountpoint
    return str(daemon.mountpoint) if daemon is not None else None


class _Notes(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        ui.note(record.getMessage())


def _say_what_is_settled(*, aloud: bool) -> None:
    """What the filesystem logs is a note where it changes the volume; elsewhere the report says the same."""
    log = logging.getLogger("cryptfs")
    log.propagate = False
    log.addHandler(_Notes(logging.WARNING) if aloud else logging.NullHandler())


@asynccontextmanager
async def _reached(
    cipher_dir: Path, volume_file: bytes, daemon: mounts.Daemon | None, top: str | None, *, exclusive: bool
) -> AsyncIterator[Reached]:
    """`top`: where the volume's root is seen, if it is mounted."""
    config = config_of(volume_file)
    clock = SystemClock()

    @asynccontextmanager
    async def domain(domain_id: bytes, path: bytes) -> AsyncIterator[Reached | None]:
        if is_shredded(domain_dir(cipher_dir, domain_id)):
            yield None
            return
        where, file = _domain(cipher_dir, domain_id)
        if not any(
            held.volume_id == domain_id and held.state == "unlocked" for held in (await client.status()).volumes
        ):
            yield None
            return
        below = top + os.fsdecode(path) if top is not None else None
        async with _reached(where, file, daemon, below, exclusive=exclusive) as reached:
            yield reached

    async with open_agent(paths.agent_socket()) as client:
        attached = await _attach(client, cipher_dir, volume_file, exclusive=exclusive)
        if attached and daemon is not None:
            # Its daemon has lost sight of the agent, and must find its place free when it comes back.
            await client.detach(config.volume_id, keep=True)
            attached = False
        keys = KeyCache(VolumeRequests.over(client, config.volume_id), CachePolicy(max_entries=MAX_ENTRIES), clock)

        def make_store() -> Store:
            return local_store(cipher_dir)

        def close_store(store: Store) -> None:
            assert isinstance(store, LocalStore)
            store.close_store()

        access = Access(config, make_store, close_store, keys, clock, os.urandom)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(keys.serve)
                yield Reached(access, _settle_through(top) if top is not None else None, domain)
                nursery.cancel_scope.cancel()
        finally:
            keys.wipe()
            if attached:
                with trio.CancelScope(shield=True), suppress(CryptfsError):
                    # What is to be locked again is when `unlocked` ends.
                    await client.detach(config.volume_id, keep=True)


async def _attach(client: AgentClient, cipher_dir: Path, volume_file: bytes, *, exclusive: bool) -> bool:
    """Stand for the volume's daemon, so that nobody mounts it meanwhile; whether that came about.

    The agent checks the `volume` file's MAC first, also where it then refuses because a daemon is attached.
    """
    volume_id = config_of(volume_file).volume_id
    try:
        await client.attach(volume_id=volume_id, cipher_dir=str(cipher_dir), mountpoint="", volume=volume_file)
    except VolumeBusy:
        if exclusive:
            raise
        return False
    return True


def is_shredded(cipher_dir: Path) -> bool:
    """Whether the domain in `cipher_dir` was shredded (`fs.domain`). Raises `StoreFailed`."""
    try:
        store = LocalStore(cipher_dir)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise StoreFailed(f"{cipher_dir}: {error.strerror}") from error
    try:
        return was_shredded(store, store.root())
    except OSError as error:
        raise StoreFailed(f"{cipher_dir}: {error.strerror}") from error
    finally:
        store.close_store()


def _domain(cipher_dir: Path, domain_id: bytes) -> tuple[Path, bytes]:
    """Cipher directory and `volume` file of a domain. Raises `Damaged`."""
    where = domain_dir(cipher_dir, domain_id)
    try:
        file = read_volume_file(where)
        found = config_of(file).volume_id
    except (NotAVolume, VolumeDamaged) as error:
        raise Damaged("domain", str(error)) from error
    if found != domain_id:
        raise Damaged("domain", f"{where} holds another volume")
    return where, file


def _settle_through(mounted: str) -> Settle:
    top = os.fsencode(mounted)

    def sync(path: bytes) -> None:
        with suppress(OSError):
            fd = os.open(top + path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

    async def settle(path: bytes) -> None:
        with trio.move_on_after(SETTLE_S):
            await trio.to_thread.run_sync(sync, path, abandon_on_cancel=True)

    return settle
