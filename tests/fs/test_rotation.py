"""KEK rotation, the filesystem's side: all is rewritten, nothing changes, and the old KEK is needed no more."""

from __future__ import annotations

import errno
import os
from dataclasses import replace

import pytest
import trio
import trio.testing

from cryptfs.errors import VolumeDamaged
from cryptfs.format.state import SLOT_BYTES, State, decode_slot
from cryptfs.fs import epoch
from cryptfs.fs.context import sidecar_name, write_all
from cryptfs.fs.epoch import STATE, read_state, sign_states, write_slot
from cryptfs.fs.pace import Pace
from cryptfs.fs.rewrapping import KEYS_AT_ONCE
from cryptfs.fs.rotation import Progress, Rotation
from cryptfs.keys.cache import KeyCache
from cryptfs.keys.policy import CachePolicy
from cryptfs.names import tree_name
from cryptfs.ports import RENAME_EXCHANGE, Store
from cryptfs.store.local import LocalStore
from cryptfs.testing.fleeting import FleetingKeys, expiring
from cryptfs.testing.freshness import FakeRecord
from cryptfs.testing.keys import FakeDekProvider, FakeUpstream
from cryptfs.types import Kind
from tests.fs.rotating import BLOCK, data_files, forget_keys, look, populate, read_own, rotated, versions
from tests.fs.tree import Tree, damage_of


@pytest.mark.parametrize(("old", "workers"), [(True, 1), (False, 1), (True, 8)])
async def test_everything_is_read_without_the_old_kek(tree: Tree, old: bool, workers: int) -> None:
    files = await populate(tree)
    if old:
        await tree.remount()
    rotation = await rotated(tree, workers=workers)
    assert rotation.progress == Progress(rotation.progress.done, rotation.progress.done, 0)
    assert rotation.progress.done >= 12
    forget_keys(tree)
    await look(tree, files)
    await tree.remount()
    await look(tree, files)


async def test_twice_in_a_row_and_once_more_without_anything_to_do(tree: Tree) -> None:
    files = await populate(tree)
    await rotated(tree)
    await tree.remount()
    await rotated(tree)
    again = Rotation(tree.volume, tree.sample.kek.version)
    await again.run()
    assert (again.progress, again.left) == (Progress(0, 0, 0), frozenset())
    forget_keys(tree)
    await look(tree, files)
    assert versions(tree) == {3}


async def test_data_files_stay_bit_identical(local_tree: Tree) -> None:
    tree = local_tree
    await populate(tree)
    await tree.remount()
    before = data_files(tree)
    await rotated(tree)
    assert data_files(tree) == before
    await tree.remount()
    assert data_files(tree) == before


async def test_what_changes_afterwards_is_under_the_new_kek(tree: Tree) -> None:
    files = await populate(tree)
    await rotated(tree)
    for path in files:
        await tree.write(path, files[path] + b"more")
    await tree.write(b"new", b"new")
    await tree.unlink(b"new")
    for path in (b"small", b"d/hard link"):
        files[path] = b"s" * 10 + b"moremore"
    await tree.remount()
    assert versions(tree) == {2}
    assert await tree.read(b"d/e/deep") == files[b"d/e/deep"] + b"more"


async def test_who_has_the_old_kek_makes_no_state(tree: Tree) -> None:
    """Nor does a copy of an older one count any more, whatever its sequence number says."""
    files = await populate(tree)
    state = tree.volume.ctx.state
    assert state is not None
    forged = State(state.sequence + 100, state.epoch, clean=False, unclean=((1, state.epoch - 1),) * (state.epoch > 1))
    forged = replace(forged, sequence=forged.sequence + forged.slot)
    (by_old_kek,) = await sign_states(tree.volume.ctx.keys, tree.sample.volume_id, forged)
    old = read_own(tree.store, STATE)
    await rotated(tree)
    now = tree.volume.ctx.state
    assert now is not None
    assert (now.epoch, now.clean, now.unclean) == (state.epoch, False, state.unclean)
    slots = [decode_slot(read_own(tree.store, STATE)[at : at + SLOT_BYTES]) for at in (0, SLOT_BYTES)]
    assert [slot.kek_version for slot in slots if slot is not None] == [2, 2]
    write_slot(tree.store, forged, by_old_kek)
    read = await read_state(tree.store, tree.sample.keys(), tree.sample.volume_id)
    assert replace(read, sequence=now.sequence) == now, "the other slot says the same"
    write_slot(tree.store, replace(forged, sequence=forged.sequence + 1), old[SLOT_BYTES:])
    with pytest.raises(VolumeDamaged):
        await read_state(tree.store, tree.sample.keys(), tree.sample.volume_id)
    await tree.remount()
    await look(tree, files)


@pytest.mark.parametrize("fails", [1, 2])
async def test_a_rotation_that_cannot_write_the_state_leaves_cleanly(
    tree: Tree, monkeypatch: pytest.MonkeyPatch, fails: int
) -> None:
    files = await populate(tree)
    written: list[State] = []

    def failing(store: Store, state: State, slot: bytes) -> None:
        written.append(state)
        if len(written) == fails:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        write_slot(store, state, slot)

    with monkeypatch.context() as patch:
        patch.setattr(epoch, "write_slot", failing)
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            await rotated(tree)
    await tree.remount()
    assert tree.volume.ctx.state is not None
    assert tree.volume.ctx.state.unclean == ()
    await look(tree, files)
    await rotated(tree)
    await tree.remount()
    await look(tree, files)


async def test_with_keys_that_expire_at_any_await(tree: Tree) -> None:
    files = await populate(tree)
    fake = FakeDekProvider(tree.sample.kek, tree.sample.clock)
    await tree.remount(keys=FleetingKeys(fake))
    with expiring(fake.wipe):
        await rotated(tree)
        await look(tree, files)


# freshness ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["file", "link"])
async def test_an_older_sidecar_is_refused_also_one_that_says_the_same(local: LocalStore, what: str) -> None:
    tree = await Tree.make(local)
    tree.sample.freshness = FakeRecord()
    await tree.write(b"file", b"content")
    await tree.symlink(b"target", b"link")
    await tree.remount()
    log_id = (await tree.inode(what.encode())).log_id
    where = tree.volume.ctx.sidecar_dir(log_id)
    fd = local.open(where, sidecar_name(log_id), os.O_RDONLY)
    old = local.pread(fd, 1 << 20, 0)
    local.close(fd)
    version = tree.sample.rotate()
    await Rotation(tree.volume, version).run()
    await tree.remount()
    assert await tree.read(b"file") == b"content"
    assert await tree.readlink(b"link") == b"target"
    await tree.unmount()
    fd = local.open(local.root(), b"sidecars/%02x/%s" % (log_id[0], sidecar_name(log_id)), os.O_RDWR | os.O_TRUNC)
    write_all(local, fd, old, 0)
    local.close(fd)
    await tree.mount()
    reading = tree.read(b"file") if what == "file" else tree.readlink(b"link")
    assert await damage_of(reading) == "rolled-back"
    await tree.finish()


@pytest.mark.parametrize("rotating", [True, False])
async def test_a_crash_excuses_no_exchange_of_what_was_rewritten(local: LocalStore, rotating: bool) -> None:
    """A rewritten log says when its directory or symlink was made as the log before did: not in the crashed epoch."""
    tree = await Tree.make(local)
    for name in (b"one", b"two"):
        await tree.mkdir(name)
        await tree.write(name + b"/file", name)
        await tree.symlink(b"to " + name, b"link " + name)
    await tree.remount()
    if rotating:
        await Rotation(tree.volume, tree.sample.rotate()).run()
    await tree.write(b"last", b"frame")
    root = await tree.volume.inodes.dir(tree.volume.root)
    places = {kind: [tree_name(e.sealed) for e in root.entries.values() if e.kind == kind] for kind in Kind}
    for kind in (Kind.DIR, Kind.SYMLINK):
        local.rename(root.fd, places[kind][0], root.fd, places[kind][1], RENAME_EXCHANGE)
    tree.kill()
    await tree.mount()
    for path in (b"one", b"two", b"link one", b"link two"):
        assert await damage_of(tree.read(path + b"/file") if path in {b"one", b"two"} else tree.readlink(path)) in {
            "id-mismatch", "exchanged",
        }  # fmt: skip
    assert await tree.read(b"last") in {b"frame", b""}
    await tree.finish()


# size and pace -----------------------------------------------------------------------------------------------------


async def test_a_file_of_more_blocks_than_one_request_takes(local_tree: Tree) -> None:
    tree = local_tree
    upstream = FakeUpstream(tree.sample.kek)
    cache = KeyCache(upstream, CachePolicy(), tree.sample.clock)
    await tree.remount(keys=cache)
    content = os.urandom(BLOCK) * (KEYS_AT_ONCE + 300)
    file = await tree.create(b"large")
    for at in range(0, len(content), 1 << 20):
        await file.write(at, content[at : at + (1 << 20)])
    version = tree.sample.rotate()
    upstream.requests.clear()
    rotation = Rotation(tree.volume, version)
    await rotation.run()
    assert rotation.left == frozenset()
    assert sum(request.startswith("rewrap") for request in upstream.requests) <= 5
    cache.wipe()
    await tree.volume.ctx.adopt_volume_key(version, tree.sample.config.volume_key_wrapped)
    tree.sample.kek.destroy_older()
    cache.wipe()
    assert await file.read(0, len(content)) == content
    await tree.remount()
    assert await tree.read(b"large") == content


async def test_keys_in_the_cache_need_not_be_asked_for_again(local_tree: Tree) -> None:
    tree = local_tree
    upstream = FakeUpstream(tree.sample.kek)
    cache = KeyCache(upstream, CachePolicy(), tree.sample.clock)
    await tree.remount(keys=cache)
    await tree.write(b"file", b"1" * 20 * BLOCK)
    file = await tree.open(b"file")
    assert await file.read(0, BLOCK) == b"1" * BLOCK
    await Rotation(tree.volume, tree.sample.rotate()).run()
    upstream.requests.clear()
    assert await file.read(0, BLOCK) == b"1" * BLOCK
    assert upstream.requests == []


async def test_the_pace_keeps_its_share(autojump_clock: trio.testing.MockClock) -> None:
    pace = Pace(0.25)
    started = trio.current_time()
    for _ in range(10):
        async with await pace.turn():
            await trio.sleep(1)
    assert trio.current_time() - started == pytest.approx(40)
