"""Domains whose daemon, agent or maker is killed."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cryptfs.cli.mounts import wait_until
from tests.mount.box import Box
from tests.mount.domains import CONTENT, SECRET, cipher_dir, create, domains, unlock
from tests.mount.syscalls import reread

pytestmark = pytest.mark.mount


def test_a_killed_daemon_loses_nothing_that_was_synced_in_a_domain(mounted: Box, pay: Path) -> None:
    inner = pay / "inner"
    inner.write_bytes(CONTENT)
    fd = os.open(inner, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
    mounted.kill_daemon()
    mounted.mount()
    unlock(mounted, pay)
    assert reread(inner) == CONTENT
    (pay / "after").write_bytes(b"after")
    mounted.umount()
    unlock(mounted, cipher_dir(mounted))
    said = mounted.run("check", "--deep", mounted.vault).stdout
    assert "domain /pay: clean" in said, said


def test_a_killed_agent_leaves_domains_as_it_leaves_the_volume(box: Box) -> None:
    box.mount("--max-age", "2")
    pay = box.clear / "pay"
    create(box, pay)
    inner = pay / "inner"
    inner.write_bytes(CONTENT)
    with inner.open("rb") as stream:
        box.kill_agent()

        def is_locked() -> bool:
            try:
                os.pread(stream.fileno(), 10, 0)
            except OSError as error:
                return error.errno == errno.ENOKEY
            return False

        assert wait_until(is_locked, 15)
        box.unlock()
        assert os.listdir(box.clear) == ["pay"]
        assert is_locked()
        unlock(box, pay)
        assert os.pread(stream.fileno(), 10, 0) == CONTENT[:10]


def test_creation_that_a_crash_cut_after_the_place_named_it_is_whole(mounted: Box, pay: Path) -> None:
    (pay / "inner").write_bytes(CONTENT)
    mounted.umount()
    usual = cipher_dir(mounted)
    usual.rename(usual.with_name(usual.name + ".aside"))
    mounted.mount()
    assert len(domains(mounted)) == 1
    unlock(mounted, pay)
    assert (pay / "inner").read_bytes() == CONTENT
    assert usual.is_dir()


def test_creation_that_a_crash_cut_before_that_leaves_an_empty_directory(mounted: Box, pay: Path) -> None:
    """What lies aside and no place names is removed by a repair, unless there is anything in it."""
    (pay / "inner").write_bytes(CONTENT)
    create(mounted, mounted.clear / "empty")
    mounted.umount()
    for path in (mounted.vault / "domains").iterdir():
        copy = path.with_name(os.urandom(16).hex() + ".aside")
        shutil.copytree(path, copy, symlinks=True)
    (mounted.vault / "domains" / (os.urandom(16).hex() + ".aside")).mkdir()
    (mounted.vault / "domains" / "stranger").mkdir()
    report = json.loads(mounted.run("check", "--repair", "--json", mounted.vault, code=24).stdout)
    found = sorted((f["severity"], f["what"], f["action"]) for f in report["findings"])
    assert found == [
        ("leftover", "unfinished", "removed"),
        ("leftover", "unfinished", "removed"),
        ("notice", "domain", None),
        ("notice", "foreign", None),
    ]
    assert len(os.listdir(mounted.vault / "domains")) == 4
    assert sorted(row["path"] for row in domains(mounted) if row["path"]) == ["/empty", "/pay"]


def begun(vault: Path) -> tuple[int, ...]:
    """How far the making of domains is, by what lies in `domains/`: parts of those aside, and how many are not."""
    parts = whole = 0
    with contextlib.suppress(FileNotFoundError):
        for path in (vault / "domains").iterdir():
            if path.suffix:
                parts += 1 + sum(
                    (path / name).exists() for name in ("tree", "sidecars/ff", "tree/.dir", "state", "volume")
                )
            else:
                whole += 1
    return parts, whole


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["daemon", "command"])
def test_a_kill_at_any_moment_of_creation_leaves_no_domain_or_a_whole_one(box: Box, victim: str) -> None:
    box.mount()
    words = [sys.executable, "-m", "cryptfs", "domain", "create", "--kdf-cost", "low"]
    env = {**box.environment, "CRYPTFS_PASSPHRASE": SECRET}
    outcomes: list[bool] = []
    # So many steps seen in `domains/`, and so long after the last of them.
    moments = [(1, 0.0), (4, 0.0), (6, 0.0), (6, 0.004), (6, 0.02), (6, 0.1)]
    for at, (steps, delay_s) in enumerate(moments):
        path = box.clear / f"pay{at}"
        path.mkdir()
        before = begun(box.vault)
        with subprocess.Popen(
            [*words, path], env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as command:
            while command.poll() is None:
                now = begun(box.vault)
                if now[1] > before[1] or now[0] - before[0] >= steps:
                    break
            time.sleep(delay_s)
            if victim == "command":
                command.kill()
            else:
                box.kill_daemon()
                box.run("umount", box.clear)
            command.wait(30)
        if victim == "daemon":
            box.mount()
        row = next((row for row in domains(box) if row["path"] == f"/{path.name}"), None)
        outcomes.append(row is not None)
        if row is not None:
            unlock(box, path)
            assert os.listdir(path) == []
        (path / "file").write_bytes(CONTENT)
        assert reread(path / "file") == CONTENT
    assert set(outcomes) == {False, True} or victim == "daemon"
    box.umount()
    report = json.loads(box.run("check", "--repair", "--json", box.vault, code=None).stdout)
    assert {f["action"] for f in report["findings"] if f["severity"] == "leftover"} <= {"removed"}
    assert not [f for f in report["findings"] if f["severity"] == "damage"]
    assert len(os.listdir(box.vault / "domains")) == sum(outcomes)
    box.mount()
    for at, is_domain in enumerate(outcomes):
        if is_domain:
            unlock(box, box.clear / f"pay{at}")
        assert (box.clear / f"pay{at}" / "file").read_bytes() == CONTENT
