"""Power cuts with a freshness record: whatever survives is never older than what was recorded.

The runs of `test_crash`, with the background work that records what is durable going on beside them; and daemons that
record too early in one way each, which the same runs must catch.
"""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import pytest
import trio
import trio.lowlevel

from cryptfs.errors import Damaged, RolledBack
from cryptfs.format.dirlog import DirPayload
from cryptfs.fs.directory import DirNode
from cryptfs.fs.freshness import Freshness
from cryptfs.fs.journal import Journal
from cryptfs.fs.reaper import Reaper
from cryptfs.store.disk_model import Order
from cryptfs.store.memory import MemoryStore
from cryptfs.testing.freshness import FakeRecord
from tests.fs.test_crash import Known, Run, base, recovered, survivors, watched

ORDERS = [Order.DIRECTORY, Order.JOURNAL]


@pytest.fixture(autouse=True)
def _crashes_are_no_news(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "cryptfs")


@dataclass
class Moment:
    """What was on the disk and in the record at one time."""

    store: MemoryStore
    record: FakeRecord
    expected: dict[bytes, Known]


class Recorded:
    """A run on a volume whose state is recorded; `moments` are taken just before calls to the store."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.moments: list[Moment] = []
        assert isinstance(run.tree.store, MemoryStore)
        self.store = run.tree.store

    @classmethod
    async def make(cls, order: Order, seed: int) -> Recorded:
        run = await base(order, seed)
        run.tree.sample.freshness = FakeRecord()
        await run.tree.remount()
        return cls(run)

    @property
    def record(self) -> FakeRecord:
        assert self.run.tree.sample.freshness is not None
        return self.run.tree.sample.freshness

    def look(self) -> None:
        self.moments.append(Moment(self.store.killed(), self.record.clone(), self.run.expected()))

    @contextmanager
    def watched(self, chance: float, *, threads: bool = False) -> Iterator[None]:
        """Look now and then; from threads only if nothing else goes on: disk and record must be of one time."""

        def look() -> None:
            if threads or threading.current_thread() is threading.main_thread():
                self.look()

        with watched(self.store, self.run.rng, chance, look):
            yield

    async def background(self) -> None:
        """What the daemon does now and then, all the time."""
        volume = self.run.tree.volume
        while True:
            await volume.files.commit_all()
            await volume.ctx.freshness.sync()
            await volume.ctx.freshness.record()
            if self.run.rng.random() < 0.5:
                await volume.files.settle()
            await self.bury()
            await trio.lowlevel.checkpoint()

    async def bury(self) -> None:
        """One round of the reaper."""
        reaper = self.run.tree.volume.reaper
        ids, dirs, reaper._ids, reaper._dirs = reaper._ids, reaper._dirs, [], []
        await reaper.ctx.freshness.sync()
        await reaper._bury(ids, dirs)

    async def write_twice(self) -> None:
        """One opening, two writes to one place, and time between them for whatever else goes on."""
        path = self.run.rng.choice(sorted(self.run.at))
        known = self.run.files[self.run.at[path]]
        file = await self.run.tree.open(path)
        for byte in b"12":
            content = known.now[:1] + bytes([byte]) * 5000 + known.now[5001:]
            known.history.append(content)
            await file.write(1, bytes([byte]) * 5000)
            for _ in range(self.run.rng.randrange(4)):
                await trio.lowlevel.checkpoint()
        await self.run.tree.close(path)

    async def work(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.background)
            await self.run.steps()
            await self.write_twice()
            await self.run.step()
            nursery.cancel_scope.cancel()

    async def rewrite(self, path: bytes = b"a") -> None:
        """One opening, other content."""
        known = self.run.files[self.run.at[path]]
        known.history.append(known.now[:1] + b"#" * 9000)
        file = await self.run.tree.open(path)
        await file.truncate(1)
        await file.write(1, b"#" * 9000)
        await self.run.tree.close(path)

    def abandon(self) -> None:
        self.look()
        self.run.tree.kill()
        self.store.close_store()

    async def check(self, count: int, states: int) -> int:
        """Open what power cuts at `count` of the moments may leave, each beside the record of its time."""
        checked = 0
        for moment in self.run.rng.sample(self.moments, min(count, len(self.moments))):
            for survivor in survivors(moment.store, self.run.rng, states):
                self.run.tree.sample.freshness = moment.record.clone()
                await recovered(self.run, survivor, moment.expected)
                checked += 1
        for moment in self.moments:
            moment.store.close_store()
        return checked


async def one(order: Order, seed: int, *, count: int = 3, states: int = 3, chance: float = 0.1) -> int:
    recorded = await Recorded.make(order, seed)
    with recorded.watched(chance):
        await recorded.work()
    recorded.abandon()
    return await recorded.check(count, states)


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("part", range(2))
async def test_a_power_cut_never_leaves_less_than_was_recorded(order: Order, part: int) -> None:
    assert sum([await one(order, 1000 + part * 50 + seed) for seed in range(6)]) > 40


@pytest.mark.parametrize("order", ORDERS)
async def test_leaving_a_volume(order: Order) -> None:
    """At every call between the last change and the end of a clean unmount."""
    for seed in range(3):
        recorded = await Recorded.make(order, seed)
        await recorded.run.steps()
        with recorded.watched(0.7, threads=True):
            await recorded.run.tree.unmount()
        recorded.look()
        assert recorded.record.state_sequence > recorded.moments[0].record.state_sequence
        recorded.run.tree.volume = await recorded.run.tree.sample.open(recorded.store)
        recorded.abandon()
        assert await recorded.check(6, 2) > 6


@pytest.mark.parametrize("order", ORDERS)
async def test_entering_a_volume(order: Order) -> None:
    """At every call of a mount after a kill: the epoch is recorded only once it is there."""
    recorded = await Recorded.make(order, 5)
    await recorded.run.steps()
    killed = recorded.store.killed()
    recorded.run.tree.kill()
    recorded.store.close_store()
    recorded.store = recorded.run.tree.store = killed
    with recorded.watched(1.0, threads=True):
        await recorded.run.tree.mount()
    recorded.abandon()
    assert await recorded.check(12, 2) > 12


# daemons that record too early -----------------------------------------------------------------------------------

Patch = Callable[[pytest.MonkeyPatch], None]
Scenario = Callable[[Recorded], Awaitable[None]]


def knows_at_once(patch: pytest.MonkeyPatch) -> None:
    async def sync(self: Freshness) -> None:
        batch, self._unsynced = self._unsynced, {}
        for log_id, generation in batch.items():
            self._know(log_id, generation)

    patch.setattr(Freshness, "sync", sync)


async def closed_and_not_synced(recorded: Recorded) -> None:
    freshness = recorded.run.tree.volume.ctx.freshness
    await recorded.run.create(b"new")
    await freshness.sync()
    await freshness.record()


def tells_of_open_files(patch: pytest.MonkeyPatch) -> None:
    append = Journal._append

    def appended(self: Journal, key: memoryview) -> None:
        append(self, key)
        self.ctx.freshness.wrote(self.state.file_id, self._last_gen)

    patch.setattr(Journal, "_append", appended)


async def overwritten_in_place(recorded: Recorded) -> None:
    """A frame that no fsync follows, a sync of the file system, and the block it names is written again."""
    run, volume = recorded.run, recorded.run.tree.volume
    file = await run.tree.create(b"open")
    run.files[b"!"] = Known([b"", b"!" * 9000, b"!" * 100 + b"?" * 8900], {b"open"})
    await file.write(0, b"!" * 9000)
    await volume.files.commit_all()
    await volume.ctx.freshness.sync()
    await volume.ctx.freshness.record()
    await file.write(100, b"?" * 8900)


def counts_what_comes_during_a_sync(patch: pytest.MonkeyPatch) -> None:
    async def sync(self: Freshness) -> None:
        await self._sync_store()
        batch, self._unsynced = self._unsynced, {}
        for log_id, generation in batch.items():
            self._know(log_id, generation)

    patch.setattr(Freshness, "sync", sync)


async def written_during_a_sync(recorded: Recorded) -> None:
    freshness = recorded.run.tree.volume.ctx.freshness
    sync_store = freshness._sync_store

    async def slow() -> None:
        await sync_store()
        await recorded.run.create(b"new")

    freshness._sync_store = slow
    await freshness.sync()
    await freshness.record()


def records_before_its_fsync(patch: pytest.MonkeyPatch) -> None:
    sync = Journal._sync

    async def synced(self: Journal, *, data_only: bool) -> None:
        if self._last_gen:
            self.ctx.freshness.durable(self.state.file_id, self._last_gen)
            await self.ctx.freshness.record()
        await sync(self, data_only=data_only)

    patch.setattr(Journal, "_sync", synced)


async def synced_by_itself(recorded: Recorded) -> None:
    await recorded.rewrite()
    with recorded.watched(1.0, threads=True):
        await recorded.run.fsync(b"a")
        await recorded.run.tree.volume.ctx.freshness.record()


def knows_directories_when_written(patch: pytest.MonkeyPatch) -> None:
    settled = DirNode.settled

    def at_once(self: DirNode) -> None:
        settled(self)
        self.ctx.freshness.durable(self.dir_id, self.done_gen)

    patch.setattr(DirNode, "settled", at_once)


async def renamed_and_not_synced(recorded: Recorded) -> None:
    await recorded.run.rename(b"a", b"d/c")
    await recorded.run.tree.volume.ctx.freshness.record()


def tells_before_the_tree_has_it(patch: pytest.MonkeyPatch) -> None:
    append = DirNode._append

    def appended(self: DirNode, log_key: memoryview, payload: DirPayload) -> None:
        append(self, log_key, payload)
        self.done_gen = self.last_gen
        self.ctx.freshness.wrote(self.dir_id, self.last_gen)

    patch.setattr(DirNode, "_append", appended)


async def recorded_within_a_rename(recorded: Recorded) -> None:
    """Between the frames of a rename and its call on the tree, which waits for a sync of the target's log."""
    names = recorded.run.tree.volume.names
    arrival = names._sync_arrival

    async def slow(node: DirNode, sealed: bytes, log_id: bytes) -> None:
        await arrival(node, sealed, log_id)
        await recorded.run.tree.volume.ctx.freshness.sync()
        await recorded.run.tree.volume.ctx.freshness.record()

    with pytest.MonkeyPatch.context() as patch, recorded.watched(1.0, threads=True):
        patch.setattr(names, "_sync_arrival", slow)
        await recorded.run.exchange(b"a", b"b")


def buries_at_once(patch: pytest.MonkeyPatch) -> None:
    add_id = Reaper.add_id

    def added(self: Reaper, log_id: bytes) -> None:
        add_id(self, log_id)
        self.ctx.freshness.gone([log_id])

    patch.setattr(Reaper, "add_id", added)


async def deleted_and_not_synced(recorded: Recorded) -> None:
    await recorded.rewrite()
    await recorded.run.fsync(b"a")
    await recorded.run.tree.volume.ctx.freshness.record()
    await recorded.run.unlink(b"a")
    recorded.run.tree.forget_all()
    await recorded.run.tree.volume.ctx.freshness.record()


def records_the_next_state(patch: pytest.MonkeyPatch) -> None:
    record = Freshness.record

    async def early(self: Freshness, state_sequence: int | None = None) -> None:
        await record(self, self.__dict__.get("next_sequence", state_sequence))

    patch.setattr(Freshness, "record", early)


async def leaving(recorded: Recorded) -> None:
    ctx = recorded.run.tree.volume.ctx
    assert ctx.state is not None
    ctx.freshness.__dict__["next_sequence"] = ctx.state.ended().sequence
    with recorded.watched(1.0, threads=True):
        await recorded.run.tree.unmount()
    recorded.run.tree.volume = await recorded.run.tree.sample.open(recorded.store)


@pytest.mark.parametrize(
    ("scenario", "wrong"),
    [
        (closed_and_not_synced, knows_at_once),
        (overwritten_in_place, tells_of_open_files),
        (written_during_a_sync, counts_what_comes_during_a_sync),
        (synced_by_itself, records_before_its_fsync),
        (renamed_and_not_synced, knows_directories_when_written),
        (recorded_within_a_rename, tells_before_the_tree_has_it),
        (deleted_and_not_synced, buries_at_once),
        (leaving, records_the_next_state),
    ],
)
async def test_who_records_too_early_is_caught(scenario: Scenario, wrong: Patch) -> None:
    for patch in (None, wrong):
        caught = False
        for order in ORDERS:
            recorded = await Recorded.make(order, 1)
            with pytest.MonkeyPatch.context() as patches:
                if patch is not None:
                    patch(patches)
                await scenario(recorded)
            recorded.abandon()
            try:
                assert await recorded.check(8, 6) > 1
            except (Damaged, RolledBack, AssertionError):
                caught = True
                if patch is None:
                    raise
        assert caught == (patch is not None)


# syncs that fail -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["fdatasync", "fsync", "syncfs"])
async def test_a_failed_sync_is_never_recorded_as_a_success(call: str) -> None:
    """What a sync could not write stays in doubt for ever, whatever a later one says."""
    for seed in range(4):
        recorded = await Recorded.make(Order.DIRECTORY, 100 + seed)
        tree, store = recorded.run.tree, recorded.store
        path = sorted(recorded.run.at)[seed % 3]
        known = recorded.run.files[recorded.run.at[path]]
        file = await tree.open(path)
        known.history.append(known.now[:1] + b"#" * 6000)
        await file.truncate(1)
        await file.write(1, b"#" * 6000)
        store.fail(call, 1, errno.EIO)
        ctx = tree.volume.ctx
        for attempt in (file.journal.fsync, ctx.freshness.sync):
            with suppress(OSError):
                await attempt()
        await tree.close(path)
        with suppress(OSError):
            await ctx.freshness.sync()
        await ctx.freshness.record()
        recorded.abandon()
        await recorded.check(1, 12)


async def test_what_a_failed_sync_was_about_is_recorded_once_its_own_sync_succeeds() -> None:
    recorded = await Recorded.make(Order.DIRECTORY, 3)
    tree = recorded.run.tree
    file = await tree.create(b"new")
    await file.write(0, b"x" * 100)
    recorded.store.fail("fdatasync", 1, errno.EIO)
    with pytest.raises(OSError, match="Input/output"):
        await file.journal.fsync()
    log_id = file.state.file_id
    await tree.volume.ctx.freshness.sync()
    await tree.volume.ctx.freshness.record()
    assert recorded.record.floor(log_id) == 0
    await file.journal.fsync()
    await tree.volume.ctx.freshness.record()
    assert recorded.record.floor(log_id) == file.journal.last_gen > 0
    await tree.close(b"new")
    recorded.abandon()
    for moment in recorded.moments:
        moment.store.close_store()
