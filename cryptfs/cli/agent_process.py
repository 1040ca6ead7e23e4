"""The one agent of this user: whether it runs, starting it, ending it.

Two commands that find no agent at the same moment must not start two: the start happens under an flock on `agent.start`
beside the socket, and whoever gets the lock second finds the first one's agent running. The lock dies with its holder.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING

from cryptfs import paths
from cryptfs.cli import processes
from cryptfs.cli.advice import hinted
from cryptfs.errors import AgentUnavailable, CryptfsError, NotPermitted

if TYPE_CHECKING:
    from collections.abc import Iterator

AGENT_MODULE = "cryptfs.agent"
_FREED_IS_OVERWRITTEN = {
    "PYTHONMALLOC": "malloc",
    "GLIBC_TUNABLES": ":".join(
        f"glibc.malloc.{name}={value}"
        for name, value in {"perturb": 165, "tcache_count": 0, "trim_threshold": 8 << 20, "top_pad": 1 << 20}.items()
    ),
}
"""Every object is the C library's to free, which overwrites it: messages, keys and passphrases in `bytes` that Python
could not wipe. What its per-thread caches keep is not overwritten, so there are none. The heap's end is not given back
each time: taking it again costs milliseconds where memory is locked. See `agent.hardening`."""
ENDING_S = 5.0
START_S = 20.0
"""How long an agent may take until it is ready, and how long to wait for another command that is starting one."""


def reached(sock: socket.socket) -> bool:
    """Connect `sock`, a Unix stream socket, to the agent; False if none accepts connections.

    Raises `NotPermitted` if the agent's socket is not ours to use, `AgentUnavailable`.
    """
    try:
        paths.connect(sock, paths.agent_socket())
    except (FileNotFoundError, ConnectionRefusedError):
        return False
    except PermissionError:
        raise NotPermitted(f"{paths.agent_socket()} belongs to another user") from None
    except OSError as error:
        raise AgentUnavailable(f"{paths.agent_socket()}: {error.strerror}") from error
    return True


def is_running() -> bool:
    """Whether something accepts connections on the agent's socket. Raises as `reached`."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        return reached(probe)


def ensure_running() -> None:
    """Start an agent that ends when it holds no volume any more, unless one runs. Raises `AgentUnavailable`."""
    if is_running():
        return
    with _start_lock():
        _start_unless_running(exit_when_empty=True)


def _start_unless_running(*, exit_when_empty: bool) -> int:
    """Start an agent; its pid, or 0 if one runs. One that is just ending holds the socket's lock: try again then."""
    end = time.monotonic() + ENDING_S
    while not is_running():
        try:
            return start(exit_when_empty=exit_when_empty)
        except CryptfsError as error:
            if type(error) is not CryptfsError or time.monotonic() > end:
                raise
            time.sleep(0.05)
    return 0


def run_background() -> int:
    """Start an agent that stays; returns its pid. Raises `CryptfsError` if one runs already, `AgentUnavailable`."""
    _wait_for_ending()
    with _start_lock():
        pid = _start_unless_running(exit_when_empty=False)
    if not pid:
        raise _second()
    return pid


def _wait_for_ending() -> None:
    """An agent that a verb started and that holds nothing any more ends within a second, if nobody talks to it."""
    from cryptfs.cli import key_agent

    with processes.watched(key_agent.ending_pid()) as watch:
        watch.has_ended(ENDING_S)


def _second() -> CryptfsError:
    return hinted(CryptfsError("an agent runs already"), "`cryptfs agent stop` ends it")


def start(*, exit_when_empty: bool) -> int:
    """Start an agent in the background and wait until it is ready; returns its pid. Raises what the agent reports."""
    arguments = ["--socket", paths.agent_socket(), "--log-file", str(log_file())]
    if exit_when_empty:
        arguments.append("--exit-when-empty")
    starting = processes.start(AGENT_MODULE, arguments, log_file=log_file(), settings=_FREED_IS_OVERWRITTEN)
    try:
        line = starting.wait_ready(START_S)
    except BaseException:
        with processes.ended_unless_left(starting):
            raise
    if line == "ready":
        starting.leave()
        return starting.process.pid
    if line is None:
        starting.process.terminate()
    exit_code = starting.end()
    if line is None:
        raise hinted(AgentUnavailable(f"the key agent was not ready within {START_S:.0f} s"), _log_hint())
    raise processes.reported(line, exit_code) or hinted(
        AgentUnavailable("the key agent ended before it was ready"), _log_hint()
    )


def run_foreground() -> int:
    """Run an agent as a child of this command, ended by SIGINT or SIGTERM; returns its exit code. Raises as above."""
    _wait_for_ending()
    if is_running():
        raise _second()
    words = ["--socket", paths.agent_socket(), "--foreground"]
    starting = processes.start(AGENT_MODULE, words, log_file=None, settings=_FREED_IS_OVERWRITTEN)
    try:
        line = starting.wait_ready(START_S)
    except BaseException:
        with processes.ended_unless_left(starting):
            raise
    if line != "ready":
        exit_code = starting.end()
        raise processes.reported(line or "", exit_code) or AgentUnavailable("the key agent was never ready")
    with processes.signals_passed_on(starting.process):
        return starting.process.wait()


def log_file() -> Path:
    """Where the agent writes its log; it never holds a secret."""
    return Path(paths.state_dir(), "log", "agent.log")


def _log_hint() -> str:
    return f"see {log_file()}"


@contextlib.contextmanager
def _start_lock() -> Iterator[None]:
    fd = os.open(
        os.path.join(paths.runtime_dir(), "agent.start"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
    )
    try:
        end = time.monotonic() + START_S
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise AgentUnavailable("another command has been starting the key agent for too long") from None
                time.sleep(0.02)
        yield
    finally:
        os.close(fd)  # also lets go of the lock; the file stays, as its name is what the lock is found by
