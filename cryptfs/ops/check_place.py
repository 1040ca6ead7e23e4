"""Repair of places: what lies under a wrong name, and whose id `.dir` names elsewhere, goes back there."""

from __future__ import annotations

import os
from dataclasses import replace

from cryptfs.errors import Damaged
from cryptfs.format.datafile import decode_data_header
from cryptfs.fs.context import FsContext
from cryptfs.fs.directory import DirNode
from cryptfs.fs.symlink import decode_target_text, read_target
from cryptfs.fs.volume import Volume
from cryptfs.ops.check import Check
from cryptfs.ops.check_dirs import Absent, Seen, Stray
from cryptfs.ops.check_files import opened, read_sidecar
from cryptfs.ops.check_report import Spot
from cryptfs.ops.offline import open_for_reading
from cryptfs.ops.quarantine import open_chain, rename_even_if_read_only
from cryptfs.ports import RENAME_EXCHANGE, RENAME_NOREPLACE
from cryptfs.types import Kind


async def place_back(volume: Volume, check: Check) -> bool:
    """Rename strays to where `.dir` has them; whether directories moved (then what is below them has moved too).

    Updates `check.strays` and `check.absent`.
    """
    directories = [absent for absent in check.absent if absent.entry.kind is Kind.DIR]
    moved = await _place(volume.ctx, check, directories)
    if moved:
        return True
    await _place(volume.ctx, check, [a for a in check.absent if a.entry.kind in (Kind.FILE, Kind.SYMLINK)])
    return False


async def _place(ctx: FsContext, check: Check, wanted: list[Absent]) -> bool:
    done = False
    for absent in wanted:
        candidates = [
            stray
            for stray in check.strays
            if stray.seen.kind is absent.entry.kind and stray.seen.log_id == absent.entry.log_id
        ]
        right = [stray for stray in candidates if await is_authentic(ctx, stray.spot, stray.seen)]
        # Of several copies the one that opens; the others are strays as before.
        if not right or (absent.entry.log_id in check.ids and absent.entry.kind is Kind.DIR):
            continue
        try:
            _move(ctx, check, right[0], absent.spot)
        except OSError as error:
            absent.finding.detail = f"not put back: {error.strerror}"
            continue
        done = True
        absent.finding.action = right[0].finding.action = "put back in its place"
        right[0].finding.moved_to = absent.path
        check.absent.remove(absent)
        check.ids[absent.entry.log_id] = right[0].seen.st.st_ino
    return done


def _move(ctx: FsContext, check: Check, stray: Stray, to: Spot) -> None:
    if stray.spot == to:
        # Brought here by an exchange already.
        check.strays.remove(stray)
        return
    src_fd = open_chain(ctx, stray.spot.above)
    try:
        dst_fd = open_chain(ctx, to.above)
        try:
            occupant = next((other for other in check.strays if other.spot == to), None)
            flags = RENAME_NOREPLACE if occupant is None else RENAME_EXCHANGE
            rename_even_if_read_only(ctx, src_fd, stray.spot.name, dst_fd, to.name, flags)
        finally:
            ctx.store.close(dst_fd)
    finally:
        ctx.store.close(src_fd)
    check.strays.remove(stray)
    if occupant is not None:
        check.strays[check.strays.index(occupant)] = replace(occupant, spot=stray.spot)


async def is_authentic(ctx: FsContext, spot: Spot, seen: Seen) -> bool:
    """Whether what lies there is, by its own header or log, what it says it is, and opens as such."""
    try:
        fd = open_chain(ctx, spot.above)
        try:
            return await opened_whole(ctx, fd, spot.name, seen)
        finally:
            ctx.store.close(fd)
    except OSError:
        return False


async def opened_whole(ctx: FsContext, dir_fd: int, name: bytes, seen: Seen) -> bool:
    """As `is_authentic`, in a directory that is open. Raises OSError: then nobody knows."""
    store, log_id = ctx.store, seen.log_id
    if not log_id:
        return False
    try:
        if seen.kind is Kind.FILE:
            ctx.check_header(await ctx.volume_key(), decode_data_header(seen.proof))
            fd = open_for_reading(store, dir_fd, name)
            with opened(ctx, seen.st.st_ino, log_id, fd, read_sidecar(ctx, log_id)) as file:
                await file.journal.load()
            return True
        if seen.kind is Kind.SYMLINK:
            return len(await read_target(ctx, log_id)) == decode_target_text(seen.proof)[1]
        fd = store.open(dir_fd, name, os.O_RDONLY | os.O_DIRECTORY)
        try:
            node = await DirNode.open(ctx, seen.st.st_ino, fd, log_id)
            node.close_log()
        finally:
            store.close(fd)
        return True
    except Damaged:
        return False
