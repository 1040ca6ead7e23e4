"""What a crash left of one file: the longest prefix of its history whose blocks are all there (FORMAT.md §9).

Runs once, on the first opening after an epoch that ended uncleanly, and settles the file: log and data file are cut
to what was kept and a new frame says so. A crash in here leaves the same file to be settled again: the cut log is a
prefix that was chosen before, and choosing is a function of what lies on disk.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from cryptfs.blocks.codec import Slots
from cryptfs.blocks.extents import HOME_TWIN, Extent, ExtentMap
from cryptfs.errors import Damaged
from cryptfs.format.datafile import HEADER_BYTES, DataHeader
from cryptfs.fs.context import FsContext, log, sidecar_name, write_all
from cryptfs.fs.freshness import check
from cryptfs.fs.history import POISON, build_map
from cryptfs.fs.log_gap import acknowledged_in_tail
from cryptfs.fs.sealed_log import Replay
from cryptfs.fs.state import FileState
from cryptfs.ports import KeyRun
from cryptfs.types import Purpose

if TYPE_CHECKING:
    from cryptfs.fs.journal_frames import Frames
    from cryptfs.fs.journal_loading import Loading

_CHECK_BLOCKS = 64


async def recover(journal: Loading, fd: int, replayed: Replay, data_size: int, floor: int, *, born: int | None) -> None:
    """Choose the prefix, adopt it, settle it. Raises `Damaged` if something acknowledged is missing.

    `floor`: what this machine has seen to be durable of it, whatever the log itself says. `born`: the generation in
    the data file's header, authenticated; None if it has no header.
    """
    has_header = born is not None
    ctx, state = journal.ctx, journal.state
    # Epochs that ended cleanly left everything durable; so did every mount for what came before it, once it was
    # settled.
    settled = (h.generation for h in replayed.heads if not ctx.forgives(h.generation))
    durable = max(replayed.durable_up_to, *settled, 0)
    if replayed.tail:
        # A frame that survived behind a torn one still knows what had become durable before it.
        durable = max(durable, acknowledged_in_tail(replayed, await journal.log_key(), ctx.is_settled))
        if durable > max((head.generation for head in replayed.heads), default=0):
            raise Damaged("frame", "an acknowledged frame is damaged")
    check(replayed.heads[-1].generation if replayed.heads else 0, floor)
    durable = max(durable, floor)
    block_size = ctx.config.block_size
    least = sum(1 for head in replayed.heads if head.generation <= durable)
    # A head whose payload is torn ends the history, unless it was acknowledged: then it is damage, and poisons.
    most = least
    while most < len(replayed.heads) and replayed.payloads[most] is not None:
        most += 1
    verdicts: dict[bytes, bool] = {}
    for keep in range(most, max(least, 1) - 1, -1):
        blocks, size = build_map(replayed, keep, block_size)
        suspects = [e for e in blocks if e.home != POISON and e.generation > durable and ctx.forgives(e.generation)]
        if all([await authentic(journal, e, verdicts) for e in suspects]):
            break
    else:
        if least:
            blocks, size = build_map(replayed, least, block_size)
            keep = least
        elif replayed.gap or (born is not None and not ctx.forgives(born)):
            # It was there, with at least one frame, when an epoch ended cleanly.
            raise Damaged("frame", "no intact frame")
        else:
            # Not one frame holds, and none was ever acknowledged: the file is as it was at its birth, empty.
            await restart_newborn(journal, data_size)
            ctx.store.close(fd)  # Not before: if that failed, the caller closes it.
            return
    if keep <= least and (not has_header or data_size < HEADER_BYTES + size):
        # All of this was acknowledged, and a data file is never cut before its smaller size is.
        raise Damaged("size", f"data file of {data_size} bytes, {HEADER_BYTES + size} expected")
    dropped = len(replayed.heads) - keep
    if dropped or replayed.tail:
        log.warning("inode %d: recovered after a crash, %d unacknowledged frames dropped", state.ino, dropped)
    journal.adopt(fd, replayed, keep, blocks, size)
    state.data_len = data_size - HEADER_BYTES
    if not ctx.read_only and state.writable:
        try:
            await _settle(journal, has_header=has_header)
        except BaseException:
            journal.disown()
            raise
    journal.loaded = True


async def _settle(journal: Loading, *, has_header: bool) -> None:
    """Make log and data file say what was adopted, and nothing else."""
    ctx, state = journal.ctx, journal.state
    assert journal.log is not None
    if ctx.store.fstat(journal.log.fd).st_size != journal.log.end:
        ctx.store.ftruncate(journal.log.fd, journal.log.end)
    if not has_header:
        await _write_header(journal)
    if state.data_len != state.size:
        before = ctx.store.fstat(state.data_fd)
        ctx.store.ftruncate(state.data_fd, HEADER_BYTES + state.size)
        ctx.store.futimens(state.data_fd, before.st_atime_ns, before.st_mtime_ns)
        state.data_len = state.size
    journal.settle_frame(await journal.log_key())


async def authentic(journal: Frames, extent: Extent, verdicts: dict[bytes, bool]) -> bool:
    """Whether every block of `extent` decrypts from its home."""
    return await authentic_in(journal.ctx, journal.state, extent, verdicts)


async def authentic_in(ctx: FsContext, state: FileState, extent: Extent, verdicts: dict[bytes, bool]) -> bool:
    """The same for a file that has no journal."""
    if extent.home == HOME_TWIN and state.twin_fd is None:
        return False
    slots = Slots(ctx.config.block_size, min(_CHECK_BLOCKS, extent.end - extent.first))
    out = memoryview(bytearray(ctx.config.block_size * slots.count))
    for first in range(extent.first, extent.end, _CHECK_BLOCKS):
        end = min(first + _CHECK_BLOCKS, extent.end)
        wraps = [extent.wrapped_of(block) for block in range(first, end)]
        if all(verdicts.get(w) for w in wraps):
            continue
        if any(verdicts.get(w) is False for w in wraps):
            return False
        targets = ctx.codec.targets(extent, first, end, slots)
        offset = state.home_offset(extent.home, first)
        got = await ctx.in_thread(ctx.store.preadv, state.home_fd(extent.home), targets, offset)
        good = got == sum(map(len, targets))
        if good:
            run = KeyRun(state.file_id, Purpose.BLOCK, extent.kek_version, wraps, first)
            try:
                deks = (await ctx.keys.unwrap([run]))[0]
            except Damaged:
                return False
            good = ctx.codec.open_run(state.file_id, extent, first, end, deks, slots, out) < 0
        verdicts.update(dict.fromkeys(wraps, good))
        if not good:
            return False
    return True


async def restart_newborn(journal: Loading, data_size: int) -> None:
    """A file whose creation a crash cut short: empty, with a header and, from the first frame on, a new sidecar."""
    ctx, state = journal.ctx, journal.state
    log.warning("inode %d: recovered after a crash, it never had content on disk", state.ino)
    state.blocks = ExtentMap(ctx.config.block_size)
    state.size = 0
    state.data_len = max(0, data_size - HEADER_BYTES)
    if ctx.read_only or not state.writable:
        journal.loaded = True
        return
    made = await ctx.keys.generate(state.file_id, Purpose.LOG_FILE, 1)
    # A sidecar without one good frame may lie there; it goes first, so that the new one can be created.
    with suppress(FileNotFoundError):
        ctx.store.unlink(ctx.sidecar_dir(state.file_id), sidecar_name(state.file_id))
    before = ctx.store.fstat(state.data_fd)
    ctx.store.ftruncate(state.data_fd, 0)
    await _write_header(journal)
    ctx.store.futimens(state.data_fd, before.st_atime_ns, before.st_mtime_ns)
    journal.begin(made.kek_version, made.wrapped[0])
    state.data_len = 0
    state.data_unsynced = True
    await journal.commit()


async def _write_header(journal: Loading) -> None:
    """Give the data file the header that a crash kept from it.

    Born in the crashed epoch, as it was: a directory that is settled later must find it so.
    """
    ctx, state = journal.ctx, journal.state
    header = ctx.sign_header(await ctx.volume_key(), DataHeader(state.file_id, ctx.crash_generation))
    write_all(ctx.store, state.data_fd, header, 0)
