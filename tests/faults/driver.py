"""A volume driven by paths through `fuse.Operations`, without a mount: what a program would see, errno for errno."""

from __future__ import annotations

import os
from collections.abc import Awaitable
from types import SimpleNamespace
from typing import Any, TypeVar, cast

import pyfuse3

from cryptfs.errors import Damaged
from cryptfs.fs.volume import Volume
from cryptfs.fuse.gate import Gate
from cryptfs.fuse.open_files import OpenFiles
from cryptfs.fuse.operations import Operations
from cryptfs.store.local import LocalStore
from cryptfs.store.memory import MemoryStore
from cryptfs.testing.volumes import SampleVolume, abandon
from cryptfs.types import Kind

T = TypeVar("T")

CALLER = cast("Any", SimpleNamespace(uid=os.geteuid(), gid=os.getegid(), pid=os.getpid(), umask=0))
UNCHANGED = SimpleNamespace(
    update_mode=False, update_uid=False, update_gid=False, update_size=False, update_atime=False, update_mtime=False,
)  # fmt: skip


async def answer(call: Awaitable[T]) -> T:
    """The result of a handler; `FUSEError` becomes the OSError that a program would get."""
    try:
        return await call
    except pyfuse3.FUSEError as error:
        code = error.errno
    raise OSError(code, os.strerror(code))


class Untold(OpenFiles):
    """Nobody is to be told which files are open: no memory that another process could look at, nothing to close."""

    def __init__(self) -> None:
        pass

    def opened(self, ino: int, *, writing: bool) -> None:
        del ino, writing

    def released(self, ino: int) -> None:
        del ino

    def close(self) -> None:
        pass


class Driver:
    """One open volume. `open_files`: handle -> path it was opened by, for those not closed yet."""

    def __init__(self, store: MemoryStore | LocalStore, sample: SampleVolume, volume: Volume) -> None:
        self.store = store
        self.sample = sample
        self.volume = volume
        self._opened = Untold()
        self.handlers = Operations(volume, Gate(), self._opened)
        self._held: dict[int, int] = {}

    @classmethod
    async def mount(cls, store: MemoryStore | LocalStore, sample: SampleVolume, *, read_only: bool = False) -> Driver:
        return cls(store, sample, await sample.open(store, read_only=read_only))

    async def unmount(self) -> bool:
        """True if the volume was left clean."""
        self.forget_all()
        self._opened.close()
        return await self.volume.close()

    def kill(self) -> None:
        self._opened.close()
        abandon(self.volume)

    def _keep(self, attr: pyfuse3.EntryAttributes) -> int:
        ino = int(attr.st_ino)
        self._held[ino] = self._held.get(ino, 0) + 1
        return ino

    def forget_all(self) -> None:
        held, self._held = self._held, {}
        for ino, count in held.items():
            self.volume.inodes.forget(ino, count)

    # paths -------------------------------------------------------------------------------------------------------

    async def look(self, path: bytes) -> pyfuse3.EntryAttributes:
        attr = await answer(self.handlers.getattr(pyfuse3.ROOT_INODE, CALLER))
        for name in filter(None, path.split(b"/")):
            attr = await answer(self.handlers.lookup(attr.st_ino, pyfuse3.FileNameT(name), CALLER))
            if not attr.st_ino:
                raise FileNotFoundError(2, os.strerror(2), path)
            self._keep(attr)
        return attr

    async def ino(self, path: bytes) -> Any:  # noqa: ANN401 - pyfuse3's InodeT
        return (await self.look(path)).st_ino

    async def parent(self, path: bytes) -> tuple[Any, Any]:
        above, _, name = path.rpartition(b"/")
        return await self.ino(above), pyfuse3.FileNameT(name)

    # what programs do --------------------------------------------------------------------------------------------

    async def create(self, path: bytes) -> Any:  # noqa: ANN401 - pyfuse3's FileHandleT
        above, name = await self.parent(path)
        info, attr = await answer(self.handlers.create(above, name, cast("Any", 0o644), cast("Any", 0), CALLER))
        self._keep(attr)
        return info.fh

    async def open(self, path: bytes, flags: int = os.O_RDWR) -> Any:  # noqa: ANN401 - pyfuse3's FileHandleT
        info = await answer(self.handlers.open(await self.ino(path), cast("Any", flags), CALLER))
        return info.fh

    async def write(self, fh: Any, offset: int, data: bytes) -> None:  # noqa: ANN401
        assert await answer(self.handlers.write(fh, offset, data)) == len(data)

    async def read(self, fh: Any, offset: int, count: int) -> bytes:  # noqa: ANN401
        return bytes(await answer(self.handlers.read(fh, offset, count)))

    async def fsync(self, fh: Any, *, data_only: bool = False) -> None:  # noqa: ANN401
        await answer(self.handlers.fsync(fh, data_only))

    async def close(self, fh: Any) -> None:  # noqa: ANN401
        await answer(self.handlers.release(fh))

    async def truncate(self, path: bytes, size: int) -> None:
        await self._setattr(path, size=size)

    async def chmod(self, path: bytes, mode: int) -> None:
        await self._setattr(path, mode=mode)

    async def utime(self, path: bytes, mtime_ns: int) -> None:
        await self._setattr(path, mtime_ns=mtime_ns)

    async def _setattr(self, path: bytes, **values: int) -> None:
        attr = pyfuse3.EntryAttributes()
        fields = SimpleNamespace(**vars(UNCHANGED))
        for name, value in values.items():
            setattr(attr, f"st_{name}", value)
            setattr(fields, f"update_{name.removesuffix('_ns')}", True)
        await answer(self.handlers.setattr(await self.ino(path), attr, cast("Any", fields), None, CALLER))

    async def mkdir(self, path: bytes) -> None:
        above, name = await self.parent(path)
        self._keep(await answer(self.handlers.mkdir(above, name, cast("Any", 0o755), CALLER)))

    async def symlink(self, target: bytes, path: bytes) -> None:
        above, name = await self.parent(path)
        self._keep(await answer(self.handlers.symlink(above, name, pyfuse3.FileNameT(target), CALLER)))

    async def mknod(self, path: bytes, mode: int) -> None:
        above, name = await self.parent(path)
        self._keep(await answer(self.handlers.mknod(above, name, cast("Any", mode), 0, CALLER)))

    async def link(self, old: bytes, new: bytes) -> None:
        ino = await self.ino(old)
        above, name = await self.parent(new)
        self._keep(await answer(self.handlers.link(ino, above, name, CALLER)))

    async def unlink(self, path: bytes) -> None:
        await self.look(path)
        above, name = await self.parent(path)
        await answer(self.handlers.unlink(above, name, CALLER))

    async def rmdir(self, path: bytes) -> None:
        await self.look(path)
        above, name = await self.parent(path)
        await answer(self.handlers.rmdir(above, name, CALLER))

    async def rename(self, old: bytes, new: bytes, flags: int = 0) -> None:
        above_old, name_old = await self.parent(old)
        above_new, name_new = await self.parent(new)
        await answer(self.handlers.rename(above_old, name_old, above_new, name_new, cast("Any", flags), CALLER))

    async def fsyncdir(self, path: bytes) -> None:
        fh = await answer(self.handlers.opendir(await self.ino(path), CALLER))
        try:
            await answer(self.handlers.fsyncdir(fh, False))
        finally:
            await answer(self.handlers.releasedir(fh))

    # looking at everything ---------------------------------------------------------------------------------------

    async def content(self, path: bytes) -> bytes:
        fh = await self.open(path, os.O_RDONLY)
        try:
            return await self.read(fh, 0, 1 << 20)
        finally:
            await self.close(fh)

    async def listing(self, path: bytes = b"") -> dict[bytes, Kind | None]:
        """Names and kinds; None for what readdir could not describe."""
        inode = self.volume.inodes.get(await self.ino(path))
        found = await self.volume.names.described(inode, await self.volume.names.listing(inode))
        out: dict[bytes, Kind | None] = {}
        for item in found:
            if item is not None:
                name, attr = item
                out[name] = attr.inode.kind if attr is not None else None
                if attr is not None:
                    self.volume.inodes.release(attr.inode)
        return out

    async def snapshot(self) -> dict[bytes, bytes | None]:
        """Every path below the root: None for a directory or fifo, the content of a file, `-> target` of a symlink."""
        out: dict[bytes, bytes | None] = {}
        todo = [b""]
        while todo:
            above = todo.pop()
            for name, kind in (await self.listing(above)).items():
                path = above + b"/" + name if above else name
                if kind is None:
                    raise Damaged("listing", repr(path))
                out[path] = None
                if kind == Kind.DIR:
                    todo.append(path)
                elif kind == Kind.FILE:
                    size = (await self.look(path)).st_size
                    content = out[path] = await self.content(path)
                    assert size == len(content), f"{path!r}: stat says {size}, reading gives {len(content)}"
                elif kind == Kind.SYMLINK:
                    target = await answer(self.handlers.readlink(await self.ino(path), CALLER))
                    assert (await self.look(path)).st_size == len(target)
                    out[path] = b"-> " + bytes(target)
        return out
