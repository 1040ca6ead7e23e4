"""One file, through the whole of `fs`, against a bytearray: whatever is done to it, it holds what was written.

And after a power cut at any moment, what it held at some moment since the last `fsync`.
"""

from __future__ import annotations

import logging
import random
import shutil
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import ClassVar, TypeVar

import pytest
import trio
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cryptfs.format.datafile import HEADER_BYTES
from cryptfs.fs import directory, journal
from cryptfs.fs.epoch import read_state
from cryptfs.fs.file import FileNode
from cryptfs.fs.making import Owner
from cryptfs.fs.rotation import Rotation
from cryptfs.fs.volume import Volume
from cryptfs.keys.cache import KeyCache
from cryptfs.keys.policy import CachePolicy
from cryptfs.ports import DekProvider
from cryptfs.store.local import LocalStore
from cryptfs.store.memory import MemoryStore
from cryptfs.testing.clock import FakeClock
from cryptfs.testing.keys import FakeKek, FakeUpstream
from cryptfs.testing.volumes import SampleVolume

T = TypeVar("T")

NAME = b"the file"
OWNER = Owner(0, 0)
SIZE_MAX = 6 * 16384
POLICIES = {
    "usual": CachePolicy(max_age_s=60), "few uses": CachePolicy(max_age_s=60, max_uses=2),
    "none": CachePolicy(caching=False),
}  # fmt: skip


def offsets(block_size: int) -> st.SearchStrategy[int]:
    """Anywhere, but mostly at and beside the borders of blocks."""
    borders = st.tuples(st.integers(0, SIZE_MAX // block_size), st.sampled_from((-17, -1, 0, 1, 33)))
    return st.one_of(borders.map(lambda b: max(0, b[0] * block_size + b[1])), st.integers(0, SIZE_MAX))


@pytest.fixture(autouse=True, scope="module")
def _logs_are_compacted_early() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        # A crash is no news here.
        patch.setattr(logging.getLogger("cryptfs"), "level", logging.ERROR)
        patch.setattr(journal, "_COMPACT_MIN_BYTES", 1024)
        patch.setattr(directory, "_COMPACT_MIN_BYTES", 1024)
        yield


class FileMachine(RuleBasedStateMachine):
    """The volume is closed and opened again, keys expire, the page cache goes cold: `model` stays the truth."""

    block_size: ClassVar[int] = 4096
    local: ClassVar[bool] = False

    store: MemoryStore | LocalStore
    sample: SampleVolume
    volume: Volume
    file: FileNode

    def __init__(self) -> None:
        super().__init__()
        self.model = bytearray()
        self.since_sync: list[bytes] = []
        """What a power cut may leave: every content since the last `fsync`."""
        self.synced = False
        self.policy = POLICIES["usual"]
        self.fill = 0
        self.opened = 0
        self.dir = Path(tempfile.mkdtemp(prefix="cfs-")) if self.local else None

    # plumbing ----------------------------------------------------------------------------------------------------

    def run(self, call: Callable[..., Awaitable[T]], *args: object) -> T:
        async def bounded() -> T:
            with trio.fail_after(20):
                return await call(*args)

        return trio.run(bounded)

    def make_keys(self, kek: FakeKek, clock: FakeClock) -> DekProvider:
        return KeyCache(FakeUpstream(kek), self.policy, clock)

    async def _open(self) -> None:
        self.volume = await self.sample.open(self.store)
        attr = await self.volume.names.lookup(self.volume.root, NAME)
        assert attr.size == len(self.model)
        attr.inode.lookups += 1
        self.inode = attr.inode
        self.file = await self.volume.files.open(attr.inode, writing=True)

    async def _close(self) -> None:
        if self.opened:
            await self.volume.files.release(self.inode)
        assert await self.volume.close()

    # beginning ---------------------------------------------------------------------------------------------------

    @initialize(policy=st.sampled_from(sorted(POLICIES)))
    def begin(self, policy: str) -> None:
        self.policy = POLICIES[policy]
        self.store = LocalStore(self.dir) if self.dir is not None else MemoryStore()
        self.run(self._begin)

    async def _begin(self) -> None:
        self.sample = SampleVolume(block_size=self.block_size, make_keys=self.make_keys)
        await self.sample.create(self.store)
        self.volume = await self.sample.open(self.store)
        attr, self.file = await self.volume.names.create(self.volume.root, NAME, 0o600, OWNER)
        attr.inode.lookups += 1
        self.inode = attr.inode
        self.opened = 1
        self.since_sync.append(b"")

    # what programs do --------------------------------------------------------------------------------------------

    def data(self, length: int) -> bytes:
        """Content that differs from write to write and from block to block."""
        self.fill = self.fill % 251 + 1
        return bytes((self.fill + i // 512) % 255 + 1 for i in range(0, length, 64) for _ in range(64))[:length]

    @rule(where=st.data(), length=st.one_of(st.integers(1, 40), st.integers(1, 40000), st.sampled_from((4096, 16384))))
    def write(self, where: st.DataObject, length: int) -> None:
        offset = where.draw(offsets(self.block_size), label="offset")
        self.put(offset, self.data(length))

    @rule(length=st.integers(1, 9000))
    def append(self, length: int) -> None:
        if len(self.model) < SIZE_MAX:
            self.put(len(self.model), self.data(length))

    @rule(block=st.integers(0, 5), times=st.integers(2, 4))
    def overwrite_a_block_again_and_again(self, block: int, times: int) -> None:
        for _ in range(times):
            self.put(block * self.block_size, self.data(self.block_size))

    def put(self, offset: int, data: bytes) -> None:
        assert self.run(self.file.write, offset, data) == len(data)
        if len(self.model) < offset:
            self.model.extend(bytes(offset - len(self.model)))
        self.model[offset : offset + len(data)] = data
        self.since_sync.append(bytes(self.model))

    @rule(where=st.data())
    def truncate(self, where: st.DataObject) -> None:
        size = where.draw(offsets(self.block_size), label="size")
        self.run(self.file.truncate, size)
        del self.model[size:]
        self.model.extend(bytes(size - len(self.model)))
        self.since_sync.append(bytes(self.model))

    @rule(where=st.data(), count=st.integers(1, 50000))
    def read(self, where: st.DataObject, count: int) -> None:
        offset = where.draw(offsets(self.block_size), label="offset")
        assert self.content(offset, count) == self.model[offset : offset + count]

    def content(self, offset: int, count: int) -> bytes:
        """Read into memory that held something else before."""
        out = memoryview(bytearray(b"?" * (count + 2 * self.block_size)))
        return bytes(self.run(self.file.read_into, out, offset, count))

    @rule(data_only=st.booleans())
    def fsync(self, data_only: bool) -> None:
        async def sync() -> None:
            await self.file.journal.fsync(data_only=data_only)

        self.run(sync)
        self.is_synced()

    def is_synced(self) -> None:
        self.since_sync = [bytes(self.model)]
        self.synced = True

    # what happens besides ----------------------------------------------------------------------------------------

    @rule()
    def release_and_open(self) -> None:
        async def again() -> None:
            await self.volume.files.release(self.inode)
            attr = await self.volume.files.attr(self.inode)
            assert attr.size == len(self.model)
            self.file = await self.volume.files.open(self.inode, writing=True)

        self.run(again)

    @rule()
    def settle(self) -> None:
        self.run(self.volume.files.settle)

    @rule()
    def settle_while_closed(self) -> None:
        async def settle() -> None:
            await self.volume.files.release(self.inode)
            await self.volume.files.settle()
            # The last frame may make a log bloated again, with the threshold as low as it is here.
            await self.volume.files.settle()
            assert self.inode.file is None
            self.file = await self.volume.files.open(self.inode, writing=True)

        self.run(settle)

    @rule()
    def compact(self) -> None:
        async def compact() -> None:
            await self.file.journal.fsync()
            await self.file.journal.compact()

        self.run(compact)
        self.is_synced()

    @rule(destroy=st.booleans())
    def rotate(self, destroy: bool) -> None:
        async def rotate() -> None:
            rotation = Rotation(self.volume, self.sample.rotate())
            await rotation.run()
            assert (rotation.left, rotation.failures) == (frozenset(), {})
            if destroy:
                config = self.sample.config
                await self.volume.ctx.adopt_volume_key(config.volume_key_kek, config.volume_key_wrapped)
                self.sample.kek.destroy_older()

        self.run(rotate)
        self.is_synced()

    @rule(seconds=st.sampled_from((1, 30, 61)))
    def let_time_pass(self, seconds: int) -> None:
        self.sample.clock.advance(seconds)

    @rule(policy=st.sampled_from(sorted(POLICIES)))
    def another_policy(self, policy: str) -> None:
        self.policy = POLICIES[policy]
        keys = self.volume.ctx.keys
        assert isinstance(keys, KeyCache)
        keys.set_policy(self.policy)

    @precondition(lambda self: not self.local)
    @rule(cold=st.booleans())
    def page_cache(self, cold: bool) -> None:
        assert isinstance(self.store, MemoryStore)
        self.store.cold = cold

    @rule()
    def unmount_and_mount(self) -> None:
        self.run(self._close)
        self.check_what_lies_on_disk()
        self.run(self._open)
        self.is_synced()

    @precondition(lambda self: not self.local)
    @rule(rng=st.randoms(use_true_random=False))
    def what_a_power_cut_would_leave(self, rng: random.Random) -> None:
        assert isinstance(self.store, MemoryStore)
        for survivor in [self.store.killed(), *self.store.crash_states(rng, 3)]:
            self.run(self._check_survivor, survivor)
            survivor.close_store()

    async def _check_survivor(self, store: MemoryStore) -> None:
        volume = await self.sample.open(store)
        try:
            attr = await volume.names.lookup(volume.root, NAME)
        except FileNotFoundError:
            assert not self.synced
        else:
            attr.inode.lookups += 1
            file = await volume.files.open(attr.inode)
            content = bytes(await file.read(0, SIZE_MAX * 2))
            assert content in self.since_sync
            assert attr.size == len(content)
            await file.write(1, b"life goes on")
            await volume.files.release(attr.inode)
        assert await volume.close()

    # what must hold ----------------------------------------------------------------------------------------------

    @invariant()
    def content_is_the_models(self) -> None:
        if self.opened:
            assert self.content(0, SIZE_MAX * 2) == self.model
            assert self.file.size == len(self.model)

    def check_what_lies_on_disk(self) -> None:
        store = self.store
        tree = store.open(store.root(), b"tree", 0)
        (name,) = [n for n in store.listdir(tree) if not n.startswith(b".")]
        assert store.lstat(tree, name).st_size == HEADER_BYTES + len(self.model)
        store.close(tree)
        tmp = store.open(store.root(), b"tmp", 0)
        assert store.listdir(tmp) == []
        store.close(tmp)
        state = trio.run(read_state, store, self.sample.keys(), self.sample.volume_id)
        assert state.clean
        assert state.unclean == ()

    def teardown(self) -> None:
        if self.opened:
            self.run(self._close)
            self.check_what_lies_on_disk()
            if isinstance(self.store, MemoryStore):
                assert self.store.open_descriptors() == 0
            self.store.close_store()
        if self.dir is not None:
            shutil.rmtree(self.dir)


class SmallBlocks(FileMachine):
    block_size = 4096


class LargeBlocks(FileMachine):
    block_size = 16384


class OnTheKernel(FileMachine):
    block_size = 4096
    local = True


few = settings(max_examples=40, stateful_step_count=40)
TestSmallBlocks = SmallBlocks.TestCase
TestSmallBlocks.settings = few
TestLargeBlocks = LargeBlocks.TestCase
TestLargeBlocks.settings = few
TestOnTheKernel = OnTheKernel.TestCase
TestOnTheKernel.settings = settings(max_examples=15, stateful_step_count=30)
