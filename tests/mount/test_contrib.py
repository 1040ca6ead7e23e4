"""The units in contrib/: well-formed, and what they run locks every volume."""

from __future__ import annotations

import configparser
import errno
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mount.box import Box
from tests.mount.syscalls import refused

pytestmark = pytest.mark.mount

UNITS = Path(__file__).parents[2] / "contrib" / "systemd"
ON_SLEEP = UNITS / "system" / "cryptfs-lock-on-sleep@.service"
ON_LOGOUT = UNITS / "user" / "cryptfs-lock-on-logout.service"
PLACE = "/usr/local/bin/cryptfs"
INSTALLED = Path(sys.executable).with_name("cryptfs")
"""The command as it was installed beside this interpreter."""


def unit(path: Path) -> configparser.ConfigParser:
    """A unit file as far as ours go: no key twice in a section."""
    parsed = configparser.ConfigParser(interpolation=None)
    parsed.optionxform = str  # type: ignore[assignment,method-assign]
    parsed.read_string(path.read_text("utf-8"))
    return parsed


@pytest.mark.parametrize(("path", "key"), [(ON_SLEEP, "ExecStart"), (ON_LOGOUT, "ExecStop")])
def test_what_a_unit_runs_locks_every_volume(mounted: Box, path: Path, key: str) -> None:
    if not INSTALLED.exists():
        pytest.skip("the command is not installed here")
    service = unit(path)["Service"]
    place, *words = shlex.split(service[key])
    assert place == PLACE
    # systemd's own: PATH, HOME and USER; a user's manager has XDG_RUNTIME_DIR, the system's needs it to be given.
    environment = {"PATH": "/usr/bin:/bin", "HOME": mounted.environment["HOME"], "USER": "somebody"}
    if path is ON_SLEEP:
        name, runtime = service["Environment"].split("=")
        assert (name, runtime, service["User"]) == ("XDG_RUNTIME_DIR", "/run/user/%i", "%i")
        assert unit(path)["Unit"]["ConditionPathExists"] == runtime + "/cryptfs/agent.sock"
    assert mounted.agent_socket == Path(mounted.environment["XDG_RUNTIME_DIR"], "cryptfs", "agent.sock")
    environment["XDG_RUNTIME_DIR"] = mounted.environment["XDG_RUNTIME_DIR"]
    (mounted.clear / "file").write_bytes(b"content")
    with (mounted.clear / "file").open("rb") as file:
        for _ in range(2):  # locked already is no failure, neither
            subprocess.run([INSTALLED, *words], env=environment, cwd="/", check=True, stdin=subprocess.DEVNULL)
        with refused(errno.ENOKEY):
            file.read()
    mounted.unlock()
    assert (mounted.clear / "file").read_bytes() == b"content"


def test_without_an_agent_there_is_nothing_to_lock(box: Box) -> None:
    if not INSTALLED.exists():
        pytest.skip("the command is not installed here")
    _, *words = shlex.split(unit(ON_LOGOUT)["Service"]["ExecStop"])
    subprocess.run([INSTALLED, *words], env=box.environment, cwd="/", check=True)


@pytest.mark.parametrize("path", [ON_SLEEP, ON_LOGOUT])
def test_systemd_has_nothing_to_say_against_it(short_tmp: Path, path: Path) -> None:
    if shutil.which("systemd-analyze") is None or not INSTALLED.exists():
        pytest.skip("needs systemd-analyze")
    copied = short_tmp / path.name.replace("@.", "@1000.")
    copied.write_text(path.read_text("utf-8").replace(PLACE, str(INSTALLED)))
    who = ["--user"] if path is ON_LOGOUT else []
    ended = subprocess.run(
        ["systemd-analyze", *who, "--man=no", "--recursive-errors=no", "verify", copied],
        capture_output=True, text=True, check=False, env={**os.environ, "XDG_RUNTIME_DIR": str(short_tmp)},
    )  # fmt: skip
    assert (ended.returncode, ended.stderr) == (0, "")
