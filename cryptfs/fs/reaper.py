"""What is dead in the tree but may not be deleted yet: sidecars of removed files, removed directories in `tmp/`.

A sidecar that is deleted while the removal of its file is not durable would, after a power cut, leave the file
without its keys. So things are deleted only after a sync of the file system that came after their removal. A crash
before that leaves orphans, which cost space and nothing else.
"""

from __future__ import annotations

import os
from contextlib import suppress

import trio

from cryptfs.fs.context import FsContext, log, sidecar_name, twin_name
from cryptfs.ports import Store
from cryptfs.types import ID_BYTES

_INTERVAL_S = 30.0
_MANY = 10_000


class Reaper:
    """Run `serve` in the background; `flush` once at unmount, after a sync."""

    def __init__(self, ctx: FsContext) -> None:
        self.ctx = ctx
        self._ids: list[bytes] = []
        self._dirs: list[bytes] = []
        self._many = trio.Event()
        self.burying = trio.Lock()
        """Held while sidecars are deleted. Who holds it may rewrite one that nobody has open."""

    @property
    def dead(self) -> frozenset[bytes]:
        """Ids whose sidecars wait to be deleted."""
        return frozenset(self._ids)

    def add_id(self, log_id: bytes) -> None:
        """The last name of this file or symlink is gone, and nobody has it open."""
        self._ids.append(log_id)
        if len(self._ids) >= _MANY:
            self._many.set()

    def add_dir(self, name: bytes) -> None:
        """A removed directory lies in `tmp/` under this name."""
        self._dirs.append(name)

    async def serve(self) -> None:
        """For ever: now and then sync, then delete what was dead before the sync."""
        while True:
            with trio.move_on_after(_INTERVAL_S):
                await self._many.wait()
            self._many = trio.Event()
            if self._ids or self._dirs:
                ids, dirs, self._ids, self._dirs = self._ids, self._dirs, [], []
                try:
                    await self.ctx.freshness.sync()
                except OSError as error:
                    log.warning("sync before deleting sidecars failed, it is tried again: %s", error.strerror)
                    self._ids += ids
                    self._dirs += dirs
                    continue
                await self._bury(ids, dirs)

    async def flush(self) -> None:
        """Delete what is dead now. The caller has just synced the file system."""
        ids, dirs, self._ids, self._dirs = self._ids, self._dirs, [], []
        await self._bury(ids, dirs)

    async def _bury(self, ids: list[bytes], dirs: list[bytes]) -> None:
        async with self.burying:
            # A removed directory lies in `tmp/` under its id.
            self.ctx.freshness.gone([*ids, *(bytes.fromhex(name.decode()) for name in dirs)])
            await self.ctx.in_thread(self._delete, ids, dirs)

    def _delete(self, ids: list[bytes], dirs: list[bytes]) -> None:
        store = self.ctx.store
        for log_id in ids:
            where = self.ctx.sidecar_dir(log_id)
            for name in (sidecar_name(log_id), twin_name(log_id)):
                try:
                    store.unlink(where, name)
                except OSError:
                    continue
        tmp = self.ctx.dir_fd(b"tmp")
        for name in dirs:
            remove_tree(store, tmp, name)


def remove_tree(store: Store, dir_fd: int, name: bytes, last: bytes = b"") -> None:
    """Delete `name` and what is in it, following nothing; what cannot be deleted stays.

    `last`: a file in it that goes after all else, as it says that the rest may go: whoever is killed leaves it.

    It may be deeper than there are descriptors: directories below the first level are moved up to that before they are
    emptied.
    """
    try:
        top = store.open(dir_fd, name, os.O_RDONLY | os.O_DIRECTORY)
    except NotADirectoryError:
        store.unlink(dir_fd, name)
        return
    except OSError:
        return
    try:
        todo = _emptied(store, top, top, last)
        while todo:
            inner = todo.pop()
            with suppress(OSError):
                fd = store.open(top, inner, os.O_RDONLY | os.O_DIRECTORY)
                try:
                    todo += _emptied(store, fd, top)
                finally:
                    store.close(fd)
                store.rmdir(top, inner)
        if last:
            with suppress(OSError):
                store.unlink(top, last)
    finally:
        store.close(top)
    with suppress(OSError):
        store.rmdir(dir_fd, name)


def _emptied(store: Store, fd: int, top: int, but: bytes = b"") -> list[bytes]:
    """Delete what is in a directory; the directories in it are in `top` afterwards, under the names returned."""
    moved: list[bytes] = []
    for inner in store.listdir(fd):
        if inner == but:
            continue
        try:
            store.unlink(fd, inner)
        except IsADirectoryError:
            with suppress(OSError):
                name = inner
                if fd != top:
                    name = os.urandom(ID_BYTES).hex().encode()
                    store.rename(fd, inner, top, name)
                moved.append(name)
        except OSError:
            continue
    return moved
