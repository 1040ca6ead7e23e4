"""A KEK rotation that finds damage, a full disk or no keys, or is cancelled."""

from __future__ import annotations

import errno
import os

import pytest
import trio
import trio.testing

from cryptfs.errors import Damaged, VolumeLocked
from cryptfs.format.log import HEADER_BYTES
from cryptfs.fs.context import sidecar_name
from cryptfs.fs.pace import Turn
from cryptfs.fs.rotation import Rotation
from cryptfs.names import tree_name
from cryptfs.store.memory import MemoryStore
from cryptfs.testing.keys import FakeDekProvider
from tests.fs.rotating import BLOCK, forget_keys, look, populate, rotated
from tests.fs.tree import Tree, errno_of


def spoil(tree: Tree, log_id: bytes, at: int) -> None:
    ctx = tree.volume.ctx
    fd = ctx.store.open(ctx.sidecar_dir(log_id), sidecar_name(log_id), os.O_RDWR)
    byte = ctx.store.pread(fd, 1, at)
    ctx.store.pwrite(fd, bytes([byte[0] ^ 1]), at)
    ctx.store.close(fd)


async def test_a_damaged_sidecar_stays_as_it_is_and_keeps_the_old_kek(
    tree: Tree, caplog: pytest.LogCaptureFixture
) -> None:
    files = await populate(tree)
    await tree.remount()
    log_id = (await tree.inode(b"d/e/deep")).log_id
    spoil(tree, log_id, HEADER_BYTES + 130)
    version = tree.sample.rotate()
    rotation = Rotation(tree.volume, version)
    await rotation.run()
    assert rotation.left == {log_id} == rotation.failures.keys()
    assert rotation.progress.failed == 1
    assert sum(log_id.hex() in record.getMessage() for record in caplog.records) == 1
    spoil(tree, log_id, HEADER_BYTES + 130)
    assert await tree.read(b"d/e/deep") == files[b"d/e/deep"]
    await rotation.run()
    assert (rotation.left, rotation.progress.failed) == (frozenset(), 0)


async def test_poison_is_not_forgotten(tree: Tree) -> None:
    """Of a file some of whose blocks are lost with a frame, a snapshot would say that they are holes."""
    await tree.write(b"file", b"1" * BLOCK)
    file = await tree.open(b"file")
    await file.write(BLOCK, b"2" * BLOCK)
    await tree.close(b"file")
    file = await tree.open(b"file")
    await file.write(2 * BLOCK, b"3" * BLOCK)
    await tree.close(b"file")
    assert file.journal.log is None
    await tree.remount()
    inode = await tree.inode(b"file")
    file = await tree.open(b"file")
    await file.journal.load()
    assert file.journal.log is not None
    await tree.close(b"file")
    ctx = tree.volume.ctx
    fd = ctx.store.open(ctx.sidecar_dir(inode.log_id), sidecar_name(inode.log_id), os.O_RDONLY)
    raw = ctx.store.pread(fd, 1 << 20, 0)
    ctx.store.close(fd)
    second = raw.index(b"CFF1", raw.index(b"CFF1", HEADER_BYTES) + 4)
    spoil(tree, inode.log_id, second + 152 + 40)  # inside the second frame's payload
    rotation = await rotated(tree, check=False)
    assert rotation.left == {inode.log_id}
    file = await tree.open(b"file")
    assert await file.read(0, BLOCK) == b"1" * BLOCK
    with pytest.raises(Damaged):
        await file.read(BLOCK, BLOCK)
    # Written anew, nothing of it is lost any more.
    await file.write(BLOCK, b"4" * BLOCK)
    await rotation.run()
    assert rotation.left == frozenset()
    await tree.close(b"file")


async def test_a_directory_that_cannot_be_read_keeps_the_old_kek(tree: Tree) -> None:
    await tree.mkdir(b"d")
    await tree.mkdir(b"d/e")
    await tree.write(b"d/e/file", b"content")
    await tree.remount()
    inode = await tree.inode(b"d")
    below, file = await tree.inode(b"d/e"), await tree.inode(b"d/e/file")
    ids = {below.log_id, file.log_id, inode.log_id}
    tree.forget_all()
    while tree.volume.inodes._dirs:
        tree.volume.inodes._dirs.popitem()[1].close()
    root = await tree.volume.inodes.dir(tree.volume.root)
    (entry,) = root.entries.values()
    ctx = tree.volume.ctx
    inner = ctx.store.open(root.fd, tree_name(entry.sealed), os.O_RDONLY | os.O_DIRECTORY)
    fd = ctx.store.open(inner, b".dir", os.O_RDWR)
    ctx.store.pwrite(fd, b"\xff", HEADER_BYTES + 125)
    rotation = await rotated(tree, check=False)
    assert inode.log_id in rotation.failures
    assert {inode.log_id, file.log_id} <= rotation.left <= ids
    assert file.log_id not in rotation.failures
    ctx.store.close(fd)
    ctx.store.close(inner)


async def test_a_full_disk_stops_it_and_changes_nothing() -> None:
    store = MemoryStore()
    tree = await Tree.make(store)
    files = await populate(tree)
    await tree.remount()
    version = tree.sample.rotate()
    for stop_at in (1, 5, 9):
        rotation = Rotation(tree.volume, version)
        calls = 0

        def full(call: str) -> None:
            nonlocal calls
            if call == "pwrite":
                calls += 1
                if calls >= stop_at:  # noqa: B023
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        store.before_call = full
        assert await errno_of(rotation.run()) == "ENOSPC"
        store.before_call = None
        forget_keys(tree)
        await look(tree, files)
        assert not [name for first in range(256) for name in store.listdir(tree.volume.ctx.sidecar_dir(bytes([first])))
                    if name.endswith(b".new")]  # fmt: skip
    await Rotation(tree.volume, version).run()
    await tree.volume.ctx.adopt_volume_key(version, tree.sample.config.volume_key_wrapped)
    tree.sample.kek.destroy_older()
    await tree.remount()
    await look(tree, files)
    await tree.finish()
    store.close_store()


async def test_a_locked_volume_stops_it(tree: Tree) -> None:
    files = await populate(tree)
    await tree.remount()
    keys = tree.volume.ctx.keys
    assert isinstance(keys, FakeDekProvider)
    rotation = Rotation(tree.volume, tree.sample.rotate())
    keys.failure = VolumeLocked("locked")
    with pytest.raises(VolumeLocked):
        await rotation.run()
    keys.failure = None
    await rotation.run()
    assert rotation.left == frozenset()
    await look(tree, files)


async def test_a_read_only_mount_refuses(tree: Tree) -> None:
    await tree.remount(read_only=True)
    assert await errno_of(Rotation(tree.volume, 2).run()) == "EROFS"


async def test_cancelled_and_gone_on_with(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    files = await populate(tree)
    await tree.remount()
    version = tree.sample.rotate()
    original, left, scopes = Turn.rest, 0, list[trio.CancelScope]()

    async def rest(self: Turn) -> None:
        nonlocal left
        left -= 1
        if not left:
            scopes[-1].cancel()
        await original(self)

    monkeypatch.setattr(Turn, "rest", rest)
    for least in range(1, 40, 4):
        left = least
        scopes.append(trio.CancelScope())
        with scopes[-1]:
            await Rotation(tree.volume, version).run()
        assert tree.volume.names.on_arrival is None
        forget_keys(tree)
        await look(tree, files)
    assert sum(scope.cancelled_caught for scope in scopes) >= 4
    rotation = Rotation(tree.volume, version)
    await rotation.run()
    assert rotation.left == frozenset()
