"""A fault in the daemon's own code is an EIO and a log line; a descriptor that cannot be had is an errno."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cryptfs.cli.mounts import wait_until
from tests.mount.box import PASSPHRASE, Box
from tests.mount.syscalls import drop_pages, refused

pytestmark = pytest.mark.mount

FAULTY = """
import os
from cryptfs.fs import file, files, namespace

def breaks(owner, name):
    real = getattr(owner, name)
    def wrapper(self, *words, **named):
        if os.path.exists(ARMED + ("-lookup" if name == "lookup" else "")):
            key = b"SECRET-" + b"KEY-MATERIAL"
            raise ZeroDivisionError("a fault made on purpose")
        return real(self, *words, **named)
    setattr(owner, name, wrapper)

for name in ("lookup", "listing", "mkdir", "create", "unlink", "rename", "link", "symlink", "rmdir", "mknod"):
    breaks(namespace.Namespace, name)
for name in ("setattr", "open", "readlink", "sync_dirs"):
    breaks(files.Files, name)
for name in ("read_into", "write"):
    breaks(file.FileNode, name)
"""


def test_a_fault_costs_one_request(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kind of request fails inside, on a mount that goes on working."""
    armed, site = box.root / "armed", box.root / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(FAULTY.replace("ARMED", repr(str(armed))))
    box.unlock()
    monkeypatch.setenv("PYTHONPATH", f"{site}:{Path(__file__).parents[2]}")
    with box.daemon(box.agent_socket) as daemon:
        here = box.clear
        (here / "file").write_bytes(b"content" * 1000)
        (here / "dir").mkdir()
        os.symlink("file", here / "symlink")
        drop_pages(here / "file")
        reader = os.open(here / "file", os.O_RDONLY)
        writer = os.open(here / "file", os.O_WRONLY)
        directory = os.open(here, os.O_RDONLY)
        armed.touch()
        calls: dict[str, Callable[[], object]] = {
            "readdir": lambda: os.listdir(here),
            "mkdir": lambda: os.mkdir(here / "new"),
            "mknod": lambda: os.mkfifo(here / "new"),
            "unlink": lambda: os.unlink(here / "file"),
            "rmdir": lambda: os.rmdir(here / "dir"),
            "setattr": lambda: os.chmod(here / "file", 0o600),
            "open": lambda: os.open(here / "file", os.O_RDONLY),
            "readlink": lambda: os.readlink(here / "symlink"),
            "read": lambda: os.pread(reader, 10, 0),
            "fsyncdir": lambda: os.fsync(directory),
        }
        for call in calls.values():
            with refused(errno.EIO):
                call()
        # By itself: the kernel looks a new name up before it asks for mkdir.
        lookups = armed.with_name("armed-lookup")
        lookups.touch()
        with refused(errno.EIO):
            os.stat(here / "unknown")
        lookups.unlink()
        os.pwrite(writer, b"of the program's" * 256, 0)  # a whole page, which the kernel takes without reading
        with refused(errno.EIO):
            os.fsync(writer)
        armed.unlink()
        for fd in (reader, writer, directory):
            os.close(fd)
        assert sorted(os.listdir(here)) == ["dir", "file", "symlink"]
        (here / "after").write_text("the mount goes on")
        assert os.stat(here / "file").st_size == 7000
        text = daemon.said()
        for name in (*calls, "lookup", "write"):
            assert text.count(f"{name} failed unexpectedly") >= 1, name
        assert "ZeroDivisionError: a fault made on purpose" in text
        # A traceback shows code and never values.
        assert "SECRET-KEY-MATERIAL" not in text
        assert "of the program's" not in text


def descriptors(box: Box) -> int:
    return len(os.listdir(f"/proc/{box.daemon_pid}/fd"))


def test_an_open_file_costs_three_descriptors_at_most(mounted: Box) -> None:
    count = 100
    mounted.clear.joinpath("warm").write_bytes(b"x")
    before = descriptors(mounted)
    opened = [os.open(mounted.clear / str(number), os.O_CREAT | os.O_RDWR) for number in range(count)]
    try:
        for _ in range(2):  # the second version of a block goes to the twin
            for fd in opened:
                os.pwrite(fd, b"written", 0)
                os.fsync(fd)
        again = [os.open(mounted.clear / str(number), os.O_RDONLY) for number in range(count)]
        most = descriptors(mounted)
        for fd in again:
            os.close(fd)
        assert most - before <= 3 * count + 16
    finally:
        for fd in opened:
            os.close(fd)
    assert wait_until(lambda: descriptors(mounted) <= before + 16, 30)


def test_more_open_files_than_descriptors(mounted: Box) -> None:
    """The daemon runs out: that is the program's EMFILE, and over as soon as something is closed."""
    here = mounted.clear
    (here / "first").write_text("kept")
    limit = descriptors(mounted) + 40
    soft, hard = resource.prlimit(mounted.daemon_pid, resource.RLIMIT_NOFILE)
    resource.prlimit(mounted.daemon_pid, resource.RLIMIT_NOFILE, (limit, hard))
    opened: list[int] = []
    try:
        with refused(errno.EMFILE, errno.ENFILE):
            for number in range(200):
                fd = os.open(here / str(number), os.O_CREAT | os.O_RDWR)
                opened.append(fd)
                os.pwrite(fd, b"acknowledged", 0)
                os.fsync(fd)
        assert len(opened) >= 5
        with refused(errno.EMFILE, errno.ENFILE):
            os.close(os.open(here / "another", os.O_CREAT | os.O_RDWR))
        assert os.pread(opened[0], 100, 0) == b"acknowledged"
    finally:
        for fd in opened:
            os.close(fd)
        resource.prlimit(mounted.daemon_pid, resource.RLIMIT_NOFILE, (soft, hard))
    (here / "another").write_text("works again")
    mounted.remount()
    assert (here / "first").read_text() == "kept"
    for number in range(len(opened)):
        assert (here / str(number)).read_bytes() == b"acknowledged"
    assert (here / "another").read_text() == "works again"
    assert "unexpectedly" not in mounted.log()


PER_DIRECTORY = 500


def resident_mb(box: Box) -> float:
    status = Path(f"/proc/{box.daemon_pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def look_at_all(path: Path) -> int:
    """How many entries there are, having asked for the attributes of each."""
    return len([entry.stat() for entry in os.scandir(path)])


def walk_and_forget(box: Box, count: int, most_s: float, back_to_mb: float) -> tuple[float, float, float]:
    """MB the daemon has before a walk over `count` files, after it, and once the kernel has let go of them.

    `most_s` after that at the latest; earlier if it is down to what it had before and `back_to_mb`.
    """
    directories = count // PER_DIRECTORY
    subprocess.run(
        [sys.executable, "-m", "tests.mount.filling", box.vault, str(directories), str(PER_DIRECTORY)],
        env={**box.environment, "CRYPTFS_PASSPHRASE": PASSPHRASE}, check=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    box.mount()
    # What is loaded or made once, at the first listing, is not counted.
    look_at_all(box.clear / "0")
    before = resident_mb(box)
    assert sum(look_at_all(path) for path in box.clear.iterdir()) == count
    most = resident_mb(box)
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("2")
    wait_until(lambda: resident_mb(box) <= before + back_to_mb, most_s)
    after = resident_mb(box)
    sys.stdout.write(f"resident: {before:.1f} MB, {most:.1f} MB after the walk, {after:.1f} MB once forgotten\n")
    return before, most, after


def test_what_the_kernel_forgets_is_forgotten(root: None, box: Box) -> None:
    before, most, after = walk_and_forget(box, 20_000, 10, 1)
    assert most >= before + 8, "nothing would have to be given back"
    # Of Python's own allocator's a fifth goes back.
    assert after - before <= (most - before) * 0.6


@pytest.mark.torture
def test_half_a_million_files_are_forgotten(root: None, box: Box) -> None:
    # Keys that were cached during the walk keep pages until they have reached the max age.
    before, most, after = walk_and_forget(box, 500_000, 120, 30)
    assert most >= before + 100, "nothing would have to be given back"
    assert after <= before + 50
