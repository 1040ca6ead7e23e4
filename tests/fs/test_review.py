"""Races and failures that a reading of the code found; each test failed before its fix."""

from __future__ import annotations

import random

import trio

from cryptfs.store.memory import MemoryStore
from tests.fs.tree import Tree

CONTENT = b"acknowledged " * 1000


async def after_power_cut(tree: Tree, store: MemoryStore) -> Tree:
    """The same volume on what is left of it."""
    survivor = Tree(store, tree.sample, tree.volume)
    await survivor.mount()
    return survivor


async def test_fsync_of_a_file_that_was_written_by_somebody_else() -> None:
    """Open, fsync, close, without reading or writing: what an earlier opening wrote is durable (dpkg does this)."""
    tree = await Tree.make(MemoryStore())
    await tree.write(b"file", CONTENT)
    await tree.fsync(b"file")
    states = 0
    with trio.fail_after(60):
        for left in tree.store.crash_states(random.Random(1), limit=40):
            survivor = await after_power_cut(tree, left)
            assert await survivor.read(b"file") == CONTENT
            survivor.kill()
            states += 1
    assert states > 1
    tree.kill()
