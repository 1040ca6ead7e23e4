"""The sidecar of what has no blocks: a symlink (target, and xattrs), or a special file (xattrs, if it ever had any).

Nobody has such a thing open, and fsync does not reach it: so a change of its xattrs is synced before it counts. A
crash before that leaves the log as it was, perhaps with a torn frame after its end, which is dropped; or, for a special
file's first xattrs, no log or a torn one, which is none.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass

from cryptfs.errors import Damaged
from cryptfs.format.log import HEADER_BYTES, KIND_FILE, LogHeader
from cryptfs.format.sidecar import Sealed, SidecarPayload, decode_sidecar
from cryptfs.fs.context import FsContext, open_ours, sidecar_name
from cryptfs.fs.freshness import check
from cryptfs.fs.log_gap import acknowledged_in_tail
from cryptfs.fs.rewrapping import Rewrapping
from cryptfs.fs.sealed_log import Frame, Replay, SealedLog, authenticate, parse, read_log
from cryptfs.ports import KeyRun
from cryptfs.types import Purpose, epoch_of

_COMPACT_MIN_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class AttrLog:
    """What the sidecar of a symlink or special file says. `keep`: how many of its frames count."""

    replayed: Replay
    keep: int
    target: Sealed | None
    xattrs: Sealed | None
    size: int


async def read_attr_log(ctx: FsContext, log_id: bytes) -> AttrLog:
    """Raises ENOENT, `Damaged`, key errors."""
    fd = open_ours(ctx.store, ctx.sidecar_dir(log_id), sidecar_name(log_id), os.O_RDONLY)
    try:
        raw = read_log(ctx.store, fd)
    finally:
        ctx.store.close(fd)
    if ctx.crashed_before and (len(raw) < HEADER_BYTES or not any(raw[:HEADER_BYTES])):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    parsed = parse(raw)
    header = parsed.header
    if header.kind != KIND_FILE or header.log_id != log_id:
        raise Damaged("id-mismatch", "the sidecar is another one's")
    log_key = await _log_key(ctx, header)
    floor = ctx.freshness.floor(log_id)
    replayed = authenticate(parsed, log_key)
    keep = _kept(ctx, replayed, log_key, floor)
    target = xattrs = None
    for head, payload in zip(replayed.heads[:keep], replayed.payloads[:keep], strict=True):
        assert payload is not None
        decoded = decode_sidecar(payload, ctx.config.block_size)
        if decoded.flags != head.flags:
            raise Damaged("payload", "xattrs that the head does not announce, or none that it does")
        target = decoded.target or target
        if decoded.flags:
            xattrs = decoded.xattrs
    return AttrLog(replayed, keep, target, xattrs, replayed.heads[keep - 1].size)


def _kept(ctx: FsContext, replayed: Replay, log_key: memoryview, floor: int) -> int:
    """How many frames count: all, but for those that a crash tore before they were synced. Raises `Damaged`."""
    heads = replayed.heads
    keep = next((i for i, payload in enumerate(replayed.payloads) if payload is None), len(heads))
    if not keep:
        raise Damaged("frame", "the sidecar is damaged")
    last = heads[keep - 1].generation
    if keep < len(heads) or replayed.tail:
        settled = (head.generation for head in heads if ctx.is_settled(head.generation))
        in_tail = acknowledged_in_tail(replayed, log_key, ctx.is_settled) if replayed.tail else 0
        durable = max(replayed.durable_up_to, in_tail, *settled, 0)
        if not ctx.crashed_since(last) or durable > last:
            raise Damaged("frame", "the sidecar is damaged")
    check(last, floor)
    return keep


async def _log_key(ctx: FsContext, header: LogHeader) -> memoryview:
    run = KeyRun(header.log_id, Purpose.LOG_FILE, header.kek_version, (header.log_wrapped,))
    return (await ctx.keys.unwrap([run]))[0][0]


async def find_attr_log(ctx: FsContext, log_id: bytes) -> AttrLog | None:
    """The same for a special file: None if it never had xattrs. Raises `Damaged` if this machine knows better."""
    try:
        return await read_attr_log(ctx, log_id)
    except FileNotFoundError:
        await ctx.freshness.check_unborn(log_id)
        return None


async def write_xattrs(ctx: FsContext, log_id: bytes, known: AttrLog | None, xattrs: Sealed | None) -> None:
    """Another xattr set, durable when this returns. `known`: the log as it is; None makes it.

    Raises OSError, key errors; then it is as it was, or, if only the sync failed, as it is wanted, and nothing says
    that this is durable. The caller lets nobody else change this log meanwhile.
    """
    if known is None:
        await make_attr_log(ctx, log_id, xattrs)
        return
    header, where = known.replayed.header, ctx.sidecar_dir(log_id)
    payload = SidecarPayload(xattrs=xattrs, xattrs_gone=xattrs is None)
    fd = open_ours(ctx.store, where, sidecar_name(log_id), os.O_RDWR)
    log = SealedLog.resume(fd, known.replayed, known.keep)
    generation = ctx.next_generation()
    assert ctx.state is not None
    last = known.replayed.heads[known.keep - 1].generation
    # A symlink made in this epoch may not be durable itself.
    durable = last if epoch_of(last) < ctx.state.epoch else known.replayed.durable_up_to
    frame = Frame(generation, durable, known.size, payload.encode(), flags=payload.flags)
    key = bytearray(await _log_key(ctx, header))
    try:
        # What a torn append left lies past the end.
        log.torn = ctx.store.fstat(fd).st_size != log.end
        log.append(ctx.store, key, frame)
        ctx.freshness.wrote(log_id, generation)
        with ctx.freshness.doubted_on_failure(log_id):
            await ctx.in_thread(ctx.store.fdatasync, fd)
            await sync_name(ctx, log_id)
            live = sum(len(each.sealed) for each in (known.target, xattrs) if each is not None)
            if log.end > _COMPACT_MIN_BYTES + 4 * live:
                generation = ctx.next_generation()
                whole = SidecarPayload(xattrs=xattrs, target=known.target)
                snapshot = Frame(generation, frame.generation, known.size, whole.encode(), flags=whole.flags)
                log = await ctx.in_thread(log.rewrite, ctx.store, where, sidecar_name(log_id), key, header, snapshot)
                await ctx.in_thread(ctx.store.fsync, where)
    finally:
        key[:] = bytes(len(key))
        ctx.store.close(log.fd)
    ctx.freshness.durable(log_id, generation)


def is_under(known: AttrLog, kek_version: int) -> bool:
    """Whether everything that reading this takes is wrapped under this KEK or a newer one."""
    sealed = all(each is None or each.kek_version >= kek_version for each in (known.target, known.xattrs))
    return known.replayed.header.kek_version >= kek_version and sealed


async def rotate_attr_log(ctx: FsContext, log_id: bytes, known: AttrLog, kek_version: int) -> Sealed | None:
    """Rewrite it under the newest KEK, at least `kek_version`, with a new MAC key; see `Journal.rotate` for durability.

    The xattr set as it is now. Raises OSError, key errors. The caller lets nobody else change this log meanwhile.
    """
    anew = Rewrapping(ctx.keys, log_id, kek_version)
    target, xattrs = await anew.sealed(known.target), await anew.sealed(known.xattrs)
    made = await anew.log_key(Purpose.LOG_FILE)
    key = bytearray(made.keys[0])
    header = LogHeader(KIND_FILE, made.kek_version, log_id, made.wrapped[0])
    payload = SidecarPayload(xattrs=xattrs, target=target)
    assert ctx.state is not None
    last = known.replayed.heads[known.keep - 1].generation
    durable = last if epoch_of(last) < ctx.state.epoch else known.replayed.durable_up_to
    # See `Journal._rotate`: the snapshot is what the last frame said, under its number.
    snapshot = Frame(last, known.replayed.durable_up_to, known.size, payload.encode(), flags=payload.flags)
    word = Frame(ctx.next_generation(), durable, known.size, SidecarPayload().encode())
    where, name = ctx.sidecar_dir(log_id), sidecar_name(log_id)
    log = SealedLog.resume(open_ours(ctx.store, where, name, os.O_RDONLY), known.replayed, known.keep)
    try:
        log = await ctx.in_thread(log.rewrite, ctx.store, where, name, key, header, snapshot, word)
        ctx.renamed_logs[log_id] = word.generation
        ctx.freshness.wrote(log_id, word.generation)
    finally:
        key[:] = bytes(len(key))
        ctx.store.close(log.fd)
    return xattrs


async def sync_name(ctx: FsContext, log_id: bytes) -> None:
    """Make it durable that a log that was replaced has its name. Raises OSError. Nobody else changes it meanwhile."""
    if log_id in ctx.renamed_logs:
        with ctx.freshness.doubted_on_failure(log_id):
            await ctx.in_thread(ctx.store.fsync, ctx.sidecar_dir(log_id))
        ctx.renamed_logs.pop(log_id, None)


async def make_attr_log(ctx: FsContext, log_id: bytes, xattrs: Sealed | None) -> None:
    """The first sidecar of a special file, durable when this returns. Raises OSError, key errors."""
    made = await ctx.keys.generate(log_id, Purpose.LOG_FILE, 1)
    # No await from here until the frame is written: the key is good.
    where = ctx.sidecar_dir(log_id)
    header = LogHeader(KIND_FILE, made.kek_version, log_id, made.wrapped[0])
    payload = SidecarPayload(xattrs=xattrs, xattrs_gone=xattrs is None)
    generation = ctx.next_generation()
    frame = Frame(generation, 0, 0, payload.encode(), flags=payload.flags)
    log = SealedLog.create(ctx.store, where, sidecar_name(log_id), header, made.keys[0], frame)
    try:
        ctx.freshness.wrote(log_id, generation)
        with ctx.freshness.doubted_on_failure(log_id):
            await ctx.in_threads([(ctx.store.fdatasync, log.fd), (ctx.store.fsync, where)])
    finally:
        ctx.store.close(log.fd)
    ctx.freshness.durable(log_id, generation)
