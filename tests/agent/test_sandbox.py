"""What the agent's process can no longer do, on the running program; and that it says what the kernel lacks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from cryptfs.agent import sandbox
from cryptfs.format.volume import parse_volume
from cryptfs.keys.agent_client import open_agent
from cryptfs.keys.edit_requests import ProtectorWish, VolumeWish
from tests.agent.conftest import StartAgent
from tests.softhsm import PIN, SoftHsm

ATTEMPTS = """
import concurrent.futures, os, socket, sys
from cryptfs.agent.sandbox import confine
inside, outside, network = sys.argv[1], sys.argv[2], sys.argv[3] == "network"
print(confine([inside], network=network))
def attempt(what, do):
    try:
        do()
        print(what, "done")
    except OSError as error:
        print(what, "refused")
def everything():
    attempt("write", lambda: open(outside + "/new", "w"))
    attempt("append", lambda: open(outside + "/there", "a"))
    attempt("truncate", lambda: os.truncate(outside + "/there", 0))
    attempt("remove", lambda: os.unlink(outside + "/there"))
    attempt("move", lambda: os.rename(outside + "/there", inside + "/there"))
    attempt("exec", lambda: os.execv("/bin/true", ["true"]))
    attempt("inet", lambda: socket.socket(socket.AF_INET).close())
    attempt("udp6", lambda: socket.socket(socket.AF_INET6, socket.SOCK_DGRAM).close())
    attempt("netlink", lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW).close())
    attempt("look", lambda: os.readlink(f"/proc/{os.getppid()}/exe"))
    attempt("own-write", lambda: open(inside + "/own", "w").close())
    attempt("own-link", lambda: os.link(inside + "/own", inside + "/own2"))
    attempt("own-remove", lambda: os.unlink(inside + "/own2"))
    attempt("own-socket", lambda: socket.socket(socket.AF_UNIX).bind(inside + "/sock"))
    os.unlink(inside + "/sock")
    attempt("null", lambda: open(os.devnull, "w").close())
everything()
concurrent.futures.ThreadPoolExecutor(1).submit(everything).result()
"""
REFUSED = {"write", "append", "truncate", "remove", "move", "exec", "inet", "udp6", "netlink", "look"}
DONE = {"own-write", "own-link", "own-remove", "own-socket", "null"}


def attempts(short_tmp: Path, network: str) -> list[str]:
    inside, outside = short_tmp / "in", short_tmp / "out"
    inside.mkdir()
    outside.mkdir()
    (outside / "there").write_text("kept")
    command = [sys.executable, "-c", ATTEMPTS, str(inside), str(outside), network]
    said = subprocess.run(command, capture_output=True, check=True, text=True, cwd=Path(sandbox.__file__).parents[2])
    lines = said.stdout.splitlines()
    if not lines[0].startswith("{'landlock': 'on', 'seccomp': 'on"):
        pytest.skip(lines[0])
    assert (outside / "there").read_text() == "kept"
    return lines[1:]


def test_neither_the_thread_nor_those_it_starts_can_do_it(short_tmp: Path) -> None:
    lines = attempts(short_tmp, "none")
    for half in (lines[: len(lines) // 2], lines[len(lines) // 2 :]):
        assert {line.split()[0] for line in half if line.endswith("refused")} == REFUSED
        assert {line.split()[0] for line in half if line.endswith("done")} == DONE


def test_with_a_protector_that_needs_the_network_that_is_left(short_tmp: Path) -> None:
    lines = attempts(short_tmp, "network")
    assert {line.split()[0] for line in lines if line.endswith("refused")} == REFUSED - {"inet", "udp6", "netlink"}


async def test_the_agent_is_confined_and_says_so(start_agent: StartAgent) -> None:
    program = start_agent()
    async with open_agent(program.path) as client:
        about = await client.request("about", {})
    pid = program.process.pid
    status = await trio.Path(f"/proc/{pid}/status").read_text()
    if about["hardening"]["seccomp"] == "on":
        assert "Seccomp:\t2" in status
    assert "NoNewPrivs:\t1" in status
    assert about["pid"] == pid
    assert about["audit"] is None
    assert set(about["hardening"]) == {
        "no_core_dumps", "not_dumpable", "locked_memory", "freed_memory", "landlock", "seccomp", "memfd_secret",
    }  # fmt: skip
    assert about["hardening"]["freed_memory"].startswith("off: "), "whoever starts it has to see to that"


@pytest.mark.parametrize("network", [False, True])
async def test_the_configuration_says_what_modules_may_do(
    start_agent: StartAgent, short_tmp: Path, network: bool
) -> None:
    hsm = SoftHsm(short_tmp / "hsm").set_up()
    hsm.make_token("card")
    config = short_tmp / "config" / "cryptfs" / "agent.toml"
    config.parent.mkdir(parents=True)
    config.write_text(hsm.agent_toml().replace("[pkcs11]\n", f"[pkcs11]\nnetwork = {str(network).lower()}\n"))
    program = start_agent(env={**os.environ, "XDG_CONFIG_HOME": str(short_tmp / "config")})
    async with open_agent(program.path) as client:
        about = await client.request("about", {})
        wish = ProtectorWish("pkcs11", "card", PIN.encode(), {"token": "card"})
        # In the confined process: loading the module, logging in, making a key.
        assert parse_volume(await client.create(VolumeWish(4096, wish))).protectors[0].kind == "pkcs11"
    if about["hardening"]["seccomp"].startswith("on"):
        assert ("network" in about["hardening"]["seccomp"]) == network


@pytest.mark.parametrize("machine", ["riscv64", "x86_64"])
def test_what_the_kernel_lacks_is_said_and_nothing_breaks(short_tmp: Path, machine: str) -> None:
    code = (
        "import platform\n"
        "from cryptfs.agent import sandbox\n"
        f"platform.machine = lambda: {machine!r}\n"
        "sandbox._LANDLOCK_CREATE_RULESET = 9999\n"
        "print(sandbox.confine([], network=False))\n"
        "open('/proc/self/status').close()\n"
    )
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(sandbox.__file__).parents[2]
    )
    assert "'landlock': 'off: the kernel has no Landlock" in said.stdout
    assert ("no filter for riscv64" in said.stdout) == (machine == "riscv64")
