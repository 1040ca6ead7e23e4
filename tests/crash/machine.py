"""The real code on the disk model, made repeatable: no threads, small thresholds, few directories, its log caught."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

from cryptfs.fs import directory, journal, rotation, volume
from cryptfs.fs.context import FsContext
from cryptfs.store.disk_model import Disk, Order
from cryptfs.store.memory import MemoryStore
from cryptfs.testing.randomness import SeededRandom
from cryptfs.testing.volumes import SampleVolume
from tests.fs.tree import Tree
from tests.threadless import without_threads

BLOCK = 4096
SIDECAR_DIRS = 4
"""Instead of 256: a crash test copies the whole disk for every state it looks at."""


_dir_fd = FsContext.dir_fd


def _fewer_dirs(self: FsContext, *names: bytes) -> int:
    if len(names) == 2:
        names = names[0], b"%02x" % (int(names[1], 16) % SIDECAR_DIRS)
    return _dir_fd(self, *names)


@contextmanager
def few_directories() -> Iterator[None]:
    """While this lasts, volumes have `SIDECAR_DIRS` directories of sidecars, as `new_volume` makes them."""
    with ExitStack() as patches:
        for owner, name, value in (
            (FsContext, "dir_fd", _fewer_dirs),
            (rotation, "SIDECAR_DIRS", SIDECAR_DIRS),
            (rotation, "_DIRS_AT_ONCE", SIDECAR_DIRS),
        ):
            patches.enter_context(mock.patch.object(owner, name, value))
        patches.enter_context(
            mock.patch.object(volume, "range", mock.Mock(return_value=range(SIDECAR_DIRS)), create=True)
        )
        yield


@contextmanager
def repeatable() -> Iterator[None]:
    """While this lasts, the same operations make the same store calls in the same order."""
    with (
        without_threads(),
        few_directories(),
        mock.patch.object(directory, "_COMPACT_MIN_BYTES", -(1 << 30)),
        mock.patch.object(journal, "_COMPACT_MIN_BYTES", -(1 << 30)),
    ):
        yield


class Complaints(logging.Handler):
    """What the program logged as an error: after a mere crash, nothing may be."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    @contextmanager
    def collected(self) -> Iterator[None]:
        """Instead of wherever the program's log goes."""
        logger = logging.getLogger("cryptfs")
        before = logger.level, logger.propagate
        logger.addHandler(self)
        logger.setLevel(logging.ERROR)
        logger.propagate = False
        try:
            yield
        finally:
            logger.removeHandler(self)
            logger.level, logger.propagate = before


async def new_volume(order: Order) -> tuple[SampleVolume, MemoryStore]:
    """An empty volume and the disk it lies on."""
    store = MemoryStore(order=order)
    sample = SampleVolume(block_size=BLOCK)
    await sample.create(store)
    sidecars = store.open(store.root(), b"sidecars", os.O_RDONLY | os.O_DIRECTORY)
    for number in range(SIDECAR_DIRS, 256):
        store.rmdir(sidecars, b"%02x" % number)
    store.syncfs(store.root())
    for inode in [inode for inode in store.disk.inodes.values() if not inode.links]:
        del store.disk.inodes[inode.ino]
    store.close(sidecars)
    return sample, store


async def opened(
    sample: SampleVolume, disk: Disk, seed: int, hook: Callable[[str], None] | None = None, *, least_kek: int = 1
) -> Tree:
    """A volume on `disk`, with randomness of its own; `hook` sees every store call, also those of opening it.

    `least_kek`: KEKs of older versions are destroyed.
    """
    sample.random = sample.kek.random = SeededRandom(seed)
    sample.kek.least = 1
    sample.rewrap_volume_key()
    sample.kek.least = least_kek
    store = MemoryStore(disk)
    store.before_call = hook
    try:
        return Tree(store, sample, await sample.open(store))
    except BaseException:
        store.before_call = None
        store.close_store()
        raise


def dropped(tree: Tree) -> None:
    """Let go of it as kill -9 would; the disk stays as it is."""
    assert isinstance(tree.store, MemoryStore)
    tree.store.before_call = None
    tree.kill()
    tree.store.close_store()
