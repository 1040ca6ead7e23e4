"""A KEK rotation while files are open, made, moved and removed."""

from __future__ import annotations

import stat
from collections.abc import Sequence

import pytest
import trio
import trio.testing

from cryptfs.format.dirlog import Entry
from cryptfs.fs.directory import DirNode
from cryptfs.fs.inodes import Inode
from cryptfs.fs.pace import Turn
from cryptfs.fs.rotation import Rotation
from cryptfs.ports import KeyRun, Kit
from cryptfs.testing.clock import FakeClock
from cryptfs.testing.keys import FakeDekProvider, FakeKek
from cryptfs.types import Kind
from tests.fs.rotating import BLOCK, forget_keys, rotated, versions
from tests.fs.tree import Tree


async def test_open_files_go_on(tree: Tree) -> None:
    await tree.write(b"synced", b"1" * 10000, sync=True)
    reading, writing, gone = [await tree.create(name) for name in (b"r", b"w", b"gone")]
    for file in (reading, writing, gone):
        await file.write(0, b"2" * 9000)
    await reading.journal.fsync()
    await writing.journal.fsync()
    await writing.write(5000, b"3" * 100)
    await tree.unlink(b"gone")
    await gone.write(4000, b"4" * 100)
    unframed = await tree.create(b"unframed")
    await unframed.write(0, b"5")
    empty = await tree.create(b"empty")
    await rotated(tree)
    forget_keys(tree)
    assert await reading.read(0, 10000) == b"2" * 9000
    assert await writing.read(0, 10000) == b"2" * 5000 + b"3" * 100 + b"2" * 3900
    assert await gone.read(0, 10000) == b"2" * 4000 + b"4" * 100 + b"2" * 4900
    for file in (reading, writing, gone, unframed, empty):
        await file.write(8000, b"6" * 1000)
        await file.journal.fsync()
        assert file.journal.is_under(2)
    await tree.remount()
    assert await tree.read(b"w") == b"2" * 5000 + b"3" * 100 + b"2" * 2900 + b"6" * 1000
    assert await tree.read(b"unframed") == b"5" + bytes(7999) + b"6" * 1000
    assert await tree.read(b"empty") == bytes(8000) + b"6" * 1000
    assert await tree.names() == [b"empty", b"r", b"synced", b"unframed", b"w"]


async def test_a_file_without_a_name_is_rewritten_before_it_was_ever_read(tree: Tree) -> None:
    await tree.write(b"file", b"1" * 10000)
    await tree.remount()
    file = await tree.open(b"file")
    await tree.unlink(b"file")
    assert not file.journal.loaded
    await rotated(tree)
    forget_keys(tree)
    assert await file.read(0, 10000) == b"1" * 10000


async def test_what_nobody_has_open_and_the_kernel_can_still_open_without_a_name(tree: Tree) -> None:
    await tree.write(b"file", b"1" * 10000, sync=True)
    await tree.symlink(b"target", b"link")
    await tree.mknod(b"fifo", stat.S_IFIFO | 0o644)
    inodes = [await tree.inode(name) for name in (b"file", b"link", b"fifo")]
    for inode in inodes:
        if inode.kind != Kind.FILE:
            await tree.volume.xattrs.set(inode, b"trusted.a", b"value")
    for name in (b"file", b"link", b"fifo"):
        await tree.unlink(name)
    assert all(inode.is_unnamed and inode.file is None for inode in inodes)
    await rotated(tree)
    forget_keys(tree)
    file = await tree.volume.files.open(inodes[0])
    assert await file.read(0, 10000) == b"1" * 10000
    await tree.volume.files.release(inodes[0])
    for inode in inodes[1:]:
        assert await tree.volume.xattrs.get(inode, b"trusted.a") == b"value"


async def test_stocks_of_the_old_kek_are_not_used(tree: Tree) -> None:
    file = await tree.create(b"file")
    await file.write(0, b"1" * 100)
    version = tree.sample.rotate()
    tree.volume.ctx.keys.renew(version)
    await file.write(BLOCK, b"2" * 100)
    assert {e.kek_version for e in file.state.blocks} == {1, 2}
    await tree.close(b"file")


class Slow(FakeDekProvider):
    """Hands out a kit that was made before, after `go` is set: a stock that the rotation has not reached yet."""

    def __init__(self, kek: FakeKek, clock: FakeClock) -> None:
        super().__init__(kek, clock)
        self.stock: list[Kit] = []
        self.held = trio.Event()
        self.go = trio.Event()

    async def make_kit(self, *, directory: bool) -> Kit:
        if directory or not self.stock:
            return await super().make_kit(directory=directory)
        kit = self.stock.pop()
        self.held.set()
        await self.go.wait()
        return kit


async def test_what_took_its_kit_before_is_found(tree: Tree) -> None:
    """A file is being made with an old kit when the rotation begins, in a directory that is under the new KEK."""
    keys = Slow(tree.sample.kek, tree.sample.clock)
    await tree.remount(keys=keys)
    keys.stock.append(await keys.make_kit(directory=False))
    version = tree.sample.rotate()
    await tree.mkdir(b"new")
    rotation = Rotation(tree.volume, version)

    async def make() -> None:
        await (await tree.create(b"new/file")).write(0, b"content")
        await tree.close(b"new/file")

    finished = trio.Event()

    async def rotate() -> None:
        await rotation.run()
        finished.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(make)
        await keys.held.wait()
        nursery.start_soon(rotate)
        with trio.move_on_after(0.5):
            await finished.wait()
        assert not finished.is_set()
        keys.go.set()
    assert rotation.left == frozenset()
    assert versions(tree) == {version}
    await tree.volume.ctx.adopt_volume_key(version, tree.sample.config.volume_key_wrapped)
    tree.sample.kek.destroy_older()
    await tree.remount()
    assert await tree.read(b"new/file") == b"content"


async def test_what_moves_meanwhile_is_found(local_tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files and directories go from where the walk has not been to where it was."""
    tree = local_tree
    for name in (b"a", b"z", b"z/sub"):
        await tree.mkdir(name)
    for number in range(20):
        await tree.write(b"z/%d" % number, b"%d" % number)
        await tree.write(b"z/sub/%d" % number, b"%d" % number)
    await tree.remount()
    version = tree.sample.rotate()
    rotation = Rotation(tree.volume, version)
    original, scan, moved = rotation._entry, rotation._scan, False

    async def move_first(parent: Inode, node: DirNode, entry: Entry, todo: list[Inode], turn: Turn) -> None:
        nonlocal moved
        if not moved and parent is not tree.volume.root and len(node.entries) == 21:
            # Everything in it goes to the root, which was the first.
            moved = True
            for number in range(20):
                await tree.rename(b"z/%d" % number, b"moved %d" % number)
            await tree.rename(b"z/sub", b"sub")
        await original(parent, node, entry, todo, turn)

    async def nothing(*, deep: bool) -> frozenset[bytes]:
        return frozenset() if deep else await scan(deep=False)

    monkeypatch.setattr(rotation, "_entry", move_first)
    # What looks once more is another test's.
    monkeypatch.setattr(rotation, "_scan", nothing)
    await rotation.run()
    assert moved
    assert versions(tree) == {2}
    assert (await tree.inode(b"sub")).log_id in rotation._seen_dirs


class Late(FakeDekProvider):
    """Keeps the next answer to `unwrap` back until `gate` is set."""

    gate: trio.Event | None = None

    async def unwrap(self, runs: Sequence[KeyRun]) -> list[list[memoryview]]:
        out = await super().unwrap(runs)
        gate, self.gate = self.gate, None
        if gate is not None:
            copies = [[bytes(view) for view in run] for run in out]
            await gate.wait()
            return [[memoryview(copy) for copy in run] for run in copies]
        return out


@pytest.mark.parametrize("kind", ["file", "directory"])
async def test_a_log_key_that_came_late_is_not_the_old_one(tree: Tree, kind: str) -> None:
    """Whoever asked for a log's MAC key before the log was replaced must not append with it afterwards."""
    keys = Late(tree.sample.kek, tree.sample.clock)
    await tree.remount(keys=keys)
    await tree.write(b"file", b"content")
    file = await tree.open(b"file")
    await file.journal.load()
    node = await tree.volume.inodes.dir(tree.volume.root)
    got: list[bytes] = []

    async def ask() -> None:
        got.append(bytes(await file.journal.log_key() if kind == "file" else (await node.keys()).log_key))

    def wrapped() -> bytes:
        return file.journal.log_wrapped if kind == "file" else node.header.log_wrapped

    keys.wipe()
    keys.gate = gate = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked()
        old = wrapped()
        await rotated(tree)
        gate.set()
    assert wrapped() != old
    assert got == [bytes(keys.peek(wrapped()) or b"")]
    await tree.close(b"file")
