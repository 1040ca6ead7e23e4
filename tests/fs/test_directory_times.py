"""The rewriting of a directory's log shows in none of the directory's times that anybody can set."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pytest

from cryptfs.fs import directory
from cryptfs.fs.attributes import Changes
from cryptfs.store.memory import MemoryStore
from tests.fs.tree import Tree

SET = 1_111_111_111 * 10**9
LATER = 1_222_222_222 * 10**9


async def _rewritten(tree: Tree, monkeypatch: pytest.MonkeyPatch, during: Callable[[], Any]) -> None:
    """Compact the log of `d`; `during` is awaited once the new log has the name and nobody has been told."""
    inode = await tree.inode(b"d")
    node = await tree.volume.inodes.dir(inode)
    in_thread = tree.volume.ctx.in_thread
    calls: list[object] = []

    async def and_then(call: Callable[..., object], *args: object) -> object:
        try:
            return await in_thread(call, *args)
        finally:
            if not calls:
                calls.append(call)
                await during()

    monkeypatch.setattr(directory, "_COMPACT_MIN_BYTES", -(1 << 20))
    monkeypatch.setattr(tree.volume.ctx, "in_thread", and_then)
    try:
        await node.compact()
    finally:
        monkeypatch.undo()
    assert calls, "nothing was rewritten"


async def test_mtime_does_not_move(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    await tree.mkdir(b"d")
    await tree.setattr(b"d", Changes(atime_ns=SET, mtime_ns=SET))
    seen: list[int | None] = []

    async def look() -> None:
        attrs = await tree.stat(b"d"), await tree.lookup(b"d")
        seen.extend(attr.mtime_ns or attr.st.st_mtime_ns for attr in attrs)

    await _rewritten(tree, monkeypatch, look)
    await look()
    assert seen == [SET] * 4


async def test_times_set_meanwhile_stay(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    await tree.mkdir(b"d")
    await tree.setattr(b"d", Changes(atime_ns=SET, mtime_ns=SET))

    async def touch() -> None:
        await tree.setattr(b"d", Changes(mtime_ns=LATER))
        # chown moves ctime alone.
        await tree.setattr(b"d", Changes())

    await _rewritten(tree, monkeypatch, touch)
    st = (await tree.stat(b"d")).st
    assert (st.st_atime_ns, st.st_mtime_ns) == (SET, LATER)


async def test_mtime_does_not_move_if_there_is_no_space(memory: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = await Tree.make(memory)
    await tree.mkdir(b"d")
    await tree.setattr(b"d", Changes(atime_ns=SET, mtime_ns=SET))
    inode = await tree.inode(b"d")
    node = await tree.volume.inodes.dir(inode)
    monkeypatch.setattr(directory, "_COMPACT_MIN_BYTES", -(1 << 20))
    memory.fail("pwrite", 1, errno.ENOSPC)
    with pytest.raises(OSError, match="No space"):
        await node.compact()
    monkeypatch.undo()
    assert (await tree.stat(b"d")).st.st_mtime_ns == SET
    await tree.finish()


@pytest.fixture
async def memory() -> MemoryStore:
    return MemoryStore()
