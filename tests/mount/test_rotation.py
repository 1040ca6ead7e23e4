"""KEK rotation of a mounted volume: from open descriptors and under load, killed, cancelled, and what it is for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from cryptfs.format.volume import encode_volume, parse_volume, split_mac
from tests.mount.box import PASSPHRASE, Box
from tests.mount.kills import rounds_of_kills
from tests.mount.rotating import at_work, data_files, look, populate, somebody_there, status, wait_for
from tests.reference.trees import reference_decrypt

pytestmark = [pytest.mark.mount, pytest.mark.slow]

KILLED = """
import os, signal, sys
from cryptfs.cli.volume_edit import Edit

class Killed(Edit):
    def replace(self, data):
        super().replace(data)
        os.kill(os.getpid(), signal.SIGKILL)

from cryptfs.cli import volume_edit
volume_edit.Edit = Killed
from cryptfs.cli.main import main
sys.exit(main())
"""

KILLS = 8
"""The daemon, the agent, the command that waits for the daemon, and one that rewrites by itself: twice each."""
FILES = 100
"""For them: what takes a daemon a few seconds at full speed."""


def test_under_load_nothing_changes_and_an_old_volume_file_opens_nothing(mounted: Box) -> None:
    box = mounted
    populate(box.clear)
    kept = open(box.clear / "kept open", "w+b", buffering=0)  # noqa: SIM115 - closed below
    kept.write(b"before")
    gone = open(box.clear / "gone", "w+b", buffering=0)  # noqa: SIM115
    gone.write(b"without a name" * 1000)
    (box.clear / "gone").unlink()
    os.fsync(kept.fileno())
    before = data_files(box.vault)
    assert [path for path, (raw, _) in before.items() if path.endswith(".twin") and any(raw)]
    old = (box.vault / "volume").read_bytes()
    with at_work(box.clear) as work:
        box.run("rotate", box.vault, "--kek", "--destroy-old")
        rounds, reads = work.rounds, work.reads
        assert wait_until_more(work.__dict__, rounds, reads)
    assert work.failures == []
    assert status(box)["older_versions"] == []
    after = data_files(box.vault)
    assert {path for path in before if after[path] != before[path]} == set()
    look(box.clear)
    kept.write(b" and after")
    os.fsync(kept.fileno())
    assert gone.seek(0) == 0
    os.posix_fadvise(gone.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    assert gone.read() == b"without a name" * 1000
    kept.close()
    gone.close()
    assert (box.clear / "written").read_bytes() == work.expected
    box.remount()
    look(box.clear)
    assert (box.clear / "kept open").read_bytes() == b"before and after"
    assert (box.clear / "written").read_bytes() == work.expected
    box.umount()
    box.run("check", box.vault, "--deep")
    # Who had a copy of the old `volume` file and the passphrase has nothing in hand any more.
    now, then = box.root / "now", box.root / "then"
    ended = reference_decrypt(box.vault, now, PASSPHRASE.encode())
    assert ended.returncode == 0, ended.stderr
    look(now)
    (box.vault / "volume").write_bytes(old)
    ended = reference_decrypt(box.vault, then, PASSPHRASE.encode())
    assert ended.returncode != 0
    assert not [path for path in then.rglob("*") if path.is_symlink() or (path.is_file() and path.stat().st_size)]


def wait_until_more(work: dict[str, object], rounds: int, reads: int) -> bool:
    """Reader and writer go on after it."""
    end = time.monotonic() + 30
    while work["rounds"] == rounds or work["reads"] == reads:
        if time.monotonic() > end or work["failures"]:
            return False
        time.sleep(0.05)
    return True


def test_killed_again_and_again(mounted: Box) -> None:
    assert rounds_of_kills(mounted, KILLS, 1, FILES).all_hits >= KILLS // 2


def test_cancelled_seen_and_gone_on_with(mounted: Box) -> None:
    box = mounted
    assert status(box) == {
        "kek_version": 1, "older_versions": [], "mounted": True, "state": None, "done": None, "total": None,
        "failed": None, "left": None, "message": None, "failed_ids": [],
    }  # fmt: skip
    populate(box.clear)
    assert "nothing is being rewritten" in box.run("rotate", box.vault, "--cancel").stderr
    with somebody_there(box.clear):
        box.run("rotate", box.vault, "--kek", "--background")
        assert wait_for(box, "running")["older_versions"] == [1]
        again = box.run("rotate", box.vault, "--kek", code=14)
        assert "under way" in again.stderr
        box.run("rotate", box.vault, "--cancel")
        stopped = wait_for(box, "cancelled")
    assert stopped["kek_version"] == 2
    assert "going on" in box.run("rotate", box.vault, "--kek").stderr
    ended = status(box)
    assert (ended["state"], ended["kek_version"], ended["left"], ended["failed"]) == ("done", 2, 0, 0)
    box.run("rotate", box.vault, "--kek", "--destroy-old")
    assert (status(box)["kek_version"], status(box)["older_versions"]) == (3, [])
    look(box.clear)


def test_a_lock_in_the_middle_is_waited_for(mounted: Box) -> None:
    box = mounted
    populate(box.clear)
    with somebody_there(box.clear):
        box.run("rotate", box.vault, "--kek", "--background")
        wait_for(box, "running")
    box.run("lock", box.vault)
    assert wait_for(box, "waiting", "done")["older_versions"] == [1]
    box.unlock()
    assert wait_for(box, "done")["left"] == 0
    look(box.clear)


@pytest.mark.parametrize("how", ["repaired", "deleted"])
def test_damage_keeps_the_old_key_until_it_is_gone(mounted: Box, how: str) -> None:
    box = mounted
    populate(box.clear)
    box.umount()
    sidecars = [path for path in (box.vault / "sidecars").rglob("*") if path.is_file() and path.suffix != ".twin"]
    victim = max(sidecars, key=lambda path: path.stat().st_size)
    raw = bytearray(victim.read_bytes())
    raw[160 + 130] ^= 1
    victim.write_bytes(raw)
    box.mount()
    ended = box.run("rotate", box.vault, "--kek", "--destroy-old", code=21)
    assert ended.stdout.startswith("/")
    shown = status(box)
    assert (shown["older_versions"], shown["left"], shown["failed_ids"]) == ([1], 1, [victim.name])
    assert victim.read_bytes() == raw
    if how == "repaired":
        raw[160 + 130] ^= 1
        victim.write_bytes(raw)
    else:
        found = Path(f"{box.clear}{ended.stdout.splitlines()[0]}")
        for name in [path for path in box.clear.rglob("*") if path.lstat().st_ino == found.lstat().st_ino]:
            name.unlink()
    # In the same mount: what an earlier look has found is not what there is.
    box.run("rotate", box.vault, "--destroy-old")
    assert status(box)["older_versions"] == []
    if how == "repaired":
        look(box.clear)


def test_a_read_only_mount_leaves_it_to_a_later_one(box: Box) -> None:
    box.mount()
    populate(box.clear)
    box.run("rotate", box.vault, "--kek", "--background")
    box.kill_daemon()
    box.mount("--read-only")
    look(box.clear)
    assert "read-only" in box.run("rotate", box.vault, "--destroy-old", code=19).stderr
    box.remount()
    assert wait_for(box, "done")["left"] == 0


def test_status_of_a_mount_whose_agent_was_killed(mounted: Box) -> None:
    box = mounted
    populate(box.clear)
    box.run("rotate", box.vault, "--kek")
    box.kill_agent()
    assert {name: status(box)[name] for name in ("mounted", "state", "older_versions")} == {
        "mounted": True, "state": None, "older_versions": [1],
    }  # fmt: skip
    said = box.run("rotate", box.vault, "--status").stdout
    assert f"mounted on {box.clear}" in said
    assert "not mounted" not in said
    box.unlock()
    look(box.clear)
    assert wait_for(box, "done")["mounted"] is True
    assert "done" in box.run("rotate", box.vault, "--status").stdout
    box.umount()
    assert "not mounted" in box.run("rotate", box.vault, "--status").stdout


def test_a_volume_file_that_somebody_edited_while_it_is_mounted_is_damaged_at_once(mounted: Box) -> None:
    """It says that there is another KEK version, which no daemon would ever come to."""
    box = mounted
    populate(box.clear, 3)
    path = box.vault / "volume"
    good = path.read_bytes()
    volume = parse_volume(good)
    [protector] = volume.protectors
    [kek] = protector.keks
    more = replace(protector, keks=(kek, replace(kek, kek_version=2)))
    key = replace(volume.volume_key, kek_version=2)
    edited = encode_volume(replace(volume, kek_version=2, volume_key=key, protectors=(more,))) + split_mac(good)[1]
    path.write_bytes(edited)
    assert parse_volume(path.read_bytes()).kek_version == 2
    begun = time.monotonic()
    for words in (("--kek",), ("--destroy-old",), ("--kek", "--background")):
        assert "MAC" in box.run("rotate", box.vault, *words, code=11).stderr
        assert path.read_bytes() == edited
    assert time.monotonic() - begun < 30, "three times nothing to be waited for"
    path.write_bytes(good)
    look(box.clear, 3)


def test_a_new_version_that_the_agent_was_not_told_of_is_gone_on_with(mounted: Box) -> None:
    """As a `rotate` leaves it that is killed between putting the file in its place and saying so."""
    box = mounted
    populate(box.clear)
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, "rotate", str(box.vault), "--kek"],
        env={**box.environment, "CRYPTFS_PASSPHRASE": PASSPHRASE}, stdin=subprocess.DEVNULL, check=False, timeout=90,
    )  # fmt: skip
    assert ended.returncode == -signal.SIGKILL
    assert (status(box)["kek_version"], status(box)["older_versions"]) == (2, [1])
    assert status(box)["state"] is None, "nobody has told the daemon"
    assert "going on" in box.run("rotate", box.vault, "--kek", "--destroy-old").stderr
    assert status(box)["older_versions"] == []
    look(box.clear)
