"""Symlinks: the target sealed in a sidecar, the id in the text of the symlink in `tree/` (FORMAT.md §8).

Written before the entry exists: a crash leaves an orphan sidecar, never a symlink without one (once its directory is
synced, which syncs the sidecar too).
"""

from __future__ import annotations

import base64
import os
import struct

from cryptfs.crypto.aead import ATTR_TARGET, open_attr, seal_attr
from cryptfs.errors import Damaged
from cryptfs.format.log import KIND_FILE, LogHeader
from cryptfs.format.sidecar import Sealed, SidecarPayload, decode_sidecar
from cryptfs.fs.context import FsContext, open_ours, sidecar_name
from cryptfs.fs.freshness import check
from cryptfs.fs.sealed_log import Frame, SealedLog, authenticate, parse, read_log
from cryptfs.ports import KeyRun, Kit
from cryptfs.types import Purpose

TARGET_MAX_BYTES = 4095
_TEXT = struct.Struct(">16sH")


def encode_target_text(log_id: bytes, length: int) -> bytes:
    """What the symlink in `tree/` points to: 24 bytes of base64url."""
    return base64.urlsafe_b64encode(_TEXT.pack(log_id, length))


def decode_target_text(text: bytes) -> tuple[bytes, int]:
    """(id, length of the target in bytes). Raises `Damaged("symlink")`."""
    try:
        raw = base64.b64decode(text, altchars=b"-_", validate=True)
        log_id, length = _TEXT.unpack(raw)
    except (ValueError, struct.error):
        raise Damaged("symlink", "target text") from None
    return log_id, length


async def write_target(ctx: FsContext, kit: Kit, target: bytes) -> None:
    """Create the sidecar that holds `target` (1 … 4095 bytes). Raises OSError, key errors."""
    made = await ctx.keys.generate(kit.log_id, Purpose.ATTR, 1)
    log_key = ctx.keys.peek(kit.log_wrapped)
    if log_key is None:
        log_key = (await ctx.keys.unwrap([KeyRun(kit.log_id, Purpose.LOG_FILE, kit.kek_version, (kit.log_wrapped,))]))[
            0
        ][0]
    if made.wiped:
        raise Damaged("wrap", "keys expired while a symlink was made")
    generation = ctx.next_generation()
    sealed = seal_attr(made.keys[0], ATTR_TARGET, ctx.config.volume_id, kit.log_id, generation, target)
    payload = SidecarPayload(target=Sealed(generation, made.kek_version, made.wrapped[0], sealed))
    header = LogHeader(KIND_FILE, kit.kek_version, kit.log_id, kit.log_wrapped)
    frame = Frame(generation, 0, len(target), payload.encode())
    log = SealedLog.create(ctx.store, ctx.sidecar_dir(kit.log_id), sidecar_name(kit.log_id), header, log_key, frame)
    ctx.store.close(log.fd)
    ctx.freshness.wrote(kit.log_id, generation)


async def read_target(ctx: FsContext, log_id: bytes) -> bytes:
    """A symlink's target. Raises `Damaged`, OSError, key errors."""
    try:
        fd = open_ours(ctx.store, ctx.sidecar_dir(log_id), sidecar_name(log_id), os.O_RDONLY)
    except FileNotFoundError:
        raise Damaged("missing-sidecar") from None
    try:
        raw = read_log(ctx.store, fd)
    finally:
        ctx.store.close(fd)
    parsed = parse(raw)
    header = parsed.header
    if header.kind != KIND_FILE or header.log_id != log_id:
        raise Damaged("id-mismatch", "the sidecar is another one's")
    log_key = (await ctx.keys.unwrap([KeyRun(log_id, Purpose.LOG_FILE, header.kek_version, (header.log_wrapped,))]))[0][
        0
    ]
    floor = ctx.freshness.floor(log_id)
    replayed = authenticate(parsed, log_key)
    if not replayed.heads or (replayed.tail and not ctx.crashed_since(replayed.heads[-1].generation)):
        raise Damaged("frame", "the sidecar is damaged")
    check(replayed.heads[-1].generation, floor)
    target: Sealed | None = None
    for payload in replayed.payloads:
        if payload is None:
            raise Damaged("frame", "the sidecar is damaged")
        target = decode_sidecar(payload, ctx.config.block_size).target or target
    if target is None:
        raise Damaged("symlink", "no target")
    key = (await ctx.keys.unwrap([KeyRun(log_id, Purpose.ATTR, target.kek_version, (target.wrapped,))]))[0][0]
    return open_attr(key, ATTR_TARGET, ctx.config.volume_id, log_id, target.generation, target.sealed)
