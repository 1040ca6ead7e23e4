"""The agent's program: ``python -m cryptfs.agent --socket PATH [--exit-when-empty] [--ready-fd N] …``.

Started by exec, in a cleaned environment. Joins server, roots, clock and randomness; nothing else knows them all.

Ready: writes the line ``ready`` to the descriptor given by ``--ready-fd`` once clients can connect, or ``error: …``
and exits with the error's code (cryptfs.errors); an end of file without a line means that it died. Then, unless
``--foreground``, it is on its own: a session of its own, no controlling terminal, standard streams on /dev/null.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import time

import trio

from cryptfs.agent.config import AgentConfig, read_config
from cryptfs.agent.hardening import measures
from cryptfs.agent.peer_names import PeerNames
from cryptfs.agent.places import covering_mount
from cryptfs.agent.sandbox import confine
from cryptfs.agent.server import Around, Server
from cryptfs.agent.unlocking import Providers
from cryptfs.errors import CryptfsError, UsageError
from cryptfs.format.protectors import PKCS11
from cryptfs.paths import config_path, private_dir, state_path
from cryptfs.ports import RootProvider
from cryptfs.private_log import PrivateLog
from cryptfs.roots.absent import AbsentProvider
from cryptfs.roots.keyfile import KeyfileProvider
from cryptfs.roots.passphrase import PassphraseProvider
from cryptfs.roots.recovery import RecoveryProvider

log = logging.getLogger("cryptfs.agent")


class SystemClock:
    """The machine's clocks."""

    def monotonic(self) -> float:
        """Seconds, time asleep included."""
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    def time_ns(self) -> int:
        """Nanoseconds since 1970."""
        return time.time_ns()


def main(argv: list[str] | None = None) -> int:
    """Run the agent until it ends; the exit code."""
    options = _parse(argv)
    os.umask(0o077)
    try:
        _log_to(options.log_file, foreground=options.foreground)
        if not options.foreground:
            with contextlib.suppress(PermissionError):  # already the leader of a session
                os.setsid()
            os.chdir("/")
        config = read_config(config_path())
        peers = PeerNames()
        providers = _providers(config)
        server = Server(
            providers=providers,
            state_dir=state_path(),
            random=os.urandom,
            clock=SystemClock(),
            around=Around(
                peers.exe_of,
                _confined(options, config, network=any(each.needs_network for each in providers.values())),
            ),
            exit_when_empty=options.exit_when_empty,
        )
        trio.run(_run, server, options.socket, options.ready_fd, options.foreground)
    except CryptfsError as error:
        return _fail(error, options.ready_fd)
    except BaseExceptionGroup as group:
        match, rest = group.split(CryptfsError)
        if match is None or rest is not None:
            raise
        return _fail(_first(match), options.ready_fd)
    return 0


def _fail(error: CryptfsError, ready_fd: int | None) -> int:
    log.error("%s", error)
    if ready_fd is None:
        sys.stderr.write(f"error: {error}\n")
    else:
        _tell(ready_fd, f"error: {error}\n")
    return error.exit_code


def _providers(config: AgentConfig) -> Providers:
    """All kinds there are, by name."""
    made: list[RootProvider] = [
        PassphraseProvider(os.urandom),
        KeyfileProvider(os.urandom),
        RecoveryProvider(os.urandom),
    ]
    made.append(_pkcs11(config))
    return {provider.kind: provider for provider in made}


def _pkcs11(config: AgentConfig) -> RootProvider:
    """Tokens, if this machine has any: their modules are loaded when first needed, by the confined process."""
    if not config.pkcs11.modules:
        return AbsentProvider(PKCS11, f"{config_path()}/agent.toml names no PKCS#11 module")
    try:
        from cryptfs.roots.pkcs11 import Pkcs11Provider  # noqa: PLC0415 - an extra, and only where it is configured
    except ImportError:
        log.warning("agent.toml names PKCS#11 modules, but python-pkcs11 is not installed")
        return AbsentProvider(PKCS11, "python-pkcs11 is not installed (the extra `pkcs11` of cryptfs)")
    # What the modules read from it (SOFTHSM2_CONF …): the agent is started without the user's environment.
    os.environ.update(config.pkcs11.environment)
    return Pkcs11Provider(config.pkcs11.modules, os.urandom, needs_network=config.pkcs11.network)


def _confined(options: argparse.Namespace, config: AgentConfig, *, network: bool) -> dict[str, str]:
    """Harden and confine this process; what is in force, by measure. Anything missing is logged, nothing is fatal."""
    found = {name: "on" if problem is None else f"off: {problem}" for name, problem in measures().items()}
    socket_dir, state_dir = os.path.dirname(os.path.abspath(options.socket)), state_path()
    writable = [private_dir(socket_dir)]
    inside = covering_mount(state_dir)
    if inside is None:
        writable.append(private_dir(state_dir))
    if options.log_file is not None:
        writable.append(os.path.dirname(os.path.abspath(options.log_file)))
    writable.extend(config.pkcs11.writable)
    found |= confine(writable, network=network)
    for name, state in found.items():
        if not state.startswith("on"):
            log.warning("%s: %s", name, state)
    return found


async def _run(server: Server, path: str, ready_fd: int | None, foreground: bool) -> None:  # noqa: FBT001
    async with trio.open_nursery() as nursery:
        await nursery.start(server.stop_on_signals)
        nursery.start_soon(_serve, server, path, nursery, ready_fd, foreground)


async def _serve(
    server: Server,
    path: str,
    nursery: trio.Nursery,
    ready_fd: int | None,
    foreground: bool,  # noqa: FBT001
) -> None:
    async with trio.open_nursery() as inner:
        await inner.start(server.serve, path)
        log.info("serving %s", path)
        if not foreground:
            _let_go_of_streams()
        _tell(ready_fd, "ready\n")
        # After that line: the log's first file takes a few syncs, and whoever waits need not wait for them.
        server.audit.event("start", detail={"pid": os.getpid()})
    nursery.cancel_scope.cancel()


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="cryptfs-agent", allow_abbrev=False, description="The key agent of cryptfs.")
    parser.add_argument("--socket", required=True, metavar="PATH", help="where to listen")
    parser.add_argument("--exit-when-empty", action="store_true", help="end once no volume is unlocked")
    parser.add_argument("--ready-fd", type=int, metavar="N", help="descriptor to report to once ready")
    parser.add_argument("--log-file", metavar="PATH", help="append log lines here")
    parser.add_argument("--foreground", action="store_true", help="stay in this session, log to stderr")
    options = parser.parse_args(argv)
    if options.ready_fd is not None and options.ready_fd < 3:
        parser.error("--ready-fd cannot be a standard stream")
    return options


def _log_to(path: str | None, *, foreground: bool) -> None:
    handler: logging.Handler
    if path is not None:
        try:
            handler = PrivateLog(path)
        except OSError as error:
            raise UsageError(f"cannot write the log file {path}: {error.strerror}") from error
    elif foreground:
        handler = logging.StreamHandler()
    else:
        handler = logging.NullHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s agent[%(process)d] %(levelname)s %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.INFO)


def _tell(ready_fd: int | None, text: str) -> None:
    if ready_fd is None:
        return
    # Whoever started us may be gone by now; that is no reason to end.
    with contextlib.suppress(OSError):
        os.write(ready_fd, text.encode("utf-8", "replace"))
        os.close(ready_fd)


def _let_go_of_streams() -> None:
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    os.close(null)


def _first(group: BaseExceptionGroup[CryptfsError]) -> CryptfsError:
    for error in group.exceptions:
        return error if isinstance(error, CryptfsError) else _first(error)
    raise AssertionError("a group is never empty")


if __name__ == "__main__":
    sys.exit(main())
