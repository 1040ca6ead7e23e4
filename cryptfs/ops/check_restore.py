"""Repair of sidecars that an earlier repair moved to `damaged/`: what needs them is there, and they are not.

That happens if a file was out of sight when its sidecar was taken for an orphan: in a directory that somebody had moved
away and has brought back since.

One rename each, the twin's first: a crash between the two leaves a file without a sidecar, as before.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress

from cryptfs.errors import Damaged
from cryptfs.format.log import KIND_FILE
from cryptfs.fs.context import FsContext, open_ours, sidecar_name, twin_name
from cryptfs.fs.sealed_log import authenticate, parse, read_log
from cryptfs.fs.volume import Volume
from cryptfs.ops.check import Check
from cryptfs.ops.check_report import Finding, Severity, What
from cryptfs.ops.check_sidecars import SIDECAR
from cryptfs.ops.quarantine import DAMAGED
from cryptfs.ports import RENAME_NOREPLACE, KeyRun
from cryptfs.types import Purpose

_KEPT = re.compile(rb"([0-9a-f]{32})\.sidecar")


async def restore_sidecars(volume: Volume, check: Check) -> bool:
    """Put sidecars back whose file is in its place and has none; whether there were any. Raises key errors.

    Only what its own log key proves to be the file's; whether it is its newest one is judged as for any sidecar.
    """
    ctx, store = volume.ctx, volume.ctx.store
    try:
        kept_fd = store.open(store.root(), DAMAGED, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return False
    done = False
    try:
        for name in sorted(store.listdir(kept_fd)):
            match = _KEPT.fullmatch(name)
            log_id = bytes.fromhex(match[1].decode()) if match is not None else b""
            if log_id not in check.ids or check.sidecars.by_id.get(log_id, 0) & SIDECAR:
                continue
            with suppress(OSError, Damaged):
                await _prove(ctx, kept_fd, name, log_id)
                _bring_back(ctx, kept_fd, name, log_id)
                _say(check, log_id, name)
                done = True
    finally:
        store.close(kept_fd)
    return done


async def _prove(ctx: FsContext, kept_fd: int, name: bytes, log_id: bytes) -> None:
    """Raises `Damaged` if nothing in this log is authentic as that id's, OSError, key errors."""
    fd = open_ours(ctx.store, kept_fd, name, os.O_RDONLY)
    try:
        parsed = parse(await ctx.in_thread(read_log, ctx.store, fd))
    finally:
        ctx.store.close(fd)
    header = parsed.header
    if header.kind != KIND_FILE or header.log_id != log_id:
        raise Damaged("id-mismatch", "another id's")
    run = KeyRun(log_id, Purpose.LOG_FILE, header.kek_version, (header.log_wrapped,))
    if not authenticate(parsed, (await ctx.keys.unwrap([run]))[0][0]).heads:
        raise Damaged("frame", "none of them is authentic")


def _bring_back(ctx: FsContext, kept_fd: int, name: bytes, log_id: bytes) -> None:
    where = ctx.sidecar_dir(log_id)
    with suppress(FileNotFoundError, FileExistsError):
        kept_twin = name.removesuffix(b".sidecar") + b".twin"
        ctx.store.rename(kept_fd, kept_twin, where, twin_name(log_id), RENAME_NOREPLACE)
    ctx.store.rename(kept_fd, name, where, sidecar_name(log_id), RENAME_NOREPLACE)


def _say(check: Check, log_id: bytes, name: bytes) -> None:
    about = [finding for finding in check.report.findings if finding.log_id == log_id]
    if not about:
        # A file that looked empty without it, or something whose attributes it holds.
        about = [Finding(Severity.DAMAGE, What.FILE, DAMAGED + b"/" + name, "missing-sidecar", "", log_id)]
        check.add(about[0])
    for finding in about:
        finding.action = "its sidecar lay in damaged/ and was put back"
