"""Rounds of: mount, write from several processes, crash at a random moment, mount again, compare with the logs."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.crash.writer import acknowledged, problems
from tests.mount.box import Box

Crash = Callable[[Box, random.Random], None]

SOURCE_ROOT = Path(__file__).resolve().parents[2]
WRITING_S = 60.0
"""Writers that nobody stops end after this."""
FIRST_MAX = 30
"""So many acknowledgements are waited for at most: on a slow disk, a time alone might pass without any."""
REMEMBERED = 3
"""So many earlier rounds are looked at again: a crash must not touch what was at rest."""


@dataclass
class Rounds:
    """A volume that lives through all of them. `crash` ends the mount, in whatever way, and returns.

    `stop_writers`: they are stopped first, so that what they have logged had returned before the crash. (While ext4
    is being shut down an fsync may return 0 for what never reaches the disk, also without cryptfs; seen on Linux 6.18.)
    """

    box: Box
    seed: int
    crash: Crash
    stop_writers: bool = False
    kept: list[tuple[int, Path, Path]] = field(default_factory=list)
    acknowledged: int = 0
    number: int = 0

    def play(self, *, longest_s: float) -> None:
        """One more. The crash comes up to `longest_s` seconds after one of the first acknowledgements."""
        self.number += 1
        seed = self.seed * 1000 + self.number
        rng = random.Random(seed)
        top, logs = self.box.clear / f"round {self.number}", self.box.root / f"logs {self.number}"
        logs.mkdir()
        top.mkdir()
        for path in (top.parent, top):
            sync_directory(path)
        command = [sys.executable, "-m", "tests.crash.writer", str(top), str(logs), str(seed), str(WRITING_S)]
        with subprocess.Popen(command, cwd=SOURCE_ROOT, start_new_session=True) as writers:
            first = rng.randint(1, FIRST_MAX)
            wait_for(lambda: acknowledged(logs) >= first, WRITING_S)
            time.sleep(rng.uniform(0, longest_s))
            if self.stop_writers:
                os.killpg(writers.pid, signal.SIGSTOP)
            self.crash(self.box, rng)
            if self.stop_writers:
                os.killpg(writers.pid, signal.SIGKILL)
            writers.wait(WRITING_S + 10)
        self.box.mount()
        self.kept.append((seed, top, logs))
        self.acknowledged += acknowledged(logs)
        found = [problem for seed, top, logs in self.kept for problem in problems(top, logs, seed)]
        found += list(unreadable(self.box.clear))
        assert not found, "\n".join([f"round {self.number}, seed {self.seed}", *found, self.box.log()[-3000:]])
        while len(self.kept) > REMEMBERED:
            _, top, logs = self.kept.pop(0)
            shutil.rmtree(top)
            shutil.rmtree(logs)


def sync_directory(path: Path) -> None:
    """fsync(2) of a directory."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def wait_for(ready: Callable[[], bool], limit_s: float) -> None:
    """Look until it is so."""
    end = time.monotonic() + limit_s
    while not ready():
        assert time.monotonic() < end, "the writers get nowhere"
        time.sleep(0.01)


def unreadable(top: Path) -> Iterator[str]:
    """Everything below that is listed and cannot be read to its end."""
    failed: list[OSError] = []
    for place, _, files in os.walk(top, onerror=failed.append):
        for name in files:
            path = Path(place, name)
            try:
                path.lstat()
                path.read_bytes()
            except OSError as error:
                failed.append(error)
    yield from (f"cannot be read: {error}" for error in failed)


# crashes -----------------------------------------------------------------------------------------------------------


def daemon_killed(box: Box, rng: random.Random) -> None:
    """kill -9 of the daemon."""
    box.kill_daemon()


def agent_killed(box: Box, rng: random.Random) -> None:
    """kill -9 of the agent; what can be saved is, and the mount is ended as well as it can be."""
    box.kill_agent()
    time.sleep(rng.uniform(0, 0.3))
    box.run("umount", box.clear, code=None)
    if box.is_mounted:
        box.kill_daemon()


def both_killed(box: Box, rng: random.Random) -> None:
    """One shortly after the other."""
    first, second = rng.sample([box.kill_agent, box.kill_daemon], 2)
    first()
    time.sleep(rng.uniform(0, 0.1))
    if box.agent_pids() or second == box.kill_daemon:
        second()


def any_killed(box: Box, rng: random.Random) -> None:
    """The daemon as often as agent and both together."""
    rng.choice((daemon_killed, daemon_killed, agent_killed, both_killed))(box, rng)
