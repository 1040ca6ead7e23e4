"""`unlock`, `lock`, `status` and `agent`, on a real agent and without a mount."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cryptfs import errors, paths
from cryptfs.agent import places
from cryptfs.cli import processes
from cryptfs.cli.advice import hint_for
from cryptfs.cli.mounts import wait_until
from tests.cli.conftest import DEFAULT_POLICY, PASSPHRASE, Cryptfs


@contextmanager
def ended_after(pids: list[int]) -> Iterator[None]:
    """The one process in `pids` ends by what is done inside."""
    assert len(pids) == 1
    with processes.watched(pids[0]) as watch:
        yield
        assert watch.has_ended(20), "the agent has not ended"


def test_no_agent_means_an_empty_list(cryptfs: Cryptfs) -> None:
    assert cryptfs.status() == []
    ended = cryptfs.run("status")
    assert ended.stdout == ""
    assert "no volume" in ended.stderr
    assert cryptfs.agent_pids() == []


def test_unlock_status_lock(cryptfs: Cryptfs, vault: Path) -> None:
    cryptfs.run("unlock", vault, passphrase=PASSPHRASE)
    volume_id = json.loads(cryptfs.run("info", vault, "--json").stdout)["volume_id"]
    assert cryptfs.status() == [
        {
            "volume_id": volume_id,
            "cipher_dir": str(vault),
            "mountpoint": None,
            "state": "unlocked",
            "daemon_pid": None,
            "locks_in_s": None,
            "policy": DEFAULT_POLICY,
            "overridden": [],
            "cache": None,
        }
    ]
    shown = cryptfs.run("status").stdout
    assert shown.startswith("VOLUME ")
    assert f"{volume_id}  unlocked  {vault}  -" in shown
    assert "unlocked already" in cryptfs.run("unlock", vault).stderr, "no passphrase is needed the second time"
    with ended_after(cryptfs.agent_pids()):  # it was started for this, and now holds nothing
        cryptfs.run("lock", vault)
    assert cryptfs.status() == []
    assert "locked already" in cryptfs.run("lock", vault).stderr


def test_lock_means_the_volume_that_is_there_now(cryptfs: Cryptfs, vault: Path) -> None:
    """The agent goes by where it was when it was unlocked; another may lie there by now."""
    cryptfs.run("unlock", vault, passphrase=PASSPHRASE)
    vault.rename(vault.with_name("elsewhere"))
    cryptfs.run("init", "--kdf-cost", "low", vault, passphrase=PASSPHRASE)
    cryptfs.run("unlock", vault, passphrase=PASSPHRASE)
    cryptfs.run("lock", vault)
    held = json.loads(cryptfs.run("status", "--json").stdout)
    assert "locked already" in cryptfs.run("lock", vault).stderr
    assert len(held) <= 1, "the other one may be locked, too: it was named by where it was"
    cryptfs.run("lock", vault.with_name("elsewhere"))
    assert json.loads(cryptfs.run("status", "--json").stdout) == []


def test_lock_needs_a_volume(cryptfs: Cryptfs) -> None:
    cryptfs.run("lock", cryptfs.root, code=10)
    cryptfs.run("lock", cryptfs.root / "missing", code=10)


@pytest.mark.parametrize("words", [("unlock",), ("mount",)])
def test_a_wrong_passphrase(cryptfs: Cryptfs, vault: Path, words: tuple[str, ...]) -> None:
    clear = cryptfs.root / "clear"
    clear.mkdir()
    rest = [clear] if words == ("mount",) else []
    ended = cryptfs.run(*words, vault, *rest, passphrase="wrong", code=13)
    assert ended.stderr.startswith("error: ")
    assert "hint: " in ended.stderr
    assert cryptfs.status() == []


def test_what_is_no_volume(cryptfs: Cryptfs) -> None:
    cryptfs.run("unlock", cryptfs.root, passphrase="x", code=10)
    cryptfs.run("mount", cryptfs.root / "missing", cryptfs.root, passphrase="x", code=10)


def test_an_edited_volume_file(cryptfs: Cryptfs, vault: Path) -> None:
    file = vault / "volume"
    data = bytearray(file.read_bytes())
    at = data.index(b"created_s") + 9 + 4
    data[at] ^= 1  # the last byte of a time: parses, but is not what was signed
    file.write_bytes(data)
    cryptfs.run("info", vault)
    ended = cryptfs.run("unlock", vault, passphrase=PASSPHRASE, code=11)
    assert "hint: put back" in ended.stderr
    assert cryptfs.status() == []


def test_a_newer_format(cryptfs: Cryptfs, vault: Path) -> None:
    data = bytearray((vault / "volume").read_bytes())
    data[9] = 2
    (vault / "volume").write_bytes(data)
    assert "format version 2" in cryptfs.run("unlock", vault, passphrase=PASSPHRASE, code=12).stderr


def test_each_source_unlocks(cryptfs: Cryptfs, vault: Path) -> None:
    passfile = cryptfs.root / "pass"
    passfile.write_text(PASSPHRASE + "\n")
    passfile.chmod(0o600)
    read_fd, write_fd = os.pipe()
    os.write(write_fd, PASSPHRASE.encode())
    os.close(write_fd)
    try:
        for words in (["--passfile", passfile], ["--passfd", str(read_fd)], ["--extpass", f"cat {passfile}"]):
            assert cryptfs.run("unlock", vault, *words, pass_fds=(read_fd,)).stderr == ""
            cryptfs.run("lock", vault)
    finally:
        os.close(read_fd)
    ended = cryptfs.run("unlock", vault, "--passfile", passfile, passphrase=PASSPHRASE, code=2)
    assert "more than one source" in ended.stderr


def test_without_a_source_and_a_terminal_there_is_advice(cryptfs: Cryptfs, vault: Path) -> None:
    ended = cryptfs.run("unlock", vault, code=2)
    assert "no terminal" in ended.stderr
    assert "hint: give it with --passfile" in ended.stderr
    assert cryptfs.agent_pids() == [], "no agent is started before there is a passphrase"


def test_a_person_may_try_three_times(cryptfs: Cryptfs, vault: Path) -> None:
    with cryptfs.on_terminal("unlock", vault) as terminal:
        terminal.expect("Passphrase: ")
        terminal.enter("wrong")
        terminal.expect("try again")
        terminal.expect("Passphrase: ")
        terminal.enter(PASSPHRASE)
        assert terminal.ended() == 0
    cryptfs.run("lock", vault)
    with cryptfs.on_terminal("unlock", vault) as terminal:
        for _ in range(3):
            terminal.expect("Passphrase: ")
            terminal.enter("wrong")
        terminal.expect("hint:")
        assert terminal.ended() == 13


def test_agent_run_stays_and_stop_ends_it(cryptfs: Cryptfs, vault: Path) -> None:
    cryptfs.run("agent", "run")
    pids = cryptfs.agent_pids()
    cryptfs.run("unlock", vault, passphrase=PASSPHRASE)
    cryptfs.run("lock", vault)
    assert cryptfs.agent_pids() == pids, "unlock used the agent that was there, and lock left it"
    ended = cryptfs.run("agent", "run", code=1)
    assert "an agent runs already" in ended.stderr
    cryptfs.run("agent", "run", "--foreground", code=1)
    with ended_after(pids):
        cryptfs.run("agent", "stop")
    assert "no agent runs" in cryptfs.run("agent", "stop").stderr


def test_agent_in_the_foreground_ends_with_the_command(cryptfs: Cryptfs) -> None:
    with subprocess.Popen(
        cryptfs.command("agent", "run", "-f"), stderr=subprocess.PIPE, start_new_session=True
    ) as process:
        assert wait_until(is_answering, 30)
        with ended_after(cryptfs.agent_pids()):
            process.send_signal(signal.SIGTERM)
            # 143 if the command had not heard yet that its agent is ready, which then ends all the same.
            assert process.wait(20) in (0, 128 + signal.SIGTERM)


def is_answering() -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(paths.agent_socket()) == 0


def test_commands_at_the_same_moment_start_one_agent(cryptfs: Cryptfs, vault: Path) -> None:
    environment = {**os.environ, "CRYPTFS_PASSPHRASE": PASSPHRASE}
    running = [
        subprocess.Popen(cryptfs.command("unlock", vault), env=environment, stderr=subprocess.PIPE) for _ in range(4)
    ]
    said = [process.communicate(timeout=60)[1] for process in running]
    assert [process.returncode for process in running] == [0] * 4, said
    assert len(cryptfs.agent_pids()) == 1
    assert [volume["state"] for volume in cryptfs.status()] == ["unlocked"]
    cryptfs.run("lock", vault)


def test_a_killed_agent_is_replaced(cryptfs: Cryptfs, vault: Path) -> None:
    cryptfs.run("unlock", vault, passphrase=PASSPHRASE)
    pids = cryptfs.agent_pids()
    with ended_after(pids):
        os.kill(pids[0], signal.SIGKILL)
    assert cryptfs.status() == []
    cryptfs.run("unlock", vault, passphrase=PASSPHRASE)
    assert [volume["state"] for volume in cryptfs.status()] == ["unlocked"]
    cryptfs.run("lock", vault)


IMPOSTOR = """
import contextlib, socket, sys
from cryptfs.format.agent_msg import encode_reply
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()
print(flush=True)
while True:
    client, _ = listener.accept()
    with client, contextlib.suppress(OSError):
        client.recv(65536)
        if sys.argv[2] == "dies":
            client.sendall(encode_reply(1, {"version": 1, "pid": 1, "started_s": 0}))
            client.recv(65536)
        else:
            client.sendall(b"HTTP/1.1 200 OK")
"""


@pytest.mark.parametrize("how", ["dies", "sends rubbish"])
def test_an_agent_that(cryptfs: Cryptfs, vault: Path, how: str) -> None:
    command = [sys.executable, "-c", IMPOSTOR, paths.agent_socket(), how]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as impostor:
        assert impostor.stdout is not None
        impostor.stdout.readline()
        ended = cryptfs.run("unlock", vault, passphrase=PASSPHRASE, code=16)
        impostor.kill()
    os.unlink(paths.agent_socket())
    assert "error: " in ended.stderr
    assert "Traceback" not in ended.stderr


STRANGER = """
import os, socket, sys
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
os.setresuid(65534, 65534, 65534)
listener.listen()
print(flush=True)
while True:
    client, _ = listener.accept()
    with client:
        print(client.recv(65536) or "nothing", flush=True)
"""


@pytest.mark.parametrize("words", [["status"], ["lock", "VAULT"], ["lock", "--all"], ["unlock", "VAULT"]])
def test_another_user_in_the_agents_place_is_told_nothing(cryptfs: Cryptfs, vault: Path, words: list[str]) -> None:
    if os.geteuid() != 0:
        pytest.skip("takes a second user")
    command = [sys.executable, "-c", STRANGER, paths.agent_socket()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as stranger:
        assert stranger.stdout is not None
        stranger.stdout.readline()
        line = [str(vault) if word == "VAULT" else word for word in words]
        ended = cryptfs.run(*line, passphrase=PASSPHRASE, code=errors.NotPermitted.exit_code)
        stranger.kill()
        assert set(stranger.stdout.read().split()) == {"nothing"}
    os.unlink(paths.agent_socket())
    assert "belongs to another user (uid 65534)" in ended.stderr


def test_a_state_directory_in_a_mount_gets_a_hint_that_helps(monkeypatch: pytest.MonkeyPatch, short_tmp: Path) -> None:
    monkeypatch.setattr(places, "cryptfs_mounts", lambda: frozenset({str(short_tmp)}))
    for refusal in (errors.AuditUnavailable, errors.FreshnessUnavailable):
        with pytest.raises(refusal) as caught:
            places.private_state_dir(str(short_tmp / "state"), "the audit log", refusal)
        assert "XDG_STATE_HOME" in hint_for(caught.value)
    assert "make room" in hint_for(errors.AuditUnavailable("No space left on device"))


def test_the_passphrase_is_nowhere_but_where_it_was_given(cryptfs: Cryptfs, vault: Path) -> None:
    cryptfs.run("unlock", vault, passphrase=PASSPHRASE)
    for pid in cryptfs.agent_pids():
        for name in ("cmdline", "environ"):
            assert PASSPHRASE.encode() not in Path(f"/proc/{pid}/{name}").read_bytes()
        assert b"CRYPTFS_PASSPHRASE" not in Path(f"/proc/{pid}/environ").read_bytes()
    for log in Path(paths.state_dir()).rglob("*.log"):
        assert PASSPHRASE.encode() not in log.read_bytes()
    cryptfs.run("lock", vault)
