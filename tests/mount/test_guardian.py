"""What the kernel goes on showing after the daemon was killed: nothing, as the guardian sees to it."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Self

import pytest

from cryptfs.cli.mounts import wait_until
from tests.mount.box import Box, ending
from tests.mount.syscalls import refused

pytestmark = pytest.mark.mount

MIB = 1 << 20
CONTENT = bytes(range(256)) * (MIB // 256)

HOLDER = """
import ctypes, json, mmap, os, sys, time
clear = sys.argv[1]
big = os.open(clear + "/big", os.O_RDONLY)
dirty = os.open(clear + "/dirty", os.O_RDWR | os.O_CREAT)
size = os.fstat(big).st_size
view = mmap.mmap(big, 0, flags=mmap.MAP_PRIVATE)
base = ctypes.addressof(ctypes.c_char.from_buffer(view))
shared = mmap.mmap(os.open(clear + "/shared", os.O_RDWR), 0)
shared_base = ctypes.addressof(ctypes.c_char.from_buffer(shared))
memory = os.open("/proc/self/mem", os.O_RDONLY)
directory = os.open(clear + "/dir", os.O_RDONLY)
for at in range(0, size, 4096):
    assert os.pread(memory, 1, base + at)
# Pages that are in nobody's hands but the kernel's when the daemon dies.
os.pwrite(dirty, b"d" * 65536, 0)
shared[0:4096] = b"m" * 4096

def works(call):
    try:
        call()
        return True
    except OSError:
        return False

def look():
    return {
        "read": sum(works(lambda: os.pread(big, 1, at)) for at in range(0, size, 4096)),
        "mapped": sum(works(lambda: os.pread(memory, 1, base + at)) for at in range(0, size, 4096)),
        "dirty": works(lambda: os.pread(dirty, 1, 0)),
        "dirty mapped": works(lambda: os.pread(memory, 1, shared_base)),
        "names": works(lambda: os.stat(clear + "/dir/inner")) or works(lambda: os.stat("inner", dir_fd=directory)),
        "listing": works(lambda: os.listdir(directory)),
    }

print(json.dumps(look()), flush=True)
for line in sys.stdin:
    begun = time.monotonic_ns()
    print(json.dumps({**look(), "at": begun}), flush=True)
"""
NOTHING = {"read": 0, "mapped": 0, "dirty": False, "dirty mapped": False, "names": False, "listing": False}
EVERYTHING = {
    "read": 8 * MIB // 4096, "mapped": 8 * MIB // 4096,
    "dirty": True, "dirty mapped": True, "names": True, "listing": True,
}  # fmt: skip


class Holder:
    """A program with everything open that a program can have open."""

    def __init__(self, box: Box) -> None:
        (box.clear / "dir").mkdir()
        (box.clear / "dir" / "inner").write_bytes(b"inner")
        (box.clear / "big").write_bytes(CONTENT * 8)
        (box.clear / "shared").write_bytes(CONTENT)
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(box.clear)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.said() == EVERYTHING

    def said(self) -> dict[str, int]:
        assert self.process.stdout is not None
        found: dict[str, int] = json.loads(self.process.stdout.readline())
        return found

    def look(self) -> dict[str, int]:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        found = self.said()
        del found["at"]
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


def guardians_of(daemon: int) -> list[int]:
    found = []
    for name in os.listdir("/proc"):
        if name.isdecimal():
            with suppress(OSError):
                words = Path(f"/proc/{name}/cmdline").read_bytes().split(b"\0")
                parent = Path(f"/proc/{name}/stat").read_text("utf-8").rpartition(") ")[2].split()[1]
                if b"cryptfs.daemon.guardian" in words and int(parent) == daemon:
                    found.append(int(name))
    return found


def test_a_killed_daemon_leaves_nothing_to_read(mounted: Box) -> None:
    with Holder(mounted) as holder:
        mounted.kill_daemon()
        assert wait_until(lambda: holder.look() == NOTHING, 5), holder.look()
        with refused(errno.ENOTCONN):
            os.listdir(mounted.clear)
        assert mounted.is_mounted, "nobody must write into the directory below by mistake"
    assert mounted.logged("guardian", "are cut off")
    mounted.mount()
    assert (mounted.clear / "big").read_bytes() == CONTENT * 8


def test_a_mount_that_ends_while_it_is_in_use_leaves_nothing_to_read_either(mounted: Box) -> None:
    with Holder(mounted) as holder:
        with ending(mounted.daemon_pid):
            os.kill(mounted.daemon_pid, signal.SIGTERM)
        assert wait_until(lambda: holder.look() == NOTHING, 5), holder.look()
    mounted.mount()
    assert (mounted.clear / "big").read_bytes() == CONTENT * 8
    assert (mounted.clear / "dirty").read_bytes() == b"d" * 65536, "what the kernel had was fetched before"


def test_a_killed_guardian_is_replaced(mounted: Box) -> None:
    daemon = mounted.daemon_pid
    assert wait_until(lambda: len(guardians_of(daemon)) == 1, 5)
    [first] = guardians_of(daemon)
    os.kill(first, signal.SIGKILL)
    assert wait_until(lambda: guardians_of(daemon) not in ([], [first]), 10)
    with Holder(mounted) as holder:
        mounted.kill_daemon()
        assert wait_until(lambda: holder.look() == NOTHING, 5), holder.look()


def test_signals_that_end_everything_of_a_user_do_not_end_the_guardian_before_its_daemon(mounted: Box) -> None:
    daemon = mounted.daemon_pid
    assert wait_until(lambda: len(guardians_of(daemon)) == 1, 5)
    [guardian] = guardians_of(daemon)
    with Holder(mounted) as holder:
        # Until it has got so far as to ignore them, they end it: then another one takes its place.
        ignored = 1 << signal.SIGTERM - 1
        assert wait_until(lambda: bool(signals_ignored(guardian) & ignored), 5)
        assert wait_until(lambda: core_limit(guardian) == ["0", "0"], 5)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.kill(guardian, number)
        mounted.kill_daemon()
        assert wait_until(lambda: holder.look() == NOTHING, 5), holder.look()
    assert wait_until(lambda: not os.path.exists(f"/proc/{guardian}"), 5)


def core_limit(pid: int) -> list[str]:
    """Soft and hard, in bytes."""
    lines = Path(f"/proc/{pid}/limits").read_text("utf-8").splitlines()
    return next(line.split()[4:6] for line in lines if line.startswith("Max core file size"))


def signals_ignored(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text("utf-8").splitlines():
        if line.startswith("SigIgn:"):
            return int(line.split()[1], 16)
    return 0


def test_daemons_killed_while_they_are_being_locked(mounted: Box) -> None:
    """The threads that have the kernel drop dirty pages wait for this very daemon to write them."""
    for moment in range(4):
        fds = [os.open(mounted.clear / f"file {n}", os.O_RDWR | os.O_CREAT) for n in range(4)]
        try:
            for fd in fds:
                os.pwrite(fd, CONTENT * 8, 0)
            lines = mounted.log().count("locking the volume")
            lock = subprocess.Popen(
                [sys.executable, "-m", "cryptfs", "lock", str(mounted.clear)], env=mounted.environment,
                stderr=subprocess.DEVNULL,
            )  # fmt: skip
            assert wait_until(lambda lines=lines: mounted.log().count("locking the volume") > lines, 20)  # type: ignore[misc]
            time.sleep(0.02 * moment)
            mounted.kill_daemon()
            assert wait_until(lambda fds=fds: not any(is_readable(fd) for fd in fds), 5)  # type: ignore[misc]
            assert lock.wait(30) in (0, 19)
        finally:
            for fd in fds:
                with suppress(OSError):
                    os.close(fd)
        mounted.mount()


def is_readable(fd: int) -> bool:
    try:
        os.pread(fd, 1, 0)
    except OSError:
        return False
    return True


IMPORTED = """
import sys
import cryptfs.daemon.guardian
print(*sorted(name for name in sys.modules if name.split(".")[0] in ("cryptfs", "pyfuse3", "trio", "cryptography")))
"""


def test_a_guardian_has_no_code_to_do_anything_else() -> None:
    said = subprocess.run([sys.executable, "-c", IMPORTED], check=True, capture_output=True, text=True).stdout
    assert said.split() == [
        "cryptfs", "cryptfs.daemon", "cryptfs.daemon.guardian",
        "cryptfs.fuse", "cryptfs.fuse.notify", "cryptfs.fuse.open_files",
    ]  # fmt: skip
