"""Leak checks for every test, and the fixtures that keep tests off the user's own directories.

A test that leaves a descriptor, a mount, a child process, a zombie or a process of its own that was meant to end
fails; what it left is cleaned away first, so that the next test starts from nothing.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.leaks import Watch

DIRECTORY_FIXTURES = frozenset({"short_root", "tmp_path", "tmp_path_factory", "tmpdir"})

settings.register_profile(
    "default",
    deadline=None,
    derandomize=True,
    print_blob=True,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("torture", parent=settings.get_profile("default"), derandomize=False, max_examples=5000)
settings.load_profile("default")


@dataclass(frozen=True, slots=True)
class XdgDirs:
    """The directories one test's programs use in place of the user's."""

    home: Path
    runtime: Path
    state: Path


@pytest.fixture(scope="session")
def short_root() -> Iterator[Path]:
    """One directory for the session, directly under the temporary one: a Unix socket's path has at most 107 bytes."""
    root = Path(tempfile.mkdtemp(prefix="cfs-"))
    yield root
    with contextlib.suppress(OSError):
        root.rmdir()


@pytest.fixture(autouse=True)
def no_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails a test that leaves something behind (see the module's docstring)."""
    # Without a directory of its own a test cannot have left a mount or an orphan that names one: spare it the search.
    owned = []
    if DIRECTORY_FIXTURES.intersection(request.fixturenames):
        owned = [request.getfixturevalue("short_root"), request.getfixturevalue("tmp_path_factory").getbasetemp()]
    watch = Watch.start(owned)
    yield
    left = watch.finish()
    if left:
        pytest.fail("left behind: " + "; ".join(left), pytrace=False)


@pytest.fixture
def short_tmp(short_root: Path, no_leaks: None) -> Iterator[Path]:
    """A directory of the test's own with a path short enough for sockets; removed afterwards."""
    path = Path(tempfile.mkdtemp(dir=short_root, prefix=""))
    yield path
    # A mount that is still there is the leak check's to report: never delete through it.
    if not any(child.is_mount() for child in path.rglob("*") if child.is_dir()):
        shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def xdg_dirs(short_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> XdgDirs:
    """Points HOME and the XDG variables below `short_tmp`, and forgets any passphrase in the environment."""
    dirs = XdgDirs(home=short_tmp / "h", runtime=short_tmp / "r", state=short_tmp / "s")
    for path in (dirs.home, dirs.runtime, dirs.state):
        path.mkdir(mode=0o700)
    monkeypatch.setenv("HOME", str(dirs.home))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(dirs.runtime))
    monkeypatch.setenv("XDG_STATE_HOME", str(dirs.state))
    for name in ("CONFIG", "CACHE", "DATA"):
        monkeypatch.setenv(f"XDG_{name}_HOME", str(dirs.home / name.lower()))
    monkeypatch.delenv("CRYPTFS_PASSPHRASE", raising=False)
    return dirs
