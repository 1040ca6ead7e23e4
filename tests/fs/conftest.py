"""Volumes for the tests of `fs`: on the kernel's filesystem and on the disk model."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from cryptfs.store.local import LocalStore
from cryptfs.store.memory import MemoryStore
from tests.fs.tree import Tree
from tests.stores import no_umask, store

__all__ = ["no_umask", "store"]


@pytest.fixture
def local(tmp_path: Path) -> Iterator[LocalStore]:
    made = LocalStore(tmp_path)
    yield made
    made.close_store()


@pytest.fixture
async def tree(store: LocalStore | MemoryStore) -> AsyncIterator[Tree]:
    """An open, empty volume; closed afterwards, cleanly, with nothing left open."""
    made = await Tree.make(store)
    yield made
    await made.finish()


@pytest.fixture
async def local_tree(local: LocalStore) -> AsyncIterator[Tree]:
    """As `tree`, on the kernel's filesystem only."""
    made = await Tree.make(local)
    yield made
    await made.finish()
