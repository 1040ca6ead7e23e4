"""Older states put back under a real mount, the agent's record gone wrong, and kills: what a user sees of it all."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from pathlib import Path

import pytest

from cryptfs.format.volume import parse_volume
from tests.mount.box import Box
from tests.mount.syscalls import refused

pytestmark = pytest.mark.mount


def record_of(box: Box) -> Path:
    volume_id = parse_volume((box.vault / "volume").read_bytes()).volume_id
    return box.root / "s" / "cryptfs" / "fresh" / f"{volume_id.hex()}.sqlite"


def agent_log(box: Box) -> str:
    return (box.root / "s" / "cryptfs" / "log" / "agent.log").read_text()


def keep(box: Box) -> Path:
    """A copy of the whole cipher directory, as a backup has it."""
    kept = box.root / "kept"
    shutil.copytree(box.vault, kept, symlinks=True)
    return kept


def put_back(kept: Path, vault: Path) -> None:
    shutil.rmtree(vault)
    shutil.copytree(kept, vault, symlinks=True)


def changed(a: Path, b: Path) -> list[Path]:
    """Files below `a` that differ in `b`, relative."""
    found = [path.relative_to(a) for path in a.rglob("*") if path.is_file() and not path.is_symlink()]
    return [path for path in found if (b / path).exists() and (a / path).read_bytes() != (b / path).read_bytes()]


def test_the_whole_volume_restored(mounted: Box) -> None:
    box = mounted
    (box.clear / "file").write_text("old")
    box.umount()
    kept = keep(box)
    box.mount()
    (box.clear / "file").write_text("new")
    box.umount()
    put_back(kept, box.vault)
    said = box.mount(code=25)
    assert "error: an older state of the volume than this machine has seen" in said
    assert "hint:" in said
    assert "--accept-all" in said
    assert not box.is_mounted
    # Another machine would trust it.
    box.run("check", box.vault, env={"XDG_STATE_HOME": str(box.root / "h"), "XDG_RUNTIME_DIR": str(box.root / "h")})
    box.run("check", box.vault, code=25)
    box.run("check", box.vault, "--accept-all")
    assert "accepted as it is" in agent_log(box)
    box.mount()
    assert (box.clear / "file").read_text() == "old"
    (box.clear / "file").write_text("newest")
    box.remount()
    assert (box.clear / "file").read_text() == "newest"


def test_one_file_restored(mounted: Box) -> None:
    """Only it fails, with EIO and one line in the log, until the owner says that it was on purpose."""
    box = mounted
    (box.clear / "file").write_bytes(b"old" * 5000)
    (box.clear / "other").write_bytes(b"other")
    box.umount()
    kept = keep(box)
    box.mount()
    (box.clear / "file").write_bytes(b"newer" * 5000)
    box.umount()
    files = [path for path in changed(kept, box.vault) if path.name not in ("state", ".dir")]
    assert len(files) == 2, files
    for path in files:
        shutil.copy2(kept / path, box.vault / path)
    since = len(box.log())
    box.mount()
    with refused(errno.EIO):
        (box.clear / "file").read_bytes()
    assert box.logged("inode", "rolled-back", since=since)
    assert (box.clear / "other").read_bytes() == b"other"
    box.run("check", box.vault, "--accept", "/file", code=14)
    box.umount()
    assert "rolled-back" in box.run("check", box.vault, code=21).stdout
    assert box.run("check", box.vault, "--accept", "/file").stdout == "accepted: /file: older than seen before\n"
    assert "accepted at generation" in agent_log(box)
    box.run("check", box.vault)
    box.mount()
    assert (box.clear / "file").read_bytes() == b"old" * 5000


def test_a_record_that_is_lost_or_damaged(mounted: Box) -> None:
    box = mounted
    (box.clear / "file").write_text("content")
    box.umount()
    record_of(box).write_bytes(b"")
    said = box.mount(code=26)
    assert str(record_of(box)) in said
    assert "hint:" in said
    record_of(box).unlink()
    since = len(box.log())
    box.mount()
    assert box.logged("for the first time", since=since)
    assert "seen for the first time on this machine" in agent_log(box)
    assert (box.clear / "file").read_text() == "content"


@pytest.mark.slow
@pytest.mark.parametrize("who", ["daemon", "agent", "both"])
def test_kills_never_raise_a_false_alarm(mounted: Box, who: str) -> None:
    box = mounted
    for number in range(4):
        for name in ("appended", "replaced", f"made {number}"):
            with (box.clear / name).open("ab") as out:
                out.write(b"%d" % number * 5000)
                if number % 2:
                    out.flush()
                    os.fsync(out.fileno())
        (box.clear / "fresh").write_bytes(b"x" * number)
        (box.clear / "fresh").rename(box.clear / "replaced")
        (box.clear / f"made {number - 1}").unlink(missing_ok=True)
        if who in ("agent", "both"):
            box.kill_agent(signal.SIGKILL)
        if who in ("daemon", "both"):
            box.kill_daemon(signal.SIGKILL)
            box.run("umount", box.clear, code=None)
        else:
            box.umount()
        box.mount()
        assert sorted(os.listdir(box.clear)) == ["appended", f"made {number}", "replaced"]
        for path in box.clear.iterdir():
            path.read_bytes()
    assert "rolled-back" not in box.log()
    assert "deleted:" not in box.log()
    box.umount()
    box.run("check", box.vault, "--deep")


def test_the_state_directory_in_the_mount_itself(mounted: Box) -> None:
    """An agent whose records lie in a mount that waits for it would wait for ever."""
    box = mounted
    box.umount()
    box.mount()
    inside = box.clear / "state"
    inside.mkdir(mode=0o700)
    other = {"XDG_STATE_HOME": str(inside), "XDG_RUNTIME_DIR": str(box.root / "h")}
    second, clear = box.root / "second", box.root / "clear2"
    clear.mkdir()
    box.run("init", "--kdf-cost", "low", second)
    ended = box.run("mount", second, clear, env=other, code=27)
    assert "lies in the cryptfs mount" in ended.stderr
