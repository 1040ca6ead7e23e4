"""Which sidecars still name keys under an older KEK: told from their bytes alone, without a key.

So it proves nothing against somebody who changes them; it is for the owner, who wants to know whether an old KEK may
go. Who changes a log loses a file by that in any case.
"""

from __future__ import annotations

import os
from contextlib import suppress

from cryptfs.errors import Damaged
from cryptfs.format.log import HEADER_BYTES, SNAPSHOT, decode_header
from cryptfs.format.sidecar import SidecarPayload, decode_sidecar
from cryptfs.fs.context import FsContext, open_ours, sidecar_name
from cryptfs.fs.sealed_log import parse, read_log
from cryptfs.types import ID_BYTES

SIDECAR_DIRS = 256
DEEP_MAX_BYTES = 16 << 20
"""Of longer logs the header alone is believed: a log is rewritten as a whole, and nothing older is appended to it."""


def sidecar_ids(ctx: FsContext, firsts: range) -> list[bytes]:
    """The ids that have a sidecar in the directories of these first bytes. Blocks; raises OSError."""
    ids = []
    for first in firsts:
        for name in ctx.store.listdir(ctx.sidecar_dir(bytes([first]))):
            if len(name) == 2 * ID_BYTES:
                with suppress(ValueError):
                    ids.append(bytes.fromhex(name.decode("ascii")))
    return ids


def header_version(ctx: FsContext, log_id: bytes) -> int:
    """The KEK version in a sidecar's header; 0 if that cannot be read as one. Raises ENOENT and other OSErrors."""
    try:
        fd = open_ours(ctx.store, ctx.sidecar_dir(log_id), sidecar_name(log_id), os.O_RDONLY)
    except Damaged:
        return 0
    try:
        return decode_header(ctx.store.pread(fd, HEADER_BYTES, 0)).kek_version
    except Damaged:
        return 0
    finally:
        ctx.store.close(fd)


def older(ctx: FsContext, log_ids: list[bytes], kek_version: int, *, deep: bool) -> list[bytes]:
    """Those of them whose sidecar names a KEK before `kek_version`; `deep`: also in its records. Blocks.

    One that is gone is none of them; one that cannot be read is.
    """
    return [log_id for log_id in log_ids if _is_older(ctx, log_id, kek_version, deep=deep)]


def _is_older(ctx: FsContext, log_id: bytes, kek_version: int, *, deep: bool) -> bool:
    try:
        if header_version(ctx, log_id) < kek_version:
            return True
        if not deep:
            return False
        fd = open_ours(ctx.store, ctx.sidecar_dir(log_id), sidecar_name(log_id), os.O_RDONLY)
        try:
            if ctx.store.fstat(fd).st_size > DEEP_MAX_BYTES:
                return False
            return any(_oldest(each) < kek_version for each in _payloads(read_log(ctx.store, fd), ctx))
        finally:
            ctx.store.close(fd)
    except FileNotFoundError:
        return False
    except (OSError, Damaged):
        return True


def _payloads(raw: bytes, ctx: FsContext) -> list[SidecarPayload]:
    """What the frames from the last snapshot on say; a lost payload says nothing, under whatever KEK."""
    parsed = parse(raw)
    snapshots = [i for i, head in enumerate(parsed.heads) if head.kind == SNAPSHOT]
    return [
        decode_sidecar(payload, ctx.config.block_size)
        for payload in parsed.payloads[snapshots[-1] if snapshots else 0 :]
        if payload is not None
    ]


def _oldest(payload: SidecarPayload) -> int:
    versions = [run.kek_version for run in payload.runs]
    versions += [each.kek_version for each in (payload.xattrs, payload.target) if each is not None]
    return min(versions, default=1 << 32)
