"""Agents to talk to: in this process on a fake root key, and as the real program."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio

from cryptfs.agent.server import Server
from cryptfs.ports import RootProvider
from cryptfs.testing.roots import FakeProvider

READY_S = 20


class StillClock:
    """A clock that stands still."""

    def monotonic(self) -> float:
        return 0.0

    def time_ns(self) -> int:
        return 1_700_000_000_000_000_000


@dataclass
class Served:
    """An agent in this process."""

    path: str
    server: Server
    provider: FakeProvider
    ended: trio.Event = field(default_factory=trio.Event)

    @property
    def socket_exists(self) -> bool:
        return Path(self.path).exists()


ServeHere = Callable[..., contextlib.AbstractAsyncContextManager[Served]]


@pytest.fixture
def serve_here(short_tmp: Path) -> ServeHere:
    """`async with serve_here() as served`: an agent in this process; `empty=True` for exit-when-empty.

    `more`: other root keys besides the fake one.
    """

    @contextlib.asynccontextmanager
    async def serve(
        *, empty: bool = False, startup_grace_s: float = 0.2, lock_deadline_s: float = 0.2,
        more: Sequence[RootProvider] = (),
    ) -> AsyncIterator[Served]:  # fmt: skip
        provider = FakeProvider()
        server = Server(
            providers={provider.kind: provider, **{each.kind: each for each in more}},
            state_dir=str(short_tmp / "state"),
            random=os.urandom,
            clock=StillClock(),
            exit_when_empty=empty,
            startup_grace_s=startup_grace_s,
            empty_grace_s=0.05,
        )
        server.locks.deadline_s = lock_deadline_s
        served = Served(str(short_tmp / "run" / "agent.sock"), server, provider)

        async def run(*, task_status: trio.TaskStatus[None]) -> None:
            await server.serve(served.path, task_status=task_status)
            served.ended.set()

        async with trio.open_nursery() as nursery:
            await nursery.start(run)
            yield served
            nursery.cancel_scope.cancel()

    return serve


@dataclass
class Program:
    """The real agent as a process of its own."""

    path: str
    process: subprocess.Popen[bytes]
    ready_line: str
    log: Path


StartAgent = Callable[..., Program]


@pytest.fixture
def start_agent(short_tmp: Path) -> Iterator[StartAgent]:
    """`start_agent(*flags)`: runs the program, waits for its line; ended by its id after the test."""
    programs: list[Program] = []

    def start(*flags: str, path: str | None = None, env: dict[str, str] | None = None) -> Program:
        socket_path = path or str(short_tmp / "run" / "agent.sock")
        log = short_tmp / f"agent{len(programs)}.log"
        ready_read, ready_write = os.pipe()
        command = [sys.executable, "-m", "cryptfs.agent", "--socket", socket_path, "--log-file", str(log)]
        process = subprocess.Popen(
            [*command, "--ready-fd", str(ready_write), *flags],
            pass_fds=[ready_write],
            stdin=subprocess.DEVNULL,
            env={**(env or os.environ), "XDG_STATE_HOME": str(short_tmp / "state")},
        )
        os.close(ready_write)
        with os.fdopen(ready_read) as ready:
            line = ready.readline()
        program = Program(socket_path, process, line, log)
        programs.append(program)
        return program

    yield start
    for program in programs:
        if program.process.poll() is None:
            program.process.terminate()
            try:
                program.process.wait(10)
            except subprocess.TimeoutExpired:
                program.process.kill()
        program.process.wait()


@contextlib.contextmanager
def raw_connection(path: str) -> Iterator[socket.socket]:
    """A blocking connection without any protocol on it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(READY_S)
        sock.connect(path)
        yield sock


async def settled(condition: Callable[[], bool]) -> None:
    """Wait until `condition` holds, 5 s at most."""
    with trio.fail_after(5):
        while not condition():  # noqa: ASYNC110 - any condition, of any process
            await trio.sleep(0.005)
