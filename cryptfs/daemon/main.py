"""One mount from start to end: agent link, key cache, volume, FUSE; and the same backwards.

Beginning: attach to the agent, take the volume's lock, begin an epoch, mount, answer requests, say "ready". Ending,
however the mount ended: everything durable, the epoch closed, the agent told, the process gone.
"""

from __future__ import annotations

import gc
import logging
import os
import resource
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress

import trio
import trio.lowlevel

from cryptfs.daemon.args import DaemonArgs, parse
from cryptfs.daemon.domains import Domains
from cryptfs.daemon.guarding import Guarding
from cryptfs.daemon.keyed import Keyed
from cryptfs.daemon.process import harden, may_go, open_log, say
from cryptfs.errors import CryptfsError, NotAVolume, StoreFailed, VolumeBusy
from cryptfs.fs.volume import Volume, open_volume
from cryptfs.fuse.session import FuseSession
from cryptfs.keys.clock import SystemClock
from cryptfs.keys.link import AgentLink, Mounted
from cryptfs.ops.info import read_volume_file
from cryptfs.ops.init import config_of
from cryptfs.store.owner import local_store

log = logging.getLogger("cryptfs")

_LOCK_WAIT_S = 5.0
"""How long to wait for a daemon that is just leaving the volume."""
_LOCK_POLL_S = 0.05


def main(argv: Sequence[str]) -> int:
    """Serve until unmounted; the exit code."""
    try:
        args = parse(argv)
    except CryptfsError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    # Before anything is touched: the key is being brought in meanwhile, and may not come.
    if not may_go(args.go_fd):
        return 0
    open_log(args.log_file)
    harden()
    os.umask(0)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        clean = trio.run(_serve, args, restrict_keyboard_interrupt_to_checkpoints=True)
    except BaseException as error:  # noqa: BLE001 - whatever it is, whoever waits for "ready" is told
        return _failed(args, error)
    return 0 if clean else StoreFailed.exit_code


def _failed(args: DaemonArgs, error: BaseException) -> int:
    """Report why the daemon ends, to whoever waits for "ready" and to the log."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    if isinstance(error, OSError):
        error = StoreFailed(f"{error.strerror}: {os.fsdecode(error.filename or b'')}".rstrip(": "))
    if isinstance(error, CryptfsError):
        log.error("%s", error)
        say(args.ready_fd, f"error: {error.exit_code} {error}")
        return error.exit_code
    log.error("the daemon failed", exc_info=error)
    say(args.ready_fd, f"error: 1 the daemon failed: {type(error).__name__}; see its log")
    return 1


async def _serve(args: DaemonArgs) -> bool:
    """The daemon's life; True if the volume was left clean."""

    def read_volume() -> bytes:
        return read_volume_file(args.cipher_dir)

    volume_file = read_volume()
    config = config_of(volume_file)
    try:
        store = local_store(args.cipher_dir)
    except OSError as error:
        raise NotAVolume(f"{args.cipher_dir}: {error.strerror}") from error
    clock = SystemClock()
    volume: Volume | None = None
    domains: Domains | None = None
    clean = True
    guarding: Guarding | None = None
    async with trio.open_nursery() as nursery:
        mounted = Mounted(config.volume_id, str(args.cipher_dir), str(args.mountpoint), read_volume)
        keyed = Keyed(nursery, args, mounted, clock)
        try:
            await _attach(keyed.link)
            keyed.serve_keys()
            volume = await open_volume(config, store, keyed.keys, clock, os.urandom, read_only=args.read_only)
            session = FuseSession(
                volume, keyed.gate, source=args.cipher_dir, mountpoint=args.mountpoint, options=args.fuse_options,
                read_only=args.read_only, forced_owner=args.force_owner,
            )  # fmt: skip
            domains = Domains(nursery, args, volume, keyed.link, session, clock)
            session.mount()
            guarding = Guarding(session)
            nursery.start_soon(guarding.serve)
            _collect_seldom()
            keyed.serve_volume(volume, session.forgetting(volume, keyed.gate))
            nursery.start_soon(_stop_on_signal, session)
            nursery.start_soon(_announce, args, session)
            await session.run()
        finally:
            if guarding is not None:
                guarding.let_go()
            with trio.CancelScope(shield=True):
                if domains is not None:
                    clean = await domains.close()
                if volume is not None:
                    clean = await volume.close() and clean
                await keyed.leave()
            nursery.cancel_scope.cancel()
    store.close_store()
    log.info("unmounted")
    return clean


def _collect_seldom() -> None:
    gc.collect()
    gc.freeze()
    # Requests make no reference cycles; scanning for them now and then is enough.
    gc.set_threshold(100_000, 20, 50)


async def _attach(link: AgentLink) -> None:
    """Attach to the agent; a daemon of the same volume that is just leaving gets a moment to do so."""
    deadline = trio.current_time() + _LOCK_WAIT_S
    while True:
        try:
            await link.attach()
        except VolumeBusy:
            if trio.current_time() > deadline:
                raise
            await trio.sleep(_LOCK_POLL_S)
        else:
            return


async def _announce(args: DaemonArgs, session: FuseSession) -> None:
    """Say "ready" once the mount answers."""
    await session.answering()
    log.info("mounted %s on %s", args.cipher_dir, args.mountpoint)
    say(args.ready_fd, "ready")


async def _stop_on_signal(session: FuseSession) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for number in signals:
            log.info("unmounting on signal %d", number)
            with suppress(OSError):
                await session.stop()
