"""Symlinks: the target sealed in a sidecar, the id in the text of the symlink in `tree/` (FORMAT.md §8).

Written before the entry exists: a crash leaves an orphan sidecar, never a symlink without one (once its directory is
synced, which syncs the sidecar too).
"""

from __future__ import annotations

import base64
import struct

from cryptfs.crypto.aead import ATTR_TARGET, open_attr, seal_attr
from cryptfs.errors import Damaged
from cryptfs.format.log import KIND_FILE, LogHeader
from cryptfs.format.sidecar import Sealed, SidecarPayload
from cryptfs.fs.attr_log import read_attr_log
from cryptfs.fs.context import FsContext, sidecar_name
from cryptfs.fs.sealed_log import Frame, SealedLog
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
    # A copy: the cache may wipe its own while the other key is made, and asking again could go on for ever.
    log_key = bytearray(await ctx.log_key_of(kit))
    try:
        made = await ctx.keys.generate(kit.log_id, Purpose.ATTR, 1)
        # No await between here and the end: the new key is good.
        generation = ctx.next_generation()
        sealed = seal_attr(made.keys[0], ATTR_TARGET, ctx.config.volume_id, kit.log_id, generation, target)
        payload = SidecarPayload(target=Sealed(generation, made.kek_version, made.wrapped[0], sealed))
        header = LogHeader(KIND_FILE, kit.kek_version, kit.log_id, kit.log_wrapped)
        frame = Frame(generation, 0, len(target), payload.encode())
        log = SealedLog.create(ctx.store, ctx.sidecar_dir(kit.log_id), sidecar_name(kit.log_id), header, log_key, frame)
    finally:
        log_key[:] = bytes(len(log_key))
    ctx.store.close(log.fd)
    ctx.freshness.wrote(kit.log_id, generation)


async def read_target(ctx: FsContext, log_id: bytes) -> bytes:
    """A symlink's target. Raises `Damaged`, OSError, key errors."""
    try:
        target = (await read_attr_log(ctx, log_id)).target
    except FileNotFoundError:
        raise Damaged("missing-sidecar") from None
    if target is None:
        raise Damaged("symlink", "no target")
    key = (await ctx.keys.unwrap([KeyRun(log_id, Purpose.ATTR, target.kek_version, (target.wrapped,))]))[0][0]
    return open_attr(key, ATTR_TARGET, ctx.config.volume_id, log_id, target.generation, target.sealed)
