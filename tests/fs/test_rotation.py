"""KEK rotation, the filesystem's side: all is rewritten, nothing changes, and the old KEK is needed no more."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from pathlib import Path

import pytest
import trio
import trio.testing

from cryptfs.errors import Damaged, VolumeLocked
from cryptfs.format.dirlog import Entry
from cryptfs.format.log import HEADER_BYTES, decode_header
from cryptfs.fs.context import sidecar_name, write_all
from cryptfs.fs.directory import DirNode
from cryptfs.fs.inodes import Inode
from cryptfs.fs.pace import Pace, Turn
from cryptfs.fs.rewrapping import KEYS_AT_ONCE
from cryptfs.fs.rotation import Progress, Rotation
from cryptfs.keys.cache import KeyCache
from cryptfs.keys.policy import CachePolicy
from cryptfs.names import tree_name
from cryptfs.ports import RENAME_EXCHANGE, KeyRun, Kit
from cryptfs.store.local import LocalStore
from cryptfs.store.memory import MemoryStore
from cryptfs.testing.clock import FakeClock
from cryptfs.testing.fleeting import FleetingKeys, expiring
from cryptfs.testing.freshness import FakeRecord
from cryptfs.testing.keys import FakeDekProvider, FakeKek, FakeUpstream
from cryptfs.types import Kind
from tests.fs.tree import Tree, damage_of, errno_of

BLOCK = 4096
LONG = b"L" * 200


DOMAIN = b"v" * 16
XATTRS = (b"d/e/xattrs", b"fifo", b"link", b"d/e", b"")


async def populate(tree: Tree) -> dict[bytes, bytes]:
    """Every kind of thing there is; the contents of the files."""
    await tree.mkdir(b"d")
    await tree.mkdir(b"d/e")
    await tree.mkdir(b"empty")
    files = {
        b"small": b"s" * 10, b"empty file": b"", b"d/blocks": os.urandom(5 * BLOCK + 7), b"d/e/deep": b"deep" * 3000,
        b"d/" + LONG: b"long", b"d/e/xattrs": b"x" * 5000,
    }  # fmt: skip
    for path, content in files.items():
        await tree.write(path, content)
    file = await tree.open(b"d/blocks")
    await file.journal.fsync()
    # The next version goes to the twin.
    await file.write(BLOCK, b"t" * (BLOCK + 9))
    files[b"d/blocks"] = files[b"d/blocks"][:BLOCK] + b"t" * (BLOCK + 9) + files[b"d/blocks"][2 * BLOCK + 9 :]
    await file.truncate(20 * BLOCK)
    files[b"d/blocks"] = files[b"d/blocks"].ljust(20 * BLOCK, b"\0")
    await tree.close(b"d/blocks")
    await tree.symlink(b"target of link", b"link")
    await tree.symlink(b"t" * 3000, b"d/link")
    await tree.mknod(b"fifo", stat.S_IFIFO | 0o644)
    await tree.mknod(b"d/plain fifo", stat.S_IFIFO | 0o644)
    await tree.link(b"small", b"d/hard link")
    files[b"d/hard link"] = files[b"small"]
    for path in XATTRS:
        await tree.volume.xattrs.set(await tree.inode(path), b"user.name", b"value of " + path)
    async with tree.volume.names.changing(await tree.inode(b"empty")) as node:
        await node.give_to_domain(DOMAIN)
    return files


async def look(tree: Tree, files: dict[bytes, bytes]) -> None:
    """That all `populate` made is there."""
    for path, content in files.items():
        assert await tree.read(path) == content, path
    assert await tree.readlink(b"link") == b"target of link"
    assert await tree.readlink(b"d/link") == b"t" * 3000
    for path in XATTRS:
        inode = await tree.inode(path)
        assert await tree.volume.xattrs.get(inode, b"user.name") == b"value of " + path
    assert await tree.names() == sorted([b"d", b"empty", b"small", b"empty file", b"link", b"fifo"])
    assert (await tree.volume.inodes.dir(await tree.inode(b"empty"))).domain == DOMAIN


def data_files(tree: Tree) -> dict[str, tuple[bytes, int]]:
    """Name and content and time of change of everything in the tree but logs, and of twins."""
    assert isinstance(tree.store, LocalStore)
    out = {}
    top = Path(os.readlink(f"/proc/self/fd/{tree.store.root()}"))
    for path in top.rglob("*"):
        if (
            path.is_file()
            and not path.is_symlink()
            and (path.suffix == ".twin" or "tree" in path.parts)
            and path.name != ".dir"
        ):
            out[str(path)] = (path.read_bytes(), path.stat().st_mtime_ns)
        elif path.is_dir():
            out[str(path)] = (b"", path.stat().st_mtime_ns if "tree" in path.parts else 0)
    return out


async def rotated(tree: Tree, *, check: bool = True, workers: int = 1) -> Rotation:
    """A new KEK, everything rewritten under it, the old one destroyed."""
    version = tree.sample.rotate()
    rotation = Rotation(tree.volume, version, Pace(workers=workers))
    await rotation.run()
    if check:
        assert (rotation.left, rotation.failures) == (frozenset(), {})
        await tree.volume.ctx.adopt_volume_key(tree.sample.config.volume_key_kek, tree.sample.config.volume_key_wrapped)
        tree.sample.kek.destroy_older()
    return rotation


def forget_keys(tree: Tree) -> None:
    """As if the max age were over."""
    assert isinstance(tree.volume.ctx.keys, FakeDekProvider)
    tree.volume.ctx.keys.wipe()


def versions(tree: Tree) -> set[int]:
    """KEK versions in the headers of all sidecars."""
    ctx, out = tree.volume.ctx, set()
    for first in range(256):
        where = ctx.sidecar_dir(bytes([first]))
        for name in ctx.store.listdir(where):
            if len(name) == 32:
                fd = ctx.store.open(where, name, os.O_RDONLY)
                out.add(decode_header(ctx.store.pread(fd, HEADER_BYTES, 0)).kek_version)
                ctx.store.close(fd)
    return out


# all of it ---------------------------------------------------------------------------------------------------------


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


async def test_with_keys_that_expire_at_any_await(tree: Tree) -> None:
    files = await populate(tree)
    fake = FakeDekProvider(tree.sample.kek, tree.sample.clock)
    await tree.remount(keys=FleetingKeys(fake))
    with expiring(fake.wipe):
        await rotated(tree)
        await look(tree, files)


# what is in use ----------------------------------------------------------------------------------------------------


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


# what cannot be done -----------------------------------------------------------------------------------------------


def spoil(tree: Tree, log_id: bytes, at: int) -> None:
    ctx = tree.volume.ctx
    fd = ctx.store.open(ctx.sidecar_dir(log_id), sidecar_name(log_id), os.O_RDWR)
    byte = ctx.store.pread(fd, 1, at)
    ctx.store.pwrite(fd, bytes([byte[0] ^ 1]), at)
    ctx.store.close(fd)


async def test_a_damaged_sidecar_stays_as_it_is_and_keeps_the_old_kek(
    tree: Tree, caplog: pytest.LogCaptureFixture
) -> None:
    files = await populate(tree)
    await tree.remount()
    log_id = (await tree.inode(b"d/e/deep")).log_id
    spoil(tree, log_id, HEADER_BYTES + 130)
    version = tree.sample.rotate()
    rotation = Rotation(tree.volume, version)
    await rotation.run()
    assert rotation.left == {log_id} == rotation.failures.keys()
    assert rotation.progress.failed == 1
    assert sum(log_id.hex() in record.getMessage() for record in caplog.records) == 1
    spoil(tree, log_id, HEADER_BYTES + 130)
    assert await tree.read(b"d/e/deep") == files[b"d/e/deep"]
    await rotation.run()
    assert (rotation.left, rotation.progress.failed) == (frozenset(), 0)


async def test_poison_is_not_forgotten(tree: Tree) -> None:
    """Of a file some of whose blocks are lost with a frame, a snapshot would say that they are holes."""
    await tree.write(b"file", b"1" * BLOCK)
    file = await tree.open(b"file")
    await file.write(BLOCK, b"2" * BLOCK)
    await tree.close(b"file")
    file = await tree.open(b"file")
    await file.write(2 * BLOCK, b"3" * BLOCK)
    await tree.close(b"file")
    assert file.journal.log is None
    await tree.remount()
    inode = await tree.inode(b"file")
    file = await tree.open(b"file")
    await file.journal.load()
    assert file.journal.log is not None
    await tree.close(b"file")
    ctx = tree.volume.ctx
    fd = ctx.store.open(ctx.sidecar_dir(inode.log_id), sidecar_name(inode.log_id), os.O_RDONLY)
    raw = ctx.store.pread(fd, 1 << 20, 0)
    ctx.store.close(fd)
    second = raw.index(b"CFF1", raw.index(b"CFF1", HEADER_BYTES) + 4)
    spoil(tree, inode.log_id, second + 152 + 40)  # inside the second frame's payload
    rotation = await rotated(tree, check=False)
    assert rotation.left == {inode.log_id}
    file = await tree.open(b"file")
    assert await file.read(0, BLOCK) == b"1" * BLOCK
    with pytest.raises(Damaged):
        await file.read(BLOCK, BLOCK)
    # Written anew, nothing of it is lost any more.
    await file.write(BLOCK, b"4" * BLOCK)
    await rotation.run()
    assert rotation.left == frozenset()
    await tree.close(b"file")


async def test_a_directory_that_cannot_be_read_keeps_the_old_kek(tree: Tree) -> None:
    await tree.mkdir(b"d")
    await tree.mkdir(b"d/e")
    await tree.write(b"d/e/file", b"content")
    await tree.remount()
    inode = await tree.inode(b"d")
    below, file = await tree.inode(b"d/e"), await tree.inode(b"d/e/file")
    ids = {below.log_id, file.log_id, inode.log_id}
    tree.forget_all()
    while tree.volume.inodes._dirs:
        tree.volume.inodes._dirs.popitem()[1].close()
    root = await tree.volume.inodes.dir(tree.volume.root)
    (entry,) = root.entries.values()
    ctx = tree.volume.ctx
    inner = ctx.store.open(root.fd, tree_name(entry.sealed), os.O_RDONLY | os.O_DIRECTORY)
    fd = ctx.store.open(inner, b".dir", os.O_RDWR)
    ctx.store.pwrite(fd, b"\xff", HEADER_BYTES + 125)
    rotation = await rotated(tree, check=False)
    assert inode.log_id in rotation.failures
    assert {inode.log_id, file.log_id} <= rotation.left <= ids
    assert file.log_id not in rotation.failures
    ctx.store.close(fd)
    ctx.store.close(inner)


async def test_a_full_disk_stops_it_and_changes_nothing() -> None:
    store = MemoryStore()
    tree = await Tree.make(store)
    files = await populate(tree)
    await tree.remount()
    version = tree.sample.rotate()
    for stop_at in (1, 5, 9):
        rotation = Rotation(tree.volume, version)
        calls = 0

        def full(call: str) -> None:
            nonlocal calls
            if call == "pwrite":
                calls += 1
                if calls >= stop_at:  # noqa: B023
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        store.before_call = full
        assert await errno_of(rotation.run()) == "ENOSPC"
        store.before_call = None
        forget_keys(tree)
        await look(tree, files)
        assert not [name for first in range(256) for name in store.listdir(tree.volume.ctx.sidecar_dir(bytes([first])))
                    if name.endswith(b".new")]  # fmt: skip
    await Rotation(tree.volume, version).run()
    await tree.volume.ctx.adopt_volume_key(version, tree.sample.config.volume_key_wrapped)
    tree.sample.kek.destroy_older()
    await tree.remount()
    await look(tree, files)
    await tree.finish()
    store.close_store()


async def test_a_locked_volume_stops_it(tree: Tree) -> None:
    files = await populate(tree)
    await tree.remount()
    keys = tree.volume.ctx.keys
    assert isinstance(keys, FakeDekProvider)
    rotation = Rotation(tree.volume, tree.sample.rotate())
    keys.failure = VolumeLocked("locked")
    with pytest.raises(VolumeLocked):
        await rotation.run()
    keys.failure = None
    await rotation.run()
    assert rotation.left == frozenset()
    await look(tree, files)


async def test_a_read_only_mount_refuses(tree: Tree) -> None:
    await tree.remount(read_only=True)
    assert await errno_of(Rotation(tree.volume, 2).run()) == "EROFS"


async def test_cancelled_and_gone_on_with(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    files = await populate(tree)
    await tree.remount()
    version = tree.sample.rotate()
    original, left, scopes = Turn.rest, 0, list[trio.CancelScope]()

    async def rest(self: Turn) -> None:
        nonlocal left
        left -= 1
        if not left:
            scopes[-1].cancel()
        await original(self)

    monkeypatch.setattr(Turn, "rest", rest)
    for least in range(1, 40, 4):
        left = least
        scopes.append(trio.CancelScope())
        with scopes[-1]:
            await Rotation(tree.volume, version).run()
        assert tree.volume.names.on_arrival is None
        forget_keys(tree)
        await look(tree, files)
    assert sum(scope.cancelled_caught for scope in scopes) >= 4
    rotation = Rotation(tree.volume, version)
    await rotation.run()
    assert rotation.left == frozenset()


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
