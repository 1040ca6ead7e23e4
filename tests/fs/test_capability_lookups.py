"""The kernel asks for `security.capability` before every write(2): the answer must cost no disk access."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any, cast

import pyfuse3
import pytest

from cryptfs import ports
from cryptfs.fuse.gate import Gate
from cryptfs.fuse.operations import Operations
from cryptfs.store.memory import MemoryStore
from tests.fs.tree import Tree

if TYPE_CHECKING:
    from cryptfs.fuse.open_files import OpenFiles

_CALLS = frozenset(name for name in vars(ports.Store) if not name.startswith("_")) - {"root"}
CAPABILITY = pyfuse3.XAttrNameT(b"security.capability")


class Watched(MemoryStore):
    """Notes which calls of the store are made."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        super().__init__()

    def __getattribute__(self, name: str) -> Any:  # noqa: ANN401 - whatever it is
        if name in _CALLS:
            self.calls.append(name)
        return super().__getattribute__(name)


class _Kernel:
    """What the kernel does for write(2), on handlers of the mount."""

    def __init__(self, tree: Tree, store: Watched) -> None:
        self.tree, self.store = tree, store
        self.begin()

    def begin(self) -> None:
        """On the volume as it is open now. No file is opened by its handlers."""
        self._operations = Operations(self.tree.volume, Gate(), cast("OpenFiles", None))

    async def look_up(self, path: bytes) -> list[str]:
        """Calls of the store for one look-up that finds no capability."""
        inode = await self.tree.inode(path)
        self.store.calls.clear()
        with pytest.raises(pyfuse3.FUSEError) as caught:
            await self._operations.getxattr(pyfuse3.InodeT(inode.ino), CAPABILITY, pyfuse3.RequestContext())
        assert caught.value.errno == errno.ENODATA
        return list(self.store.calls)


@pytest.fixture
async def kernel() -> AsyncIterator[_Kernel]:
    store = Watched()
    tree = await Tree.make(store)
    yield _Kernel(tree, store)
    await tree.finish()


async def test_of_a_file_that_is_made_and_written(kernel: _Kernel) -> None:
    file = await kernel.tree.create(b"file")
    for number in range(20):
        assert await kernel.look_up(b"file") == [], number
        await file.write(number * 5000, b"content" * 700)
        if number % 5 == 0:
            await file.journal.fsync()


async def test_of_a_file_that_was_there(kernel: _Kernel) -> None:
    """Its sidecar is read once, for the first one or for the first write."""
    await kernel.tree.write(b"file", b"content" * 5000)
    await kernel.tree.remount()
    kernel.begin()
    file = await kernel.tree.open(b"file")
    assert await kernel.look_up(b"file"), "what reads a sidecar must show, or this test shows nothing"
    for number in range(20):
        assert await kernel.look_up(b"file") == [], number
        await file.write(number * 100, b"other content")
    await kernel.tree.close(b"file")
    # Also of one that nobody has open any more: truncate(2) and chown(2) ask, too.
    assert await kernel.look_up(b"file") == []


async def test_of_a_file_with_other_xattrs(kernel: _Kernel) -> None:
    file = await kernel.tree.create(b"file")
    await kernel.tree.volume.xattrs.set(await kernel.tree.inode(b"file"), b"user.a", b"value", lambda _gid: True)
    for number in range(20):
        assert await kernel.look_up(b"file") == [], number
        await file.write(number * 100, b"content")
