"""Complete older states put back: of a file, a directory, the volume. Only the freshness record can tell."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import trio
import trio.testing

from cryptfs.errors import AgentUnavailable, FreshnessUnavailable, RolledBack, VolumeDamaged
from cryptfs.fs import freshness
from cryptfs.store.local import LocalStore
from cryptfs.testing.freshness import FakeRecord
from cryptfs.testing.keys import FakeDekProvider
from cryptfs.types import DELETED
from tests.fs.test_tamper import BLOCK, CONTENT, TARGET, Cipher
from tests.fs.tree import damage_of

NEW = b"newer"


class Seen(Cipher):
    """A cipher directory whose states a machine has seen."""

    @property
    def record(self) -> FakeRecord:
        assert self.tree.sample.freshness is not None
        return self.tree.sample.freshness

    @record.setter
    def record(self, record: FakeRecord) -> None:
        self.tree.sample.freshness = record

    def files_of(self, path: bytes) -> list[Path]:
        """Everything of one file, symlink or directory."""
        if (self.data[path] / ".dir").exists():
            return [self.data[path]]
        return [self.data[path], self.sidecar(path), self.twin(path)]

    async def rewrite(self, path: bytes, content: bytes = NEW) -> None:
        """In an epoch of its own, which ends cleanly."""
        await self.mount()
        await self.tree.write(path, content)
        await self.tree.unmount()


@pytest.fixture
async def seen(tmp_path: Path) -> AsyncIterator[Seen]:
    root = tmp_path / "vault"
    root.mkdir()
    store = LocalStore(root)
    made = await Seen.make(root, store)
    assert isinstance(made, Seen)
    made.record = FakeRecord()
    # Seen once, and written, so that there is something to be older than.
    await made.mount()
    for path, content in CONTENT.items():
        await made.tree.write(path, content)
    file = await made.tree.open(b"victim")
    await file.journal.fsync()
    await file.write(BLOCK, b"V" * 2 * BLOCK)
    await made.tree.unmount()
    assert made.twin(b"victim").exists()
    yield made
    store.close_store()


async def eventually(condition: Callable[[], bool]) -> bool:
    """Whether it holds within 30 s of real time, which the test's clock knows nothing of."""
    for _ in range(3000):
        if condition():
            return True
        await trio.to_thread.run_sync(time.sleep, 0.01)
    return False


class Copy:
    """What was on disk at one time, with modes and times, to be put back."""

    def __init__(self, paths: list[Path], where: Path) -> None:
        self._pairs = [(path, where / str(number)) for number, path in enumerate(paths)]
        where.mkdir()
        for path, kept in self._pairs:
            copy(path, kept)

    def put_back(self) -> None:
        for path, kept in self._pairs:
            remove(path)
            copy(kept, path)


def copy(src: Path, dst: Path) -> None:
    if src.is_symlink():
        dst.symlink_to(os.readlink(src))
    elif src.is_dir():
        shutil.copytree(src, dst, symlinks=True)
    elif src.exists():
        shutil.copy2(src, dst)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def refill(path: Path, kept: Path) -> None:
    """The same inode with the contents of another time."""
    path.write_bytes(kept.read_bytes())


# files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [b"victim", b"small", b"empty", b"d1/inner"])
async def test_an_older_file_with_its_sidecar_and_twin(seen: Seen, tmp_path: Path, path: bytes) -> None:
    old = Copy(seen.files_of(path), tmp_path / "old")
    await seen.rewrite(path)
    old.put_back()
    await seen.mount()
    assert await damage_of(seen.tree.read(path)) == "rolled-back"
    assert await damage_of(seen.tree.write(path, b"overwritten")) == "rolled-back"
    await seen.others_are_fine(path)


async def test_cut_at_the_boundary_of_a_frame(seen: Seen, tmp_path: Path) -> None:
    """The log as it was, which is a prefix of what it is, and the data file of that size."""
    before, size = seen.sidecar(b"victim").stat().st_size, seen.data[b"victim"].stat().st_size
    await seen.mount()
    file = await seen.tree.open(b"victim")
    await file.write(file.size, b"appended")
    await seen.tree.unmount()
    os.truncate(seen.sidecar(b"victim"), before)
    os.truncate(seen.data[b"victim"], size)
    await seen.mount()
    assert await damage_of(seen.tree.read(b"victim")) == "rolled-back"
    await seen.others_are_fine(b"victim")


async def test_another_machine_trusts_what_it_sees_first(seen: Seen, tmp_path: Path) -> None:
    old = Copy(seen.files_of(b"victim"), tmp_path / "old")
    await seen.rewrite(b"victim")
    old.put_back()
    seen.record = FakeRecord()
    await seen.mount()
    assert await seen.tree.read(b"victim") == CONTENT[b"victim"]
    # From now on it has seen it.
    await seen.tree.write(b"victim", NEW)
    await seen.tree.unmount()
    old.put_back()
    await seen.mount()
    assert await damage_of(seen.tree.read(b"victim")) == "rolled-back"
    await seen.others_are_fine(b"victim")


async def test_an_older_file_while_it_is_mounted(seen: Seen, tmp_path: Path) -> None:
    """Nothing was recorded or synced yet, and its key is still in the cache: the daemon knows what it wrote."""
    kept = Copy(seen.files_of(b"victim"), tmp_path / "old")
    await seen.mount()
    await seen.tree.write(b"victim", NEW, sync=True)
    assert await seen.tree.read(b"victim") == NEW
    for path, old in kept._pairs:
        if old.exists():
            refill(path, old)
    assert await damage_of(seen.tree.read(b"victim")) == "rolled-back"
    # And after it was recorded, when the floor is only beside the key.
    await seen.tree.volume.ctx.freshness.record()
    await seen.tree.volume.ctx.freshness.record()
    assert await damage_of(seen.tree.read(b"victim")) == "rolled-back"
    await seen.others_are_fine(b"victim")


async def test_a_crash_does_not_excuse_what_is_older(seen: Seen, tmp_path: Path) -> None:
    old = Copy(seen.files_of(b"victim"), tmp_path / "old")
    await seen.mount()
    await seen.tree.write(b"victim", NEW, sync=True)
    await seen.tree.volume.ctx.freshness.record()
    seen.tree.kill()
    old.put_back()
    await seen.mount()
    assert await damage_of(seen.tree.lookup(b"victim")) == "rolled-back"
    await seen.others_are_fine(b"victim")


async def test_a_crash_does_not_excuse_a_lost_tail(seen: Seen) -> None:
    """What was fsynced is recorded, though no later frame says `durable_up_to`: it is not given up for a prefix."""
    await seen.mount()
    file = await seen.tree.open(b"victim")
    await file.write(0, b"W" * BLOCK)
    await file.journal.fsync()
    await seen.tree.volume.ctx.freshness.record()
    seen.tree.kill()
    for raw in (seen.data[b"victim"], seen.twin(b"victim")):
        data = bytearray(raw.read_bytes())
        at = data.find(b"") if raw.suffix else 64
        data[at] ^= 1
        raw.write_bytes(data)
    await seen.mount()
    file = await seen.tree.open(b"victim")
    assert await damage_of(file.read(0, 1)) == "tag"
    assert bytes(await file.read(3 * BLOCK, BLOCK)) == b"V" * BLOCK
    await seen.others_are_fine(b"victim")


async def test_a_crash_does_not_excuse_a_lost_sidecar(seen: Seen) -> None:
    """A file made and acknowledged in the crashed epoch: without its sidecar it looks like one that never was."""
    await seen.mount()
    await seen.tree.write(b"made", b"acknowledged", sync=True)
    log_id = (await seen.tree.inode(b"made")).log_id
    await seen.tree.volume.ctx.freshness.record()
    seen.tree.kill()
    (seen.root / "sidecars" / log_id.hex()[:2] / log_id.hex()).unlink()
    for read_only in (True, False):
        await seen.tree.mount(read_only=read_only)
        assert await damage_of(seen.tree.read(b"made")) == "rolled-back"
        await seen.others_are_fine()


# directories -----------------------------------------------------------------------------------------------------


async def test_an_older_directory_with_its_entries(seen: Seen, tmp_path: Path) -> None:
    await seen.mount()
    await seen.tree.write(b"d1/first", b"1")
    await seen.tree.unmount()
    old = Copy(seen.files_of(b"d1"), tmp_path / "old")
    await seen.mount()
    await seen.tree.unlink(b"d1/first")
    await seen.tree.write(b"d1/second", b"2")
    await seen.tree.unmount()
    old.put_back()
    await seen.mount()
    for call in (seen.tree.names(b"d1"), seen.tree.lookup(b"d1/first"), seen.tree.create(b"d1/third")):
        assert await damage_of(call) == "rolled-back"
    await seen.others_are_fine(b"d1")


async def test_an_older_root_directory(seen: Seen, tmp_path: Path) -> None:
    old = Copy([seen.root / "tree"], tmp_path / "old")
    await seen.rewrite(b"another", b"")
    old.put_back()
    await seen.mount()
    assert await damage_of(seen.tree.names()) == "rolled-back"
    await seen.tree.unmount()


# deleted things --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [b"victim", b"link"])
async def test_a_deleted_one_brought_back_with_its_directory(seen: Seen, tmp_path: Path, path: bytes) -> None:
    old = Copy([*seen.files_of(path), seen.log(b"")], tmp_path / "old")
    await seen.mount()
    await seen.tree.unlink(path)
    await seen.tree.unmount()
    old.put_back()
    await seen.mount()
    assert await damage_of(seen.tree.names()) == "rolled-back"
    # Were it not for the directory: the log itself was seen deleted.
    seen.tree.volume.ctx.freshness.accept(seen.tree.sample.config.root_dir_id)
    if path == b"link":
        assert await seen.tree.readlink(path) == TARGET  # written once, before this machine saw the volume
    else:
        assert await damage_of(seen.tree.read(path)) == "deleted"
    await seen.tree.unmount()


async def test_a_deleted_one_brought_back_after_a_crash(seen: Seen, tmp_path: Path) -> None:
    """Made in the epoch that then crashed: by its looks it might just not have been deleted yet."""
    await seen.mount()
    tree = seen.tree
    await tree.write(b"secret", b"s" * 5000, sync=True)
    await tree.mkdir(b"secrets")
    await tree.symlink(TARGET, b"secret link")
    inodes = {name: await tree.inode(name) for name in (b"secret", b"secrets", b"secret link")}
    paths = [seen.root / "tree" / os.fsdecode(inode.place()[1]) for inode in inodes.values()]
    paths += [
        seen.root / "sidecars" / inode.log_id.hex()[:2] / inode.log_id.hex()
        for name, inode in inodes.items() if name != b"secrets"
    ]  # fmt: skip
    await tree.volume.ctx.freshness.sync()
    await tree.volume.ctx.freshness.record()
    old = Copy(paths, tmp_path / "old")
    await tree.unlink(b"secret")
    await tree.unlink(b"secret link")
    await tree.rmdir(b"secrets")
    ids = [inode.log_id for inode in inodes.values()]
    tree.forget_all()
    await tree.volume.ctx.freshness.sync()
    await tree.volume.reaper.flush()
    await tree.volume.ctx.freshness.record()
    assert [seen.record.floor(log_id) for log_id in ids] == [DELETED] * 3
    tree.kill()
    old.put_back()
    await seen.mount()
    assert not {b"secret", b"secrets", b"secret link"}.intersection(await tree.names())
    await seen.others_are_fine()


async def test_temporary_files_leave_no_tombstones(seen: Seen) -> None:
    before = dict(seen.record.floors)
    await seen.mount()
    for number in range(20):
        await seen.tree.write(b"t%d" % number, b"x")
        await seen.tree.unlink(b"t%d" % number)
    await seen.tree.unmount()
    assert seen.record.floors.keys() - before.keys() == {seen.tree.sample.config.root_dir_id}
    assert DELETED not in seen.record.floors.values()


# the whole volume ------------------------------------------------------------------------------------------------


async def test_an_older_state_of_the_whole_volume(seen: Seen, tmp_path: Path) -> None:
    store = seen.tree.store
    old = Copy([seen.root / name for name in ("state", "volume", "tree", "sidecars", "tmp")], tmp_path / "old")
    await seen.rewrite(b"victim")
    old.put_back()
    for read_only in (False, True):
        with pytest.raises(RolledBack, match="an older state of the volume than this machine has seen"):
            await seen.tree.mount(read_only=read_only)
    assert issubclass(RolledBack, VolumeDamaged)
    # Nothing was written: once more, and another machine still takes it.
    seen.record = FakeRecord()
    assert isinstance(store, LocalStore)
    store.close_store()
    seen.tree.store = LocalStore(seen.root)
    await seen.mount()
    await seen.others_are_fine()
    seen.tree.store.close_store()


async def test_a_copy_taken_while_mounted(seen: Seen, tmp_path: Path) -> None:
    await seen.mount()
    old = Copy([seen.root / "state"], tmp_path / "old")
    await seen.tree.unmount()
    old.put_back()
    with pytest.raises(RolledBack):
        await seen.mount()


# telling the record ----------------------------------------------------------------------------------------------


async def test_reading_records_nothing(seen: Seen) -> None:
    before = dict(seen.record.floors)
    await seen.mount()
    for path in CONTENT:
        await seen.tree.read(path)
    await seen.tree.unmount()
    assert seen.record.floors == before


async def test_what_is_recorded_and_when(seen: Seen, autojump_clock: trio.testing.MockClock) -> None:
    """A file that was fsynced within some seconds; one that was only closed after the next sync; in one batch each."""
    await seen.mount()
    tree = seen.tree
    await tree.write(b"synced", b"1", sync=True)
    await tree.write(b"closed", b"2")
    synced, closed = [(await tree.inode(name)).log_id for name in (b"synced", b"closed")]
    floor = seen.record.floor
    async with trio.open_nursery() as nursery:
        nursery.start_soon(tree.volume.serve)
        assert floor(synced) == 0
        await trio.sleep(freshness.RECORD_INTERVAL_S + 1)
        assert await eventually(lambda: floor(synced) > 0)
        assert floor(closed) == 0
        await trio.sleep(freshness.SYNC_INTERVAL_S + freshness.RECORD_INTERVAL_S)
        assert await eventually(lambda: floor(closed) > 0)
        asked = tree.volume.ctx.keys
        assert isinstance(asked, FakeDekProvider)
        trips = asked.round_trips
        await trio.sleep(600)
        assert asked.round_trips == trips, "nothing was written, nothing is told"
        nursery.cancel_scope.cancel()
    await seen.others_are_fine()


async def test_a_record_that_fails_is_told_later(
    seen: Seen, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    await seen.mount()
    tree = seen.tree
    seen.record.failure = FreshnessUnavailable("the disk is full")
    await tree.write(b"synced", b"1", sync=True)
    log_id = (await tree.inode(b"synced")).log_id
    async with trio.open_nursery() as nursery:
        nursery.start_soon(tree.volume.serve)
        assert await eventually(lambda: "the disk is full" in caplog.text)
        await trio.sleep(100)
        assert caplog.text.count("the disk is full") == 1, "said once"
        assert seen.record.floor(log_id) == 0
        seen.record.failure = None
        await trio.sleep(freshness.RECORD_INTERVAL_S + 1)
        assert await eventually(lambda: seen.record.floor(log_id) > 0)
        nursery.cancel_scope.cancel()
    await seen.others_are_fine()


async def test_what_cannot_be_told_is_bounded(
    seen: Seen, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    monkeypatch.setattr(freshness, "KEPT_MAX", 50)
    await seen.mount()
    told = seen.tree.volume.ctx.freshness
    seen.record.failure = AgentUnavailable("gone")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(told.serve)
        for number in range(200):
            told.durable(b"%16d" % number, 7)
            if number % 20 == 0:
                await trio.sleep(10)
        assert len(told._newest) < 100
        assert len(told._durable) < 100
        nursery.cancel_scope.cancel()
    seen.record.failure = None
    await seen.others_are_fine()


async def test_many_logs_are_synced_early(
    seen: Seen, monkeypatch: pytest.MonkeyPatch, mock_clock: trio.testing.MockClock
) -> None:
    monkeypatch.setattr(freshness, "MANY", 10)
    await seen.mount()
    told = seen.tree.volume.ctx.freshness
    async with trio.open_nursery() as nursery:
        nursery.start_soon(told.serve)  # on a clock that stands still
        for number in range(9):
            await seen.tree.write(b"m%d" % number, b"x")
        log_id = (await seen.tree.inode(b"m5")).log_id
        assert seen.record.floor(log_id) == 0
        await seen.tree.write(b"m9", b"x")
        assert await eventually(lambda: seen.record.floor(log_id) > 0)
        nursery.cancel_scope.cancel()
    await seen.others_are_fine()


async def test_a_record_that_is_unusable_at_mount_refuses(seen: Seen) -> None:
    seen.record.failure = FreshnessUnavailable("damaged")
    with pytest.raises(FreshnessUnavailable):
        await seen.mount()
    seen.record.failure = None
    await seen.mount()
    # At unmount it is said and that is all: the volume is left clean.
    seen.record.failure = FreshnessUnavailable("damaged")
    await seen.tree.unmount()
    seen.record.failure = None
    await seen.mount()
    assert seen.tree.volume.ctx.state is not None
    await seen.others_are_fine()


async def test_the_first_sight_is_said(seen: Seen, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "cryptfs")
    await seen.mount()
    assert "for the first time" not in caplog.text
    await seen.tree.unmount()
    seen.record = FakeRecord()
    await seen.mount()
    assert "for the first time" in caplog.text
    await seen.others_are_fine()
