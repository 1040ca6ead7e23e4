"""A rotation while everything is in use: random operations on many files, held against what they must contain."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable

import pytest
import trio

from cryptfs.fs.pace import Pace
from cryptfs.fs.rotation import Rotation
from cryptfs.store.local import LocalStore
from cryptfs.testing.keys import FakeDekProvider
from tests.fs.tree import Tree

FILES = 16
BLOCK = 4096


class Load:
    """Files by path, in three directories; some are open, some of those have no name any more."""

    def __init__(self, tree: Tree, seed: int) -> None:
        self.tree = tree
        self.rng = random.Random(seed)
        self.files: dict[bytes, bytearray] = {}
        self.made = 0
        self.done = 0
        self.unnamed: list[tuple[object, bytearray]] = []

    def path(self) -> bytes:
        self.made += 1
        return self.rng.choice((b"", b"one/", b"two/")) + b"file %d" % self.made

    def data(self, size: int) -> bytes:
        return self.rng.randbytes(8) * (size // 8 + 1)

    async def create(self) -> None:
        path = self.path()
        content = self.data(self.rng.choice((0, 50, 3 * BLOCK)))
        await self.tree.write(path, content)
        self.files[path] = bytearray(content)

    async def step(self) -> None:
        """One operation."""
        operations: tuple[Callable[[bytes], Awaitable[None]], ...] = (
            self.write, self.write, self.write, self.cut, self.read, self.read, self.sync, self.rename, self.unlink,
        )  # fmt: skip
        self.done += 1
        if len(self.files) < FILES // 2:
            await self.create()
        else:
            await self.rng.choice(operations)(self.rng.choice(sorted(self.files)))

    async def write(self, path: bytes) -> None:
        file, content = await self.tree.open(path), self.files[path]
        inode = self.tree.open_files[-1]
        for _ in range(self.rng.randint(1, 3)):
            offset, data = self.rng.randrange(4 * BLOCK), self.data(self.rng.choice((9, BLOCK, 2 * BLOCK)))
            content.extend(bytes(max(0, offset - len(content))))
            content[offset : offset + len(data)] = data
            await file.write(offset, data)
            assert await file.read(0, 1 << 20) == content
        await self.tree.release(inode)

    async def cut(self, path: bytes) -> None:
        file, size = await self.tree.open(path), self.rng.randrange(3 * BLOCK)
        inode = self.tree.open_files[-1]
        content = self.files[path]
        del content[size:]
        content.extend(bytes(size - len(content)))
        await file.truncate(size)
        await self.tree.release(inode)

    async def read(self, path: bytes) -> None:
        assert await self.tree.read(path) == self.files[path]

    async def sync(self, path: bytes) -> None:
        await self.tree.fsync(path)

    async def rename(self, path: bytes) -> None:
        new = self.path()
        await self.tree.rename(path, new)
        self.files[new] = self.files.pop(path)

    async def unlink(self, path: bytes) -> None:
        file = await self.tree.open(path)
        await self.tree.unlink(path)
        self.unnamed.append((file, self.files.pop(path)))

    async def look(self) -> None:
        for path, content in self.files.items():
            assert await self.tree.read(path) == content
        for file, content in self.unnamed:
            assert await file.read(0, 1 << 20) == content  # type: ignore[attr-defined]


@pytest.mark.parametrize("seed", range(3))
async def test_random_operations_while_everything_is_rewritten(local: LocalStore, seed: int) -> None:
    tree = await Tree.make(local)
    for name in (b"one", b"two"):
        await tree.mkdir(name)
    load = Load(tree, seed)
    for _ in range(FILES):
        await load.create()
    if seed % 2:
        await tree.remount()
    finished = trio.Event()
    for _ in range(2):
        finished = trio.Event()
        rotation = Rotation(tree.volume, tree.sample.rotate(), Pace(0.7))

        async def rotate(rotation: Rotation = rotation, finished: trio.Event = finished) -> None:
            await rotation.run()
            finished.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(rotate)
            before = load.done
            while not finished.is_set():
                await load.step()
                await trio.lowlevel.checkpoint()
            assert load.done - before > 20
        assert (rotation.left, rotation.failures) == (frozenset(), {})
        config = tree.sample.config
        await tree.volume.ctx.adopt_volume_key(config.volume_key_kek, config.volume_key_wrapped)
        tree.sample.kek.destroy_older()
        assert isinstance(tree.volume.ctx.keys, FakeDekProvider)
        tree.volume.ctx.keys.wipe()
        await load.look()
    load.unnamed.clear()
    await tree.remount()
    await load.look()
    await tree.finish()
