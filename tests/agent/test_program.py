"""The agent as the program it is: started by exec, under a passphrase, killed, attacked by other users, left alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from cryptfs.errors import AgentUnavailable, NotPermitted, VolumeLocked, WrongSecret
from cryptfs.format.agent_msg import encode_request
from cryptfs.format.volume import parse_volume
from cryptfs.keys.agent_client import AgentClient, open_agent
from cryptfs.keys.edit_requests import ProtectorWish, VolumeWish
from tests.agent.conftest import StartAgent, settled

SECRET = b"hunter2-\xff-correct-horse"


async def create(client: AgentClient) -> tuple[bytes, bytes]:
    data = await client.create(VolumeWish(4096, ProtectorWish("passphrase", "", SECRET, {"cost": "low"})))
    return parse_volume(data).volume_id, data


async def test_ready_then_a_volume_then_stop(start_agent: StartAgent) -> None:
    program = start_agent()
    assert program.ready_line == "ready\n"
    async with open_agent(program.path) as client:
        volume_id, data = await create(client)
        await client.lock(volume_id)
        with pytest.raises(WrongSecret):
            await client.unlock(volume=data, cipher_dir="/c", secret=SECRET + b"x")
        await client.unlock(volume=data, cipher_dir="/c", secret=SECRET)
        assert (await client.status()).pid == program.process.pid
        await client.stop()
    assert await trio.to_thread.run_sync(program.process.wait, 10) == 0
    assert not _exists(program.path)
    log = program.log.read_text()
    assert "is unlocked" in log
    assert "wrong-secret" in log
    assert "hunter2" not in log
    assert "horse" not in log


def _exists(path: str) -> bool:
    return os.path.lexists(path)


def test_it_is_hardened_and_on_its_own(start_agent: StartAgent) -> None:
    program = start_agent()
    pid = program.process.pid
    assert os.getsid(pid) == pid
    limits = Path(f"/proc/{pid}/limits").read_text().splitlines()
    [core] = [line.split() for line in limits if line.startswith("Max core file size")]
    assert core[4:6] == ["0", "0"]
    # Not dumpable: its /proc files belong to root, whoever runs it (proc(5)).
    assert Path(f"/proc/{pid}/environ").stat().st_uid == 0
    if os.geteuid() == 0:
        assert {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in (0, 1, 2)} == {"/dev/null"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
async def test_signals_end_it_cleanly(start_agent: StartAgent, number: signal.Signals) -> None:
    program = start_agent()
    async with open_agent(program.path) as client:
        await create(client)
        program.process.send_signal(number)
        with trio.fail_after(10):
            await client.lost.wait()
    assert await trio.to_thread.run_sync(program.process.wait, 10) == 0
    assert not _exists(program.path)
    assert "is locked" in program.log.read_text()


async def test_killed_in_mid_request_then_a_new_one_takes_over(start_agent: StartAgent) -> None:
    program = start_agent()
    async with open_agent(program.path) as client:
        volume_id, data = await create(client)
        program.process.send_signal(signal.SIGSTOP)
        errors: list[AgentUnavailable] = []

        async def ask() -> None:
            try:
                await client.generate(volume_id, bytes(16), "block", 1)
            except AgentUnavailable as error:
                errors.append(error)

        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                for _ in range(5):
                    nursery.start_soon(ask)
                await trio.sleep(0.02)
                program.process.kill()
        assert len(errors) == 5
    await trio.to_thread.run_sync(program.process.wait, 10)
    assert _exists(program.path), "nobody was left to remove it"
    second = start_agent()
    assert second.ready_line == "ready\n"
    async with open_agent(second.path) as client:
        with pytest.raises(VolumeLocked):
            await client.generate(volume_id, bytes(16), "block", 1)
        await client.unlock(volume=data, cipher_dir="/c", secret=SECRET)
        await client.generate(volume_id, bytes(16), "block", 1)


async def test_exit_when_empty(start_agent: StartAgent) -> None:
    program = start_agent("--exit-when-empty")
    async with open_agent(program.path) as client:
        volume_id, data = await create(client)
        async with open_agent(program.path, role="daemon") as daemon:
            await daemon.attach(volume_id=volume_id, cipher_dir="/c", mountpoint="/m", volume=data)
    # The daemon's connection is gone, so is the KEK, so is the agent.
    assert await trio.to_thread.run_sync(program.process.wait, 10) == 0
    assert not _exists(program.path)


async def test_a_second_agent_says_why_not(start_agent: StartAgent) -> None:
    first = start_agent()
    second = start_agent()
    assert second.ready_line.startswith("error: another agent")
    assert second.process.wait(10) != 0
    async with open_agent(first.path) as client:
        await client.status()


async def test_unusable_paths_are_an_error_and_a_code(start_agent: StartAgent, short_tmp: Path) -> None:
    (short_tmp / "open").mkdir()
    (short_tmp / "open").chmod(0o777)
    program = start_agent(path=str(short_tmp / "open" / "agent.sock"))
    assert program.ready_line.startswith("error: ")
    assert "0777" in program.ready_line
    assert program.process.wait(10) == NotPermitted.exit_code


async def test_a_path_too_long_for_a_socket_address_works(start_agent: StartAgent, short_tmp: Path) -> None:
    program = start_agent(path=str(short_tmp / ("d" * 120) / "agent.sock"))
    assert program.ready_line == "ready\n"
    async with open_agent(program.path) as client:
        await client.status()


async def test_without_a_ready_descriptor_errors_go_to_stderr(short_tmp: Path) -> None:
    (short_tmp / "file").write_text("")
    done = await trio.run_process(
        [sys.executable, "-m", "cryptfs.agent", "--socket", str(short_tmp / "file" / "agent.sock")],
        check=False,
        capture_stderr=True,
    )
    assert done.returncode == NotPermitted.exit_code
    assert done.stderr.startswith(b"error: ")
    assert done.stderr.count(b"\n") == 1


AS_NOBODY = """
import os, socket, sys
os.setgid(65534); os.setuid(65534)
sock = socket.socket(socket.AF_UNIX)
try:
    sock.connect(sys.argv[1])
    sock.sendall(bytes.fromhex(sys.argv[2]))
    print("got", sock.recv(100))
except OSError as error:
    print(type(error).__name__)
"""


def _ask_as_nobody(path: str) -> str:
    """What another user hears from the agent, with nothing in the way but the agent itself."""
    opened = [Path(path).parents[2], Path(path).parents[1], Path(path).parent]
    for directory in opened:
        directory.chmod(0o755)
    Path(path).chmod(0o666)
    try:
        command = [sys.executable, "-I", "-c", AS_NOBODY, path, encode_request(1, "status", {}).hex()]
        return subprocess.run(command, capture_output=True, check=True, text=True).stdout.strip()
    finally:
        for directory in opened:
            directory.chmod(0o700)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
async def test_another_user_gets_nothing_even_if_the_directory_lets_them_in(start_agent: StartAgent) -> None:
    program = start_agent()
    heard = await trio.to_thread.run_sync(_ask_as_nobody, program.path)
    assert heard in ("got b''", "ConnectionResetError", "BrokenPipeError")
    await settled(lambda: "refused a connection from uid 65534" in program.log.read_text())
    async with open_agent(program.path) as client:
        await client.status()


NOBODYS_AGENT = """
import os, socket, sys
sock = socket.socket(socket.AF_UNIX)
os.seteuid(65534)
sock.bind(sys.argv[1])
sock.listen()
print("ready", flush=True)
peer, _ = sock.accept()
sys.exit(1 if peer.recv(100) else 0)
"""


@pytest.fixture
def nobodys_agent(short_tmp: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Another user's listener where ours would be; it exits with 1 if it is told anything."""
    public = short_tmp / "pub"
    public.mkdir()
    opened = [short_tmp.parent, short_tmp, public]
    for directory in opened:
        directory.chmod(0o777)
    path = str(public / "agent.sock")
    command = [sys.executable, "-I", "-c", NOBODYS_AGENT, path]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield path, process
        process.kill()
    for directory in opened:
        directory.chmod(0o700)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
async def test_another_users_agent_is_told_no_secrets(
    nobodys_agent: tuple[str, subprocess.Popen[bytes]],
) -> None:
    path, process = nobodys_agent
    with pytest.raises(NotPermitted, match="uid 65534"):
        async with open_agent(path):
            pass
    assert await trio.to_thread.run_sync(process.wait, 10) == 0, "it was told something"


def test_the_client_and_the_messages_import_no_agent_roots_or_kdf() -> None:
    code = (
        "import sys; import cryptfs.keys.agent_client, cryptfs.format.agent_msg, cryptfs.format.volume, cryptfs.paths\n"
        "never = ('cryptfs.agent', 'cryptfs.roots', 'cryptfs.crypto.wrap', 'cryptography.hazmat.primitives.kdf')\n"
        "bad = [name for name in sys.modules if name.startswith(never)]\n"
        "sys.exit(repr(bad) if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
