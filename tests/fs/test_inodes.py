"""What is kept in memory and in descriptors, and that it is let go of."""

from __future__ import annotations

import os
import random
import stat
from pathlib import Path

import pytest
import trio

from cryptfs.errors import AgentUnavailable, VolumeBusy
from cryptfs.fs import inodes as inodes_module
from cryptfs.fs.inodes import ROOT_INO, Inode
from cryptfs.fs.reaper import remove_tree
from cryptfs.store.local import LocalStore
from cryptfs.store.memory import MemoryStore
from cryptfs.testing.keys import FakeDekProvider
from cryptfs.types import Kind
from tests.fs.tree import OWNER, Tree, damage_of, errno_of

CONTENT = b"content" * 2000


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


async def fill(tree: Tree) -> None:
    for a in (b"a", b"b"):
        await tree.mkdir(a)
        for b in (b"c", b"d"):
            await tree.mkdir(a + b"/" + b)
            await tree.write(a + b"/" + b + b"/file", CONTENT, sync=True)
    await tree.symlink(b"a/c/file", b"link")
    await tree.link(b"a/c/file", b"b/c/second name")


async def test_the_root_stays_and_everything_else_goes_when_forgotten(tree: Tree) -> None:
    await fill(tree)
    assert len(tree.volume.inodes) == 12
    tree.forget_all()
    assert len(tree.volume.inodes) == 1
    assert tree.volume.inodes.get(ROOT_INO) is tree.volume.root
    await tree.remount()
    await tree.read(b"a/c/file")
    await tree.names(b"b/c")
    assert len(tree.volume.inodes) > 1
    tree.forget_all()
    assert len(tree.volume.inodes) == 1


async def test_a_parent_is_kept_for_its_children(tree: Tree) -> None:
    await fill(tree)
    ino = (await tree.inode(b"a/c/file")).ino
    held = tree.held.pop(ino)
    tree.forget_all()
    # file <- c <- a, and the second name's c <- b.
    assert len(tree.volume.inodes) == 6
    assert await tree.read(b"b/c/second name") == CONTENT
    tree.held[ino] = tree.held.get(ino, 0) + held
    tree.forget_all()
    assert len(tree.volume.inodes) == 1


async def test_a_listing_leaves_nothing_behind(tree: Tree) -> None:
    await fill(tree)
    tree.forget_all()
    assert await tree.names() == [b"a", b"b", b"link"]
    tree.forget_all()
    assert len(tree.volume.inodes) == 1


async def test_an_open_file_outlives_the_kernels_reference(tree: Tree) -> None:
    await tree.write(b"file", CONTENT)
    file = await tree.open(b"file")
    tree.forget_all()
    assert len(tree.volume.inodes) == 2
    assert bytes(await file.read(0, len(CONTENT))) == CONTENT
    await tree.release(tree.open_files[0])
    assert len(tree.volume.inodes) == 1


async def test_a_removed_file_is_forgotten_with_its_last_reference(tree: Tree) -> None:
    file = await tree.create(b"file")
    inode = tree.open_files[0]
    await tree.unlink(b"file")
    tree.forget_all()
    await file.write(0, CONTENT)
    assert len(tree.volume.inodes) == 2
    await tree.release(inode)
    assert len(tree.volume.inodes) == 1
    assert await errno_of(tree.volume.files.attr(inode)) is None
    with pytest.raises(OSError, match="Stale"):
        tree.volume.inodes.get(inode.ino)


async def test_what_was_damaged_is_forgotten_too(local_tree: Tree) -> None:
    tree = local_tree
    await tree.write(b"file", CONTENT)
    await tree.mkdir(b"dir")
    await tree.symlink(b"target", b"link")
    await tree.remount()
    store = tree.store
    top = store.open(store.root(), b"tree", os.O_RDONLY)
    for name in store.listdir(top):
        mode = store.lstat(top, name).st_mode
        if stat.S_ISLNK(mode):
            store.unlink(top, name)
            store.symlink(b"x" * 24, top, name)
        elif stat.S_ISREG(mode) and not name.startswith(b"."):
            store.close(store.open(top, name, os.O_WRONLY | os.O_TRUNC))
    store.close(top)
    assert await damage_of(tree.lookup(b"file")) == "data-header"
    assert await damage_of(tree.lookup(b"link")) in {"symlink", "id-mismatch"}
    assert sorted(await tree.names()) == [b"dir", b"file", b"link"]
    tree.forget_all()
    assert len(tree.volume.inodes) == 1


async def test_only_so_many_directories_are_open(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inodes_module, "_DIRS_MAX", 8)
    for i in range(30):
        await tree.mkdir(b"dir %d" % i)
        await tree.write(b"dir %d/file" % i, b"%d" % i)
        assert len(tree.volume.inodes.open_dirs()) <= 8
    for i in range(30):
        assert await tree.read(b"dir %d/file" % i) == b"%d" % i
        assert len(tree.volume.inodes.open_dirs()) <= 8


async def test_a_deep_tree_is_reached_with_few_open_directories(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inodes_module, "_DIRS_MAX", 3)
    path = b""
    for i in range(12):
        path += b"/%d" % i
        await tree.mkdir(path)
    await tree.write(path + b"/file", CONTENT)
    await tree.remount()
    inode = await tree.inode(path + b"/file")
    for above in range(12):
        await tree.names(b"/".join(path.split(b"/")[: above + 2]))
    file = await tree.volume.files.open(inode)
    assert bytes(await file.read(0, len(CONTENT))) == CONTENT
    await tree.volume.files.release(inode)


async def test_an_inode_number_used_again_is_another_inode(tree: Tree) -> None:
    first = (await tree.create(b"first")).state.ino
    old = tree.volume.inodes.get(first)
    await tree.close(b"first")
    await tree.unlink(b"first")
    for i in range(50):
        await tree.write(b"%d" % i, b"")
        attr = await tree.stat(b"%d" % i)
        if attr.inode.ino == first:
            assert attr.inode is not old
            assert attr.inode.generation != old.generation
            break


async def test_closing_the_volume_closes_every_descriptor(local: LocalStore) -> None:
    before = open_fds()
    tree = await Tree.make(local)
    await fill(tree)
    await tree.open(b"a/c/file")
    for name in (b"x", b"y", b"z"):
        file = await tree.create(name)
        await file.write(0, CONTENT)
        await file.journal.fsync()
        await file.write(0, CONTENT)
    assert open_fds() > before + 8
    tree.forget_all()
    assert await tree.volume.close()
    assert open_fds() == before


@pytest.mark.parametrize("fault", ["lock", "open", "pread", "syncfs", "fdatasync"])
async def test_a_volume_that_does_not_open_leaves_no_descriptor(fault: str) -> None:
    store = MemoryStore()
    tree = await Tree.make(store)
    await tree.unmount()
    for k in (1, 2, 5):
        store.fail(fault, k, 5)
        try:
            volume = await tree.sample.open(store)
        except (OSError, VolumeBusy):
            assert store.open_descriptors() == 0
        else:
            await volume.close()
    store.close_store()


async def test_a_volume_is_opened_once(tree: Tree) -> None:
    store = tree.store
    other = another_store(store)
    with pytest.raises(VolumeBusy):
        await tree.sample.open(other)
    other.close_store()
    await tree.write(b"file", CONTENT)
    assert await tree.read(b"file") == CONTENT


def another_store(store: LocalStore | MemoryStore) -> LocalStore | MemoryStore:
    """Another store on the same directory or disk, as a second daemon has it."""
    if isinstance(store, MemoryStore):
        return MemoryStore(store.disk)
    return LocalStore(Path(f"/proc/self/fd/{store.root()}").resolve())


async def test_many_tasks_open_one_directory_once(tree: Tree) -> None:
    await fill(tree)
    await tree.remount()
    parent = await tree.inode(b"a")
    found: list[int] = []

    async def look(name: bytes) -> None:
        attr = await tree.volume.names.lookup(parent, name)
        found.append(tree.take(attr).ino)

    async with trio.open_nursery() as nursery:
        for name in (b"c", b"d") * 5:
            nursery.start_soon(look, name)
    assert len(set(found)) == 2
    assert len(tree.volume.inodes.open_dirs()) == 2


async def test_creators_in_one_directory_do_not_disturb_each_other(tree: Tree) -> None:
    await tree.mkdir(b"dir")
    parent = await tree.inode(b"dir")
    outcomes: list[str] = []

    async def make(name: bytes) -> None:
        try:
            attr, _ = await tree.volume.names.create(parent, name, 0o600, OWNER)
        except FileExistsError:
            outcomes.append("exists")
            return
        outcomes.append("made")
        tree.open_files.append(tree.take(attr))

    async with trio.open_nursery() as nursery:
        for i in range(60):
            nursery.start_soon(make, b"%d" % (i % 30))
    assert (outcomes.count("made"), outcomes.count("exists")) == (30, 30)
    await tree.remount()
    assert len(await tree.names(b"dir")) == 30


async def test_renames_across_directories_do_not_wait_for_each_other(tree: Tree) -> None:
    await tree.mkdir(b"a")
    await tree.mkdir(b"b")
    for i in range(10):
        await tree.write(b"a/%d" % i, b"from a")
        await tree.write(b"b/%d" % (100 + i), b"from b")
    a, b = await tree.inode(b"a"), await tree.inode(b"b")
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            for i in range(10):
                nursery.start_soon(tree.volume.names.rename, a, b"%d" % i, b, b"%d" % i)
                nursery.start_soon(tree.volume.names.rename, b, b"%d" % (100 + i), a, b"%d" % (100 + i))
    assert await tree.names(b"a") == sorted(b"%d" % (100 + i) for i in range(10))
    assert await tree.names(b"b") == sorted(b"%d" % i for i in range(10))


async def test_while_the_agent_is_away_what_needs_keys_fails(store: LocalStore | MemoryStore) -> None:
    tree = await Tree.make(store)
    await fill(tree)
    keys = FakeDekProvider(tree.sample.kek, tree.sample.clock)
    await tree.remount(keys=keys)
    await tree.read(b"a/c/file")
    keys.failure = AgentUnavailable("gone")
    assert await tree.read(b"a/c/file") == CONTENT
    tree.sample.clock.advance(100)
    for call in (
        lambda: tree.read(b"a/c/file"), lambda: tree.lookup(b"b/c"), lambda: tree.create(b"new"),
        lambda: tree.mkdir(b"new"), lambda: tree.rename(b"link", b"new"), lambda: tree.readlink(b"link"),
    ):  # fmt: skip
        with pytest.raises(AgentUnavailable):
            await call()
    keys.failure = None
    assert await tree.read(b"a/c/file") == CONTENT
    assert await tree.names() == [b"a", b"b", b"link"]
    await tree.write(b"new", CONTENT)
    await tree.finish()


async def test_dirty_data_is_written_when_the_agent_is_back(store: LocalStore | MemoryStore) -> None:
    tree = await Tree.make(store)
    keys = FakeDekProvider(tree.sample.kek, tree.sample.clock)
    await tree.remount(keys=keys)
    file = await tree.create(b"file")
    inode = tree.open_files[0]
    await file.write(0, CONTENT)
    keys.failure = AgentUnavailable("gone")
    tree.sample.clock.advance(100)
    with pytest.raises(AgentUnavailable):
        await file.journal.fsync()
    await tree.release(inode)  # Never an error; what is owed is kept.
    keys.failure = None
    await tree.volume.files.settle()
    assert await tree.read(b"file") == CONTENT
    await tree.remount()
    assert await tree.read(b"file") == CONTENT
    await tree.finish()


async def test_a_volume_that_could_not_write_its_frames_is_not_left_clean(store: LocalStore | MemoryStore) -> None:
    tree = await Tree.make(store)
    keys = FakeDekProvider(tree.sample.kek, tree.sample.clock)
    await tree.remount(keys=keys)
    await tree.write(b"safe", CONTENT, sync=True)
    file = await tree.create(b"file")
    await file.write(0, CONTENT)
    keys.failure = AgentUnavailable("gone")
    tree.sample.clock.advance(100)
    assert not await tree.volume.close()
    tree.held.clear()
    tree.open_files.clear()
    await tree.mount()
    assert await tree.read(b"safe") == CONTENT
    assert await tree.read(b"file") == b""
    await tree.finish()


# depth -----------------------------------------------------------------------------------------------------------

DEPTH = 2000
"""More levels than Python nests calls, than directories are kept open, and a path longer than PATH_MAX."""


async def test_a_tree_deeper_than_calls_can_nest(local: LocalStore) -> None:
    tree = await Tree.make(local)
    table, names = tree.volume.inodes, tree.volume.names
    way = [tree.volume.root]
    for _ in range(DEPTH):
        way.append(tree.take(await names.mkdir(way[-1], b"level", 0o755, OWNER)))
    for number in range(inodes_module._DIRS_MAX):
        await tree.mkdir(b"%d" % number)
    assert not any(table.dir_nowait(inode) for inode in way[1:])
    async with trio.open_nursery() as nursery:
        # Several at once, and the top moves while they are on their way down.
        for inode in (way[-1], way[-1], way[DEPTH // 2]):
            nursery.start_soon(names.listing, inode)
        nursery.start_soon(names.rename, tree.volume.root, b"level", tree.volume.root, b"top")
    # Whoever came last may have closed what the others opened.
    await names.listing(way[-1])
    assert table.dir_nowait(way[-1]) is not None
    assert table.dir_nowait(way[1]) is None
    assert await tree.names(b"top") == [b"level"]
    tree.forget_all()
    assert len(table) == 1
    await tree.unmount()
    # What a removed domain leaves is as deep as its tree was.
    remove_tree(local, local.root(), b"tree")
    assert b"tree" not in local.listdir(local.root())


# names of one object ----------------------------------------------------------------------------------------------


def test_the_name_seen_last_is_the_best_and_the_one_before_comes_next() -> None:
    """As a list would do it, which takes too long for a file of 65,000 names."""
    chance = random.Random(5)
    above = [Inode(number, Kind.DIR, bytes(16), 0) for number in range(3)]
    inode, model = Inode(9, Kind.FILE, bytes(16), 0), list[tuple[Inode, bytes]]()
    for _ in range(3000):
        pair = (chance.choice(above), b"%d" % chance.randrange(6))
        if pair in model:
            model.remove(pair)
        if chance.random() < 0.5:
            inode.add_path(*pair)
            model.append(pair)
        else:
            inode.drop_path(*pair)
        assert inode.paths == model
        assert inode.path == (model[-1] if model else None)
        assert [parent.children for parent in above] == [sum(p is parent for p, _ in model) for parent in above]
    inode.drop_paths()
    assert (inode.path, inode.paths, sum(parent.children for parent in above)) == (None, [], 0)
