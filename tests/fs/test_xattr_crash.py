"""Power cuts while xattrs are set: the old set or the new one, never less than what was acknowledged."""

from __future__ import annotations

import logging
import random
import stat
from unittest import mock

import pytest

from cryptfs.fs.rotation import Rotation
from cryptfs.store.disk_model import Order
from cryptfs.store.memory import MemoryStore
from cryptfs.types import Kind
from tests.fs.tree import Tree

NAME, LIMIT = b"trusted.t", 3
PATHS = (b"file", b"dir", b"symlink", b"fifo")
WRITES = {"pwrite", "pwritev", "ftruncate", "fsync", "fdatasync", "syncfs", "open", "rename", "unlink", "futimens"}


@pytest.fixture(autouse=True)
def _crashes_are_no_news(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, "cryptfs")


async def value_of(tree: Tree, path: bytes) -> bytes | None:
    try:
        return await tree.volume.xattrs.get(await tree.inode(path), NAME)
    except OSError:
        return None


async def make(order: Order) -> Tree:
    tree = await Tree.make(MemoryStore(order=order))
    await tree.write(b"file", b"content")
    await tree.mkdir(b"dir")
    await tree.symlink(b"target", b"symlink")
    await tree.mknod(b"fifo", stat.S_IFIFO | 0o600)
    await tree.remount()
    return tree


@pytest.mark.parametrize("order", [Order.JOURNAL, Order.DIRECTORY])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("rewritten", [False, True])
async def test_the_old_set_or_the_new_one(order: Order, path: bytes, rewritten: bool) -> None:
    """`rewritten`: a rotation has replaced every log, and was cut short before it synced anything."""
    tree = await make(order)
    rng, states = random.Random(f"{order} {path!r}"), 0
    if rewritten:
        await tree.volume.xattrs.set(await tree.inode(path), NAME, b"from the beginning")
        await tree.remount()
        rotation = Rotation(tree.volume, tree.sample.rotate())
        with mock.patch.object(rotation, "_look_again", mock.AsyncMock()):
            await rotation.run()
    may_be: list[bytes | None] = [b"from the beginning" if rewritten else None]
    survivors: list[tuple[MemoryStore, list[bytes | None]]] = []

    def crash(call: str) -> None:
        if call in WRITES:
            survivors.extend((each, list(may_be)) for each in tree.store.crash_states(rng, LIMIT))  # type: ignore[union-attr]

    assert isinstance(tree.store, MemoryStore)
    inode = await tree.inode(path)
    for value in (b"first", b"second" * 100, b"third"):
        tree.store.before_call = crash
        may_be.append(value)
        await tree.volume.xattrs.set(inode, NAME, value)
        if inode.kind not in (Kind.FILE, Kind.DIR):
            may_be = [value]
        crash("fsync")
        if value == b"second" * 100 and inode.kind in (Kind.FILE, Kind.DIR):
            await tree.fsync(path)
            may_be = [value]
            crash("fsync")
        tree.store.before_call = None
    for store, allowed in survivors:
        after = Tree(store, tree.sample, await tree.sample.open(store))
        assert await value_of(after, path) in allowed
        assert await after.read(b"file") == b"content"
        assert await after.readlink(b"symlink") == b"target"
        await after.volume.xattrs.set(await after.inode(path), NAME, b"afterwards")
        await after.remount()
        assert await value_of(after, path) == b"afterwards"
        await after.finish()
        states += 1
    assert states > 20
    await tree.finish()
