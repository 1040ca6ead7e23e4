"""A domain's place: what the parent's volume makes of it, and power cuts while it is made and removed."""

from __future__ import annotations

import errno
import logging
import os
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from cryptfs.errors import Damaged, VolumeLocked
from cryptfs.fs.directory import DirNode
from cryptfs.fs.domain import aside_name, domains_fd, find_name, id_in_name, make_place, put_aside, put_in_place
from cryptfs.fs.inodes import Inode
from cryptfs.store.disk_model import Order
from cryptfs.store.local import LocalStore
from cryptfs.store.memory import MemoryStore
from cryptfs.types import ID_BYTES
from tests.fs.test_crash import survivors, watched
from tests.fs.tree import OWNER, Tree, damage_of, errno_of


@dataclass
class Pair:
    """A volume, and one that is to be its domain, on a disk of its own: `domains/` has an empty directory for it."""

    parent: Tree
    domain: Tree

    @classmethod
    async def make(cls, store: LocalStore | MemoryStore) -> Pair:
        parent, domain = await Tree.make(store), await Tree.make(MemoryStore())
        # Another volume than the first, of the same seed.
        await domain.unmount()
        domain.store.close_store()
        domain.store = MemoryStore()
        domain.sample = type(domain.sample)(seed=2)
        await domain.sample.create(domain.store)
        await domain.mount()
        store.mkdir(store.root(), b"domains")
        ctx = parent.volume.ctx
        store.mkdir(domains_fd(ctx), aside_name(domain.sample.volume_id))
        store.syncfs(store.root())
        return cls(parent, domain)

    @property
    def domain_id(self) -> bytes:
        return self.domain.sample.volume_id

    async def place(self, path: bytes) -> Inode:
        """Make `path`, an empty directory, the place of the domain."""
        inode = await self.parent.inode(path)
        await make_place(self.parent.volume, inode, self.domain.volume)
        put_in_place(self.parent.volume.ctx, self.domain_id)
        return inode

    async def finish(self) -> None:
        await self.parent.finish()
        await self.domain.finish()
        self.domain.store.close_store()


@pytest.fixture
async def pair(store: LocalStore | MemoryStore) -> AsyncIterator[Pair]:
    made = await Pair.make(store)
    await made.parent.mkdir(b"pay")
    yield made
    await made.finish()


async def domain_at(tree: Tree, path: bytes) -> bytes:
    return (await tree.volume.inodes.dir(await tree.inode(path))).domain


async def test_a_place_holds_nothing_of_its_volume(pair: Pair) -> None:
    inode = await pair.place(b"pay")
    names = pair.parent.volume.names
    for call in (
        lambda: names.lookup(inode, b"file"),
        lambda: names.listing(inode),
        lambda: names.create(inode, b"file", 0o644, OWNER),
        lambda: names.mkdir(inode, b"dir", 0o755, OWNER),
        lambda: names.symlink(inode, b"link", b"target", OWNER),
        lambda: names.mknod(inode, b"fifo", 0o010644, 0, OWNER),
        lambda: make_place(pair.parent.volume, inode, pair.domain.volume),
        lambda: names.rmdir(pair.parent.volume.root, b"pay"),
    ):
        with pytest.raises(VolumeLocked):
            await call()
    await pair.parent.write(b"file", b"content")
    with pytest.raises(VolumeLocked):
        await pair.parent.rename(b"file", b"pay/file")
    assert await pair.parent.names() == [b"file", b"pay"]
    assert (await pair.parent.stat(b"pay")).st.st_nlink == 2


async def test_a_place_stays_one(pair: Pair) -> None:
    """Through remounts, a rewritten log, renames and exchanges."""
    parent = pair.parent
    await pair.place(b"pay")
    await parent.mkdir(b"dir")
    await parent.rename(b"pay", b"dir/salaries")
    await parent.remount()
    assert await domain_at(parent, b"dir/salaries") == pair.domain_id
    node = await parent.volume.inodes.dir(await parent.inode(b"dir/salaries"))
    async with parent.volume.names.changing(await parent.inode(b"dir")):
        await node._rewrite()
    await parent.remount()
    assert await domain_at(parent, b"dir/salaries") == pair.domain_id
    await parent.mkdir(b"other")
    assert await errno_of(parent.rename(b"other", b"dir/salaries")) == "EBUSY"
    await parent.rename(b"other", b"dir/salaries", 2)
    assert await domain_at(parent, b"other") == pair.domain_id
    assert await domain_at(parent, b"dir/salaries") == b""
    assert find_name(parent.volume.ctx, pair.domain_id) == pair.domain_id.hex().encode()


async def test_what_cannot_be_a_place(pair: Pair) -> None:
    parent = pair.parent
    await parent.write(b"file", b"content")
    await parent.mkdir(b"full")
    await parent.mkdir(b"full/inner")
    for path, code in ((b"file", "ENOTDIR"), (b"full", "ENOTEMPTY"), (b"", "ENOTDIR")):
        call = make_place(parent.volume, await parent.inode(path), pair.domain.volume)
        assert await errno_of(call) == code
    inode = await parent.inode(b"pay")
    await parent.remount(read_only=True)
    inode = await parent.inode(b"pay")
    assert await errno_of(make_place(parent.volume, inode, pair.domain.volume)) == "EROFS"
    await parent.remount()
    assert await domain_at(parent, b"pay") == b""


async def test_the_domain_gets_what_the_directory_had(pair: Pair) -> None:
    parent, inode = pair.parent, await pair.parent.inode(b"pay")
    await parent.volume.xattrs.set(inode, b"user.colour", b"green", lambda _: True)
    (await parent.volume.inodes.dir(inode)).ctx.store.fchmod((await parent.volume.inodes.dir(inode)).fd, 0o2751)
    await pair.place(b"pay")
    root = pair.domain.volume.root
    assert await pair.domain.volume.xattrs.get(root, b"user.colour") == b"green"
    assert (await pair.domain.stat(b"")).st.st_mode & 0o7777 == 0o2751
    await pair.domain.remount()
    assert await pair.domain.volume.xattrs.get(pair.domain.volume.root, b"user.colour") == b"green"


async def test_removal_is_the_hooks_to_allow(pair: Pair) -> None:
    parent, inode = pair.parent, await pair.place(b"pay")
    asked: list[tuple[Inode, bytes]] = []

    @asynccontextmanager
    async def refuse(place: Inode, domain_id: bytes) -> AsyncIterator[None]:
        asked.append((place, domain_id))
        if domain_id == pair.domain_id:
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))
        yield

    @asynccontextmanager
    async def allow(place: Inode, domain_id: bytes) -> AsyncIterator[None]:
        asked.append((place, domain_id))
        yield
        assert place.last_st is not None, "its place is gone by now"

    parent.volume.names.removing_domain = refuse
    assert await errno_of(parent.rmdir(b"pay")) == "ENOTEMPTY"
    assert await domain_at(parent, b"pay") == pair.domain_id
    parent.volume.names.removing_domain = allow
    await parent.rmdir(b"pay")
    assert asked == [(inode, pair.domain_id)] * 2
    assert await parent.names() == []
    await parent.mkdir(b"pay")
    assert await domain_at(parent, b"pay") == b""


async def test_a_place_with_entries_is_damage(pair: Pair) -> None:
    await pair.parent.write(b"pay/file", b"content")
    node = await pair.parent.volume.inodes.dir(await pair.parent.inode(b"pay"))
    async with pair.parent.volume.names.changing(await pair.parent.inode(b"pay")):
        await node.give_to_domain(pair.domain_id)
    await pair.parent.remount()
    assert await damage_of(pair.parent.inode(b"pay/file")) == "payload"


async def test_what_a_stranger_puts_into_a_place_is_not_let_in_by_a_crash(local: LocalStore, tmp_path: Path) -> None:
    pair = await Pair.make(local)
    await pair.parent.mkdir(b"pay")
    await pair.place(b"pay")
    await pair.parent.mkdir(b"dir")
    await pair.parent.write(b"dir/file", b"born in this epoch")
    pair.parent.kill()
    dirs = [path for path in (tmp_path / "tree").iterdir() if path.is_dir()]
    [source] = [path for one in dirs for path in one.iterdir() if path.name != ".dir"]
    [place] = [path for path in dirs if path != source.parent]
    source.rename(place / source.name)
    await pair.parent.mount()
    assert await domain_at(pair.parent, b"pay") == pair.domain_id
    await pair.parent.remount()
    assert await domain_at(pair.parent, b"pay") == pair.domain_id
    await pair.finish()


async def test_a_failure_leaves_an_ordinary_directory() -> None:
    store = MemoryStore()
    pair = await Pair.make(store)
    await pair.parent.mkdir(b"pay")
    inode = await pair.parent.inode(b"pay")

    def fail(call: str) -> None:
        if call == "rename":
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    store.before_call = fail
    assert await errno_of(make_place(pair.parent.volume, inode, pair.domain.volume)) == "EIO"
    store.before_call = None
    assert await domain_at(pair.parent, b"pay") == b""
    await pair.parent.write(b"pay/file", b"an ordinary directory")
    await pair.parent.remount()
    assert await pair.parent.read(b"pay/file") == b"an ordinary directory"
    await pair.finish()
    store.close_store()


@pytest.mark.parametrize("order", [Order.DIRECTORY, Order.JOURNAL])
async def test_a_power_cut_leaves_no_domain_or_a_whole_one(order: Order, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, "cryptfs")
    seen: set[bool] = set()
    for seed in range(6):
        rng = random.Random(seed)
        store = MemoryStore(order=order)
        pair = await Pair.make(store)
        await pair.parent.mkdir(b"above")
        if seed % 2:
            await pair.parent.remount()
        await pair.parent.mkdir(b"above/pay")
        moments: list[MemoryStore] = []
        with watched(store, rng, 0.7, lambda: moments.append(store.killed())):  # noqa: B023
            await pair.place(b"above/pay")
        for moment in moments:
            for survivor in survivors(moment, rng, 6):
                seen.add(await is_whole(pair, survivor))
            moment.close_store()
        for survivor in survivors(store, rng, 12):
            assert await is_whole(pair, survivor), "it was acknowledged"
        await pair.finish()
        store.close_store()
    assert seen == {False, True}


async def is_whole(pair: Pair, survivor: MemoryStore) -> bool:
    """Whether the place is one, after a crash; its domain is there then, and otherwise it is a directory to work in."""
    tree = Tree(survivor, pair.parent.sample, await pair.parent.sample.open(survivor))
    domain_id = b""
    if b"above" in await tree.names() and b"pay" in await tree.names(b"above"):
        domain_id = await domain_at(tree, b"above/pay")
        if domain_id:
            assert domain_id == pair.domain_id
        else:
            await tree.write(b"above/pay/file", b"content")
    assert find_name(tree.volume.ctx, pair.domain_id), "what was synced before is there under one name or the other"
    await tree.finish()
    survivor.close_store()
    return bool(domain_id)


@pytest.mark.parametrize("order", [Order.DIRECTORY, Order.JOURNAL])
async def test_a_power_cut_during_removal_leaves_the_domain_or_no_place(
    order: Order, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR, "cryptfs")
    found: set[bool] = set()
    for seed in range(6):
        rng = random.Random(seed)
        store = MemoryStore(order=order)
        pair = await Pair.make(store)
        await pair.parent.mkdir(b"pay")
        await pair.place(b"pay")
        ctx = pair.parent.volume.ctx

        @asynccontextmanager
        async def allow(_place: Inode, domain_id: bytes) -> AsyncIterator[None]:
            yield
            put_aside(ctx, domain_id)  # noqa: B023

        pair.parent.volume.names.removing_domain = allow
        moments: list[MemoryStore] = []
        with watched(store, rng, 0.8, lambda: moments.append(store.killed())):  # noqa: B023
            await pair.parent.rmdir(b"pay")
        moments.append(store.killed())
        for moment in moments:
            for survivor in survivors(moment, rng, 6):
                tree = Tree(survivor, pair.parent.sample, await pair.parent.sample.open(survivor))
                there = b"pay" in await tree.names()
                found.add(there)
                if there:
                    assert await domain_at(tree, b"pay") == pair.domain_id
                assert find_name(tree.volume.ctx, pair.domain_id)
                await tree.finish()
                survivor.close_store()
            moment.close_store()
        await pair.finish()
        store.close_store()
    assert found == {False, True}


async def test_names_in_domains(pair: Pair) -> None:
    ctx = pair.parent.volume.ctx
    own = pair.domain_id.hex().encode()
    assert id_in_name(own) == id_in_name(aside_name(pair.domain_id)) == pair.domain_id
    for wrong in (b"", own[:-1], own.upper() if own.upper() != own else b"x", own + b".new", b"\xff" * 32, b" " + own):
        assert id_in_name(wrong) is None
    assert find_name(ctx, pair.domain_id) == aside_name(pair.domain_id)
    put_in_place(ctx, pair.domain_id)
    assert find_name(ctx, pair.domain_id) == own
    with pytest.raises(Damaged):
        find_name(ctx, bytes(ID_BYTES))


async def test_a_volume_without_domains_has_no_directory_for_them(store: LocalStore | MemoryStore) -> None:
    tree = await Tree.make(store)
    assert b"domains" not in store.listdir(store.root())
    assert isinstance(await tree.volume.inodes.dir(tree.volume.root), DirNode)
    with pytest.raises(FileNotFoundError):
        domains_fd(tree.volume.ctx)
    await tree.finish()
