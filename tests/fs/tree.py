"""A volume addressed by paths, as the kernel would drive it: every component looked up, every reference counted."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import pytest

from cryptfs.errors import Damaged
from cryptfs.fs.attributes import Attr, Changes
from cryptfs.fs.file import FileNode
from cryptfs.fs.inodes import Inode
from cryptfs.fs.making import Owner
from cryptfs.fs.volume import Volume
from cryptfs.ports import DekProvider
from cryptfs.store.local import LocalStore
from cryptfs.store.memory import MemoryStore
from cryptfs.testing.volumes import SampleVolume, abandon

OWNER = Owner(os.geteuid(), os.getegid())
Store = LocalStore | MemoryStore


@dataclass
class Tree:
    """`held`: how many references the caller, in the kernel's place, holds to each inode."""

    store: Store
    sample: SampleVolume
    volume: Volume
    held: dict[int, int] = field(default_factory=dict)
    open_files: list[Inode] = field(default_factory=list)

    @classmethod
    async def make(cls, store: Store, *, block_size: int = 4096) -> Tree:
        sample = SampleVolume(block_size=block_size)
        await sample.create(store)
        return cls(store, sample, await sample.open(store))

    # mounting ----------------------------------------------------------------------------------------------------

    async def unmount(self) -> None:
        """Leave cleanly. Fails if it was not."""
        for inode in list(self.open_files):
            await self.release(inode)
        assert await self.volume.close()
        self.held.clear()

    async def remount(self, *, read_only: bool = False, keys: DekProvider | None = None) -> None:
        await self.unmount()
        await self.mount(read_only=read_only, keys=keys)

    async def mount(self, *, read_only: bool = False, keys: DekProvider | None = None) -> None:
        self.volume = await self.sample.open(self.store, read_only=read_only, keys=keys)

    def kill(self) -> None:
        """Let go of the volume as kill -9 does."""
        abandon(self.volume)
        self.held.clear()
        self.open_files.clear()

    async def finish(self) -> None:
        """Forget everything, close, and see that nothing is left."""
        for inode in list(self.open_files):
            await self.release(inode)
        self.forget_all()
        await self.volume.files.settle()
        assert len(self.volume.inodes) == 1, "inodes that nobody holds are still in the table"
        assert await self.volume.close()
        if isinstance(self.store, MemoryStore):
            assert self.store.open_descriptors() == 0

    # the kernel's references -------------------------------------------------------------------------------------

    def take(self, attr: Attr) -> Inode:
        attr.inode.lookups += 1
        self.held[attr.inode.ino] = self.held.get(attr.inode.ino, 0) + 1
        return attr.inode

    def forget_all(self) -> None:
        for ino, count in self.held.items():
            self.volume.inodes.forget(ino, count)
        self.held.clear()

    # paths -------------------------------------------------------------------------------------------------------

    async def lookup(self, path: bytes) -> Attr:
        inode, attr = self.volume.root, None
        for name in filter(None, path.split(b"/")):
            attr = await self.volume.names.lookup(inode, name)
            inode = self.take(attr)
        return attr or await self.volume.files.attr(self.volume.root)

    async def inode(self, path: bytes) -> Inode:
        return (await self.lookup(path)).inode

    async def parent(self, path: bytes) -> tuple[Inode, bytes]:
        above, _, name = path.rpartition(b"/")
        return await self.inode(above), name

    async def exists(self, path: bytes) -> bool:
        try:
            await self.lookup(path)
        except FileNotFoundError:
            return False
        return True

    async def names(self, path: bytes = b"") -> list[bytes]:
        inode = await self.inode(path)
        found = await self.volume.names.described(inode, await self.volume.names.listing(inode))
        for item in found:
            if item is not None and item[1] is not None:
                self.volume.inodes.release(item[1].inode)
        return sorted(item[0] for item in found if item is not None)

    async def stat(self, path: bytes) -> Attr:
        return await self.volume.files.attr(await self.inode(path))

    async def setattr(self, path: bytes, want: Changes) -> Attr:
        return await self.volume.files.setattr(await self.inode(path), want)

    # making and removing -----------------------------------------------------------------------------------------

    async def create(self, path: bytes, mode: int = 0o644) -> FileNode:
        """A new file, open."""
        parent, name = await self.parent(path)
        attr, file = await self.volume.names.create(parent, name, mode, OWNER)
        self.open_files.append(self.take(attr))
        return file

    async def open(self, path: bytes, *, writing: bool = True) -> FileNode:
        inode = await self.inode(path)
        file = await self.volume.files.open(inode, writing=writing)
        self.open_files.append(inode)
        return file

    async def release(self, inode: Inode) -> None:
        self.open_files.remove(inode)
        await self.volume.files.release(inode)

    async def close(self, path: bytes) -> None:
        """Release one opening of the file that has this name."""
        await self.release(await self.inode(path))

    async def write(self, path: bytes, data: bytes, *, sync: bool = False) -> None:
        """The whole of a file, made if need be."""
        file = await self.open(path) if await self.exists(path) else await self.create(path)
        inode = self.open_files[-1]
        await file.truncate(0)
        await file.write(0, data)
        if sync:
            await file.journal.fsync()
        await self.release(inode)

    async def read(self, path: bytes) -> bytes:
        file = await self.open(path, writing=False)
        inode = self.open_files[-1]
        try:
            return bytes(await file.read(0, file.ctx.store.fstat(file.state.data_fd).st_size))
        finally:
            await self.release(inode)

    async def mkdir(self, path: bytes, mode: int = 0o755) -> Inode:
        parent, name = await self.parent(path)
        return self.take(await self.volume.names.mkdir(parent, name, mode, OWNER))

    async def symlink(self, target: bytes, path: bytes) -> Inode:
        parent, name = await self.parent(path)
        return self.take(await self.volume.names.symlink(parent, name, target, OWNER))

    async def readlink(self, path: bytes) -> bytes:
        return await self.volume.files.readlink(await self.inode(path))

    async def mknod(self, path: bytes, mode: int, rdev: int = 0) -> Inode:
        parent, name = await self.parent(path)
        return self.take(await self.volume.names.mknod(parent, name, mode, rdev, OWNER))

    async def link(self, old: bytes, new: bytes) -> Attr:
        inode = await self.inode(old)
        parent, name = await self.parent(new)
        attr = await self.volume.names.link(inode, parent, name)
        self.take(attr)
        return attr

    async def unlink(self, path: bytes) -> None:
        parent, name = await self.parent(path)
        await self.volume.names.unlink(parent, name)

    async def rmdir(self, path: bytes) -> None:
        parent, name = await self.parent(path)
        # rmdir(2) has looked the entry up.
        await self.lookup(path)
        await self.volume.names.rmdir(parent, name)

    async def rename(self, old: bytes, new: bytes, flags: int = 0) -> None:
        source, source_name = await self.parent(old)
        target, target_name = await self.parent(new)
        await self.lookup(old)
        await self.exists(new)
        await self.volume.names.rename(source, source_name, target, target_name, flags)

    async def fsync(self, path: bytes) -> None:
        inode = await self.inode(path)
        if stat.S_ISDIR((await self.volume.files.attr(inode)).st.st_mode):
            await self.volume.files.sync_dirs(inode)
            return
        file = await self.open(path)
        await file.journal.fsync()
        await self.release(inode)


Call = Callable[[], Coroutine[Any, Any, object]]


async def errno_of(call: Coroutine[Any, Any, object]) -> str | None:
    """The name of the errno it ends with, None if it succeeds."""
    try:
        await call
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return None


async def damage_of(call: Coroutine[Any, Any, object]) -> str:
    """The reason of the `Damaged` it must end with."""
    with pytest.raises(Damaged) as caught:
        await call
    return caught.value.reason
