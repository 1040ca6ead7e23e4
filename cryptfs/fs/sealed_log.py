"""Sealed logs on a store: append, replay, rewrite (FORMAT.md §5).

A crash between any two calls leaves:

- in `create`: no file, or a file whose header or first frame is torn: a log that never was (its owner's frame names
it only later, or
  its epoch ended uncleanly);
- in `append`: the log as it was, and perhaps a torn frame after its end, which replay does not count;
- in `rewrite`: the old log and a stray `.new`, or the new log, complete, because it is synced before the rename.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass, field

from cryptfs.crypto.mac import mac, same, sha256
from cryptfs.errors import Damaged
from cryptfs.format.log import (
    DELTA,
    FOOT_BYTES,
    HEAD_BYTES,
    HEADER_BYTES,
    SIGNED_BYTES,
    SNAPSHOT,
    Head,
    LogHeader,
    decode_head,
    decode_header,
    encode_foot,
)
from cryptfs.format.sidecar import SidecarPayload
from cryptfs.fs.context import write_all
from cryptfs.ports import Store
from cryptfs.types import Buffer

_SPARSE_MIN_BYTES = 16 << 20


@dataclass(slots=True)
class Replay:
    """What a log holds. `payloads[i]` is None where frame i's head is intact and its payload is not.

    `ends[i]`: offset just past frame i. `tail`: bytes after the last intact frame.
    """

    header: LogHeader
    heads: list[Head] = field(default_factory=list)
    payloads: list[memoryview | None] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    tail: int = 0
    raw: bytes = b""
    gap: bool = False
    """Frames before the first one here are lost (`log_gap`): what none of these states is not known."""
    decoded: dict[int, SidecarPayload] = field(default_factory=dict)
    """Payloads of a sidecar that were decoded already, by frame."""

    @property
    def durable_up_to(self) -> int:
        """The newest generation any intact frame calls durable."""
        return max((head.durable_up_to for head in self.heads), default=0)


def header_of(raw: bytes) -> LogHeader:
    """The header of a log's bytes, not yet authenticated. Raises `Damaged`."""
    return decode_header(raw[:HEADER_BYTES])


def parse(raw: bytes) -> Replay:
    """Walk the frames of a whole log without a key: nothing in the result is authentic before `authenticate`.

    Raises `Damaged` for the header only. Stops at the first head that is torn, not linked to the one before, or not
    newer.
    """
    out = Replay(header_of(raw))
    view = memoryview(raw)
    at, prev, generation = HEADER_BYTES, sha256(view[:HEADER_BYTES]), 0
    while at + HEAD_BYTES <= len(raw):
        try:
            head = decode_head(raw[at : at + HEAD_BYTES])
        except Damaged:
            break
        if head.prev_mac != prev or head.generation <= generation:
            break
        end = at + head.frame_bytes
        # A payload that is torn or cut has its place all the same: what is written next goes behind it.
        out.heads.append(head)
        out.payloads.append(intact_payload(view, at, head))
        out.ends.append(end)
        at, prev, generation = end, head.mac, head.generation
    out.tail = max(0, len(raw) - at)
    out.raw = raw
    return out


def intact_payload(view: memoryview, at: int, head: Head) -> memoryview | None:
    """The payload of the frame at `at` of a log's bytes; None if it is not the one its head says."""
    payload = view[at + HEAD_BYTES : at + head.frame_bytes - FOOT_BYTES]
    intact = len(payload) == head.payload_len and sha256(payload) == head.payload_sha256
    return payload if intact else None


def is_authentic(head: Head, log_id: bytes, mac_key: Buffer) -> bool:
    """Whether a log's key vouches for a head."""
    return same(mac(mac_key, log_id, head.signed()), head.mac)


def authenticate(parsed: Replay, mac_key: Buffer) -> Replay:
    """Keep what the log key vouches for; what follows is tail. Never raises: the caller judges by what is missing."""
    log_id = parsed.header.log_id
    for i, head in enumerate(parsed.heads):
        if not is_authentic(head, log_id, mac_key):
            start = parsed.ends[i - 1] if i else HEADER_BYTES
            parsed.tail += parsed.ends[-1] - start
            del parsed.heads[i:], parsed.payloads[i:], parsed.ends[i:]
            break
    return parsed


@dataclass(frozen=True, slots=True)
class Frame:
    """What the writer of a frame decides."""

    generation: int
    durable_up_to: int
    size: int
    payload: bytes
    extent: tuple[int, int] = (0, 0)
    flags: int = 0


class SealedLog:
    """An open log that is appended to. `unsynced` says whether something was written since the last fdatasync.

    `torn`: what a failed append left may lie past the end; a clean unmount must not vouch for that.
    """

    __slots__ = ("end", "fd", "header", "live_from", "prev_mac", "torn", "unsynced")

    def __init__(self, fd: int, header: LogHeader, end: int, prev_mac: bytes) -> None:
        self.fd = fd
        self.header = header
        self.end = end
        self.prev_mac = prev_mac
        self.unsynced = False
        self.torn = False
        self.live_from = end
        """Size of the log when it was last one snapshot: growth past it decides about compaction."""

    @classmethod
    def create(
        cls, store: Store, dir_fd: int, name: bytes, header: LogHeader, mac_key: Buffer, frame: Frame
    ) -> SealedLog:
        """A new log with its first frame, in one write. Raises OSError; then no such file is left."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
        try:
            fd = store.open(dir_fd, name, flags)
        except FileExistsError:
            # What an attempt left that failed and could not be taken back either.
            store.unlink(dir_fd, name)
            fd = store.open(dir_fd, name, flags)
        encoded = header.encode()
        log = cls(fd, header, HEADER_BYTES, sha256(encoded))
        try:
            head, foot = log._frame(mac_key, SNAPSHOT, frame)
            write_all(store, fd, encoded + head + frame.payload + foot, 0)
        except BaseException:
            store.close(fd)
            with suppress(OSError):
                store.unlink(dir_fd, name)
            raise
        log._advance(head, frame)
        log.live_from = log.end
        return log

    @classmethod
    def resume(cls, fd: int, replayed: Replay, keep: int) -> SealedLog:
        """Continue after the first `keep` frames (at least one) of a replayed log."""
        log = cls(fd, replayed.header, replayed.ends[keep - 1], replayed.heads[keep - 1].mac)
        log.live_from = replayed.ends[0]
        return log

    def append(self, store: Store, mac_key: Buffer, frame: Frame) -> None:
        """One write past the end. Raises OSError; the log then ends where it did."""
        head, foot = self._frame(mac_key, DELTA, frame)
        self.mend(store)
        self.unsynced = True
        try:
            write_all(store, self.fd, head + frame.payload + foot, self.end)
        except BaseException:
            self.torn = True
            with suppress(OSError):
                self.mend(store)
            raise
        self._advance(head, frame)

    def mend(self, store: Store) -> None:
        """Cut away what a failed append left past the end. Raises OSError."""
        if self.torn:
            store.ftruncate(self.fd, self.end)
            self.torn = False
            self.unsynced = True

    def rewrite(
        self, store: Store, dir_fd: int, name: bytes, mac_key: Buffer, header: LogHeader, frame: Frame,
        *following: Frame,
    ) -> SealedLog:  # fmt: skip
        """A new log of one snapshot (and the frames `following` it) beside this one, synced, renamed over it.

        Blocks; returns it, this one is closed. That the new one has the name is not durable yet: until the caller has
        synced the directory nothing may count as durable that only the new one says. Raises OSError; then this one is
        as it was.
        """
        fresh = name + b".new"
        with suppress(FileNotFoundError):
            store.unlink(dir_fd, fresh)
        new = SealedLog.create(store, dir_fd, fresh, header, mac_key, frame)
        try:
            for each in following:
                new.append(store, mac_key, each)
            store.fdatasync(new.fd)
            store.rename(dir_fd, fresh, dir_fd, name)
        except BaseException:
            store.close(new.fd)
            with suppress(OSError):
                store.unlink(dir_fd, fresh)
            raise
        store.close(self.fd)
        new.unsynced = False
        return new

    def _frame(self, mac_key: Buffer, kind: int, frame: Frame) -> tuple[bytes, bytes]:
        payload = frame.payload
        head = Head(kind, frame.generation, frame.durable_up_to, frame.size, *frame.extent, len(payload),
                    sha256(payload), self.prev_mac, flags=frame.flags)  # fmt: skip
        signed = head.signed()
        return signed + mac(mac_key, self.header.log_id, signed), encode_foot(head.frame_bytes)

    def _advance(self, head: bytes, frame: Frame) -> None:
        self.prev_mac = head[SIGNED_BYTES:]
        self.end += HEAD_BYTES + len(frame.payload) + FOOT_BYTES
        self.unsynced = True


def read_log(store: Store, fd: int) -> bytes:
    """A whole log's bytes. May block on a cold disk.

    Raises `Damaged` for one that is mostly a hole: no writer makes such a log, and reading it would take its apparent
    size in memory.
    """
    st = store.fstat(fd)
    size = st.st_size
    if size > _SPARSE_MIN_BYTES and st.st_blocks * 512 < size // 2:
        raise Damaged("frame", f"a log of {size} bytes of which most are a hole")
    raw = store.pread(fd, size, 0)
    while len(raw) < size:
        more = store.pread(fd, size - len(raw), len(raw))
        if not more:
            break
        raw += more
    return raw
