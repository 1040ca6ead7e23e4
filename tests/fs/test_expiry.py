"""Keys that expire at every await: nothing fails for it, and nothing is written under a key that was wiped."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable

import pytest

from cryptfs.fs import acl
from cryptfs.fs.attributes import Changes
from cryptfs.fs.newborn import kit_for
from cryptfs.fs.rotation import Rotation
from cryptfs.keys.cache import KeyCache
from cryptfs.keys.policy import CachePolicy
from cryptfs.ports import DekProvider, KeyRun
from cryptfs.store.memory import MemoryStore
from cryptfs.testing.fleeting import FleetingKeys, expiring
from cryptfs.testing.keys import FakeDekProvider, FakeUpstream
from cryptfs.testing.volumes import SampleVolume
from cryptfs.types import Purpose
from tests.fs.tree import Tree

JOE, NOBODY = 1234, 0xFFFFFFFF
DEFAULT = acl.Acl(
    (
        (acl.USER_OBJ, 7, NOBODY), (acl.USER, 6, JOE), (acl.GROUP_OBJ, 5, NOBODY), (acl.MASK, 7, NOBODY),
        (acl.OTHER, 0, NOBODY),
    )
).encode()  # fmt: skip
BLOCK = 4096

Expire = Callable[[], None]
POLICIES = {
    "age": CachePolicy(max_age_s=1),
    "uses": CachePolicy(max_uses=1),
    "age-uses": CachePolicy(max_age_s=1, max_uses=1),
    "none": CachePolicy(caching=False),
}


def short_lived(sample: SampleVolume, kind: str) -> tuple[DekProvider, Expire]:
    """Keys, and what makes their time be up."""
    if kind == "port":
        fake = FakeDekProvider(sample.kek, sample.clock)
        return FleetingKeys(fake), fake.wipe
    cache = KeyCache(FakeUpstream(sample.kek), POLICIES[kind], sample.clock)

    def expire() -> None:
        sample.clock.advance(1)
        cache.sweep()

    return cache, expire


@pytest.fixture(params=["port", *POLICIES])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


async def everything(tree: Tree) -> None:
    """Whatever takes a key, at least once."""
    await tree.mkdir(b"d")
    await tree.write(b"d/small", b"small")
    big = await tree.create(b"d/big")
    await big.write(0, bytes(range(256)) * 16 * 9)
    await big.journal.fsync()
    await big.write(BLOCK * 2 + 5, b"in the middle")
    await big.write(BLOCK * 4 + 100, b"x" * BLOCK * 2)
    await big.truncate(BLOCK * 7 + 11)
    await big.journal.fsync()
    await tree.symlink(b"small", b"d/link")
    await tree.mknod(b"d/fifo", stat.S_IFIFO | 0o600)
    for path in (b"d/small", b"d/link", b"d/fifo", b"d"):
        await tree.volume.xattrs.set(await tree.inode(path), b"trusted.t", b"of " + path)
    await tree.volume.xattrs.set(await tree.inode(b"d"), acl.DEFAULT, DEFAULT)
    # In a directory with a default ACL everything that is made gets a set of its own before it is there.
    await tree.mkdir(b"d/sub", 0o777)
    await tree.write(b"d/sub/file", b"inherits")
    await tree.mknod(b"d/sub/fifo", stat.S_IFIFO | 0o600)
    await tree.symlink(b"../small", b"d/sub/link")
    await tree.link(b"d/small", b"d/sub/second")
    await tree.rename(b"d/sub/file", b"moved")
    await tree.mkdir(b"victim")
    await tree.mkdir(b"mover")
    await tree.rename(b"mover", b"victim")
    await tree.write(b"gone", b"gone")
    await tree.unlink(b"gone")
    await tree.rmdir(b"victim")
    await tree.setattr(b"moved", Changes(size=3))
    await tree.fsync(b"d/sub")


async def check_everything(tree: Tree) -> None:
    wanted = bytearray(bytes(range(256)) * 16 * 9)
    wanted[BLOCK * 2 + 5 : BLOCK * 2 + 18] = b"in the middle"
    wanted[BLOCK * 4 + 100 : BLOCK * 6 + 100] = b"x" * BLOCK * 2
    assert await tree.read(b"d/big") == bytes(wanted[: BLOCK * 7 + 11])
    assert await tree.read(b"d/small") == await tree.read(b"d/sub/second") == b"small"
    assert await tree.read(b"moved") == b"inh"
    assert await tree.readlink(b"d/link") == b"small"
    assert await tree.readlink(b"d/sub/link") == b"../small"
    for path in (b"d/small", b"d/link", b"d/fifo", b"d"):
        assert await tree.volume.xattrs.get(await tree.inode(path), b"trusted.t") == b"of " + path
    assert await tree.volume.xattrs.get(await tree.inode(b"d/sub"), acl.DEFAULT) == DEFAULT
    assert await tree.names() == [b"d", b"moved"]
    assert await tree.names(b"d") == [b"big", b"fifo", b"link", b"small", b"sub"]
    assert await tree.names(b"d/sub") == [b"fifo", b"link", b"second"]


async def test_everything_works_and_is_there_afterwards(kind: str) -> None:
    store = MemoryStore()
    tree = await Tree.make(store, block_size=BLOCK)
    keys, expire = short_lived(tree.sample, kind)
    await tree.unmount()
    with expiring(expire):
        await tree.mount(keys=keys)
        await everything(tree)
        await check_everything(tree)
        await tree.unmount()
        await tree.mount(keys=keys)
        await check_everything(tree)
    # What is wrong on the disk shows with keys that stay.
    await tree.remount()
    await check_everything(tree)
    await tree.finish()


async def test_what_a_crash_left_is_settled_with_such_keys(kind: str) -> None:
    store = MemoryStore()
    tree = await Tree.make(store, block_size=BLOCK)
    await everything(tree)
    await tree.write(b"last", b"after the last sync", sync=False)
    tree.kill()
    keys, expire = short_lived(tree.sample, kind)
    with expiring(expire):
        await tree.mount(keys=keys)
        await check_everything_but_last(tree)
        await tree.unmount()
    await tree.mount()
    await check_everything_but_last(tree)
    await tree.finish()


async def check_everything_but_last(tree: Tree) -> None:
    # Nothing was lost by the kill, as the store lived on: only what has to be settled differs.
    assert b"last" in await tree.names()
    assert await tree.read(b"d/small") == b"small"
    assert await tree.readlink(b"d/link") == b"small"
    assert await tree.volume.xattrs.get(await tree.inode(b"d/link"), b"trusted.t") == b"of d/link"


async def test_a_directory_is_rebuilt_under_keys_that_are_good(kind: str) -> None:
    sample = SampleVolume()
    store = MemoryStore()
    await sample.create(store)
    keys, expire = short_lived(sample, kind)
    volume = await sample.open(store)
    volume.ctx.keys = keys
    dir_id = os.urandom(16)
    with expiring(expire):
        kit = await kit_for(volume.ctx, dir_id)
        assert any(kit.log_key)
        log_key = bytes(kit.log_key)
        assert kit.names_wrapped is not None
        runs = [
            KeyRun(dir_id, Purpose.LOG_DIR, kit.kek_version, (kit.log_wrapped,)),
            KeyRun(dir_id, Purpose.NAMES, kit.kek_version, (kit.names_wrapped,)),
        ]
        (again,), _ = await keys.unwrap(runs)
        assert bytes(again) == log_key
    volume.ctx.keys = sample.keys()
    assert await volume.close()
    store.close_store()


async def test_every_log_is_rewritten_under_a_new_kek_with_such_keys(kind: str) -> None:
    store = MemoryStore()
    tree = await Tree.make(store, block_size=BLOCK)
    await everything(tree)
    await tree.unmount()
    keys, expire = short_lived(tree.sample, kind)
    with expiring(expire):
        await tree.mount(keys=keys)
        rotation = Rotation(tree.volume, tree.sample.rotate())
        await rotation.run()
        assert (rotation.left, rotation.failures) == (frozenset(), {})
        await check_everything(tree)
        await tree.unmount()
    await tree.mount()
    await check_everything(tree)
    await tree.finish()
