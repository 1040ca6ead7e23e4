"""The leak checks themselves: each kind of leak is found, and nothing else is."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import leaks
from tests.conftest import XdgDirs
from tests.leaks import Watch

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


@pytest.fixture(autouse=True)
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaks, "GRACE_S", 0.1)


@pytest.fixture
def watch(short_tmp: Path) -> Watch:
    return Watch.start([short_tmp])


def test_nothing_left_is_nothing_found(watch: Watch, short_tmp: Path) -> None:
    with open(short_tmp / "a", "wb") as file:
        file.write(b"x")
    subprocess.run([sys.executable, "-c", ""], check=True)
    assert watch.finish() == []


def test_an_open_descriptor_is_found(watch: Watch, short_tmp: Path) -> None:
    fd = os.open(short_tmp, os.O_RDONLY)
    try:
        assert watch.finish() == [f"1 descriptors: {fd} -> {short_tmp}"]
    finally:
        os.close(fd)


def test_a_descriptor_that_only_garbage_holds_is_not_a_leak(watch: Watch, short_tmp: Path) -> None:
    with open(short_tmp / "a", "wb") as file:
        cycle: list[object] = [os.dup(file.fileno())]

    class Owner:
        def __init__(self, fd: int) -> None:
            self.fd, self.me = fd, self

        def __del__(self) -> None:
            os.close(self.fd)

    fd = cycle.pop()
    assert isinstance(fd, int)
    Owner(fd)
    assert watch.finish() == []


def test_a_child_is_found_and_killed(watch: Watch) -> None:
    with subprocess.Popen(SLEEP) as process:
        left = watch.finish()
        assert left == [f"process {process.pid} ({' '.join(SLEEP)})"]
        assert not Path(f"/proc/{process.pid}").exists()


def test_a_zombie_is_found_and_reaped(watch: Watch) -> None:
    pid = os.posix_spawn("/bin/true", ["true"], {})
    deadline = time.monotonic() + 10
    while leaks.describe(pid) != "zombie" and time.monotonic() < deadline:
        time.sleep(0.01)
    assert watch.finish() == [f"process {pid} (zombie)"]
    assert not Path(f"/proc/{pid}").exists()


def test_an_orphan_is_found_by_the_directories_it_carries(watch: Watch, xdg_dirs: XdgDirs) -> None:
    start = f"import subprocess as s; print(s.Popen({SLEEP!r}, stdout=s.DEVNULL, stderr=s.DEVNULL).pid)"
    pid = int(subprocess.run([sys.executable, "-c", start], check=True, capture_output=True, text=True).stdout)
    assert pid not in leaks.children()
    assert watch.finish() == [f"process {pid} ({' '.join(SLEEP)})"]
    deadline = time.monotonic() + 10
    while leaks.describe(pid) not in {"gone", "zombie"} and time.monotonic() < deadline:
        time.sleep(0.01)
    assert leaks.describe(pid) in {"gone", "zombie"}


def test_programs_see_only_the_tests_own_directories(xdg_dirs: XdgDirs, short_tmp: Path) -> None:
    names = ("HOME", "XDG_RUNTIME_DIR", "XDG_STATE_HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME")
    assert all(Path(os.environ[name]).is_relative_to(short_tmp) for name in names)
    assert len(os.fsencode(xdg_dirs.runtime / "cryptfs" / "agent.sock")) < 108
