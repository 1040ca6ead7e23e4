"""Writers that break one rule each: a checker that lets one of them pass would prove nothing.

Each is a context in which the real code is wrong in one place, and a workload that ought to show it.
"""

from __future__ import annotations

# ruff: noqa: ANN401 - what is replaced takes what it takes
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

from cryptfs.blocks.extents import HOME_DATA
from cryptfs.format.state import State
from cryptfs.fs import epoch, volume
from cryptfs.fs.context import FsContext
from cryptfs.fs.file import FileNode
from cryptfs.fs.files import Files
from cryptfs.fs.freshness import Freshness
from cryptfs.fs.inodes import Inode, InodeTable
from cryptfs.fs.journal import Journal
from cryptfs.fs.namespace import Namespace
from cryptfs.fs.reaper import Reaper
from cryptfs.fs.rewrapping import Rewrapping
from cryptfs.fs.rotation import Rotation
from cryptfs.fs.sealed_log import SealedLog
from cryptfs.ports import Store
from cryptfs.store.memory import MemoryStore
from cryptfs.testing import volumes

Patch = tuple[Any, str, Any]


@contextmanager
def patched(*patches: Patch) -> Iterator[None]:
    """With these attributes replaced."""
    with ExitStack() as stack:
        for owner, name, value in patches:
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


async def _nothing(*args: object, **kwargs: object) -> None:
    """What ought to be done is not."""


@contextmanager
def no_mount_sync() -> Iterator[None]:
    """What an earlier daemon left in the page cache is taken for durable."""
    syncfs, opening = MemoryStore.syncfs, volume.open_volume
    now_opening = False

    def unless_opening(self: MemoryStore, fd: int, /) -> None:
        if not now_opening:
            syncfs(self, fd)

    async def open_it(*args: Any, **kwargs: Any) -> volume.Volume:
        nonlocal now_opening
        now_opening = True
        try:
            return await opening(*args, **kwargs)
        finally:
            now_opening = False

    with patched((MemoryStore, "syncfs", unless_opening), (volumes, "open_volume", open_it)):
        yield


@contextmanager
def epoch_not_durable() -> Iterator[None]:
    """A mount writes in an epoch that a power cut takes back."""
    write_slot = epoch.write_slot

    def unsynced(store: Store, state: State, slot: bytes) -> None:
        assert isinstance(store, MemoryStore)
        with nullcontext() if state.clean else mock.patch.object(store, "fdatasync"):
            write_slot(store, state, slot)

    with patched((volume, "write_slot", unsynced)):
        yield


def _always_in_the_data_file(self: FileNode, first: int, end: int) -> list[tuple[int, int, int]]:
    return [(first, end, HOME_DATA)]


@contextmanager
def durable_home() -> Iterator[None]:
    """The acknowledged version of a block is overwritten where it is."""
    with patched((FileNode, "_homes", _always_in_the_data_file)):
        yield


@contextmanager
def eager_cut() -> Iterator[None]:
    """The data file is cut before the smaller size is durable."""
    shrink = FileNode._shrink

    async def cut_at_once(self: FileNode, size: int) -> None:
        await shrink(self, size)
        self.journal.cut()

    with patched((FileNode, "_shrink", cut_at_once)):
        yield


@contextmanager
def durable_too_early() -> Iterator[None]:
    """A frame counts as durable, with all it names, when it is written."""
    append = Journal._append

    def believe(self: Journal, key: memoryview) -> None:
        append(self, key)
        self.durable_gen = self._last_gen

    with patched((Journal, "_append", believe)):
        yield


@contextmanager
def sidecar_deleted_at_once() -> Iterator[None]:
    """The sidecar of a removed file goes before the removal is durable."""
    with patched((Reaper, "add_id", lambda self, log_id: self._delete([log_id], []))):
        yield


@contextmanager
def removed_directory_deleted_at_once() -> Iterator[None]:
    """The same for a removed directory; its log goes first, by itself."""
    with patched((Reaper, "add_dir", lambda self, name: self._delete([], [name]))):
        yield


@contextmanager
def fsync_without_entry() -> Iterator[None]:
    """`fsync` of a new file leaves its name out."""
    with patched((Files, "sync_entry", _nothing)):
        yield


@contextmanager
def fsync_without_sidecar_name() -> Iterator[None]:
    """`fsync` of a new file leaves out the directory that its sidecar was made in."""
    fsync = MemoryStore.fsync

    def but_sidecars(self: MemoryStore, fd: int, /) -> None:
        inode = self._file(fd).inode
        if not (inode.is_dir and any(len(name) == 32 for name in inode.entries) and b".dir" not in inode.entries):
            fsync(self, fd)

    with patched((MemoryStore, "fsync", but_sidecars)):
        yield


@contextmanager
def fsync_without_twin() -> Iterator[None]:
    """`fsync` leaves the second home out."""
    in_threads = FsContext.in_threads

    async def but_twins(self: FsContext, calls: list[tuple[Callable[[int], None], int]]) -> None:
        twins = {inode.file.state.twin_fd for inode in _known(self) if inode.file is not None}
        await in_threads(self, [call for call in calls if call[1] not in twins])

    def _known(ctx: FsContext) -> list[Inode]:
        return [inode for table in tables if table.ctx is ctx for inode in table.with_files()]

    tables: list[InodeTable] = []
    init = InodeTable.__init__

    def remember(self: InodeTable, *args: Any) -> None:
        init(self, *args)
        tables.append(self)

    with patched((FsContext, "in_threads", but_twins), (InodeTable, "__init__", remember)):
        yield


@contextmanager
def no_arrival_sync() -> Iterator[None]:
    """A name is given before the frame that binds it is durable."""
    with patched((Namespace, "_sync_arrival", _nothing)):
        yield


@contextmanager
def no_place_sync() -> Iterator[None]:
    """Something acknowledged moves into a directory that is not durable."""
    with patched((Namespace, "_before_entering", _nothing)):
        yield


@contextmanager
def compact_unsynced() -> Iterator[None]:
    """A new log is renamed over the old one before it is durable."""
    rewrite = SealedLog.rewrite

    def unsynced(self: SealedLog, store: Store, *args: Any) -> SealedLog:
        with mock.patch.object(store, "fdatasync"):
            return rewrite(self, store, *args)

    with patched((SealedLog, "rewrite", unsynced)):
        yield


@contextmanager
def compact_dirty() -> Iterator[None]:
    """A log is rewritten while data that the snapshot names is not durable."""
    compact = Journal.compact

    async def unsynced(self: Journal) -> None:
        with mock.patch.object(self, "_sync", _nothing):
            await compact(self)

    with patched((Journal, "compact", unsynced)):
        yield


@contextmanager
def rotate_dirty() -> Iterator[None]:
    """The same when a log is rewritten under another KEK, of what was written since everything was synced."""
    rotate = Journal._rotate

    async def unsynced(self: Journal, anew: Rewrapping) -> None:
        with mock.patch.object(self, "_sync", _nothing):
            await rotate(self, anew)

    with patched((Journal, "_rotate", unsynced), (Freshness, "sync", _nothing)):
        yield


@contextmanager
def rotated_too_early() -> Iterator[None]:
    """An old KEK is destroyed while the rewritten logs may still be lost."""
    fsync = MemoryStore.fsync

    async def pretend(self: Rotation) -> None:
        with mock.patch.object(MemoryStore, "syncfs"), mock.patch.object(MemoryStore, "fsync", but_directories):
            await run(self)

    def but_directories(self: MemoryStore, fd: int, /) -> None:
        if not self._file(fd).inode.is_dir:
            fsync(self, fd)

    run = Rotation.run
    with patched((Rotation, "run", pretend)):
        yield


class Forgetful(dict[bytes, int]):
    """Keeps nothing."""

    def __setitem__(self, key: bytes, value: int) -> None:
        """See above."""


@contextmanager
def renames_forgotten() -> Iterator[None]:
    """A rewritten log that was closed and opened again counts as having its name for good."""
    begin = FsContext.__init__

    def forgetful(self: FsContext, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        self.renamed_logs = Forgetful()

    with patched((FsContext, "__init__", forgetful)):
        yield


@contextmanager
def unforgiving() -> Iterator[None]:
    """A reader that knows no crash: whatever a power cut left undone is damage."""
    with patched((FsContext, "forgives", mock.Mock(return_value=False))):
        yield


@dataclass(frozen=True)
class Variant:
    """`workload`: after it a power cut, or a kill and a power cut, must show what is wrong."""

    wrong: Callable[[], Any]
    workload: str
    start: str = "old"
    again: int = 0


VARIANTS = (
    Variant(no_mount_sync, "fsync a", "killed", again=3),
    Variant(epoch_not_durable, "overwrite a; fsync a", again=3),
    Variant(durable_home, "overwrite b"),
    Variant(eager_cut, "cut a"),
    Variant(durable_too_early, "overwrite b; append b"),
    Variant(sidecar_deleted_at_once, "unlink a"),
    Variant(removed_directory_deleted_at_once, "rmdir e"),
    Variant(fsync_without_entry, "create n; fsync n"),
    Variant(fsync_without_sidecar_name, "create n; fsync n"),
    Variant(fsync_without_twin, "overwrite b; fsync b"),
    Variant(no_arrival_sync, "rename a x"),
    Variant(no_place_sync, "mkdir m; mkdir m/k; rename a m/k/x"),
    Variant(compact_unsynced, "compact /"),
    Variant(compact_dirty, "hold; overwrite a; compact a"),
    Variant(compact_unsynced, "rotate"),
    Variant(rotate_dirty, "hold; overwrite a; rewrite"),
    Variant(rotated_too_early, "rotate"),
    Variant(renames_forgotten, "rewrite; overwrite a; fsync a"),
    Variant(unforgiving, "overwrite a"),
)
