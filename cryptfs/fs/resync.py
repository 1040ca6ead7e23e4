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

from cryptfs.errors import Damaged
from cryptfs.fs.context import FsContext, write_all
from cryptfs.fs.recovery import authentic
from cryptfs.fs.sealed_log import SealedLog, authenticate, parse, read_log

if TYPE_CHECKING:
    from cryptfs.fs.journal import Journal

_CHUNK_BYTES = 1 << 20


async def write_again(journal: Journal) -> None:
    """Make a file's unsynced blocks and frames dirty again.

    Raises OSError(EIO) if something does not read back, key errors.

    The caller holds the file's lock alone.
    """
    ctx, state = journal.ctx, journal.state
    block_size = ctx.config.block_size
    for extent in list(state.blocks.unsettled()):
        if not await authentic(journal, extent, {}):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        length = (extent.end - 1 - extent.first) * block_size + extent.last_len
        offset = state.home_offset(extent.home, extent.first)
        await ctx.in_thread(_copy_onto_itself, ctx, state.home_fd(extent.home), offset, length)
    if journal.log is not None:
        await log_again(ctx, journal.log, bytearray(await journal.log_key()))
    state.data_unsynced = state.twin_unsynced = True


async def log_again(ctx: FsContext, log: SealedLog, key: bytearray) -> None:
    """The same for a log. `key` is wiped. Raises OSError(EIO)."""
    # Whoever changes a directory may append to its log meanwhile.
    log_end, last_mac = log.end, log.prev_mac

    def again() -> None:
        raw = read_log(ctx.store, log.fd)[:log_end]
        try:
            good = authenticate(parse(raw), key)
        except Damaged:
            good = None
        if good is None or not good.ends or good.ends[-1] != log_end or good.heads[-1].mac != last_mac:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        write_all(ctx.store, log.fd, raw, 0)

    try:
        await ctx.in_thread(again)
    finally:
        key[:] = bytes(len(key))
    log.unsynced = True


def _copy_onto_itself(ctx: FsContext, fd: int, offset: int, length: int) -> None:
    done = 0
    while done < length:
        piece = ctx.store.pread(fd, min(_CHUNK_BYTES, length - done), offset + done)
        if not piece:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        write_all(ctx.store, fd, piece, offset + done)
        done += len(piece)
