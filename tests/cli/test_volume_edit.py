"""What is done and shown when replacing a `volume` file fails at each place."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from cryptfs.cli.new_protector import Made, NewProtector
from cryptfs.cli.passphrase import NEW_PASSPHRASE, NEW_PIN, Sources
from cryptfs.cli.volume_edit import Edit
from cryptfs.errors import AgentUnavailable, StoreFailed
from cryptfs.keys.agent_client import AgentClient
from tests.cli.conftest import PASSPHRASE, Cryptfs

NEW = b"the new file"


class Replacing(Edit):
    """A held `volume` file whose replacement fails where it is told."""

    def __init__(self, cipher_dir: Path, fails: str) -> None:
        super().__init__(cipher_dir, (cipher_dir / "volume").read_bytes())
        self._fails = fails

    def replace(self, data: bytes) -> None:
        if self._fails == "before":
            raise StoreFailed("no space")
        (self.cipher_dir / "volume").write_bytes(data)
        if self._fails == "after":
            raise StoreFailed("the directory cannot be synced")


@pytest.mark.parametrize(("fails", "kept"), [("before", False), ("after", True), ("commit", True), ("", True)])
def test_a_protector_is_kept_exactly_if_the_new_file_is_in_its_place(
    vault: Path, monkeypatch: pytest.MonkeyPatch, fails: str, kept: bool
) -> None:
    asked: list[str] = []

    def ask(request: Callable[[AgentClient], Awaitable[object]]) -> object:
        asked.append("make" if not asked else "commit")
        if asked[-1] == "make":
            return NEW
        if fails == "commit":
            raise AgentUnavailable("the key agent is gone")
        return 1

    monkeypatch.setattr("cryptfs.cli.key_agent.ask", ask)
    calls: list[str] = []
    edit = Replacing(vault, fails)

    async def make(_client: AgentClient, _data: bytes) -> bytes:
        return NEW

    if fails:
        with pytest.raises((StoreFailed, AgentUnavailable)):
            edit.change(make, lambda: calls.append("in place"))
    else:
        edit.change(make, lambda: calls.append("in place"))
    assert calls == ["in place"] * kept
    assert asked == ["make", "commit"][: 2 if fails in ("", "commit") else 1]


@pytest.mark.parametrize("kept", [True, False])
def test_a_made_key_file_stays_exactly_if_its_protector_does(tmp_path: Path, kept: bool) -> None:
    keyfile = tmp_path / "key"
    new = NewProtector(Sources(words=NEW_PASSPHRASE), Sources(words=NEW_PIN), new_keyfile=keyfile)

    def fail(made: Made) -> None:
        made.is_kept = kept
        assert keyfile.read_bytes() == made.wish.secret
        raise AgentUnavailable("the key agent is gone")

    with pytest.raises(AgentUnavailable), new.made("keyfile", "stick", tmp_path / "vault") as made:
        fail(made)
    assert keyfile.exists() == kept


KILLED = """
import os, signal, sys
from cryptfs.keys import edit_requests
from cryptfs.ops import volume_file

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

if sys.argv.pop(1) == "replace":
    volume_file.VolumeEdit.replace = die
else:
    edit_requests.commit = die
from cryptfs.cli.main import main
sys.exit(main())
"""


@pytest.mark.parametrize(("at", "opens"), [("replace", False), ("commit", True)])
def test_killed_the_key_file_is_there_and_the_volume_is_the_old_or_the_new_one(
    cryptfs: Cryptfs, vault: Path, at: str, opens: bool
) -> None:
    """Before the file is replaced, or after it and before the agent is told: the next unlock goes by what is there."""
    keyfile = cryptfs.root / "key"
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, at, "protector", "add", str(vault), "--new-keyfile", str(keyfile)],
        env={**os.environ, "CRYPTFS_PASSPHRASE": PASSPHRASE},
        check=False,
        timeout=90,
    )
    assert ended.returncode == -signal.SIGKILL
    assert keyfile.stat().st_size == 64
    cryptfs.run("agent", "stop")
    cryptfs.run("unlock", vault, "--keyfile", keyfile, code=0 if opens else 2)
    cryptfs.run("lock", vault)
    cryptfs.run("unlock", vault, passphrase=PASSPHRASE)
    cryptfs.run("lock", vault)
    # Nothing is in the way of the next one.
    env = {"CRYPTFS_PASSPHRASE": PASSPHRASE}
    cryptfs.run("protector", "add", vault, "--use-keyfile", keyfile, "--label", "again", env=env)
    cryptfs.run("unlock", vault, "--keyfile", keyfile)
