"""`check --repair` of a lost or damaged `state` file: it is made anew from what the volume's logs say (FORMAT.md §4).

Every frame of every sealed log names the mount epoch that it was written in, authenticated. The newest of all is the
last one that anything was written in; that it ended cleanly nobody can say any more, so it counts as one that did not,
and what a crash may leave in it is settled as after any crash. Nothing older is forgiven.

A mount that wrote data file headers and nothing else is in no log: the number after the newest is left out.

Nothing is changed here but `state`, which is replaced by rename: a crash leaves the old file, perhaps with a stray
`state.new`, or the new one.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass

from cryptfs.errors import Damaged, VolumeDamaged
from cryptfs.format.log import KIND_DIR, Head, LogHeader
from cryptfs.format.state import SLOT_BYTES, State
from cryptfs.fs.context import FsContext, log, open_ours, sidecar_name, write_all
from cryptfs.fs.epoch import STATE, read_state, sign_states
from cryptfs.fs.older import SIDECAR_DIRS, sidecar_ids
from cryptfs.fs.sealed_log import is_authentic, parse, read_log
from cryptfs.names import DIR_LOG
from cryptfs.ops.check_report import Finding, Severity, What
from cryptfs.ops.offline import Access, locked_context
from cryptfs.ports import KeyRun, Store
from cryptfs.types import EPOCH_MAX, Purpose, epoch_of

STATE_NEW = b"state.new"
_LEVELS = 256
"""Directories deeper than that are passed over: each level takes a descriptor, and what was written in the last mount
was hardly all of it down there."""
_SEQUENCES_SHIFT = 20
"""So many bits for the slots written in one mount, which are two, and two for each rotation: no number that was ever
used, and may be on record, is as high."""


@dataclass(frozen=True, slots=True)
class _Last:
    """The last frame's head of one log, and what its key takes; nothing of it is authentic yet."""

    header: LogHeader
    head: Head


async def mend_state(access: Access) -> Finding | None:
    """Replace a `state` without a slot that is authentic; what was wrong, or None if it is as it should be.

    The freshness record is not told: what this machine has seen newer is still damage (docs/FRESHNESS.md).

    Raises `VolumeBusy` if the volume is mounted, `VolumeDamaged` if there is no log to learn from either, OSError, key
    errors.
    """
    with locked_context(access) as ctx:
        try:
            await read_state(ctx.store, access.keys, access.config.volume_id)
        except VolumeDamaged as error:
            damage = str(error)
        else:
            return None
        # What was not durable before is not to look so afterwards: see `fs.epoch`.
        await ctx.sync_everything()
        newest = await _newest_epoch(ctx)
        epoch = min(newest + 1, EPOCH_MAX)
        state = State(epoch << _SEQUENCES_SHIFT, epoch, clean=True, unclean=((newest, epoch),))
        (slot,) = await sign_states(access.keys, access.config.volume_id, state)
        await ctx.in_thread(_replace, ctx.store, state, slot)
        log.warning("%s: made anew; the last mount that wrote anything was number %d", damage, newest)
    made = f"made anew; what a crash may leave is excused in mount {newest}, the last that wrote anything"
    return Finding(Severity.DAMAGE, What.STATE, STATE, "state", damage, action=made)


def _replace(store: Store, state: State, slot: bytes) -> None:
    """Have a file of this slot (512 bytes) and an empty one where `state` should be. Blocks. Raises OSError."""
    root = store.root()
    with suppress(FileNotFoundError):
        store.unlink(root, STATE_NEW)
    fd = store.open(root, STATE_NEW, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    try:
        write_all(store, fd, bytes(2 * SLOT_BYTES), 0)
        write_all(store, fd, slot, state.slot * SLOT_BYTES)
        store.fsync(fd)
    finally:
        store.close(fd)
    store.rename(root, STATE_NEW, root, STATE)
    store.fsync(root)


async def _newest_epoch(ctx: FsContext) -> int:
    """Of all authentic frames. Heads are tried from the newest claim on, so one key is asked for where none lies."""
    found = await ctx.in_thread(_all_logs, ctx)
    for last in sorted(found, key=lambda each: each.head.generation, reverse=True):
        header = last.header
        purpose = Purpose.LOG_DIR if header.kind == KIND_DIR else Purpose.LOG_FILE
        run = KeyRun(header.log_id, purpose, header.kek_version, (header.log_wrapped,))
        try:
            key = (await ctx.keys.unwrap([run]))[0][0]
        except Damaged:
            continue
        if is_authentic(last.head, header.log_id, key):
            return epoch_of(last.head.generation)
    raise VolumeDamaged("the volume's `state` file is lost, and it has no log to learn from what that said")


def _all_logs(ctx: FsContext) -> list[_Last]:
    """Sidecars and `.dir`s, as far as they can be parsed. Blocks; raises OSError."""
    found: list[_Last] = []
    for first in range(SIDECAR_DIRS):
        where = ctx.sidecar_dir(bytes([first]))
        for log_id in sidecar_ids(ctx, range(first, first + 1)):
            _look(ctx.store, where, sidecar_name(log_id), found)
    _look_below(ctx.store, ctx.dir_fd(b"tree"), found)
    return found


def _look_below(store: Store, top: int, found: list[_Last]) -> None:
    """Each directory's log; one descriptor per level is open."""
    _look(store, top, DIR_LOG, found)
    levels = [(top, store.listdir(top))]
    try:
        while levels:
            fd, names = levels[-1]
            if not names:
                levels.pop()
                if fd != top:
                    store.close(fd)
                continue
            try:
                below = open_ours(store, fd, names.pop(), os.O_RDONLY | os.O_DIRECTORY)
            except (Damaged, FileNotFoundError):
                continue
            levels.append((below, []))
            _look(store, below, DIR_LOG, found)
            if len(levels) < _LEVELS:
                levels[-1] = below, store.listdir(below)
    finally:
        for fd, _ in levels:
            if fd != top:
                store.close(fd)


def _look(store: Store, dir_fd: int, name: bytes, found: list[_Last]) -> None:
    try:
        fd = open_ours(store, dir_fd, name, os.O_RDONLY)
    except (Damaged, FileNotFoundError):
        return
    try:
        parsed = parse(read_log(store, fd))
    except Damaged:
        return
    finally:
        store.close(fd)
    if parsed.heads:
        found.append(_Last(parsed.header, parsed.heads[-1]))
