"""What the command line's tests share: running `cryptfs` as a process of its own, in directories of the test's own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cryptfs import paths
from cryptfs.cli.mounts import wait_until
from tests.cli.terminal import Terminal
from tests.conftest import XdgDirs
from tests.processes import processes_with
from tests.softhsm import SoftHsm

TIMEOUT_S = 90.0
PASSPHRASE = "correct horse battery staple 7"
DEFAULT_POLICY: dict[str, bool | float | None] = {
    "caching": True, "max_age_s": 60, "max_entries": 262144, "max_uses": None, "idle_s": None, "for_s": None,
    "reverify_s": 60, "unwraps_per_s": None,
}  # fmt: skip


@dataclass
class Cryptfs:
    """The command, and a directory to work in."""

    root: Path

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

    def status(self) -> list[dict[str, Any]]:
        volumes: list[dict[str, Any]] = json.loads(self.run("status", "--json").stdout)
        return volumes

    def agent_pids(self) -> list[int]:
        return processes_with(b"cryptfs.agent", os.fsencode(paths.agent_socket()))

    def daemon_pids(self) -> list[int]:
        return processes_with(b"cryptfs.daemon", os.fsencode(paths.agent_socket()))


@pytest.fixture(scope="session")
def template(short_root: Path) -> Iterator[Path]:
    """A volume to be copied: making one takes an agent's life."""
    path = Path(tempfile.mkdtemp(dir=short_root))
    dirs = dict.fromkeys(("HOME", "XDG_RUNTIME_DIR", "XDG_STATE_HOME"), str(path))
    agent = os.fsencode(path / "cryptfs" / "agent.sock")
    subprocess.run(
        Cryptfs(path).command("init", "--kdf-cost", "low", path / "vault"),
        env={**os.environ, **dirs, "CRYPTFS_PASSPHRASE": PASSPHRASE},
        check=True,
    )
    assert wait_until(lambda: not processes_with(b"cryptfs.agent", agent), 30), "the agent has not ended"
    yield path / "vault"
    shutil.rmtree(path)


@pytest.fixture
def vault(cryptfs: Cryptfs, template: Path) -> Path:
    """A fresh volume under `PASSPHRASE`, locked."""
    path = cryptfs.root / "vault"
    shutil.copytree(template, path, symlinks=True)
    return path


@pytest.fixture
def cryptfs(xdg_dirs: XdgDirs, short_tmp: Path) -> Iterator[Cryptfs]:
    """The command; an agent still running at the end is stopped."""
    command = Cryptfs(short_tmp)
    yield command
    if command.agent_pids():
        command.run("agent", "stop", code=None)


@pytest.fixture
def token(cryptfs: Cryptfs) -> SoftHsm:
    """A SoftHSM with the token `card`, and an agent.toml that names it."""
    hsm = SoftHsm(cryptfs.root / "hsm").set_up()
    hsm.make_token("card")
    agent_toml().write_text(hsm.agent_toml())
    return hsm


def agent_toml() -> Path:
    path = Path(paths.config_path(), "agent.toml")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
