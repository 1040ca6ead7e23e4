"""Repair of sealed logs: sidecars that lie under each other's names, `.dir` logs that cannot be relied on."""

from __future__ import annotations

import os
import stat
from contextlib import suppress

from cryptfs.errors import Damaged
from cryptfs.format.dirlog import DirPayload
from cryptfs.format.log import HEADER_BYTES, KIND_DIR, KIND_FILE, LogHeader, decode_header
from cryptfs.fs.context import FsContext, open_ours, sidecar_name
from cryptfs.fs.sealed_log import Frame, SealedLog
from cryptfs.fs.volume import Volume
from cryptfs.names import DIR_LOG, DIR_LOG_NEW
from cryptfs.ops.check import Check, LostDir
from cryptfs.ops.check_report import What
from cryptfs.ops.quarantine import Quarantine, open_chain
from cryptfs.ports import RENAME_EXCHANGE, RENAME_NOREPLACE, KeyRun
from cryptfs.types import Purpose


async def exchange_sidecars(volume: Volume, check: Check) -> None:
    """Rename sidecars back that lie under another id's name. One rename each."""
    ctx = volume.ctx
    wrong = [
        finding
        for finding in check.report.findings
        if finding.what in (What.FILE, What.SYMLINK) and finding.reason == "id-mismatch" and not finding.action
    ]
    by_id = {finding.log_id: finding for finding in wrong}
    for finding in wrong:
        owner = await _owner_of_sidecar(ctx, finding.log_id)
        if finding.action or owner in (b"", finding.log_id):
            continue
        there = await _owner_of_sidecar(ctx, owner)
        if there not in (b"", finding.log_id):
            continue
        flags = RENAME_EXCHANGE if there else RENAME_NOREPLACE
        src, dst = ctx.sidecar_dir(finding.log_id), ctx.sidecar_dir(owner)
        with suppress(FileExistsError):
            ctx.store.rename(src, sidecar_name(finding.log_id), dst, sidecar_name(owner), flags)
            if there:
                finding.action = "its sidecar lay under another file's name and was put back"
                if owner in by_id:
                    by_id[owner].action = finding.action


async def _owner_of_sidecar(ctx: FsContext, log_id: bytes) -> bytes:
    """Whose the sidecar under this id's name is, proven by its log key; b"" if there is none or it proves nothing."""
    try:
        fd = ctx.store.open(ctx.sidecar_dir(log_id), sidecar_name(log_id), os.O_RDONLY)
    except OSError:
        return b""
    try:
        header = decode_header(ctx.store.pread(fd, HEADER_BYTES, 0))
        if header.kind == KIND_FILE:
            run = KeyRun(header.log_id, Purpose.LOG_FILE, header.kek_version, (header.log_wrapped,))
            await ctx.keys.unwrap([run])
            return header.log_id
    except (Damaged, OSError):
        return b""
    finally:
        ctx.store.close(fd)
    return b""


async def renew_log(volume: Volume, quarantine: Quarantine, lost: LostDir) -> None:
    """Give a directory a new, empty log under its id; what lies in it is strays from then on.

    The names key is kept if it can be, so that the strays' names can still be read. Raises OSError, key errors.
    """
    ctx, store = volume.ctx, volume.ctx.store
    fd = open_chain(ctx, lost.spot.below)
    try:
        kept = await _names_key(ctx, fd, lost.dir_id)
        fresh = await ctx.keys.generate(lost.dir_id, Purpose.NAMES, 1)
        made = await ctx.keys.generate(lost.dir_id, Purpose.LOG_DIR, 1)
        if made.wiped:
            raise Damaged("wrap", "keys expired while a directory was repaired")
        names = kept[1] if kept is not None and kept[0] == made.kek_version else fresh.wrapped[0]
        header = LogHeader(KIND_DIR, made.kek_version, lost.dir_id, made.wrapped[0], names)
        _clear_the_way(ctx, quarantine, fd, lost.dir_id)
        frame = Frame(ctx.next_generation(), 0, 0, DirPayload().encode())
        log = SealedLog.create(store, fd, DIR_LOG_NEW, header, made.keys[0], frame)
        try:
            store.fdatasync(log.fd)
            store.rename(fd, DIR_LOG_NEW, fd, DIR_LOG)
            store.fsync(fd)
        finally:
            store.close(log.fd)
    finally:
        store.close(fd)
    lost.finding.action = "given a new log; what lay in it is in the quarantine"


async def _names_key(ctx: FsContext, fd: int, dir_id: bytes) -> tuple[int, bytes] | None:
    """(KEK version, wrapped names key) of the old log, if it unwraps for this directory.

    Raises OSError: a log that cannot be read at the moment is not given up.
    """
    try:
        log_fd = open_ours(ctx.store, fd, DIR_LOG, os.O_RDONLY)
    except (Damaged, FileNotFoundError):
        return None
    try:
        header = decode_header(ctx.store.pread(log_fd, HEADER_BYTES, 0))
        if header.kind != KIND_DIR:
            return None
        await ctx.keys.unwrap([KeyRun(dir_id, Purpose.NAMES, header.kek_version, (header.names_wrapped,))])
        return header.kek_version, header.names_wrapped
    except Damaged:
        return None
    finally:
        ctx.store.close(log_fd)


def _clear_the_way(ctx: FsContext, quarantine: Quarantine, fd: int, dir_id: bytes) -> None:
    """Keep what is left of the old log, and make sure that a new one can be renamed over it."""
    store = ctx.store
    with suppress(FileNotFoundError):
        store.unlink(fd, DIR_LOG_NEW)
    try:
        st = store.lstat(fd, DIR_LOG)
    except FileNotFoundError:
        return
    if stat.S_ISDIR(st.st_mode):
        store.rename(fd, DIR_LOG, fd, b"dir-log-" + dir_id.hex().encode(), RENAME_NOREPLACE)
    else:
        quarantine.keep_aside(fd, DIR_LOG, dir_id.hex().encode() + b".dir")
