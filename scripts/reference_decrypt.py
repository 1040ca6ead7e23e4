#!/usr/bin/env python3
"""Decrypt a whole cryptfs volume of format version 1, written from docs/FORMAT.md alone.

    reference_decrypt.py CIPHERDIR DEST [--passfile FILE]     write the plaintext tree to DEST (made; must not exist)
    reference_decrypt.py CIPHERDIR --list [--passfile FILE]   print it instead

With --keyfile FILE or --recovery-file FILE it opens the volume by a key file or a recovery key.

It shares no code with the program, so where the two differ, one of them misreads the format. It is slow and reads
whole logs into memory; it changes nothing in the volume and refuses one that is mounted. Everything that can be
verified is; what fails is named on stderr, the rest is written, and the exit status is 1. Section numbers in
comments are those of FORMAT.md. A domain (§6) is named and left out: it is a volume of its own, in
CIPHERDIR/domains, to be decrypted by itself.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import fcntl
import getpass
import hashlib
import hmac
import os
import stat
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgpack
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, AESSIV
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand
from cryptography.hazmat.primitives.keywrap import InvalidUnwrap, aes_key_unwrap

NO_ID = bytes(16)
NONCE = bytes(12)
FILE, DIR, SYMLINK, FIFO, SOCKET, CHAR, BLOCK = range(1, 8)
TYPES = (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK)
DELTA, SNAPSHOT = 1, 2
LOST: list[Any] = []
"""In place of xattrs whose frame is damaged."""
T = TypeVar("T")


class Damaged(Exception):
    """Something is not as the format says; the text says what."""


def check(true: object, what: str) -> None:
    """Raise `Damaged(what)` unless `true`."""
    if not true:
        raise Damaged(what)


def need(value: T | None, what: str) -> T:
    """`value`, or `Damaged(what)` if it is None."""
    if value is None:
        raise Damaged(what)
    return value


def b64(raw: bytes) -> bytes:
    """base64url without padding."""
    return base64.urlsafe_b64encode(raw).rstrip(b"=")


def unpack(raw: bytes) -> Any:  # noqa: ANN401 - whatever msgpack holds; `shape` checks it
    """One msgpack value in its only allowed encoding: packing it again gives the same bytes."""
    try:
        value = msgpack.unpackb(raw, raw=False, ext_hook=None, strict_map_key=True)
    except Exception as error:
        raise Damaged("msgpack") from error
    check(msgpack.packb(value) == raw, "msgpack not canonical")
    return value


def is_int(value: object, low: int = 0, high: int = 2**64 - 1) -> bool:
    """Whether `value` is an integer in low … high."""
    return type(value) is int and low <= value <= high


def same(left: bytes, right: bytes) -> bool:
    """Equality in constant time."""
    return hmac.compare_digest(left, right)


# -- keys (§1), volume (§3), state (§4)


class Keys:
    """The KEKs of a volume, and what they open."""

    def __init__(self, volume_id: bytes, keks: dict[int, bytes]) -> None:
        """`keks`: version → 32 bytes."""
        self.volume_id = volume_id
        self.keks = keks
        self.volume_key = b""
        self.block_size = 0

    def wrapping_key(self, purpose: str, log_id: bytes, version: int) -> bytes:
        """32 bytes."""
        check(version in self.keks, f"KEK version {version} unknown")
        info = b"cryptfs/1/" + purpose.encode() + b"\0" + self.volume_id + log_id + struct.pack(">I", version)
        return HKDFExpand(SHA256(), 32, info).derive(self.keks[version])

    def unwrap(self, purpose: str, log_id: bytes, version: int, wrapped: bytes) -> bytes:
        """The wrapped key: 8 bytes shorter than `wrapped`."""
        try:
            return aes_key_unwrap(self.wrapping_key(purpose, log_id, version), wrapped)
        except InvalidUnwrap as error:
            raise Damaged(f"wrapped key ({purpose})") from error


def root_key(kind: str, p: dict[str, Any], secret: bytes) -> bytes:
    """The 32 bytes that wrap a protector's KEKs (§3)."""
    if kind == "passphrase":
        check(p["kdf"] == "argon2id", "a passphrase's KDF")
        kdf = Argon2id(
            salt=p["salt"], length=32, iterations=p["iterations"], lanes=p["lanes"], memory_cost=p["memory_kib"]
        )
        return kdf.derive(secret)
    check(sorted(p) == ["kdf", "salt"] and p["kdf"] == "hkdf-sha256" and len(p["salt"]) == 16, f"a {kind}'s params")
    return HKDF(algorithm=SHA256(), length=32, salt=p["salt"], info=b"cryptfs/1/" + kind.encode()).derive(secret)


RECOVERY_CHARACTERS = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"


def recovery_key(text: str) -> bytes:
    """The 25 bytes behind a recovery key as text (§3)."""
    typed = text.upper().translate(str.maketrans("OIL", "011"))
    values = [RECOVERY_CHARACTERS.index(char) for char in typed if char in RECOVERY_CHARACTERS]
    check(len(values) == 50, "a recovery key has 50 characters")
    # x times a value, modulo x^5 + x^2 + 1.
    double = [value << 1 ^ (0b100101 if value & 16 else 0) for value in range(32)]
    number = 0
    for group in range(10):
        total = 0
        for value in values[5 * group : 5 * group + 5]:
            total = double[total] ^ value  # Horner: 16, 8, 4, 2, 1 are powers of x
        check(total == group + 1, f"group {group + 1} of the recovery key")
        for value in values[5 * group : 5 * group + 4]:
            number = 32 * number + value
    return number.to_bytes(25, "big")


@dataclass(frozen=True)
class Secret:
    """What opens a protector of a kind."""

    kind: str
    secret: bytes = field(repr=False)
    shred: bytes | None = field(default=None, repr=False)


def sealed_keks(protector: dict[str, Any], volume_id: bytes, secret: bytes) -> dict[int, bytes] | None:
    """The sealed KEKs behind a protector, or None if it does not open with `secret`."""
    root = AESGCM(root_key(protector["kind"], protector["params"], secret))
    keks = {}
    for version, wrapped in protector["keks"]:
        aad = b"cryptfs/1/protector\0" + volume_id + protector["id"] + struct.pack(">I", version)
        try:
            keks[version] = root.decrypt(wrapped[:12], wrapped[12:], aad)
        except InvalidTag:
            return None
    return keks


def unsealed(
    sealed: dict[int, bytes], volume_id: bytes, shred: dict[str, Any], secret: bytes | None
) -> dict[int, bytes]:
    """The KEKs, which a shred secret (32 bytes) wraps besides (§3)."""
    if secret is None:
        sys.exit(f"error: the volume has a shred secret (kind {shred['kind']}): give it as --shred-keyfile")
    check = hmac.digest(secret, b"cryptfs/1/shred-check\0" + volume_id, "sha256")[:16]
    if len(secret) != 32 or not same(check, shred["check"]):
        sys.exit("error: this is not the volume's shred secret")
    keys = Keys(volume_id, dict.fromkeys(sealed, secret))
    return {version: keys.unwrap("shred", NO_ID, version, wrapped) for version, wrapped in sealed.items()}


VOLUME_KEYS = ["block_size", "created_s", "features", "kek_version", "policy", "protectors"]
VOLUME_KEYS += ["root_dir_id", "serial", "shred", "volume_id", "volume_key"]


def read_volume(raw: bytes, given: Secret) -> tuple[Keys, bytes]:
    """(keys, root directory's id)."""
    check(raw[:8] == b"CRYPTFS\0" and len(raw) >= 48, "no volume file")
    version, zero, length = struct.unpack_from(">HHI", raw, 8)
    check(version == 1, f"format version {version}")
    check(zero == 0 and length <= 1 << 20 and len(raw) == 48 + length, "volume file's length")
    body = unpack(raw[16:-32])
    check(isinstance(body, dict) and sorted(body) == VOLUME_KEYS, "volume file's keys")
    check(body["features"] in ([], ["domains"]), f"features {body['features']}")
    size = body["block_size"]
    check(is_int(size, 4096, 1 << 20) and size & (size - 1) == 0, "block size")
    check(len(body["volume_id"]) == len(body["root_dir_id"]) == 16, "ids")
    candidates = (
        sealed_keks(p, body["volume_id"], given.secret) for p in body["protectors"] if p["kind"] == given.kind
    )
    keks = next((found for found in candidates if found is not None), None)
    if keks is None:
        sys.exit(f"error: no protector opens with this {given.kind}")
    if body["shred"] is not None:
        keks = unsealed(keks, body["volume_id"], body["shred"], given.shred)
    keys = Keys(body["volume_id"], keks)
    keys.block_size = size
    mac_key = keys.wrapping_key("volume-mac", NO_ID, body["kek_version"])
    check(same(raw[-32:], hmac.digest(mac_key, raw[:-32], "sha256")), "volume file's MAC")
    keys.volume_key = keys.unwrap("volume", NO_ID, *body["volume_key"])
    return keys, body["root_dir_id"]


class Unclean:
    """Which epochs ended uncleanly."""

    def __init__(self, ranges: list[tuple[int, int]]) -> None:
        """`ranges`: first and last epoch of each."""
        self.ranges = ranges

    def has(self, generation: int) -> bool:
        """Whether the epoch of `generation` is one."""
        return any(first <= generation >> 40 <= last for first, last in self.ranges)

    def since(self, generation: int) -> bool:
        """Whether the epoch of `generation` or a later one is."""
        return any(last >= generation >> 40 for _, last in self.ranges)


def read_state(raw: bytes, keys: Keys) -> Unclean:
    """The newer valid slot's ranges, and its own epoch if that did not end (this volume is not mounted)."""
    slots = []
    for slot in (raw[:512], raw[512:1024]):
        if len(slot) != 512 or slot[:8] != b"CFSTATE1":
            continue
        try:
            key = keys.unwrap("state", NO_ID, *struct.unpack_from(">I40s", slot, 424))
        except Damaged:
            continue
        if not same(slot[480:], hmac.digest(key, keys.volume_id + slot[:480], "sha256")):
            continue
        sequence, epoch, clean, count, zero = struct.unpack_from(">QIBBH", slot, 8)
        check(epoch < 1 << 24 and clean <= 1 and count <= 50 and zero == 0, "state's fields")
        check(not any(slot[24 + 8 * count : 424] + slot[468:480]), "state's padding")
        numbers = struct.unpack_from(f">{2 * count}I", slot, 24)
        ranges = list(zip(numbers[::2], numbers[1::2], strict=True))
        slots.append((sequence, [*ranges, (epoch, epoch)] if not clean else ranges))
    check(slots and len(raw) == 1024, "no valid state")
    return Unclean(max(slots)[1])


# -- sealed logs (§5)


@dataclass
class Frame:
    """A frame whose head is authentic; `payload` is None if that is not what the head says it is."""

    kind: int
    generation: int
    durable_up_to: int
    flags: int
    size: int
    first: int
    end: int
    mac: bytes
    previous_mac: bytes
    payload: dict[str, Any] | None
    length: int


@dataclass
class Log:
    """Frames up to the last that counts. `gap`: those before the first are lost, with what they alone said."""

    frames: list[Frame]
    names_key: bytes
    gap: bool = False

    @property
    def last(self) -> int:
        """The last frame's generation, 0 if there is none."""
        return self.frames[-1].generation if self.frames else 0

    @property
    def durable_up_to(self) -> int:
        """The newest generation that is known to be durable."""
        return max((frame.durable_up_to for frame in self.frames), default=0)


def read_frame(raw: bytes, at: int, log_key: bytes, log_id: bytes) -> Frame:
    """The frame at offset `at`, by itself: its place in the chain is the caller's business."""
    check(len(raw) >= at + 160 and raw[at : at + 4] == b"CFF1", "no frame")
    mac = raw[at + 120 : at + 152]
    check(same(mac, hmac.digest(log_key, log_id + raw[at : at + 120], "sha256")), "frame's MAC")
    kind, flags, zero2, generation, durable_up_to, size, first, end, length, zero4 = struct.unpack_from(
        ">BB2sQQQQQII", raw, at + 4
    )
    check(kind in {DELTA, SNAPSHOT} and flags in {0, 1} and not any(zero2) and zero4 == 0, "frame's fields")
    check(durable_up_to <= generation, "frame's generation")
    body = raw[at + 152 : at + 152 + length]
    payload = None
    if len(body) == length and hashlib.sha256(body).digest() == raw[at + 56 : at + 88]:
        payload = unpack(body)
        check(isinstance(payload, dict), "payload is no map")
        check(("x" in payload) == bool(flags), "xattrs and the frame's flags")
    previous = raw[at + 88 : at + 120]
    return Frame(kind, generation, durable_up_to, flags, size, first, end, mac, previous, payload, 160 + length)


def read_log(raw: bytes, kind: int, log_id: bytes, keys: Keys, unclean: Unclean) -> Log | None:
    """The log of `log_id`; None if not even its header and first frame are there (a creation cut short, or damage)."""
    header = raw[:160]
    if len(header) < 160 or not any(header):
        return None
    check(header[:8] == b"CFSLOG1\0" and header[8] == kind and not any(header[9:12]), "log's header")
    check(header[16:32] == log_id, "log's id")
    check(not any(header[144:]) and (kind == 2 or not any(header[72:])), "log header's padding")
    (version,) = struct.unpack_from(">I", header, 12)
    log_key = keys.unwrap("log-dir" if kind == 2 else "log-file", log_id, version, header[32:72])
    names_key = keys.unwrap("names", log_id, version, header[72:144]) if kind == 2 else b""
    log = Log([], names_key)
    log.frames, at = read_chain(raw, 160, hashlib.sha256(header).digest(), log_key, log_id)
    check(not log.frames or log.frames[0].kind == SNAPSHOT, "log begins with a delta")
    if at < len(raw):
        rest = [frame for _, frame in frames_after(raw, at, log_key, log_id)]
        acknowledged = max((known_durable(frame, unclean) for frame in rest), default=0)
        if kind == 1:
            log, at = behind_gaps(raw, at, log, log_key, log_id, acknowledged)
        check(acknowledged <= log.last, "durable frames are lost")
        check(at >= len(raw) or not log.frames or unclean.since(log.last), "the log's tail")
    # A payload that is not the head's is a crash's work only where the crash can have been (§5, Damage).
    for n, frame in enumerate(log.frames):
        if frame.payload is None and frame.generation > log.durable_up_to and unclean.has(frame.generation):
            del log.frames[n:]
            break
    return log if log.frames else None


def read_chain(raw: bytes, at: int, previous: bytes, log_key: bytes, log_id: bytes) -> tuple[list[Frame], int]:
    """Frames from `at` on that link to one another, the first to `previous`, and where they end."""
    frames: list[Frame] = []
    try:
        while at < len(raw):
            frame = read_frame(raw, at, log_key, log_id)
            check(frame.previous_mac == previous, "frame's chain")
            check(not frames or frame.generation > frames[-1].generation, "frame's generation runs back")
            check(len(raw) >= at + frame.length, "frame is torn")
            frames.append(frame)
            at, previous = at + frame.length, frame.mac
    except Damaged:
        pass
    return frames, at


def known_durable(frame: Frame, unclean: Unclean) -> int:
    """The newest generation that a frame's head alone shows to be durable."""
    return frame.durable_up_to if unclean.has(frame.generation) else frame.generation


def behind_gaps(raw: bytes, at: int, log: Log, log_key: bytes, log_id: bytes, acknowledged: int) -> tuple[Log, int]:
    """The log from the last chain on that only damage, no crash, can have cut off (§5, A gap), and where that ends."""
    best, best_end, newest, end = log, at, log.last, at
    for start, frame in frames_after(raw, at, log_key, log_id):
        if start < end:
            continue
        frames, end = read_chain(raw, start, frame.previous_mac, log_key, log_id)
        if not frames:
            continue
        if newest < frame.generation <= acknowledged:
            best, best_end = Log(frames, log.names_key, gap=True), end
        newest = max(newest, frames[-1].generation)
    return best, best_end


def frames_after(raw: bytes, at: int, log_key: bytes, log_id: bytes) -> Iterator[tuple[int, Frame]]:
    """Authentic frames anywhere past a broken one at `at`, and where they start: they tell what it was."""
    at -= 1
    while (at := raw.find(b"CFF1", at + 1)) >= 0:
        try:
            yield at, read_frame(raw, at, log_key, log_id)
        except Damaged:
            continue


def attribute(kind: bytes, value: list[Any] | None, log_id: bytes, keys: Keys) -> bytes | None:
    """A symlink's target or the packed xattrs behind an `x` or `t` of a payload (§8)."""
    if value is None:
        return None
    check(value is not LOST, "the frame with the xattrs is damaged")
    generation, version, wrapped, sealed = value
    key = keys.unwrap("attr", log_id, version, wrapped)
    aad = b"CFATTR0\0" + kind + keys.volume_id + log_id + struct.pack(">Q", generation)
    try:
        return AESGCM(key).decrypt(NONCE, sealed, aad)
    except InvalidTag as error:
        raise Damaged("attribute's tag") from error


# -- directories (§6)


@dataclass(frozen=True)
class Entry:
    """What a name stands for. Nothing in `tree/` says a special file's id, so it is left out here."""

    kind: int
    id: bytes
    rdev: int


@dataclass
class Directory:
    """A `.dir` replayed: what it says now, and what it said at any time since its last durable frame."""

    log: Log
    entries: dict[bytes, Entry]
    said: dict[bytes, set[Entry]]
    special: dict[bytes, bytes]
    xattrs: Any
    touched_by_crash: bool
    domain: bytes = b""


def read_directory(raw: bytes, dir_id: bytes, keys: Keys, unclean: Unclean) -> Directory | None:
    """None: as `read_log`."""
    log = read_log(raw, 2, dir_id, keys, unclean)
    if log is None:
        return None
    entries: dict[bytes, Entry] = {}
    said: dict[bytes, set[Entry]] = {}
    special: dict[bytes, bytes] = {}
    xattrs: Any = None
    domain = b""
    for frame in log.frames:
        payload = need(frame.payload, ".dir payload")
        check(set(payload) <= {"e", "d", "x", "v"}, "payload's keys")
        if frame.kind == SNAPSHOT:
            for name, entry in entries.items():
                said.setdefault(name, set()).add(entry)
            entries, xattrs = {}, None
        for name in payload.get("d", []):
            check(name in entries, "removal of a name that is not there")
            said.setdefault(name, set()).add(entries.pop(name))
        for name, kind, entry_id, rdev in payload.get("e", []):
            check(isinstance(name, bytes) and is_int(kind, FILE, BLOCK) and is_int(rdev), "entry's shape")
            check(len(entry_id) == 16 and (kind >= CHAR or rdev == 0), "entry's id")
            if name in entries:
                said.setdefault(name, set()).add(entries[name])
            if kind > SYMLINK:
                special[name] = entry_id
            entries[name] = Entry(kind, entry_id if kind <= SYMLINK else NO_ID, rdev)
        if "x" in payload:
            xattrs = payload["x"]
        if "v" in payload:
            domain = payload["v"]
            check(isinstance(domain, bytes) and len(domain) == 16, "domain's id")
        check(not domain or not entries, "entries in a domain's place")
        check(frame.size == len(entries), "number of entries")
        check(frame.first == frame.end == 0, "block range of a directory")
        if frame.generation <= log.durable_up_to or not unclean.has(frame.generation):
            said.clear()  # the tree has had all this for certain
    return Directory(log, entries, said, special, xattrs, unclean.since(log.last), domain)


def tree_name(sealed: bytes) -> bytes:
    """The name in `tree/` of a sealed name."""
    name = b64(sealed)
    return name if len(name) <= 255 else b"~" + b64(hashlib.sha256(sealed).digest())


def from_b64(name: bytes) -> bytes:
    """The bytes behind base64url without padding, in its only allowed form."""
    try:
        sealed = base64.urlsafe_b64decode(name + b"=" * (-len(name) % 4))
    except ValueError as error:
        raise Damaged("no base64url") from error
    check(b64(sealed) == name, "no base64url")
    return sealed


def open_name(sealed: bytes, dir_id: bytes, names_key: bytes) -> bytes:
    """The plaintext name."""
    try:
        name = AESSIV(names_key).decrypt(sealed, [dir_id])
    except (InvalidTag, ValueError) as error:
        raise Damaged("name is not of this directory") from error
    check(name not in {b"", b".", b".."} and b"/" not in name and b"\0" not in name, "name")
    return name


# -- files (§7, §8, §9)


@dataclass(frozen=True)
class Record:
    """One version of one block; `generation` is its frame's."""

    block: int
    version: int
    length: int
    home: int
    kek_version: int
    wrapped: bytes
    tag: bytes
    generation: int


@dataclass
class State:
    """A file after some frames. A block whose record is None is damaged."""

    size: int = 0
    records: dict[int, Record | None] = field(default_factory=dict)
    xattrs: Any = None
    target: Any = None
    lost_attributes: bool = False

    def share(self, block: int, block_size: int) -> int:
        """How many bytes of the file `block` stands for."""
        return max(0, min(block_size, self.size - block * block_size))


def replay(frames: list[Frame], block_size: int, *, gap: bool = False) -> State:
    """What a prefix of a log says; behind a `gap` everything is damaged that no frame states."""
    state = State()
    if gap:
        state.size = frames[0].size
        state.records.update(dict.fromkeys(range(-(-state.size // block_size))))
        state.lost_attributes = True
    for frame in frames:
        if frame.kind == SNAPSHOT:
            state = State()
        if frame.payload and "x" in frame.payload:
            state.lost_attributes = False
        shrinks, state.size = frame.size < state.size, frame.size
        if frame.payload is None:
            check(frame.kind == DELTA, "snapshot's payload")
            if frame.flags:
                state.xattrs = LOST
            state.records.update(dict.fromkeys(range(frame.first, frame.end)))
        else:
            apply_payload(state, frame, frame.payload, block_size)
        for block in list(state.records) if shrinks else range(frame.first, frame.end):
            record = state.records.get(block)
            if not state.share(block, block_size):
                state.records.pop(block, None)
            elif record:
                check(record.length <= state.share(block, block_size), f"block {block}: longer than its share")
    return state


def apply_payload(state: State, frame: Frame, payload: dict[str, Any], block_size: int) -> None:
    """Holes, then runs, then attributes."""
    check(set(payload) <= {"r", "h", "x", "t"}, "payload's keys")
    for first, count in payload.get("h", []):
        check(frame.first <= first and count >= 1 and first + count <= frame.end, "hole outside the frame's range")
        for block in [b for b in state.records if first <= b < first + count]:
            del state.records[block]
    for first, version, last_length, home, kek_version, wrapped, tags in payload.get("r", []):
        count = len(tags) // 16
        check(count >= 1 and len(tags) == 16 * count and len(wrapped) == 40 * count, "run's lengths")
        check(is_int(last_length, 1, block_size) and home in {0, 1} and is_int(version), "run's fields")
        check(frame.first <= first and first + count <= frame.end, "run outside the frame's range")
        for i in range(count):
            length = block_size if i < count - 1 else last_length
            key, tag = wrapped[40 * i : 40 * i + 40], tags[16 * i : 16 * i + 16]
            state.records[first + i] = Record(first + i, version, length, home, kek_version, key, tag, frame.generation)
    state.xattrs = payload.get("x", state.xattrs)
    state.target = payload.get("t", state.target)


def settle(log: Log, block_size: int, unclean: Unclean, read: Callable[[Record], bytes]) -> State:
    """The state that counts (§9): after a crash the longest prefix whose records in doubt all decrypt."""
    frames = log.frames
    while unclean.has(log.last) and frames[-1].generation > log.durable_up_to:
        state = replay(frames, block_size, gap=log.gap)
        try:
            for record in state.records.values():
                if record and record.generation > log.durable_up_to and unclean.has(record.generation):
                    read(record)
            break
        except Damaged:
            if len(frames) > 1 and frames[-2].generation < log.durable_up_to:
                break
            frames = frames[:-1]
            if not frames:
                check(not log.gap, "durable frames are lost")
                return State()
    return replay(frames, block_size, gap=log.gap)


def decrypt(record: Record, file_id: bytes, data: int, twin: Path, keys: Keys) -> bytes:
    """The plaintext of `record`; `data`: descriptor of the data file, `twin`: path, may not exist."""
    at = record.block * keys.block_size
    if record.home == 0:
        sealed = os.pread(data, record.length, 64 + at)
    else:
        check(twin.exists(), f"block {record.block}: no twin")
        with twin.open("rb") as stream:
            sealed = os.pread(stream.fileno(), record.length, at)
    check(len(sealed) == record.length, f"block {record.block}: cut short")
    key = keys.unwrap("block", file_id, record.kek_version, record.wrapped)
    place = struct.pack(">QQI", record.block, record.version, record.length)
    try:
        return AESGCM(key).decrypt(NONCE, sealed + record.tag, b"CFBLOCK1" + keys.volume_id + file_id + place)
    except InvalidTag as error:
        raise Damaged(f"block {record.block}: tag") from error


# -- the whole volume


@dataclass(frozen=True)
class Found:
    """What `tree/` has under a name. `entry` is None for a creation that a crash cut short; `born`: its generation."""

    kind: int
    info: os.stat_result
    entry: Entry | None = None
    born: int = 0
    log: Log | None = None
    directory: Directory | None = None


class Volume:
    """One run over a volume. `problems` counts what was damaged."""

    def __init__(self, cipher_dir: Path, keys: Keys, unclean: Unclean, *, listing: bool) -> None:
        """`listing`: print names instead of writing files."""
        self.cipher_dir, self.keys, self.unclean, self.listing = cipher_dir, keys, unclean, listing
        self.problems = 0
        self.written: dict[tuple[int, int], tuple[int, bytes]] = {}
        self.inode_of: dict[bytes, tuple[int, int]] = {}

    def walk(self, tree_fd: int, directory: Directory, dir_id: bytes, dest_fd: int, path: bytes) -> None:
        """Write (or print) all that is in one directory. `path` is its plaintext path, for messages."""
        sealed_of = {tree_name(sealed): sealed for sealed in [*directory.said, *directory.entries]}
        there = {os.fsencode(name) for name in os.listdir(tree_fd)} - {b".dir", b".dir.new"}
        for hidden in sorted(there | {tree_name(sealed) for sealed in directory.entries}):
            shown = path + b"/<" + hidden + b">"
            try:
                sealed = sealed_of.get(hidden) or from_b64(hidden)
                name = open_name(sealed, dir_id, directory.log.names_key)
                shown = path + b"/" + name
                if hidden not in there:
                    check(directory.touched_by_crash, "entry is missing from the tree")
                    continue
                found = self.identify(tree_fd, hidden)
                if self.exists(directory, sealed, found):
                    self.extract(tree_fd, hidden, found, dest_fd, name, shown, directory.special.get(sealed, NO_ID))
            except Damaged as error:
                self.report(shown, error)

    def report(self, path: bytes, error: Damaged) -> None:
        """Say what is damaged, and go on."""
        self.problems += 1
        print(f"damaged: {path.decode(errors='backslashreplace')}: {error}", file=sys.stderr)

    def sidecar(self, log_id: bytes) -> Path:
        """Where the log of a file or symlink lies."""
        return self.cipher_dir / "sidecars" / log_id.hex()[:2] / log_id.hex()

    def log_of(self, log_id: bytes) -> Log | None:
        """None: not there, or a creation cut short."""
        path = self.sidecar(log_id)
        return read_log(path.read_bytes(), 1, log_id, self.keys, self.unclean) if path.exists() else None

    def identify(self, tree_fd: int, hidden: bytes) -> Found:
        """What lies under a name in `tree/`, by its own header or log."""
        info = os.stat(hidden, dir_fd=tree_fd, follow_symlinks=False)
        kind = TYPES.index(stat.S_IFMT(info.st_mode)) + 1
        if kind == FILE:
            header = read_at(tree_fd, hidden, 64)
            if not any(header):
                return Found(kind, info)
            check(len(header) == 64 and header[:8] == b"CFDATA1\0", "data file's header")
            mac = hmac.digest(self.keys.volume_key, self.keys.volume_id + header[:32], "sha256")
            check(same(header[32:], mac), "data file header's MAC")
            entry = Entry(kind, header[8:24], 0)
            return Found(kind, info, entry, int.from_bytes(header[24:32], "big"), self.log_of(entry.id))
        if kind == DIR:
            raw = read_at(tree_fd, hidden + b"/.dir")
            directory = read_directory(raw, raw[16:32], self.keys, self.unclean)
            if not directory:
                return Found(kind, info)
            log = directory.log
            return Found(kind, info, Entry(kind, raw[16:32], 0), log.frames[0].generation, log, directory)
        if kind == SYMLINK:
            link = from_b64(os.readlink(hidden, dir_fd=tree_fd))
            check(len(link) == 18, "symlink's text")
            link_log = self.log_of(link[:16])
            if not link_log:
                return Found(kind, info)
            return Found(kind, info, Entry(kind, link[:16], 0), link_log.frames[0].generation, link_log)
        return Found(kind, info, Entry(kind, NO_ID, info.st_rdev if kind >= CHAR else 0))

    def exists(self, directory: Directory, sealed: bytes, found: Found) -> bool:
        """Whether to show an entry (§6). Raises `Damaged` where tree and `.dir` differ and no crash explains it."""
        if found.entry is None:
            check(directory.touched_by_crash, "neither header nor log")
            return found.kind == FILE  # with no content; a directory or symlink without its log never was
        if found.entry != directory.entries.get(sealed):
            check(directory.touched_by_crash, "tree and .dir differ")
            new = found.kind > SYMLINK or self.unclean.has(found.born)
            check(new or found.entry in directory.said.get(sealed, ()), "older than the crash and never here")
        return True

    def extract(  # noqa: C901
        self, tree_fd: int, hidden: bytes, found: Found, dest_fd: int, name: bytes, path: bytes, special_id: bytes
    ) -> None:
        """Write one entry with its attributes, a directory with all below it."""
        info, entry_id = found.info, found.entry.id if found.entry else NO_ID
        inode = (info.st_dev, info.st_ino)
        if found.kind in {FILE, SYMLINK} and entry_id != NO_ID:
            check(self.inode_of.setdefault(entry_id, inode) == inode, "a copy of another file")
        if not self.listing and inode in self.written:
            other_fd, other = self.written[inode]
            os.link(other, name, src_dir_fd=other_fd, dst_dir_fd=dest_fd, follow_symlinks=False)
            return
        xattrs, note = None, b""
        if found.kind == FILE:
            xattrs, note = self.extract_file(tree_fd, hidden, found, dest_fd, name, path)
        elif found.kind == SYMLINK:
            log = need(found.log, "no log")
            check(not log.gap, "damaged frames")
            state = replay(log.frames, self.keys.block_size)
            target = need(attribute(b"t", state.target, entry_id, self.keys), "no target")
            check(len(target) == int.from_bytes(from_b64(os.readlink(hidden, dir_fd=tree_fd))[16:], "big"), "length")
            xattrs, note = state.xattrs, b" -> " + target
            if not self.listing:
                os.symlink(target, name, dir_fd=dest_fd)
        elif found.kind > SYMLINK:
            entry_id, special_log = special_id, self.log_of(special_id)
            if special_log:
                xattrs = replay(special_log.frames, self.keys.block_size).xattrs
            if not self.listing:
                os.mknod(name, info.st_mode, info.st_rdev, dir_fd=dest_fd)
        if found.directory and found.directory.domain:
            note = b" (domain " + found.directory.domain.hex().encode() + b")"
            print(f"left out: {path.decode(errors='backslashreplace')}{note.decode()}", file=sys.stderr)
        if self.listing:
            print(stat.filemode(info.st_mode), os.fsdecode(path + note))
        if found.directory:
            xattrs = found.directory.xattrs
            with contextlib.ExitStack() as stack:
                below_fd = -1
                if not self.listing:
                    os.mkdir(name, 0o700, dir_fd=dest_fd)
                    below_fd = stack.enter_context(opened(name, dest_fd))
                from_fd = stack.enter_context(opened(hidden, tree_fd))
                self.walk(from_fd, found.directory, entry_id, below_fd, path)
        elif info.st_nlink > 1 and not self.listing:
            self.written[inode] = (os.dup(dest_fd), name)
        if not self.listing:
            set_attributes(dest_fd, name, info, attribute(b"x", xattrs, entry_id, self.keys))

    def extract_file(
        self, tree_fd: int, hidden: bytes, found: Found, dest_fd: int, name: bytes, path: bytes
    ) -> tuple[Any, bytes]:
        """A regular file with its holes; returns its sealed xattrs and its size as text."""
        state, file_id = State(), found.entry.id if found.entry else NO_ID
        twin, block_size = self.sidecar(file_id).with_suffix(".twin"), self.keys.block_size
        with opened(hidden, tree_fd) as data:

            def read(record: Record) -> bytes:
                return decrypt(record, file_id, data, twin, self.keys)

            if found.log:
                state = settle(found.log, block_size, self.unclean, read)
                crashed = self.unclean.since(found.log.last)
                check(found.info.st_size == 64 + state.size or crashed, "size of the data file")
                if state.lost_attributes:
                    self.report(path, Damaged("attributes: their frame is damaged"))
            else:
                check(found.entry is None or self.unclean.has(found.born), "missing sidecar")
            if not self.listing:
                with opened(name, dest_fd, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as out:
                    os.ftruncate(out, state.size)
                    for block, record in sorted(state.records.items()):
                        try:
                            plain = read(need(record, f"block {block}: its frame is damaged"))
                            os.pwrite(out, plain, block * block_size)
                        except Damaged as error:
                            self.report(path, error)
        return state.xattrs, b" (%d bytes)" % state.size


@contextlib.contextmanager
def opened(name: bytes, dir_fd: int, flags: int = os.O_RDONLY) -> Iterator[int]:
    """A descriptor, closed at the end; no symlink is followed."""
    fd = os.open(name, flags | os.O_NOFOLLOW, 0o600, dir_fd=dir_fd)
    try:
        yield fd
    finally:
        os.close(fd)


def read_at(dir_fd: int, name: bytes, count: int = -1) -> bytes:
    """A whole file or its first `count` bytes, nothing if there is none."""
    try:
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=dir_fd)
    except FileNotFoundError:
        return b""
    with os.fdopen(fd, "rb") as stream:
        return stream.read(count)


def set_attributes(dest_fd: int, name: bytes, info: os.stat_result, xattrs: bytes | None) -> None:
    """Owner (root only), mode, xattrs and times, in the order that keeps them."""
    path = b"/proc/self/fd/%d/" % dest_fd + name
    if os.geteuid() == 0:
        os.chown(path, info.st_uid, info.st_gid, follow_symlinks=False)
    for key, value in unpack(xattrs).items() if xattrs else ():
        os.setxattr(path, key, value, follow_symlinks=False)
    if not stat.S_ISLNK(info.st_mode):
        os.chmod(path, stat.S_IMODE(info.st_mode))
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns), follow_symlinks=False)


def read_secret(args: argparse.Namespace) -> Secret:
    """What the options name."""
    shred = args.shred_keyfile.read_bytes() if args.shred_keyfile else None
    if args.keyfile:
        return Secret("keyfile", args.keyfile.read_bytes(), shred)
    if args.recovery_file:
        lines = args.recovery_file.read_text().splitlines()
        try:
            return Secret("recovery", recovery_key("".join(line for line in lines if not line.startswith("#"))), shred)
        except Damaged as error:
            sys.exit(f"error: {error}")
    return Secret("passphrase", read_passphrase(args.passfile), shred)


def read_passphrase(passfile: Path | None) -> bytes:
    """The passphrase's bytes, without the newline that ends the file."""
    return passfile.read_bytes().removesuffix(b"\n") if passfile else getpass.getpass().encode()


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and run; returns the exit status."""
    parser = argparse.ArgumentParser(description="Decrypt a cryptfs volume (format 1) without cryptfs.")
    parser.add_argument("cipher_dir", type=Path)
    parser.add_argument("dest", type=Path, nargs="?")
    parser.add_argument("--list", action="store_true", help="print the tree instead of writing it")
    parser.add_argument("--passfile", type=Path, help="file that holds the passphrase; asked for if missing")
    parser.add_argument("--keyfile", type=Path, help="a key file instead")
    parser.add_argument("--recovery-file", type=Path, help="file that holds a recovery key instead")
    parser.add_argument("--shred-keyfile", type=Path, help="file that holds the volume's shred secret, if it has one")
    args = parser.parse_args(argv)
    if args.list == (args.dest is not None):
        parser.error("give either DEST or --list")
    with contextlib.ExitStack() as stack:
        return decrypt_volume(args.cipher_dir, args.dest, read_secret(args), stack)


def decrypt_volume(cipher_dir: Path, dest: Path | None, given: Secret, stack: contextlib.ExitStack) -> int:
    """The whole work; returns the exit status. `stack` closes the descriptors."""

    def open_dir(path: Path) -> int:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        stack.callback(os.close, fd)
        return fd

    try:
        fcntl.flock(open_dir(cipher_dir), fcntl.LOCK_SH | fcntl.LOCK_NB)
        keys, root_id = read_volume((cipher_dir / "volume").read_bytes(), given)
        unclean = read_state((cipher_dir / "state").read_bytes(), keys)
        tree_fd = open_dir(cipher_dir / "tree")
        root = need(read_directory(read_at(tree_fd, b".dir"), root_id, keys, unclean), "root directory's log")
    except BlockingIOError:
        sys.exit("error: the volume is in use")
    except (Damaged, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    volume = Volume(cipher_dir, keys, unclean, listing=dest is None)
    dest_fd = -1
    if dest:
        dest.mkdir()
        dest_fd = open_dir(dest)
    volume.walk(tree_fd, root, root_id, dest_fd, b"")
    for fd, _ in volume.written.values():
        stack.callback(os.close, fd)
    if dest:
        set_attributes(dest_fd, b".", os.fstat(tree_fd), attribute(b"x", root.xattrs, root_id, keys))
    return 1 if volume.problems else 0


if __name__ == "__main__":
    sys.exit(main())
