"""A data file that a crash left without its header: made in the crashed epoch, so nothing in it was ever acknowledged.

Whatever else the name may have stood for, and may still stand for in a log whose last frames are lost: a removed file
whose name was used again. Only blocks that are where an acknowledged frame says speak against it; then the header is
what is damaged.
"""

from __future__ import annotations

import os

from cryptfs.blocks.extents import HOME_DATA
from cryptfs.errors import Damaged
from cryptfs.format.datafile import DataHeader
from cryptfs.fs.context import FsContext, log, sidecar_name, write_all
from cryptfs.fs.history import build_map
from cryptfs.fs.recovery import authentic_in
from cryptfs.fs.sealed_log import Replay, authenticate, parse, read_log
from cryptfs.fs.state import FileState
from cryptfs.ports import KeyRun
from cryptfs.types import Buffer, Purpose


async def is_still(ctx: FsContext, dir_fd: int, name: bytes, file_id: bytes) -> bool:
    """Whether the data file `name`, which has no header, holds an acknowledged block of file `file_id`.

    Raises OSError, key errors.
    """
    replayed = await _sidecar(ctx, file_id)
    if replayed is None:
        return False
    durable = max([replayed.durable_up_to, *(h.generation for h in replayed.heads if not ctx.forgives(h.generation))])
    keep = sum(1 for head in replayed.heads if head.generation <= durable)
    blocks, _ = build_map(replayed, keep, ctx.config.block_size)
    fd = ctx.store.open(dir_fd, name, os.O_RDONLY)
    state = FileState(ctx, 0, file_id, fd, writable=False)
    try:
        for extent in blocks:
            first = extent.piece(extent.first, extent.first + 1, ctx.config.block_size)
            if extent.home == HOME_DATA and await authentic_in(ctx, state, first, {}):
                return True
        return False
    finally:
        state.close()


async def _sidecar(ctx: FsContext, file_id: bytes) -> Replay | None:
    """The file's log, if there is one of it with at least a frame."""
    try:
        fd = ctx.store.open(ctx.sidecar_dir(file_id), sidecar_name(file_id), os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        parsed = parse(await ctx.in_thread(read_log, ctx.store, fd))
        header = parsed.header
        run = KeyRun(file_id, Purpose.LOG_FILE, header.kek_version, (header.log_wrapped,))
        replayed = authenticate(parsed, (await ctx.keys.unwrap([run]))[0][0])
    except Damaged:
        return None
    finally:
        ctx.store.close(fd)
    return replayed if replayed.heads else None


def give_header(ctx: FsContext, volume_key: Buffer, dir_fd: int, name: bytes, file_id: bytes) -> None:
    """Make it the new, empty file it is, under an id that all its names will find in it.

    What its owner may not write stays as it is until it is written.
    """
    try:
        fd = ctx.store.open(dir_fd, name, os.O_RDWR)
    except PermissionError:
        return
    try:
        header = ctx.sign_header(memoryview(volume_key), DataHeader(file_id, ctx.crash_generation))
        before = ctx.store.fstat(fd)
        write_all(ctx.store, fd, header, 0)
        ctx.store.futimens(fd, before.st_atime_ns, before.st_mtime_ns)
        log.warning("inode %d: its header never reached the disk before a crash, started anew", before.st_ino)
    finally:
        ctx.store.close(fd)
