"""A sample volume made once, copied for each test."""

from __future__ import annotations

import subprocess
from copy import deepcopy
from pathlib import Path

import pytest
import trio

from tests.check.lab import Lab
from tests.mount.conftest import box, fuse, template

__all__ = ["box", "fuse", "template"]


@pytest.fixture(scope="session")
def pattern(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """The volume that the others are copies of."""
    lab = Lab(tmp_path_factory.mktemp("pattern"))
    trio.run(lab.make)
    return lab


@pytest.fixture
def lab(pattern: Lab, tmp_path: Path) -> Lab:
    """A volume of the test's own."""
    root = tmp_path / "vault"
    subprocess.run(["cp", "-a", pattern.root, root], check=True)
    return Lab(root, pattern.sample, deepcopy(pattern.content))
