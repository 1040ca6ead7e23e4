"""What can still be read of a damaged file, written into a new one.

Every record in every frame that survives is used: frames after a damaged one carry their own MAC, and where even the
log's key is lost, each block still proves itself, by a DEK that unwraps for this file alone and a tag over file,
index, version and length. So a salvage never yields forged content; what it may yield, where a frame is lost, is an
older version of a block, and it says so. It goes to the quarantine, not to the file's place, unless every frame and
every block was there: then it is the file.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from cryptfs.blocks.extents import DURABLE, Extent, ExtentMap
from cryptfs.errors import Damaged
from cryptfs.format.log import HEAD_BYTES, HEAD_MAGIC, HEADER_BYTES, KIND_FILE, SNAPSHOT, Head, decode_head
from cryptfs.format.sidecar import Sealed, decode_sidecar
from cryptfs.fs.attributes import Changes
from cryptfs.fs.context import FsContext, sidecar_name, twin_name
from cryptfs.fs.history import POISON, build_map, xattrs_after
from cryptfs.fs.inodes import Inode
from cryptfs.fs.making import Owner
from cryptfs.fs.sealed_log import authenticate, intact_payload, is_authentic, parse, read_log
from cryptfs.fs.state import FileState
from cryptfs.fs.volume import Volume
from cryptfs.fs.xattr import open_set
from cryptfs.ops.blocks import BlockReader
from cryptfs.ports import KeyRun
from cryptfs.types import Purpose

Place = Callable[[], Awaitable[tuple[Inode, bytes]]]
"""Where a salvaged file goes: its directory and a name that is free there."""


@dataclass(frozen=True, slots=True)
class Records:
    """A file's blocks as far as its sidecar still tells. `complete`: no frame is missing, this is the whole truth."""

    blocks: ExtentMap
    size: int
    complete: bool
    xattrs: Sealed | None = None


@dataclass(slots=True)
class Salvaged:
    """The outcome. `name` is b"" if nothing could be read. `exact`: content and size are those of the file itself."""

    name: bytes
    inode: Inode | None
    size: int
    exact: bool
    older: bool
    lost_bytes: list[tuple[int, int]]
    reasons: list[str]


@dataclass(frozen=True, slots=True)
class Source:
    """What there is of the file: its data file (an empty one if it is gone), id, the attributes it is to get."""

    data_fd: int
    file_id: bytes
    st: os.stat_result | None


async def read_records(ctx: FsContext, file_id: bytes) -> Records:
    """From the sidecar of `file_id`. Raises OSError, key errors; a sidecar that is gone or useless has no records."""
    empty = Records(ExtentMap(ctx.config.block_size), 0, complete=False)
    try:
        fd = ctx.store.open(ctx.sidecar_dir(file_id), sidecar_name(file_id), os.O_RDONLY)
    except FileNotFoundError:
        return empty
    try:
        raw = await ctx.in_thread(read_log, ctx.store, fd)
    finally:
        ctx.store.close(fd)
    log_key: bytearray | None = None
    try:
        parsed = parse(raw)
        header = parsed.header
        if header.kind == KIND_FILE and header.log_id == file_id:
            run = KeyRun(file_id, Purpose.LOG_FILE, header.kek_version, (header.log_wrapped,))
            log_key = bytearray((await ctx.keys.unwrap([run]))[0][0])
            replayed = authenticate(parsed, log_key)
            if replayed.heads and not replayed.tail:
                blocks, size = build_map(replayed, len(replayed.heads), ctx.config.block_size)
                xattrs = xattrs_after(replayed, len(replayed.heads), ctx.config.block_size)
                return Records(blocks, size, all(e.home != POISON for e in blocks), xattrs)
    except Damaged:
        pass
    try:
        frames = _surviving_frames(raw, file_id, log_key)
    finally:
        if log_key is not None:
            log_key[:] = bytes(len(log_key))
    return _records_of(ctx, frames) if frames else empty


def _surviving_frames(raw: bytes, file_id: bytes, log_key: bytearray | None) -> list[tuple[Head, bytes]]:
    """Frames whose payload fits its digest, wherever they start, oldest first; given a key, only authentic ones."""
    out: list[tuple[Head, bytes]] = []
    view = memoryview(raw)
    at = HEADER_BYTES if len(raw) >= HEADER_BYTES else 0
    while (at := raw.find(HEAD_MAGIC, at)) >= 0:
        try:
            head = decode_head(raw[at : at + HEAD_BYTES])
        except Damaged:
            at += 1
            continue
        payload = intact_payload(view, at, head)
        if payload is not None and (log_key is None or is_authentic(head, file_id, log_key)):
            out.append((head, bytes(payload)))
            at += head.frame_bytes
        else:
            at += 1
    out.sort(key=lambda frame: frame[0].generation)
    return out


def _records_of(ctx: FsContext, frames: list[tuple[Head, bytes]]) -> Records:
    block_size = ctx.config.block_size
    blocks, size = ExtentMap(block_size), 0
    xattrs: Sealed | None = None
    for head, payload in frames:
        try:
            decoded = decode_sidecar(payload, block_size)
        except Damaged:
            continue
        if head.kind == SNAPSHOT:
            blocks, xattrs = ExtentMap(block_size), None
        if decoded.flags:
            xattrs = decoded.xattrs
        size = head.size
        last = -(-size // block_size)
        end = max((extent.end for extent in blocks), default=0)
        blocks.remove(last, max(last, end))
        for first, count in decoded.holes:
            blocks.remove(first, first + count)
        for run in decoded.runs:
            end = run.first + run.count
            blocks.remove(run.first, end)
            blocks.insert(
                Extent(
                    run.first, end, run.version, run.last_len, run.home, run.kek_version, run.wrapped, run.tags,
                    DURABLE, head.generation,
                )
            )  # fmt: skip
    return Records(blocks, size, complete=False, xattrs=xattrs)


async def salvage(volume: Volume, source: Source, place: Place, records: Records | None = None) -> Salvaged:
    """Write what can be read of `source` into a new file; durable when this returns.

    `place` is asked once there is something to write. Raises OSError (then the new
    file is gone again), key errors.
    """
    ctx, block_size = volume.ctx, volume.ctx.config.block_size
    records = records or await read_records(ctx, source.file_id)
    state = FileState(ctx, 0, source.file_id, source.data_fd, writable=False)
    state.blocks, state.size = records.blocks, records.size
    target = _Target(volume, source.st, place)
    try:
        state.twin_fd = ctx.store.open(ctx.sidecar_dir(source.file_id), twin_name(source.file_id), os.O_RDONLY)
    except FileNotFoundError:
        state.twin_fd = None
    try:
        bad = await BlockReader(ctx, state, target.write).run(list(records.blocks))
        exact = records.complete and not bad.ranges
        if exact and target.inode is None:
            await target.make()
        try:
            xattrs = await open_set(ctx, source.file_id, records.xattrs)
        except Damaged as error:
            bad.reasons.append(f"{error.reason} (extended attributes)")
            xattrs, exact = {}, False
        await target.finish(records.size, xattrs)
    except BaseException:
        await target.undo()
        raise
    finally:
        if state.twin_fd is not None:
            ctx.store.close(state.twin_fd)
    lost = bad.lost_bytes(block_size, records.size)
    return Salvaged(
        target.name, target.inode, records.size, exact, not records.complete and target.inode is not None, lost,
        bad.reasons,
    )  # fmt: skip


class _Target:
    """The new file, made when the first block comes."""

    def __init__(self, volume: Volume, st: os.stat_result | None, place: Place) -> None:
        self.volume = volume
        self.st = st
        self.place = place
        self.name = b""
        self.parent: Inode | None = None
        self.inode: Inode | None = None

    async def make(self) -> None:
        self.parent, self.name = await self.place()
        mode = self.st.st_mode & 0o7777 if self.st is not None else 0o600
        owner = Owner(self.st.st_uid, self.st.st_gid) if self.st is not None else Owner(os.geteuid(), os.getegid())
        attr, _ = await self.volume.names.create(self.parent, self.name, mode, owner)
        self.inode = attr.inode
        self.inode.lookups += 1

    async def write(self, offset: int, data: memoryview) -> None:
        if self.inode is None:
            await self.make()
        assert self.inode is not None
        assert self.inode.file is not None
        await self.inode.file.write(offset, data)

    async def finish(self, size: int, xattrs: dict[bytes, bytes]) -> None:
        if self.inode is None:
            return
        file = self.inode.file
        assert file is not None
        if file.size < size:
            await file.truncate(size)
        if xattrs:
            await self.volume.xattrs.give(self.inode, xattrs)
        await file.journal.fsync()
        if self.st is not None:
            times = Changes(atime_ns=self.st.st_atime_ns, mtime_ns=self.st.st_mtime_ns)
            await self.volume.files.setattr(self.inode, times)
        await self.volume.files.release(self.inode)

    async def undo(self) -> None:
        if self.inode is not None and self.parent is not None:
            if self.inode.file is not None and self.inode.file.opens:
                await self.volume.files.release(self.inode)
            await self.volume.names.unlink(self.parent, self.name)
            self.inode = None
