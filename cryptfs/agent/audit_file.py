"""One file of an audit log: a sealed log (FORMAT.md §5) whose payloads are lines of JSON, read frame by frame.

Bytes in, verdicts out; no locks, no service. A file begins with a header that holds its key, wrapped, and a first
frame (the line `begin`) that says which file of the log it is and where the one before ended. Every later frame is one
line; its generation is its number in the whole log.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from cryptfs.crypto.mac import MAC_BYTES, mac, same, sha256
from cryptfs.crypto.secret import Secret
from cryptfs.crypto.wrap import unwrap_keys, wrap_keys, wrapping_key
from cryptfs.errors import Damaged
from cryptfs.format.audit import LINE_MAX_BYTES
from cryptfs.format.log import (
    DELTA,
    FOOT_BYTES,
    HEAD_BYTES,
    HEAD_MAGIC,
    HEADER_BYTES,
    KIND_AUDIT,
    SIGNED_BYTES,
    SNAPSHOT,
    Head,
    LogHeader,
    decode_head,
    decode_header,
    encode_foot,
)
from cryptfs.types import WRAPPED_BYTES, Buffer, Purpose

KEY_SUFFIX = ".key"
"""Added to a file's name: where its key is wrapped under a later KEK (`audit_rewrap`)."""
FILE_MAX_BYTES = 64 << 20
"""Larger ones are not read: none is ever written that is much longer than `audit_log.FILE_BYTES`."""


@dataclass(frozen=True, slots=True)
class Sealing:
    """What a log's keys are wrapped under: KEKs by version, the newest of them, and the volume (zeros: the agent's)."""

    keks: Mapping[int, Secret]
    kek_version: int
    volume_id: bytes

    def new_header(self, log_id: bytes, log_key: bytes) -> LogHeader:
        """A header with `log_key` (32 bytes) wrapped for this log id."""
        wrapped = wrap_keys(self._wrapper(self.kek_version, log_id), [log_key])
        return LogHeader(KIND_AUDIT, self.kek_version, log_id, wrapped)

    def key_of(self, header: LogHeader) -> Secret | None:
        """The file's key; None if it was not wrapped under any of the KEKs."""
        if header.kind != KIND_AUDIT or header.kek_version not in self.keks:
            return None
        wrapper = self._wrapper(header.kek_version, header.log_id)
        key = unwrap_keys(wrapper, header.log_wrapped, WRAPPED_BYTES)
        return None if key is None else Secret.of(key)

    def is_newest(self, path: str) -> bool:
        """Whether the key of the file at `path` is wrapped under the newest KEK beside it."""
        beside = _read_beside(path)
        return beside is not None and beside[0] == self.kek_version

    def _wrapper(self, kek_version: int, log_id: bytes) -> bytes:
        kek = self.keks[kek_version].view()
        return wrapping_key(kek, Purpose.LOG_AUDIT, self.volume_id, log_id, kek_version)


def key_beside(path: str, header: LogHeader, sealing: Sealing) -> Secret | None:
    """The key of the file at `path`, whose own KEK is destroyed, from what lies beside it; None if nothing fits there.

    Raises OSError.
    """
    beside = _read_beside(path)
    return None if beside is None else sealing.key_of(replace(header, kek_version=beside[0], log_wrapped=beside[1]))


def _read_beside(path: str) -> tuple[int, bytes] | None:
    try:
        fd = os.open(path + KEY_SUFFIX, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    with os.fdopen(fd, "rb") as file:
        data = file.read(4 + WRAPPED_BYTES + 1)
    return (int.from_bytes(data[:4], "big"), data[4:]) if len(data) == 4 + WRAPPED_BYTES else None


def frame(key: Buffer, log_id: bytes, generation: int, prev_mac: bytes, line: bytes, *, first: bool = False) -> bytes:
    """A whole frame: head, line, foot."""
    kind = SNAPSHOT if first else DELTA
    head = Head(kind, generation, 0, 0, 0, 0, len(line), sha256(line), prev_mac)
    signed = head.signed()
    return signed + mac(key, log_id, signed) + line + encode_foot(head.frame_bytes)


def mac_of(whole: bytes) -> bytes:
    """A frame's own MAC, which the next one repeats."""
    return whole[SIGNED_BYTES : SIGNED_BYTES + MAC_BYTES]


@dataclass(frozen=True, slots=True)
class Frame:
    """An intact frame: its line, number, MAC, and where it ends in the file."""

    generation: int
    line: bytes
    mac: bytes
    end: int


@dataclass(slots=True)
class Reading:
    """What reading a file came to. `fault` is None, ``torn`` (a crash cut the last line short) or what was changed.

    `end`, `generation`, `mac`: of the last frame that is right.
    """

    end: int = 0
    generation: int = 0
    mac: bytes = b""
    frames: int = 0
    fault: str | None = None
    at: int = 0
    """Where the fault is, in bytes."""


def read_frames(raw: bytes, key: Buffer | None, into: Reading) -> Iterator[Frame]:
    """The frames of a file's bytes, as far as each is right and follows the one before; then `into.fault` says why not.

    Without a key MACs are not checked: then nothing is proven, and the lines are only read.
    """
    try:
        header = decode_header(raw[:HEADER_BYTES])
    except Damaged:
        into.fault = "header"
        return
    into.end, into.mac = HEADER_BYTES, sha256(raw[:HEADER_BYTES])
    while into.end < len(raw):
        found = _next(raw, header.log_id, key, into)
        if isinstance(found, str):
            into.fault, into.at = found, into.end
            if found == "torn" and key is not None and _hides(raw, header.log_id, key, into.end):
                into.fault = "edited"
            return
        into.end, into.generation, into.mac = found.end, found.generation, found.mac
        into.frames += 1
        yield found


def _next(raw: bytes, log_id: bytes, key: Buffer | None, so_far: Reading) -> Frame | str:
    at = so_far.end
    head_bytes = raw[at : at + HEAD_BYTES]
    try:
        head = decode_head(head_bytes)
    except Damaged:
        if len(head_bytes) < HEAD_BYTES and HEAD_MAGIC.startswith(head_bytes[:4]):
            return "torn"
        # Zeros: a file that was made longer before its data reached the disk.
        return "edited" if any(raw[at:]) else "torn"
    if key is not None and not same(mac(key, log_id, head.signed()), head.mac):
        return "edited"
    if head.payload_len > LINE_MAX_BYTES:
        return "edited"
    if head.prev_mac != so_far.mac or (so_far.frames and head.generation != so_far.generation + 1):
        # Authentic, and not the one that belongs here.
        return "reordered"
    end = at + head.frame_bytes
    if end > len(raw):
        return "torn"
    line = raw[at + HEAD_BYTES : end - FOOT_BYTES]
    if sha256(line) != head.payload_sha256 or raw[end - FOOT_BYTES : end] != encode_foot(head.frame_bytes):
        # The head says what the line was: a power cut may have written the one without the other.
        return "torn" if end == len(raw) and not any(raw[end - FOOT_BYTES : end]) else "edited"
    return Frame(head.generation, line, head.mac, end)


def _hides(raw: bytes, log_id: bytes, key: Buffer, start: int) -> bool:
    """Whether what looks torn has a whole authentic frame in it: no crash leaves one behind a torn one."""
    at = raw.find(HEAD_MAGIC, start + 1)
    while at >= 0:
        try:
            head = decode_head(raw[at : at + HEAD_BYTES])
        except Damaged:
            head = None
        if head is not None and same(mac(key, log_id, head.signed()), head.mac):
            return True
        at = raw.find(HEAD_MAGIC, at + 1)
    return False


def read_whole(path: str) -> bytes:
    """A file's bytes. Blocks. Raises OSError; `Damaged` for one that is no file of ours or far too long."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    with os.fdopen(fd, "rb") as file:
        if os.fstat(fd).st_size > FILE_MAX_BYTES:
            raise Damaged("audit-file", f"{path} is longer than any that is written")
        return file.read(FILE_MAX_BYTES)
