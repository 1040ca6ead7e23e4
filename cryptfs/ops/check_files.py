"""One file of a check: header, sidecar, sizes, twin; and with `deep` every block.

A file is opened as the daemon opens it, through `fs.journal`, read-only: what loads here loads in the mount, and what
a crash left is judged by the same rules. Keys and sidecars come in batches, which is what makes small files cheap.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from cryptfs.blocks.extents import HOME_TWIN, Extent
from cryptfs.errors import Damaged
from cryptfs.format.datafile import decode_data_header
from cryptfs.fs.context import FsContext, sidecar_name
from cryptfs.fs.history import POISON
from cryptfs.fs.journal import Journal
from cryptfs.fs.sealed_log import Replay, parse, read_log
from cryptfs.fs.state import FileState
from cryptfs.fs.xattr import open_set
from cryptfs.ops.blocks import KEYS_AT_ONCE, Bad, BlockReader
from cryptfs.ops.check_report import Finding, Severity, Spot, Tally, What
from cryptfs.ops.offline import open_for_reading
from cryptfs.ports import KeyRun, Store
from cryptfs.types import Purpose

RUNS_AT_ONCE = 200


class DirRef:
    """A directory's descriptor that several tasks use: the last `drop` closes it."""

    def __init__(self, store: Store, fd: int) -> None:
        self.fd = fd
        self._store = store
        self._count = 1

    def keep(self) -> DirRef:
        """One more user."""
        self._count += 1
        return self

    def drop(self) -> None:
        """One user less."""
        self._count -= 1
        if self._count == 0:
            self._store.close(self.fd)


@dataclass(slots=True)
class FileJob:
    """A regular file to check. `ref` is the job's to drop. `header`: the data file's first bytes as seen."""

    ref: DirRef
    path: bytes
    spot: Spot
    file_id: bytes
    inode: int
    header: bytes
    size: int = 0
    fd: int = -1
    replay: Replay | None = None
    findings: list[Finding] = field(default_factory=list)

    def find(self, what: What, reason: str, detail: str = "", blocks: list[tuple[int, int]] | None = None) -> None:
        """Damage of this file."""
        lost = blocks or []
        finding = Finding(Severity.DAMAGE, what, self.path, reason, detail, self.file_id, self.inode, lost, self.spot)
        self.findings.append(finding)


class _ReadAhead:
    """`journal.Owner` for a file that is only read. The sidecar is handed out once."""

    def __init__(self, replay: Replay | None) -> None:
        self._replay = replay

    async def sync_entry(self) -> None:
        raise AssertionError("a file that is only read is never synced")

    def sidecar_read_ahead(self) -> Replay | None:
        replay, self._replay = self._replay, None
        return replay

    async def warm(self, parsed: Replay) -> None:
        del parsed


@dataclass(frozen=True, slots=True)
class OpenFile:
    """A file opened for reading: its block map and sizes are in `state` once `journal.load()` returned."""

    state: FileState
    journal: Journal


@contextmanager
def opened(ctx: FsContext, inode: int, file_id: bytes, fd: int, replay: Replay | None = None) -> Iterator[OpenFile]:
    """The file behind `fd` (closed at the end), not loaded yet; nothing of it is ever written."""
    state = FileState(ctx, inode, file_id, fd, writable=False)
    journal = Journal(ctx, state, _ReadAhead(replay))
    try:
        yield OpenFile(state, journal)
    finally:
        journal.close()
        state.close()


def read_sidecar(ctx: FsContext, file_id: bytes) -> Replay | None:
    """An id's sidecar, parsed and not authenticated; None if that fails. Blocks."""
    try:
        fd = ctx.store.open(ctx.sidecar_dir(file_id), sidecar_name(file_id), os.O_RDONLY)
    except OSError:
        return None
    try:
        return parse(read_log(ctx.store, fd))
    except (OSError, Damaged):
        return None
    finally:
        ctx.store.close(fd)


async def check_files(ctx: FsContext, jobs: Sequence[FileJob], tally: Tally, *, deep: bool) -> None:
    """Check `jobs` (their `findings` are filled in, their descriptors closed). Raises key errors."""
    await ctx.in_thread(_open_all, ctx, jobs)
    with ExitStack() as stack:
        files = [
            (job, stack.enter_context(opened(ctx, job.inode, job.file_id, job.fd, job.replay)))
            for job in jobs
            if job.fd >= 0
        ]
        await _warm(ctx, [_log_key(job.replay) for job in jobs if job.replay is not None])
        loaded = [(job, file) for job, file in files if await _load(ctx, job, file)]
        if deep:
            await _warm(ctx, _small_files_keys(ctx, [file for _, file in loaded]))
        for job, file in loaded:
            if deep:
                await _read_all(ctx, job, file, tally)
            else:
                _check_homes(ctx, job, file)
    for job in jobs:
        tally.files += 1
        if not deep:
            tally.done_bytes += job.size


def _open_all(ctx: FsContext, jobs: Sequence[FileJob]) -> None:
    for job in jobs:
        try:
            job.fd = open_for_reading(ctx.store, job.ref.fd, job.spot.name)
        except OSError as error:
            job.find(What.UNREADABLE, error.strerror or "unreadable")
            continue
        job.replay = read_sidecar(ctx, job.file_id)


async def _warm(ctx: FsContext, runs: list[KeyRun]) -> None:
    """Bring keys into the cache, in few requests; those that do not unwrap are found where they are used."""
    batch: list[KeyRun] = []
    count = 0
    for run in runs:
        if batch and (count + len(run.wrapped) > KEYS_AT_ONCE or len(batch) == RUNS_AT_ONCE):
            await ctx.keys.warm(batch)
            batch, count = [], 0
        batch.append(run)
        count += len(run.wrapped)
    if batch:
        await ctx.keys.warm(batch)


def _log_key(replay: Replay) -> KeyRun:
    header = replay.header
    return KeyRun(header.log_id, Purpose.LOG_FILE, header.kek_version, (header.log_wrapped,))


def _small_files_keys(ctx: FsContext, files: Sequence[OpenFile]) -> list[KeyRun]:
    """DEKs of the files that are read in one piece or two."""
    small = (1 << 20) // ctx.config.block_size
    return [
        KeyRun(
            file.state.file_id, Purpose.BLOCK, extent.kek_version,
            [extent.wrapped_of(block) for block in range(extent.first, extent.end)], extent.first,
        )
        for file in files
        if sum(extent.end - extent.first for extent in file.state.blocks) <= small
        for extent in file.state.blocks
        if extent.home != POISON
    ]  # fmt: skip


async def _load(ctx: FsContext, job: FileJob, file: OpenFile) -> bool:
    """Everything that can be known without reading blocks; whether there are any to read."""
    if job.header or not ctx.crashed_before:
        try:
            ctx.check_header(await ctx.volume_key(), decode_data_header(job.header))
        except Damaged as error:
            job.find(What.FILE, error.reason, str(error))
            return False
    try:
        await file.journal.load()
    except Damaged as error:
        job.find(What.FILE, error.reason, str(error))
        return False
    except OSError as error:
        job.find(What.UNREADABLE, error.strerror or "unreadable")
        return False
    job.size = file.state.size
    try:
        await open_set(ctx, job.file_id, file.journal.xattrs)
    except Damaged as error:
        job.find(What.XATTRS, error.reason, str(error))
    return True


def _check_homes(ctx: FsContext, job: FileJob, file: OpenFile) -> None:
    """Blocks that are lost for certain, without reading them: no record, no twin, a twin that is too short."""
    state, block_size = file.state, ctx.config.block_size
    twin_bytes = ctx.store.fstat(state.twin_fd).st_size if state.twin_fd is not None else 0
    bad = Bad()
    for extent in state.blocks:
        if extent.home == POISON:
            bad.add(extent.first, extent.end, "frame")
        elif extent.home == HOME_TWIN and state.twin_fd is None:
            bad.add(extent.first, extent.end, "missing-twin")
        elif extent.home == HOME_TWIN and twin_bytes < _end_in_home(extent, block_size):
            bad.add(max(extent.first, twin_bytes // block_size), extent.end, "short")
    if bad.ranges:
        job.find(What.BLOCKS, ", ".join(bad.reasons), blocks=bad.ranges)


def _end_in_home(extent: Extent, block_size: int) -> int:
    return (extent.end - 1) * block_size + extent.last_len


async def _read_all(ctx: FsContext, job: FileJob, file: OpenFile, tally: Tally) -> None:
    read = 0

    def done(count: int) -> None:
        nonlocal read
        read += count
        tally.done_bytes += count

    bad = await BlockReader(ctx, file.state, done=done).run(list(file.state.blocks))
    tally.done_bytes += max(0, file.state.size - read)
    if bad.ranges:
        job.find(What.BLOCKS, ", ".join(bad.reasons), blocks=bad.ranges)
