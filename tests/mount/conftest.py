"""Volumes to work in. Each test that only works in the mount shares one; one that does more gets its own."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.box import Box, boxed
from tests.mount.domains import CONTENT, create


@pytest.fixture(scope="session")
def fuse() -> None:
    """Skips where nothing can be mounted."""
    if not os.path.exists("/dev/fuse") or shutil.which("fusermount3") is None:
        pytest.skip("needs /dev/fuse and fusermount3")


@pytest.fixture(scope="session")
def template(fuse: None, short_root: Path) -> Iterator[Path]:
    """An empty volume to be copied."""
    with boxed(short_root) as box:
        box.init()
        yield box.vault


@pytest.fixture(scope="module")
def shared(template: Path, short_root: Path) -> Iterator[Box]:
    """A mounted volume for those tests of a module that leave it mounted."""
    with boxed(short_root, template) as box:
        box.mount()
        yield box
        assert "unexpectedly" not in box.log(), box.log()


@pytest.fixture
def here(shared: Box, request: pytest.FixtureRequest) -> Iterator[Path]:
    """An empty directory in the shared mount."""
    path = shared.clear / "here"
    path.mkdir()
    yield path
    shutil.rmtree(path)


@pytest.fixture
def box(template: Path, short_tmp: Path) -> Iterator[Box]:
    """A volume of the test's own, not mounted."""
    with boxed(short_tmp, template) as own:
        yield own


@pytest.fixture
def mounted(box: Box) -> Box:
    """A volume of the test's own, mounted."""
    box.mount()
    return box


@pytest.fixture
def pay(mounted: Box) -> Path:
    """A domain, unlocked, beside a file of the volume."""
    (mounted.clear / "plain").write_bytes(CONTENT)
    create(mounted, mounted.clear / "pay")
    return mounted.clear / "pay"


@pytest.fixture
def root() -> None:
    """Skips unless the tests run as root."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
