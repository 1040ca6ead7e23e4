"""After a sync that failed: write what was not durable once more, so that the next sync can be believed.

A kernel that could not write a dirty page back reports it once and may then take the page for clean, or drop it
(fsync(2), "fsyncgate"): calling fsync again returns 0 and proves nothing. So everything that is not known to be
durable is read back, checked to be what was written, and written again to the same place, which makes it dirty again.
What does not read back stays an error for ever.

It is the same ciphertext under the same DEK: nothing is encrypted twice. A crash in here leaves what a crash in the
failed sync would have.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from cryptfs.blocks.extents import DURABLE
from cryptfs.errors import Damaged
from cryptfs.fs.context import FsContext, sidecar_name, write_all
from cryptfs.fs.history import POISON
from cryptfs.fs.log_gap import take_up
from cryptfs.fs.recovery import authentic
from cryptfs.fs.sealed_log import SealedLog, authenticate, parse, read_log
from cryptfs.ports import KeyRun
from cryptfs.types import Buffer, Purpose

if TYPE_CHECKING:
    from cryptfs.fs.journal_frames import Frames

_CHUNK_BYTES = 1 << 20


async def write_again(journal: Frames) -> None:
    """Make a file's unsynced blocks and frames dirty again.

    Raises OSError(EIO) if something does not read back, key errors.

    The caller holds the file's lock alone.
    """
    ctx, state = journal.ctx, journal.state
    block_size = ctx.config.block_size
    # A frame of this epoch that an earlier opening appended may be as far from the disk as what is new.
    doubtful = [e for e in state.blocks if e.stage != DURABLE or e.generation > journal.durable_gen]
    for extent in doubtful:
        if extent.home == POISON or not await authentic(journal, extent, {}):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        length = (extent.end - 1 - extent.first) * block_size + extent.last_len
        offset = state.home_offset(extent.home, extent.first)
        await ctx.in_thread(_copy_onto_itself, ctx, state.home_fd(extent.home), offset, length)
    if journal.log is not None:
        await log_again(ctx, journal.log, bytearray(await journal.log_key()), journal.durable_gen)
    state.data_unsynced = state.twin_unsynced = True


async def log_again(ctx: FsContext, log: SealedLog, key: bytearray, durable: int) -> None:
    """The same for a log of which everything up to generation `durable` is. `key` is wiped. Raises OSError(EIO)."""
    # Whoever changes a directory may append to its log meanwhile.
    log_end, last_mac = log.end, log.prev_mac

    def again() -> None:
        raw = read_log(ctx.store, log.fd)[:log_end]
        if _last_mac(raw, key, durable) != last_mac:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        write_all(ctx.store, log.fd, raw, 0)

    try:
        await ctx.in_thread(again)
    finally:
        key[:] = bytes(len(key))
    log.unsynced = True


async def symlink_again(ctx: FsContext, log_id: bytes) -> None:
    """The same for a symlink's sidecar, and a sync of it. Raises OSError."""
    where = ctx.sidecar_dir(log_id)
    fd = ctx.store.open(where, sidecar_name(log_id), os.O_RDWR)
    try:
        raw = read_log(ctx.store, fd)
        header = parse(raw).header
        run = [KeyRun(log_id, Purpose.LOG_FILE, header.kek_version, (header.log_wrapped,))]
        if _last_mac(raw, (await ctx.keys.unwrap(run))[0][0], 0) is None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        await ctx.in_thread(write_all, ctx.store, fd, raw, 0)
        await ctx.in_threads([(ctx.store.fdatasync, fd), (ctx.store.fsync, where)])
    finally:
        ctx.store.close(fd)


def _last_mac(raw: bytes, key: Buffer, durable: int) -> bytes | None:
    """The MAC of the last frame of a log that is authentic to its end, None for any other."""
    try:
        good = take_up(authenticate(parse(raw), key), key, lambda _: True)
    except Damaged:
        return None
    lost = any(p is None and h.generation > durable for h, p in zip(good.heads, good.payloads, strict=True))
    return None if lost or good.tail or not good.heads else good.heads[-1].mac


def _copy_onto_itself(ctx: FsContext, fd: int, offset: int, length: int) -> None:
    done = 0
    while done < length:
        piece = ctx.store.pread(fd, min(_CHUNK_BYTES, length - done), offset + done)
        if not piece:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        write_all(ctx.store, fd, piece, offset + done)
        done += len(piece)
