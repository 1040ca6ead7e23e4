"""Sealed log: header and frame heads (FORMAT.md §5). MACs and digests are computed by `crypto.mac`, not here."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from cryptfs.errors import Damaged
from cryptfs.types import ID_BYTES, WRAPPED_BYTES, WRAPPED_NAMES_BYTES

HEADER_BYTES = 160
HEAD_BYTES = 152
SIGNED_BYTES = 120
"""How much of a head its MAC covers."""
FOOT_BYTES = 8
PAYLOAD_MAX_BYTES = 1 << 30

KIND_FILE, KIND_DIR, KIND_AUDIT = 1, 2, 3
DELTA, SNAPSHOT, INDEX = 1, 2, 3
SAYS_XATTRS = 1
"""Flag of a head: the payload has a key `x`. So a lost payload costs the xattrs only if they were in it."""

_HEADER_MAGIC = b"CFSLOG1\0"
HEAD_MAGIC = b"CFF1"
_FOOT_MAGIC = b"CFE1"
_HEADER = struct.Struct(">8sB3xI16s40s72s16x")
_SIGNED = struct.Struct(">4sBB2xQQQQQI4x32s32s")
_FOOT = struct.Struct(">I4s")
_NO_NAMES = bytes(WRAPPED_NAMES_BYTES)


@dataclass(frozen=True, slots=True)
class LogHeader:
    """The first 160 bytes of a log. `names_wrapped` (72 bytes) is empty for all but directories."""

    kind: int
    kek_version: int
    log_id: bytes
    log_wrapped: bytes
    names_wrapped: bytes = b""

    def encode(self) -> bytes:
        """160 bytes."""
        names = self.names_wrapped or _NO_NAMES
        assert len(self.log_id) == ID_BYTES
        assert len(self.log_wrapped) == WRAPPED_BYTES
        assert len(names) == WRAPPED_NAMES_BYTES
        return _HEADER.pack(_HEADER_MAGIC, self.kind, self.kek_version, self.log_id, self.log_wrapped, names)


def decode_header(data: bytes) -> LogHeader:
    """Raises `Damaged("log-header")` unless `data` is exactly what `encode` writes."""
    if len(data) != HEADER_BYTES:
        raise Damaged("log-header", f"{len(data)} bytes")
    magic, kind, kek_version, log_id, log_wrapped, names = _HEADER.unpack(data)
    if magic != _HEADER_MAGIC or kind not in (KIND_FILE, KIND_DIR, KIND_AUDIT) or not kek_version:
        raise Damaged("log-header", "magic, kind or KEK version")
    header = LogHeader(kind, kek_version, log_id, log_wrapped, names if names != _NO_NAMES else b"")
    if header.encode() != data or (kind == KIND_DIR) != bool(header.names_wrapped):
        raise Damaged("log-header", "not canonical")
    return header


@dataclass(frozen=True, slots=True)
class Head:
    """A frame's head. `size`: plaintext bytes (file) or entries (directory); `first`/`end`: blocks touched."""

    kind: int
    generation: int
    durable_up_to: int
    size: int
    first: int
    end: int
    payload_len: int
    payload_sha256: bytes
    prev_mac: bytes
    mac: bytes = b""
    flags: int = 0

    def signed(self) -> bytes:
        """The 120 bytes under the MAC."""
        return _SIGNED.pack(
            HEAD_MAGIC, self.kind, self.flags, self.generation, self.durable_up_to, self.size, self.first, self.end,
            self.payload_len, self.payload_sha256, self.prev_mac,
        )  # fmt: skip

    @property
    def frame_bytes(self) -> int:
        """Length of head, payload and foot."""
        return HEAD_BYTES + self.payload_len + FOOT_BYTES


def decode_head(data: bytes) -> Head:
    """From 152 bytes; raises `Damaged("frame-head")`. The MAC is the caller's to check."""
    if len(data) != HEAD_BYTES:
        raise Damaged("frame-head", f"{len(data)} bytes")
    magic, kind, flags, generation, durable, size, first, end, length, digest, prev = _SIGNED.unpack_from(data)
    if flags & ~SAYS_XATTRS:
        raise Damaged("frame-head", "flags")
    if magic != HEAD_MAGIC or kind not in (DELTA, SNAPSHOT, INDEX) or length > PAYLOAD_MAX_BYTES or first > end:
        raise Damaged("frame-head", "magic, kind or length")
    head = Head(kind, generation, durable, size, first, end, length, digest, prev, data[SIGNED_BYTES:], flags)
    if head.signed() != data[:SIGNED_BYTES]:
        raise Damaged("frame-head", "not canonical")
    return head


def encode_foot(frame_bytes: int) -> bytes:
    """The 8 bytes after a payload."""
    return _FOOT.pack(frame_bytes, _FOOT_MAGIC)
