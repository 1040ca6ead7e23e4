"""Locking when something else is wrong: a full disk, a failing one, a daemon that hangs, an agent told to end."""

from __future__ import annotations

import errno
import json
import mmap
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from cryptfs.cli.mounts import wait_until
from tests.mount.box import Box, boxed, ending
from tests.mount.syscalls import refused, reread
from tests.mount.test_backing import ext4, write_synced

pytestmark = pytest.mark.mount

PAGE = 4096
CONTENT = bytes(range(256)) * 256
"""64 KiB."""
LARGE = CONTENT * 32


@contextmanager
def tmpfs(path: Path, size: str) -> Iterator[None]:
    """A small disk of its own on `path`."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size},mode=700", "small", path], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", path], check=True)


@contextmanager
def filled(directory: Path) -> Iterator[None]:
    """Not a byte is free where `directory` lies."""
    filler = directory / "filler"
    fd = os.open(filler, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        with suppress(OSError):
            while True:
                os.write(fd, bytes(PAGE))
        yield
    finally:
        os.close(fd)
        filler.unlink()


@contextmanager
def beside(box: Box, name: str) -> Iterator[Path]:
    """Another volume of the same user, mounted where this says."""
    vault, clear = box.root / f"{name}-vault", box.root / name
    clear.mkdir()
    box.run("init", "--kdf-cost", "low", vault)
    box.run("mount", vault, clear)
    try:
        yield clear
    finally:
        box.run("umount", clear)


def is_locked(clear: Path) -> bool:
    try:
        os.listdir(clear)
    except OSError as error:
        return error.errno == errno.ENOKEY
    return False


def write_direct(fd: int, content: bytes) -> None:
    """Past the kernel's cache: in the data file when this returns, and named by no frame yet."""
    with mmap.mmap(-1, len(content)) as pages:
        pages[:] = content
        assert os.write(fd, pages) == len(content)


def test_a_lock_on_a_full_disk_loses_nothing(root: None, template: Path, short_tmp: Path) -> None:
    """What no frame says yet waits in memory, and is written after `unlock`."""
    with boxed(short_tmp) as box, ExitStack() as stack:
        box.vault.mkdir()
        stack.enter_context(tmpfs(box.vault, "8m"))
        stack.callback(box.close)
        shutil.copytree(template, box.vault, symlinks=True, dirs_exist_ok=True)
        box.mount()
        write_synced(box.clear / "before", CONTENT)
        fd = os.open(box.clear / "late", os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
        try:
            os.fsync(fd)
            write_direct(fd, LARGE)
            with filled(box.vault):  # so that not even the frame with the keys of so many blocks finds room
                said = box.run("lock", box.clear, code=19).stderr
                assert "changes of 1 files could not be written" in said
                assert "make room" in said
                for path in ("before", "late"):
                    with refused(errno.ENOKEY):
                        (box.clear / path).read_bytes()
                with refused(errno.ENOKEY):
                    os.listdir(box.clear)
            box.unlock()
            assert reread(box.clear / "before") == CONTENT
            os.fsync(fd)
        finally:
            os.close(fd)
        box.kill_daemon()
        box.mount()
        assert (box.clear / "late").read_bytes() == LARGE
        assert (box.clear / "before").read_bytes() == CONTENT
        assert "Traceback" not in box.log()


def test_a_lock_on_a_failing_disk_ends_and_keeps_what_was_synced(root: None, template: Path, short_tmp: Path) -> None:
    with boxed(short_tmp) as box:
        box.vault.mkdir()
        with ext4(box.vault) as device, ExitStack() as stack:
            shutil.copytree(template, box.vault, symlinks=True, dirs_exist_ok=True)
            stack.callback(box.close)
            box.mount()
            write_synced(box.clear / "before", CONTENT)
            fd = os.open(box.clear / "late", os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
            try:
                os.fsync(fd)
                write_direct(fd, CONTENT)
                subprocess.run(["mount", "-o", "remount,abort", device, box.vault], check=False)
                said = box.run("lock", box.clear, code=19).stderr
                assert "could not be written" in said
                with refused(errno.ENOKEY):
                    (box.clear / "before").read_bytes()
                [volume] = json.loads(box.run("status", "--json").stdout)
                assert volume["state"] == "locked"
            finally:
                with suppress(OSError):
                    os.close(fd)
            assert "Traceback" not in box.log()
            box.close()
            # As after the repair of a disk: what it had taken is there.
            subprocess.run(["umount", box.vault], check=True)
            subprocess.run(["mount", "-o", "loop", box.vault.with_name("image"), box.vault], check=True)
            box.mount()
            assert (box.clear / "before").read_bytes() == CONTENT
            assert len((box.clear / "late").read_bytes()) in (0, len(CONTENT))


def test_an_agent_told_to_end_locks_first_and_everything_written_is_on_disk(mounted: Box) -> None:
    """SIGTERM: the daemon writes what programs and the kernel hold, erases its keys, and only then the agent ends."""
    plain, mapped = mounted.clear / "plain", mounted.clear / "mapped"
    mapped.write_bytes(bytes(len(CONTENT)))
    fd, mapped_fd = os.open(plain, os.O_RDWR | os.O_CREAT), os.open(mapped, os.O_RDWR)
    try:
        os.write(fd, CONTENT)
        with mmap.mmap(mapped_fd, 0) as view:
            view[:] = CONTENT
            mounted.kill_agent(signal.SIGTERM)
            # The agent is gone by now: the daemon's word was there before.
            assert mounted.log().count("the volume is locked, after") == 1
            assert "flushing with the keys at hand" not in mounted.log(), "it was told, it did not have to find out"
            with refused(errno.ENOKEY):
                os.pread(fd, PAGE, 0)
            mounted.kill_daemon()
    finally:
        os.close(mapped_fd)
        os.close(fd)
    mounted.mount()
    assert (plain.read_bytes(), mapped.read_bytes()) == (CONTENT, CONTENT)


def test_a_daemon_that_hangs_is_not_waited_for_and_killing_it_ends_all_access(mounted: Box) -> None:
    (mounted.clear / "file").write_bytes(CONTENT)
    with ExitStack() as stack:
        others = [stack.enter_context(beside(mounted, name)) for name in ("above", "below")]
        file = stack.enter_context((mounted.clear / "file").open("rb", buffering=0))
        assert file.read() == CONTENT
        daemon = mounted.daemon_pid
        os.kill(daemon, signal.SIGSTOP)
        try:
            words = [sys.executable, "-m", "cryptfs", "lock", "--all"]
            command = subprocess.Popen(words, env=mounted.environment, stderr=subprocess.PIPE, text=True)
            assert wait_until(lambda: all(is_locked(other) for other in others), 30)
            assert command.poll() is None, "they waited for the one that hangs"
            _, said = command.communicate(timeout=60)
            assert command.returncode == 19
            assert f"{mounted.vault} is locked, but its mount did not say in time" in said
            assert f"kill -9 {daemon}" in said
            assert os.pread(file.fileno(), PAGE, 0) == CONTENT[:PAGE], "what is cached is the kernel's to show"
        finally:
            with ending(daemon):
                os.kill(daemon, signal.SIGKILL)
        with refused(errno.ENOTCONN, errno.ECONNABORTED):
            assert not wait_until(lambda: not os.pread(file.fileno(), PAGE, 0), 5)
    mounted.mount()
    assert (mounted.clear / "file").read_bytes() == CONTENT


def test_when_the_audit_logs_disk_is_full_no_key_is_handed_out_until_there_is_room(
    root: None, template: Path, short_tmp: Path
) -> None:
    with boxed(short_tmp, template) as box, ExitStack() as stack:
        audit = box.root / "s" / "cryptfs" / "audit"
        audit.mkdir(mode=0o700, parents=True)
        audit.parent.chmod(0o700)
        stack.enter_context(tmpfs(audit, "256k"))
        stack.callback(box.close)
        box.mount("--max-age", "1")
        write_synced(box.clear / "file", CONTENT)

        def trouble() -> str | None:
            found: str | None = json.loads(box.run("agent", "status", "--json").stdout)["audit_trouble"]
            return found

        assert trouble() is None
        with filled(audit):
            with refused(errno.ENOKEY, errno.EIO):
                for _ in range(2000):  # until what was left of the last page is written, too
                    reread(box.clear / "file")
            assert "No space left on device" in (trouble() or "")
            said = box.run("lock", box.clear).stderr
            assert not said, "locking is never refused"
            assert "No space left on device" in box.run("unlock", box.vault, code=27).stderr
            with refused(errno.ENOKEY):
                os.listdir(box.clear)
        box.unlock()
        assert reread(box.clear / "file") == CONTENT
        assert trouble() is None
        assert "missed" in box.run("audit", "show").stdout
        box.run("audit", "verify")
        box.umount()
