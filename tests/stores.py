"""Fixtures for tests on both stores: who imports them has them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from cryptfs.store.local import LocalStore
from cryptfs.store.memory import MemoryStore


@pytest.fixture(autouse=True)
def no_umask() -> Iterator[None]:
    """Modes are what the test asks for, on the kernel as on the model."""
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[LocalStore | MemoryStore]:
    """Each of the two."""
    made = LocalStore(tmp_path) if request.param == "local" else MemoryStore()
    yield made
    made.close_store()
