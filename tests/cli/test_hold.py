"""A command that unlocked a volume for itself leaves it locked, also when it is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from cryptfs.cli import key_agent
from cryptfs.cli.mounts import wait_until
from tests.cli.conftest import PASSPHRASE, TIMEOUT_S, Cryptfs

COMMANDS = {
    "rotate": ("rotate", "VAULT", "--kek"),
    "destroy": ("rotate", "VAULT", "--kek", "--destroy-old"),
    "policy": ("policy", "VAULT", "--max-age", "5m"),
    "protector": ("protector", "add", "VAULT", "--label", "two", "--kdf-cost", "low"),
    "check": ("check", "VAULT", "--deep"),
    "accept": ("check", "VAULT", "--accept-all"),
    "verify": ("audit", "verify", "VAULT"),
    "export": ("export", "VAULT", "/", "OUT"),
    "init": ("init", "OUT", "--kdf-cost", "low"),
}


def words(cryptfs: Cryptfs, name: str) -> list[str]:
    places = {"VAULT": str(cryptfs.root / "vault"), "OUT": str(cryptfs.root / "out")}
    return [places.get(word, word) for word in COMMANDS[name]]


@pytest.mark.parametrize("name", COMMANDS)
def begun(cryptfs: Cryptfs, name: str) -> subprocess.Popen[bytes]:
    """The command, as soon as the volume is unlocked."""
    secrets = {"CRYPTFS_PASSPHRASE": PASSPHRASE, "CRYPTFS_NEW_PASSPHRASE": "another one 5 horses"}
    command = subprocess.Popen(
        cryptfs.command(*words(cryptfs, name)), env={**os.environ, **secrets}, stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + TIMEOUT_S
    while not key_agent.held() and command.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    return command


@pytest.mark.parametrize("name", COMMANDS)
def test_a_killed_command_leaves_nothing_unlocked(cryptfs: Cryptfs, vault: Path, name: str) -> None:
    # So that the agent does not end with the connection, which would be a lock of its own.
    cryptfs.run("agent", "run")
    command = begun(cryptfs, name)
    command.send_signal(signal.SIGKILL)
    assert command.wait(TIMEOUT_S) == -signal.SIGKILL, "it was done before it was seen at work"
    assert wait_until(lambda: not key_agent.held(), 10)
    cryptfs.run("check", vault, passphrase=PASSPHRASE)


def test_a_command_that_is_done_leaves_it_as_it_was(cryptfs: Cryptfs, vault: Path) -> None:
    cryptfs.run("agent", "run")
    for name in ("policy", "rotate", "check"):
        cryptfs.run(*words(cryptfs, name), passphrase=PASSPHRASE)
        assert cryptfs.status() == []
    cryptfs.run("unlock", vault, passphrase=PASSPHRASE)
    for name in ("policy", "check", "rotate"):
        cryptfs.run(*words(cryptfs, name), passphrase=PASSPHRASE)
        assert [volume["state"] for volume in cryptfs.status()] == ["unlocked"]


def test_unlock_counts_while_a_command_has_it_unlocked(cryptfs: Cryptfs, vault: Path) -> None:
    """It asks for no secret, as the key is there, and the end of the command does not take that back."""
    command = begun(cryptfs, "protector")
    command.send_signal(signal.SIGSTOP)
    try:
        assert "already" in cryptfs.run("unlock", vault).stderr
    finally:
        command.send_signal(signal.SIGCONT)
    assert command.wait(TIMEOUT_S) == 0
    assert [volume["state"] for volume in cryptfs.status()] == ["unlocked"]
