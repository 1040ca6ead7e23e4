"""Races and failures that a reading of the code found: each test failed before its fix."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from cryptfs.errors import AgentUnavailable, VolumeLocked
from cryptfs.format.log import HEADER_BYTES as LOG_HEADER_BYTES
from cryptfs.fs import directory, journal, reconcile
from cryptfs.fs.context import sidecar_name
from cryptfs.fs.directory import DirNode
from cryptfs.names import tree_name
from cryptfs.ports import RENAME_EXCHANGE, FreshKeys, KeyRun, Store
from cryptfs.store.memory import MemoryStore
from cryptfs.testing.keys import FakeDekProvider
from cryptfs.types import Purpose
from tests.fs.tree import Tree, damage_of, errno_of

CONTENT = b"acknowledged " * 1000
Patch = pytest.MonkeyPatch


@pytest.fixture
async def memory() -> MemoryStore:
    return MemoryStore()


def below(tree: Tree, node: DirNode, name: bytes) -> bytes:
    """The name in `tree/` of an entry whose names key is in the cache."""
    names = node.names_nowait()
    assert names is not None
    return tree_name(names.seal(name))


async def reopened(tree: Tree, left: MemoryStore) -> Tree:
    """The same volume on what a crash left."""
    survivor = Tree(left, tree.sample, tree.volume)
    await survivor.mount()
    return survivor


# fsync -----------------------------------------------------------------------------------------------------------


async def test_fsync_of_a_file_that_was_written_by_somebody_else(memory: MemoryStore) -> None:
    """Open, fsync, close, without reading or writing (dpkg does this): what an earlier opening wrote is durable."""
    tree = await Tree.make(memory)
    await tree.write(b"file", CONTENT)
    await tree.fsync(b"file")
    states = 0
    for left in memory.crash_states(random.Random(1), limit=40):
        survivor = await reopened(tree, left)
        assert await survivor.read(b"file") == CONTENT
        survivor.kill()
        states += 1
    assert states > 1
    tree.kill()


async def test_what_a_synced_directory_holds_survives_its_move_into_a_new_one(memory: MemoryStore) -> None:
    """fsync of a directory acknowledges the names in it, also of files that are new themselves."""
    tree = await Tree.make(memory)
    await tree.mkdir(b"old")
    await tree.create(b"old/file")
    await tree.close(b"old/file")
    await tree.fsync(b"old")
    await tree.mkdir(b"new")
    await tree.rename(b"old/file", b"new/file")
    for left in memory.crash_states(random.Random(1), limit=60):
        survivor = await reopened(tree, left)
        names = [
            *await survivor.names(b"old"),
            *(await survivor.names(b"new") if await survivor.exists(b"new") else []),
        ]
        assert names == [b"file"]
        survivor.kill()
    tree.kill()


async def test_a_directory_counts_as_durable_only_with_the_way_to_it(memory: MemoryStore) -> None:
    """Two files of a new directory are synced at once: neither is acknowledged before the directory's own name is."""
    tree = await Tree.make(memory)
    await tree.mkdir(b"d")
    root, d = tree.volume.root, await tree.inode(b"d")
    root_node, d_node = await tree.volume.inodes.dir(root), await tree.volume.inodes.dir(d)
    reached, gate, synced = trio.Event(), trio.Event(), []
    sync = DirNode.sync

    async def gated(node: DirNode) -> None:
        if node is root_node:
            reached.set()
            await gate.wait()
        await sync(node)
        synced.append(node)

    with Patch.context() as patch:
        patch.setattr(DirNode, "sync", gated)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(tree.volume.files.sync_dirs, d)
            await reached.wait()
            assert synced == [d_node]
            assert d.log_id in tree.volume.files.new_ids
            gate.set()
    assert d.log_id not in tree.volume.files.new_ids
    await tree.finish()


async def test_a_file_that_is_closed_while_everything_is_flushed_is_closed(memory: MemoryStore) -> None:
    """Its last words get their frame, and its descriptors go."""
    tree = await Tree.make(memory)
    file = await tree.create(b"file")
    inode = await tree.inode(b"file")
    await file.state.lock.acquire_shared()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(tree.volume.flush)
        await wait_all_tasks_blocked()
        nursery.start_soon(file.write, 0, CONTENT)
        await wait_all_tasks_blocked()
        await tree.release(inode)
        file.state.lock.release_shared()
    assert inode.file is None
    assert await tree.read(b"file") == CONTENT
    await tree.finish()


# opening ---------------------------------------------------------------------------------------------------------


async def test_two_that_open_a_directory_first_after_a_crash(memory: MemoryStore) -> None:
    """It is settled once: two frames at one place would make the log unreadable."""
    tree = await Tree.make(memory)
    for i in range(20):
        await tree.mkdir(b"d%d" % i)
    await tree.fsync(b"")
    await tree.rmdir(b"d3")
    tree.kill()
    await tree.mount()
    found: list[bool] = []

    async def look(name: bytes) -> None:
        found.append(await tree.exists(name))

    async with trio.open_nursery() as nursery:
        for name in (b"d0", b"d3", b"d19"):
            nursery.start_soon(look, name)
    assert sorted(found) == [False, True, True]
    await tree.mkdir(b"another")
    await tree.remount()
    assert len(await tree.names()) == 20
    await tree.finish()


async def test_what_was_read_ahead_is_not_kept_for_a_file_opened_meanwhile(tree: Tree) -> None:
    """Its log would be older than the file the next time it is opened, and be continued over its newest frames."""
    await tree.write(b"first", CONTENT)
    await tree.write(b"second", CONTENT)
    await tree.names()
    second = await tree.inode(b"second")
    prefetcher, in_thread = tree.volume.files.prefetcher, tree.volume.ctx.in_thread

    async def opened_meanwhile(call: Callable[..., object], *args: object) -> object:
        found = await in_thread(call, *args)
        if call == prefetcher._read:
            file = await tree.open(b"second")
            await file.read(0, 1)
        return found

    assert isinstance(tree.volume.ctx.keys, FakeDekProvider)
    tree.volume.ctx.keys.wipe()
    with Patch.context() as patch:
        patch.setattr(tree.volume.ctx, "in_thread", opened_meanwhile)
        assert await tree.read(b"first") == CONTENT
    assert second.file is not None
    await second.file.write(0, b"new content")
    await tree.close(b"second")
    await tree.volume.files.settle()
    assert not tree.volume.inodes.is_open(second.log_id)
    assert await tree.read(b"second") == b"new content" + CONTENT[11:]


async def test_loading_that_fails_again_and_again_keeps_no_descriptors(memory: MemoryStore) -> None:
    tree = await Tree.make(memory)
    await tree.write(b"file", CONTENT, sync=True)
    await tree.write(b"file", CONTENT, sync=True)
    await tree.volume.files.settle()
    file = await tree.open(b"file")
    before = memory.open_descriptors()
    memory.ftruncate(file.state.data_fd, 70)
    for _ in range(5):
        assert await damage_of(file.read(0, 10)) == "size"
    assert memory.open_descriptors() <= before + 1
    await tree.close(b"file")
    tree.kill()


async def test_a_file_that_its_owner_may_not_read_stays_after_a_crash(memory: MemoryStore) -> None:
    """chmod 000: the daemon cannot look into it, which does not make it gone."""
    tree = await Tree.make(memory)
    await tree.write(b"secret", CONTENT)
    await tree.fsync(b"")
    tree.kill()
    read = reconcile._first_bytes

    def refused(store: Store, fd: int, name: bytes, count: int) -> bytes:
        if name != b".dir":
            raise PermissionError(errno.EACCES, "refused")
        return read(store, fd, name, count)

    with Patch.context() as patch:
        patch.setattr(reconcile, "_first_bytes", refused)
        await tree.mount()
        assert await tree.names() == [b"secret"]
    assert await tree.read(b"secret") == CONTENT
    await tree.finish()


async def test_starting_a_file_anew_that_fails_closes_nothing_twice(memory: MemoryStore) -> None:
    """The number may be another file's by then."""
    tree = await Tree.make(memory)
    await tree.write(b"file", CONTENT)
    await tree.fsync(b"")
    inode = await tree.inode(b"file")
    fd = memory.open(tree.volume.ctx.sidecar_dir(inode.log_id), sidecar_name(inode.log_id), os.O_RDWR)
    memory.ftruncate(fd, LOG_HEADER_BYTES)
    memory.close(fd)
    tree.kill()
    await tree.mount()
    keys = tree.volume.ctx.keys

    async def gone(log_id: bytes, purpose: Purpose, count: int) -> FreshKeys:
        raise AgentUnavailable("gone")

    with Patch.context() as patch:
        patch.setattr(keys, "generate", gone)
        with pytest.raises(AgentUnavailable):
            await tree.lookup(b"file")
    assert await tree.read(b"file") == b""
    await tree.finish()


async def test_a_locked_volume_that_owes_nothing_is_left_clean(tree: Tree) -> None:
    """Lock, then unmount: an epoch that ended uncleanly would excuse things that no crash did."""
    await tree.write(b"file", CONTENT)
    keys = tree.volume.ctx.keys
    assert isinstance(keys, FakeDekProvider)
    keys.wipe()
    keys.failure = VolumeLocked("locked")
    await tree.unmount()
    await tree.mount()
    assert not tree.volume.ctx.crashed_before
    assert await tree.read(b"file") == CONTENT


# names -----------------------------------------------------------------------------------------------------------


async def test_rmdir_of_what_is_missing_below_is_damage_and_no_hang(tree: Tree) -> None:
    await tree.mkdir(b"d")
    node = await tree.volume.inodes.dir(tree.volume.root)
    tree.volume.inodes.release(await tree.inode(b"d"))
    name = below(tree, node, b"d")
    tree.store.rename(node.fd, name, tree.volume.ctx.dir_fd(b"tmp"), b"away")
    with trio.fail_after(5):
        assert await damage_of(tree.volume.names.rmdir(tree.volume.root, b"d")) == "missing"
    tree.store.rename(tree.volume.ctx.dir_fd(b"tmp"), b"away", node.fd, name)
    await tree.rmdir(b"d")


@pytest.mark.parametrize("change", ["rename", "exchange", "link"])
async def test_a_sync_that_fails_in_a_rename_leaves_everything_where_it_was(memory: MemoryStore, change: str) -> None:
    tree = await Tree.make(memory)
    await tree.mkdir(b"a")
    await tree.mkdir(b"b")
    await tree.write(b"a/old", CONTENT, sync=True)
    await tree.write(b"b/victim", b"victim", sync=True)
    memory.fail("fdatasync", 1, errno.EIO)
    if change == "link":
        assert await errno_of(tree.link(b"a/old", b"b/link")) == "EIO"
    else:
        flags = RENAME_EXCHANGE if change == "exchange" else 0
        assert await errno_of(tree.rename(b"a/old", b"b/victim", flags)) == "EIO"
    for _ in range(2):
        assert (await tree.names(b"a"), await tree.names(b"b")) == ([b"old"], [b"victim"])
        assert (await tree.read(b"a/old"), await tree.read(b"b/victim")) == (CONTENT, b"victim")
        await tree.remount()
    await tree.finish()


async def test_a_frame_that_fails_in_an_exchange_leaves_the_victim_its_name(memory: MemoryStore) -> None:
    tree = await Tree.make(memory)
    await tree.mkdir(b"a")
    await tree.mkdir(b"b")
    await tree.write(b"a/one", b"one", sync=True)
    await tree.write(b"b/two", b"two", sync=True)
    await tree.lookup(b"a/one")
    await tree.lookup(b"b/two")
    # The first frame is the target's, the second the source's.
    memory.fail("pwrite", 2, errno.ENOSPC)
    assert await errno_of(tree.rename(b"a/one", b"b/two", RENAME_EXCHANGE)) == "ENOSPC"
    for _ in range(2):
        assert (await tree.read(b"a/one"), await tree.read(b"b/two")) == (b"one", b"two")
        await tree.remount()
    await tree.finish()


async def test_an_agent_that_goes_away_in_a_rename_leaves_everything_where_it_was(memory: MemoryStore) -> None:
    """Keys of both directories are fetched together: there is nothing to fetch between the two frames."""
    tree = await Tree.make(memory)
    await tree.mkdir(b"a")
    await tree.mkdir(b"b")
    await tree.write(b"a/file", CONTENT)
    a, b = await tree.inode(b"a"), await tree.inode(b"b")
    keys = tree.volume.ctx.keys
    assert isinstance(keys, FakeDekProvider)
    unwrap, left, tries = keys.unwrap, [0], 0

    async def few(runs: list[KeyRun]) -> list[list[memoryview]]:
        if left[0] == 0:
            raise AgentUnavailable("gone")
        left[0] -= 1
        return await unwrap(runs)

    done = False
    while not done:
        left[0] = tries
        with Patch.context() as patch:
            patch.setattr(keys, "unwrap", few)
            patch.setattr(keys, "peek", lambda _: None)
            try:
                await tree.volume.names.rename(a, b"file", b, b"file")
                done = True
            except AgentUnavailable:
                tries += 1
        names = (await tree.names(b"a"), await tree.names(b"b"))
        assert names == (([], [b"file"]) if done else ([b"file"], []))
    assert tries > 1
    assert await tree.read(b"b/file") == CONTENT
    await tree.finish()


async def test_a_file_exchanged_below_does_not_push_an_open_one_out(tree: Tree) -> None:
    """The entry is damaged, and whoever has the other file open goes on with it."""
    await tree.write(b"one", b"one")
    await tree.write(b"two", b"two")
    file = await tree.open(b"two")
    node = await tree.volume.inodes.dir(tree.volume.root)
    one, two = below(tree, node, b"one"), below(tree, node, b"two")
    tree.store.rename(node.fd, one, node.fd, two, RENAME_EXCHANGE)
    assert await damage_of(tree.lookup(b"one")) == "exchanged"
    await file.write(0, b"TWO")
    assert bytes(await file.read(0, 9)) == b"TWO"
    tree.store.rename(node.fd, one, node.fd, two, RENAME_EXCHANGE)
    await tree.close(b"two")
    assert await tree.read(b"two") == b"TWO"


# compaction ------------------------------------------------------------------------------------------------------


async def test_frames_after_a_rewriting_whose_sync_failed_are_in_the_log_that_has_the_name(memory: MemoryStore) -> None:
    tree = await Tree.make(memory)
    file = await tree.create(b"file")
    with Patch.context() as patch:
        patch.setattr(journal, "_COMPACT_MIN_BYTES", 0)
        for i in range(30):
            await file.write(0, b"%d" % i)
            await file.journal.fsync()
        memory.fail("fsync", 1, errno.EIO)
        with pytest.raises(OSError, match="Input/output"):
            await file.journal.compact()
    await file.write(0, b"the last word")
    await file.journal.fsync()
    await tree.close(b"file")
    await tree.remount()
    assert await tree.read(b"file") == b"the last word"
    await tree.finish()


async def test_a_directory_that_is_closed_while_others_are_compacted(memory: MemoryStore) -> None:
    """The settling task goes on: it would take the daemon along."""
    tree = await Tree.make(memory)
    await tree.mkdir(b"a")
    await tree.mkdir(b"b")
    for i in range(30):
        await tree.mkdir(b"a/%d" % i)
        await tree.rmdir(b"a/%d" % i)
    b = await tree.volume.inodes.dir(await tree.inode(b"b"))
    in_thread = tree.volume.ctx.in_thread

    async def closing(call: Callable[..., object], *args: object) -> object:
        if b._log is not None:
            tree.volume.inodes._dirs.pop(b.ino).close()
        return await in_thread(call, *args)

    with Patch.context() as patch:
        patch.setattr(directory, "_COMPACT_MIN_BYTES", 0)
        patch.setattr(tree.volume.ctx, "in_thread", closing)
        await tree.volume.files.settle()
    assert b._log is None
    assert await tree.names(b"b") == []
    await tree.finish()


async def test_directories_are_synced_and_compacted_at_once(memory: MemoryStore) -> None:
    """Nobody is told EBADF, and nobody takes another's sync for one that failed."""
    tree = await Tree.make(memory)
    inode = await tree.mkdir(b"d")
    node = await tree.volume.inodes.dir(inode)
    with Patch.context() as patch:
        patch.setattr(directory, "_COMPACT_MIN_BYTES", -(1 << 20))
        for i in range(15):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(node.sync)
                nursery.start_soon(node.compact)
                nursery.start_soon(tree.mkdir, b"d/%d" % i)
                nursery.start_soon(node.sync)
    await tree.remount()
    assert len(await tree.names(b"d")) == 15
    await tree.finish()
