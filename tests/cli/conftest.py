"""What the command line's tests share: running `cryptfs` as a process of its own, in directories of the test's own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.cli.terminal import Terminal
from tests.conftest import XdgDirs

TIMEOUT_S = 90.0
PASSPHRASE = "correct horse battery staple 7"


@dataclass
class Cryptfs:
    """The command, and a directory to work in."""

    root: Path
    daemons: list[int] = field(default_factory=list)

    def command(self, *words: str | Path) -> list[str]:
        return [sys.executable, "-m", "cryptfs", *map(str, words)]

    def run(
        self,
        *words: str | Path,
        code: int | None = 0,
        passphrase: str | None = None,
        env: Mapping[str, str] | None = None,
        pass_fds: tuple[int, ...] = (),
    ) -> subprocess.CompletedProcess[str]:
        """Run one command line without a terminal; `code` is the exit code it must end with."""
        environment = {**os.environ, **(env or {})}
        if passphrase is not None:
            environment["CRYPTFS_PASSPHRASE"] = passphrase
        ended = subprocess.run(
            self.command(*words),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
            env=environment,
            pass_fds=pass_fds,
            start_new_session=True,  # no controlling terminal, wherever the tests are run from
        )
        if code is not None:
            assert ended.returncode == code, f"exit code {ended.returncode}: {ended.stdout}{ended.stderr}"
        return ended

    def on_terminal(self, *words: str | Path) -> Terminal:
        return Terminal(self.command(*words))


@pytest.fixture
def cryptfs(xdg_dirs: XdgDirs, short_tmp: Path) -> Iterator[Cryptfs]:
    """The command; an agent still running at the end is stopped."""
    command = Cryptfs(short_tmp)
    yield command
    command.run("agent", "stop", code=None)
