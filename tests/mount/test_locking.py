"""`lock` and `unlock` of a mounted volume: nothing more to read, nothing lost, and the same mount again afterwards."""

from __future__ import annotations

import errno
import json
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cryptfs.cli.mounts import mount_at, wait_until
from tests.mount.box import Box
from tests.mount.syscalls import refused
from tests.mount.test_ending import state_of

pytestmark = pytest.mark.mount

PAGE = 4096
CONTENT = bytes(range(256)) * 16 * 64
"""256 KiB."""


def locked(call: Callable[[], object]) -> None:
    with refused(errno.ENOKEY):
        call()


@pytest.mark.parametrize("how", ["path", "all"])
def test_what_was_mounted_inside_is_unmounted_and_named(root: None, box: Box, how: str) -> None:
    box.mount()
    deep, bound, outside = box.clear / "a" / "b c", box.clear / "bound", box.root / "outside"
    for place in (deep, bound, outside):
        place.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "small", deep], check=True)
    subprocess.run(["mount", "--bind", outside, bound], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "small", outside], check=True)
    try:
        said = box.run("lock", "--all" if how == "all" else box.clear).stderr
        assert f"warning: {deep} (tmpfs) was unmounted" in said
        assert f"warning: {bound} (" in said
        assert said.count("was unmounted") == 2, said
        assert mount_at(deep) is mount_at(bound) is None
        assert mount_at(outside) is not None
        box.unlock()
        assert os.listdir(deep) == []
        assert "unmounted" not in box.run("lock", box.clear).stderr
    finally:
        subprocess.run(["umount", outside], check=True)


MAPPED = """
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
mapped = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
assert mapped[5] == 5
print("mapped", flush=True)
sys.stdin.readline()
print(mapped[5], flush=True)
"""


def test_after_lock_nothing_can_be_read_and_after_unlock_everything_can(box: Box) -> None:
    box.mount()
    (box.clear / "dir").mkdir()
    file, inner = box.clear / "file", box.clear / "dir" / "inner"
    file.write_bytes(CONTENT)
    inner.write_bytes(CONTENT)
    (box.clear / "link").symlink_to("dir/inner")
    fd, dir_fd = os.open(file, os.O_RDWR), os.open(box.clear / "dir", os.O_RDONLY)
    mapping = subprocess.Popen(
        [sys.executable, "-c", MAPPED, str(inner)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert mapping.stdout is not None
    try:
        assert os.pread(fd, PAGE, 0) == CONTENT[:PAGE]
        assert mapping.stdout.readline() == b"mapped\n"
        box.run("lock", box.clear)
        assert box.log().count("the volume is locked, after") == 1
        locked(lambda: os.pread(fd, PAGE, 0))
        locked(lambda: os.listdir(box.clear))
        locked(lambda: os.listdir(dir_fd))
        locked(file.read_bytes)
        locked(file.stat)
        locked(lambda: os.stat("inner", dir_fd=dir_fd))
        locked((box.clear / "absent").stat)
        locked(lambda: os.readlink(box.clear / "link"))
        locked((box.clear / "new").touch)
        locked((box.clear / "new").mkdir)
        locked(file.unlink)
        locked(lambda: os.pwrite(fd, b"x", 10))
        assert os.fstat(fd).st_size == len(CONTENT), "sizes are no secret"
        assert os.stat(box.clear).st_mode, "the mount itself can be looked at"
        mapping.communicate(b"\n")
        assert mapping.returncode == -signal.SIGBUS
        [volume] = json.loads(box.run("status", "--json").stdout)
        assert (volume["state"], volume["daemon_pid"]) == ("locked", box.daemon_pid)
        assert "locked already" in box.run("lock", box.vault).stderr
        box.unlock()
        assert os.pread(fd, PAGE, PAGE) == CONTENT[PAGE : 2 * PAGE]
        assert sorted(os.listdir(box.clear)) == ["dir", "file", "link"]
        assert os.listdir(dir_fd) == ["inner"]
        os.pwrite(fd, b"again", 0)
        os.fsync(fd)
        assert file.read_bytes() == b"again" + CONTENT[5:]
        assert (box.clear / "link").read_bytes() == CONTENT
    finally:
        os.close(fd)
        os.close(dir_fd)
        mapping.kill()
        mapping.wait()
    box.umount()


def test_what_was_written_before_lock_is_on_disk_also_from_files_that_are_open_and_mapped(box: Box) -> None:
    box.mount()
    plain, mapped = box.clear / "plain", box.clear / "mapped"
    mapped.write_bytes(bytes(len(CONTENT)))
    fd, mapped_fd = os.open(plain, os.O_RDWR | os.O_CREAT), os.open(mapped, os.O_RDWR)
    try:
        os.write(fd, CONTENT)
        with mmap.mmap(mapped_fd, 0) as view:
            view[:] = CONTENT
            box.run("lock", box.clear)
            # Killed: nothing that was only in the daemon's or the kernel's memory survives.
            box.kill_daemon()
    finally:
        os.close(fd)
        os.close(mapped_fd)
    box.mount()
    assert plain.read_bytes() == CONTENT
    assert mapped.read_bytes() == CONTENT


def test_a_write_while_locked_is_refused_and_fsync_says_so(box: Box) -> None:
    box.mount()
    file = box.clear / "file"
    file.write_bytes(CONTENT)
    fd = os.open(file, os.O_RDWR)
    try:
        box.run("lock", box.clear)
        # A whole page needs nothing of what is there: the kernel takes it without asking.
        assert os.pwrite(fd, b"n" * PAGE, 0) == PAGE
        with refused(errno.ENOKEY):
            os.fsync(fd)
        assert wait_until(lambda: _is_unreadable(fd), 5), "what was refused is still shown"
        box.unlock()
        assert os.pread(fd, len(CONTENT), 0) == CONTENT, "nothing of it is in the file"
        os.pwrite(fd, b"y" * PAGE, PAGE)
        os.fsync(fd)
        assert os.pread(fd, PAGE, PAGE) == b"y" * PAGE
    finally:
        os.close(fd)


def _is_unreadable(fd: int) -> bool:
    try:
        os.pread(fd, PAGE, 0)
    except OSError as error:
        return error.errno == errno.ENOKEY
    return False


def test_writers_at_work_lose_nothing_that_they_were_told_is_safe(box: Box) -> None:
    box.mount()
    safe: dict[Path, int] = {}
    codes: list[int | None] = []

    def write(path: Path) -> None:
        fd = os.open(path, os.O_RDWR | os.O_CREAT)
        try:
            for number in range(1, 1 << 16):
                os.pwrite(fd, number.to_bytes(4, "big") * (PAGE // 4), 0)
                os.fsync(fd)
                safe[path] = number
        except OSError as error:
            codes.append(error.errno)
        finally:
            os.close(fd)

    writers = [threading.Thread(target=write, args=(box.clear / f"file{n}",)) for n in range(3)]
    for writer in writers:
        writer.start()
    assert wait_until(lambda: len(safe) == 3, 20)
    box.run("lock", box.clear)
    for writer in writers:
        writer.join(20)
        assert not writer.is_alive()
    assert codes == [errno.ENOKEY] * 3
    box.unlock()
    box.remount()
    for path, number in safe.items():
        assert int.from_bytes(path.read_bytes()[:4], "big") in (number, number + 1)


def test_umount_while_locked(box: Box) -> None:
    box.mount()
    file = box.clear / "file"
    fd = os.open(file, os.O_RDWR | os.O_CREAT)
    os.write(fd, CONTENT)
    box.run("lock", box.clear)
    os.close(fd)
    box.run("umount", box.clear)
    assert state_of(box.vault).clean
    box.mount()
    assert file.read_bytes() == CONTENT


def test_two_locks_at_once_and_an_idle_mount(box: Box) -> None:
    box.mount()
    words = [sys.executable, "-m", "cryptfs", "lock", "--all"]
    both = [subprocess.Popen(words, env=box.environment, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for command in both:
        _, said = command.communicate(timeout=60)
        assert command.returncode == 0, said
    locked(lambda: os.listdir(box.clear))
    box.unlock()
    assert os.listdir(box.clear) == []
    box.umount()


@pytest.mark.parametrize("option", ["--for", "--idle"])
def test_a_mount_locks_itself_when_its_time_is_up(box: Box, option: str) -> None:
    box.mount()
    file = box.clear / "file"
    file.write_bytes(CONTENT)
    box.run("lock", box.clear)
    began = time.monotonic()
    box.run("unlock", option, "3", box.vault)
    (box.clear / "late").write_bytes(CONTENT)

    def is_locked() -> bool:
        try:
            os.listdir(box.clear)
        except OSError as error:
            return error.errno == errno.ENOKEY
        return False

    assert wait_until(is_locked, 40)
    assert time.monotonic() - began >= 3
    assert box.is_mounted
    box.unlock()
    assert file.read_bytes() == (box.clear / "late").read_bytes() == CONTENT
    box.umount()
