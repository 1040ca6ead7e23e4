"""Rotations in which one of those who take part is killed, again and again: the daemon, the agent, the command."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from unittest import mock

from cryptfs.cli import key_agent, rotating
from cryptfs.cli.mounts import wait_until
from cryptfs.cli.rotate import older_versions
from cryptfs.keys.rotation_requests import Known
from cryptfs.ops.info import read_volume
from tests.mount.box import PASSPHRASE, TIMEOUT_S, Box
from tests.mount.rotating import data_files, look, populate, somebody_there, status

VICTIMS = ("daemon", "agent", "waiting command", "working command")
"""The command waits for the daemon of a mounted volume, and works itself on one that is not mounted."""
LATEST_S = 1.2
"""Rewriting `FILES` of them at full speed takes longer than this."""
UMOUNT_S = 300.0
"""A machine with other things to do may take long to sync all that."""


@dataclass
class Kills:
    """How many there were, and how many of them hit a rotation at work, by victim."""

    tried: Counter[str] = field(default_factory=Counter)
    hits: Counter[str] = field(default_factory=Counter)

    @property
    def all_hits(self) -> int:
        return self.hits.total()


def rounds_of_kills(box: Box, kills: int, seed: int, files: int) -> Kills:
    """`box` is mounted, and unmounted at the end; what is in the mount and in data files is looked at."""
    rng, out = random.Random(seed), Kills()
    populate(box.clear, files)
    box.umount(UMOUNT_S)
    before = data_files(box.vault)
    assert [path for path, (raw, _) in before.items() if path.endswith(".twin") and any(raw)]
    box.mount()
    for number in range(kills):
        victim = VICTIMS[number % len(VICTIMS)]
        out.tried[victim] += 1
        # Now at full speed, now beside a program.
        beside = number // len(VICTIMS) % 2 == 1
        out.hits[victim] += _round(box, victim, rng.uniform(0, LATEST_S), beside=beside)
        if number % 3 == 2:
            look(box.clear, files)
    _go_on(box)
    box.run("rotate", box.vault, "--destroy-old")
    assert status(box)["older_versions"] == []
    look(box.clear, files)
    box.umount(UMOUNT_S)
    assert data_files(box.vault) == before
    box.run("check", box.vault, "--deep")
    return out


def _round(box: Box, victim: str, after_s: float, *, beside: bool) -> bool:
    """One kill so long after the rotation was seen at work; whether it still was. Mounted and unlocked afterwards."""
    _go_on(box)
    is_command = victim.endswith("command")
    fresh = is_command or not _is_running(box)
    if fresh:
        # Of a rotation that an earlier kill interrupted there may be something left, or not.
        box.run("rotate", box.vault, "--destroy-old")
    if victim == "working command":
        box.umount(UMOUNT_S)
    command = _begun(box) if is_command else None
    if fresh and not is_command:
        box.run("rotate", box.vault, "--kek", "--background")
    with somebody_there(box.clear) if beside and box.is_mounted else nullcontext():
        assert wait_until(lambda: _is_at_work(box, command) or _has_ended(command), TIMEOUT_S), victim
        time.sleep(after_s)
        hit = _is_at_work(box, command) and not _has_ended(command)
        if command is not None:
            command.send_signal(signal.SIGKILL)
            command.wait()
        elif victim == "agent":
            box.kill_agent()
        else:
            box.kill_daemon()
    if victim == "working command":
        with mock.patch.dict(os.environ, box.environment):
            assert wait_until(lambda: not key_agent.held(), TIMEOUT_S), "it was locked before"
    if victim in ("daemon", "working command"):
        box.mount()
    elif victim == "agent":
        box.unlock()
    return hit


def _begun(box: Box) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "cryptfs", "rotate", str(box.vault), "--kek"],
        env={**box.environment, "CRYPTFS_PASSPHRASE": PASSPHRASE}, stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip


def _has_ended(command: subprocess.Popen[bytes] | None) -> bool:
    return command is not None and command.poll() is not None


def _is_at_work(box: Box, command: subprocess.Popen[bytes] | None) -> bool:
    """Rewriting: the daemon says so, or there is none, and the command has made a new version."""
    if command is None or box.is_mounted:
        return _is_running(box)
    return bool(older_versions(read_volume(box.vault)))


def _known(box: Box) -> Known | None:
    with mock.patch.dict(os.environ, box.environment):
        return rotating.known(read_volume(box.vault))


def _is_running(box: Box) -> bool:
    known = _known(box)
    return known is not None and known.attached and known.report is not None and known.report.state == "running"


def _go_on(box: Box) -> None:
    """The daemon has found the agent (again)."""

    def is_attached() -> bool:
        with suppress(OSError):
            os.listdir(box.clear)
        known = _known(box)
        return known is not None and known.attached

    assert wait_until(is_attached, TIMEOUT_S)
