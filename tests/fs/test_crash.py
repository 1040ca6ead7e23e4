"""Power cuts and kills during short runs of operations through the whole of `fs`, on the disk model.

Not every state there is (that is a later issue's), but a sample with a fixed seed: after each, the volume opens, what
`fsync` acknowledged is there, every file is a prefix of its own history, and the volume can be used and left cleanly.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest

from cryptfs.errors import CryptfsError, Damaged
from cryptfs.ports import RENAME_EXCHANGE
from cryptfs.store.disk_model import Order
from cryptfs.store.local import LocalStore
from cryptfs.store.memory import MemoryStore
from cryptfs.testing.volumes import SampleVolume
from cryptfs.types import Kind
from tests.fs.tree import Tree, errno_of

BLOCK = 4096
WRITES = {
    "pwrite", "pwritev", "ftruncate", "fsync", "fdatasync", "syncfs", "open", "rename", "unlink", "link", "mkdir",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _crashes_are_no_news(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, "cryptfs")


@dataclass
class Known:
    """One file: everything it ever held, in order.

    `acked`: index of what was acknowledged last; None: nothing, not even its name.
    `names`: where it may be found; it is at one of them at least if `acked`, unless `gone`.
    """

    history: list[bytes]
    names: set[bytes]
    acked: int | None = None
    gone: bool = False

    @property
    def now(self) -> bytes:
        return self.history[-1]

    def copy(self) -> Known:
        return Known(list(self.history), set(self.names), self.acked, self.gone)


@dataclass
class Run:
    """Operations on a tree, and what may be found after a crash. Files are told apart by their first byte."""

    tree: Tree
    rng: random.Random
    files: dict[bytes, Known] = field(default_factory=dict)
    at: dict[bytes, bytes] = field(default_factory=dict)
    """Path -> which file."""
    made: int = 0
    done: list[str] = field(default_factory=list)
    touched: set[bytes] = field(default_factory=set)

    def bytes_of(self, who: bytes, count: int) -> bytes:
        """Content that starts with the file's own byte."""
        return who + bytes(self.rng.randrange(1, 256) for _ in range(8)) * (count // 8) + who * ((count - 1) % 8)

    # operations: each notes beforehand what may be found from now on -------------------------------------------------

    async def create(self, path: bytes) -> None:
        self.made += 1
        who = bytes([64 + self.made])
        data = self.bytes_of(who, self.rng.choice((100, BLOCK, 2 * BLOCK + 7)))
        self.files[who] = Known([b"", data], {path})
        self.at[path] = who
        self.touched = {path}
        file = await self.tree.create(path)
        await file.write(0, data)
        await self.tree.close(path)

    async def change(self, path: bytes) -> None:
        """Write somewhere behind the first byte, or cut, in one or two calls on one opening."""
        known = self.files[self.at[path]]
        file = await self.tree.open(path)
        self.touched = {path}
        for _ in range(self.rng.randint(1, 3)):
            content = bytearray(known.now)
            if self.rng.random() < 0.3 and len(content) > 1:
                size = self.rng.choice((1, len(content) // 2, BLOCK, 3 * BLOCK + 1))
                content = content[:size].ljust(size, b"\0")
                known.history.append(bytes(content))
                await file.truncate(size)
            else:
                offset = self.rng.choice((1, len(content), BLOCK - 3, BLOCK, len(content) + BLOCK))
                data = self.bytes_of(b"+", self.rng.choice((5, BLOCK, BLOCK + 9)))
                content.extend(bytes(max(0, offset - len(content))))
                content[offset : offset + len(data)] = data
                known.history.append(bytes(content))
                await file.write(offset, data)
        await self.tree.close(path)

    async def fsync(self, path: bytes) -> None:
        known = self.files[self.at[path]]
        version = len(known.history) - 1
        await self.tree.fsync(path)
        # The file is durable, a new name of it need not be: that takes a sync of the directory.
        known.acked = version

    async def unlink(self, path: bytes) -> None:
        who = self.at.pop(path)
        if who not in self.at.values():
            self.files[who].gone = True
        await self.tree.unlink(path)

    async def rename(self, old: bytes, new: bytes) -> None:
        who, victim = self.at.pop(old), self.at.get(new)
        self.at[new] = who
        self.touched = {new}
        self.files[who].names.add(new)
        if victim is not None and victim not in self.at.values():
            self.files[victim].gone = True
        await self.tree.rename(old, new)

    async def exchange(self, a: bytes, b: bytes) -> None:
        self.at[a], self.at[b] = self.at[b], self.at[a]
        self.touched = {a, b}
        for path in (a, b):
            self.files[self.at[path]].names.add(path)
        await self.tree.rename(a, b, RENAME_EXCHANGE)

    async def link(self, old: bytes, new: bytes) -> None:
        self.at[new] = self.at[old]
        self.touched = {new}
        self.files[self.at[old]].names.add(new)
        await self.tree.link(old, new)

    async def symlink(self, path: bytes) -> None:
        await self.tree.symlink(b"target of " + path, path)

    async def move_into_new_dir(self, path: bytes) -> None:
        self.made += 1
        above = b"new%d" % self.made
        await self.tree.mkdir(above)
        await self.rename(path, above + b"/moved")

    async def steps(self) -> None:
        """Two operations, the first one often followed by a sync of what it touched."""
        await self.step()
        if self.rng.random() < 0.6:
            path = self.rng.choice(sorted(self.touched & self.at.keys()) or sorted(self.at))
            self.done.append(f"fsync {path!r}")
            await self.fsync(path)
        await self.step()

    async def step(self) -> None:
        """One operation, chosen among those that make sense now."""
        paths = sorted(self.at)
        path = self.rng.choice(paths)
        others = [p for p in paths if p != path]
        fresh = b"n%d" % self.made + (b"." * 200 if self.rng.random() < 0.25 else b"")
        choices: list[tuple[float, str, Callable[[], Awaitable[None]]]] = [
            (3, f"change {path!r}", lambda: self.change(path)),
            (2, f"fsync {path!r}", lambda: self.fsync(path)),
            (1, f"create d/{fresh!r}", lambda: self.create(b"d/" + fresh)),
            (1, f"create {fresh!r}", lambda: self.create(fresh)),
            (1, f"rename {path!r} d/{fresh!r}", lambda: self.rename(path, b"d/" + fresh)),
            (1, "symlink", lambda: self.symlink(fresh)),
            (1, f"link {path!r}", lambda: self.link(path, b"l" + fresh)),
            (1, f"move {path!r} into a new directory", lambda: self.move_into_new_dir(path)),
        ]
        if others:
            other = self.rng.choice(others)
            choices.append((1, f"exchange {path!r} {other!r}", lambda: self.exchange(path, other)))
            choices.append((1, f"unlink {path!r}", lambda: self.unlink(path)))
            if self.at[other] != self.at[path]:
                choices.append((2, f"rename {path!r} {other!r}", lambda: self.rename(path, other)))
        (name, operation), *_ = self.rng.choices([choice[1:] for choice in choices], [choice[0] for choice in choices])
        self.made += 1
        self.done.append(name)
        await operation()

    def expected(self) -> dict[bytes, Known]:
        return {who: known.copy() for who, known in self.files.items()}


async def check_symlink(tree: Tree, path: bytes, *, synced: bool) -> None:
    """One that was synced has its target; another may have lost it, which shows as damage of it alone."""
    try:
        target = await tree.readlink(path)
    except Damaged:
        assert not synced
    else:
        assert target == b"target of " + path


async def check(tree: Tree, expected: dict[bytes, Known], synced: frozenset[bytes] = frozenset()) -> dict[bytes, bytes]:
    """Everything in the tree, after checking it against what may be there."""
    found: dict[bytes, bytes] = {}
    todo = [b""]
    while todo:
        above = todo.pop()
        for name in await tree.names(above):
            path = above + b"/" + name if above else name
            attr = await tree.lookup(path)
            if attr.inode.kind == Kind.DIR:
                todo.append(path)
            elif attr.inode.kind == Kind.SYMLINK:
                await check_symlink(tree, path, synced=name in synced)
            else:
                found[path] = await tree.read(path)
                assert attr.size == len(found[path])
    for path, content in found.items():
        owners = [k for k in expected.values() if path in k.names and content in k.history[k.acked or 0 :]]
        assert owners, f"{path!r} holds {len(content)} bytes, {content[:12]!r}…: never, or before it was synced"
    for who, known in expected.items():
        if known.acked is not None and not known.gone:
            assert any(found.get(name) in known.history[known.acked :] for name in known.names), f"{who!r} is lost"
    return found


async def recovered(run: Run, store: MemoryStore, expected: dict[bytes, Known]) -> None:
    """Open what a crash left, check it, use it, leave it, and check it again."""
    tree = Tree(store, run.tree.sample, await run.tree.sample.open(store))
    try:
        found = await check(tree, expected)
    except (AssertionError, Damaged, OSError) as error:
        error.add_note(f"after {', '.join(run.done)}")
        raise
    # What was found is settled: it reads the same from now on, even after one more kill.
    tree.kill()
    again = Tree(store.killed(), run.tree.sample, run.tree.volume)
    store.close_store()
    await again.mount()
    assert await check(again, expected) == found
    changed = {content[:1]: path for path, content in sorted(found.items())}  # one name of each file
    for path in changed.values():
        await again.write(path, b"written after the crash: " + path, sync=path < b"d")
    await again.create(b"created after the crash")
    await again.unmount()
    await again.mount()
    for path in changed.values():
        assert await again.read(path) == b"written after the crash: " + path
    assert await again.read(b"created after the crash") == b""
    await again.finish()
    again.store.close_store()


async def base(order: Order, seed: int) -> Run:
    """A volume with a few files, left cleanly and mounted again."""
    store = MemoryStore(order=order)
    run = Run(await Tree.make(store), random.Random(seed))
    await run.tree.mkdir(b"d")
    for path in (b"a", b"b", b"d/c"):
        await run.create(path)
    await run.change(b"b")
    await run.tree.remount()
    for known in run.files.values():
        known.acked = len(known.history) - 1
    return run


@contextmanager
def watched(store: MemoryStore, rng: random.Random, chance: float, look: Callable[[], None]) -> Iterator[None]:
    """Call `look` now and then just before the store is changed."""

    def before(call: str) -> None:
        if call in WRITES and rng.random() < chance:
            store.before_call = None
            look()
            store.before_call = before

    store.before_call = before
    yield
    store.before_call = None


def survivors(store: MemoryStore, rng: random.Random, limit: int) -> Iterator[MemoryStore]:
    yield store.killed()
    yield from store.crash_states(rng, limit)


@pytest.mark.slow
@pytest.mark.parametrize("order", [Order.DIRECTORY, Order.JOURNAL])
@pytest.mark.parametrize("part", range(4))
async def test_a_power_cut_between_any_two_calls_loses_nothing_acknowledged(order: Order, part: int) -> None:
    for workload in range(6):
        seed = part * 100 + workload
        run = await base(order, seed)
        store = run.tree.store
        assert isinstance(store, MemoryStore)
        moments: list[tuple[MemoryStore, dict[bytes, Known]]] = []

        with watched(store, run.rng, 0.12, lambda: moments.append((store.killed(), run.expected()))):  # noqa: B023
            await run.steps()
        moments.append((store.killed(), run.expected()))
        run.tree.kill()
        store.close_store()
        for moment, expected in moments[-4:]:
            for survivor in survivors(moment, run.rng, 4):
                await recovered(run, survivor, expected)
            moment.close_store()


@pytest.mark.parametrize("order", [Order.DIRECTORY, Order.JOURNAL])
async def test_a_synced_symlink_has_its_target(order: Order) -> None:
    store = MemoryStore(order=order)
    tree = await Tree.make(store)
    run = Run(tree, random.Random(5))
    await run.symlink(b"synced")
    await tree.fsync(b"")
    await run.symlink(b"later")
    for survivor in survivors(store, run.rng, 20):
        left = Tree(survivor, tree.sample, await tree.sample.open(survivor))
        assert b"synced" in await left.names()
        await check(left, {}, frozenset({b"synced"}))
        await left.finish()
        survivor.close_store()
    await tree.finish()
    store.close_store()


@pytest.mark.slow
@pytest.mark.parametrize("order", [Order.DIRECTORY, Order.JOURNAL])
async def test_a_kill_and_then_a_power_cut(order: Order) -> None:
    """What the next daemon finds in the page cache "reads back", which is not "durable"."""
    for seed in range(8):
        run = await base(order, seed)
        await run.steps()
        store = run.tree.store
        assert isinstance(store, MemoryStore)
        expected = run.expected()
        killed = store.killed()
        run.tree.kill()
        store.close_store()
        tree = Tree(killed, run.tree.sample, await run.tree.sample.open(killed))
        second = Run(tree, run.rng, done=[*run.done, "kill"])
        for path, content in (await check(second.tree, expected)).items():
            if content:
                who = content[:1]
                second.at[path] = who
                second.files.setdefault(who, Known([content], set())).names.add(path)
        for survivor in killed.crash_states(run.rng, 3):
            await recovered(second, survivor, expected)
        # The second daemon goes on from there: what it acknowledges rests on what the first one left.
        for path in sorted(second.at):
            second.done.append(f"change and fsync {path!r}")
            await second.change(path)
            await second.fsync(path)
        await second.change(second.rng.choice(sorted(second.at)))
        expected = second.expected()
        for survivor in survivors(killed, run.rng, 6):
            await recovered(second, survivor, expected)
        second.tree.kill()
        killed.close_store()


async def test_a_new_volume_is_there_or_not() -> None:
    store = MemoryStore()
    sample = SampleVolume()
    moments: list[MemoryStore] = []
    rng = random.Random(3)

    with watched(store, rng, 0.03, lambda: moments.append(store.killed())):
        await sample.create(store)
    assert len(moments) >= 3
    for moment in moments:
        for survivor in moment.crash_states(rng, 3):
            if b"volume" in survivor.listdir(survivor.root()):
                tree = Tree(survivor, sample, await sample.open(survivor))
                await tree.write(b"file", b"content")
                await tree.finish()
            else:
                with pytest.raises((OSError, CryptfsError)):
                    await sample.open(survivor)
                assert survivor.open_descriptors() == 0
            survivor.close_store()
        moment.close_store()
    # Once `create` has returned, no power cut takes it away.
    for survivor in store.crash_states(rng, 3):
        tree = Tree(survivor, sample, await sample.open(survivor))
        await tree.finish()
        survivor.close_store()
    store.close_store()


async def test_a_daemon_that_is_killed_on_a_real_filesystem(local: LocalStore) -> None:
    tree = await Tree.make(local)
    await tree.write(b"closed cleanly", b"1" * 10000)
    await tree.remount()
    await tree.mkdir(b"dir")
    await tree.write(b"dir/synced", b"2" * 10000, sync=True)
    await tree.write(b"released", b"3" * 10000)
    file = await tree.create(b"open")
    await file.write(0, b"4" * 10000)
    await tree.symlink(b"target", b"link")
    synced = await tree.open(b"dir/synced")
    await synced.write(0, b"5" * 100)
    await tree.write(b"replacement", b"6" * 10)
    await tree.rename(b"replacement", b"closed cleanly")
    tree.kill()
    await tree.mount()
    assert await tree.names() == [b"closed cleanly", b"dir", b"link", b"open", b"released"]
    assert await tree.read(b"closed cleanly") == b"6" * 10
    assert await tree.read(b"released") == b"3" * 10000
    assert await tree.readlink(b"link") == b"target"
    assert await tree.read(b"dir/synced") in (b"2" * 10000, b"5" * 100 + b"2" * 9900)
    assert await tree.read(b"open") in (b"", b"4" * 10000)
    await tree.write(b"open", b"7" * 5000)
    await tree.remount()
    assert await tree.read(b"open") == b"7" * 5000
    assert await errno_of(tree.lookup(b"replacement")) == "ENOENT"
    await tree.finish()


@pytest.mark.parametrize("times", [1, 3])
async def test_killed_again_and_again(times: int) -> None:
    store = MemoryStore()
    tree = await Tree.make(store)
    await tree.write(b"file", b"0" * 9000, sync=True)
    for number in range(1, times + 1):
        file = await tree.open(b"file")
        await file.write(0, b"%d" % number * 5000)
        await file.journal.fsync()
        await file.write(100, b"x" * 100)
        killed = store.killed()
        tree.kill()
        store.close_store()
        tree.store = store = killed
        await tree.mount()
        content = await tree.read(b"file")
        assert content[:100] + content[200:] == b"%d" % number * 4900 + b"0" * 4000
        assert content[100:200] in (b"%d" % number * 100, b"x" * 100)
    await tree.finish()
    store.close_store()
