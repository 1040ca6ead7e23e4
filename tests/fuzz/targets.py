"""Every parser of bytes a stranger may have written, with valid samples and the one exception it may raise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cryptfs.agent.audit_file import Reading, read_frames
from cryptfs.crypto.mac import sha256
from cryptfs.crypto.siv import NameCipher
from cryptfs.errors import CryptfsError, Damaged, ProtocolError, UnsupportedFormat, VolumeDamaged
from cryptfs.format.agent_msg import (
    AnswerDecoder,
    RequestDecoder,
    encode_failure,
    encode_push,
    encode_reply,
    encode_request,
)
from cryptfs.format.audit import AuditLine, PeerLine, Touched, decode_line
from cryptfs.format.datafile import DataHeader, decode_data_header
from cryptfs.format.dirlog import DirPayload, Entry, decode_dir
from cryptfs.format.log import (
    DELTA,
    HEADER_BYTES,
    KIND_AUDIT,
    KIND_DIR,
    KIND_FILE,
    SNAPSHOT,
    Head,
    LogHeader,
    decode_head,
    decode_header,
    encode_foot,
)
from cryptfs.format.sidecar import Run, Sealed, SidecarPayload, decode_sidecar
from cryptfs.format.state import Slot, State, decode_slot
from cryptfs.format.volume import Protector, Volume, WrappedKey, encode_volume, parse_passphrase, parse_volume
from cryptfs.fs.history import build_map
from cryptfs.fs.sealed_log import parse
from cryptfs.fs.symlink import decode_target_text, encode_target_text
from cryptfs.names import sealed_from_tree, tree_name
from cryptfs.types import Kind

BLOCK = 4096
ID = bytes(range(16))


@dataclass(frozen=True)
class Target:
    """`parse` takes any bytes and returns, or raises one of `raises`. `msgpack_at`: where a sample's msgpack begins."""

    name: str
    parse: Callable[[bytes], object]
    samples: Sequence[bytes]
    raises: tuple[type[CryptfsError], ...]
    msgpack_at: int | None = None


def _volume() -> bytes:
    params: dict[str, int | str | bytes] = {"kdf": "argon2id", "salt": bytes(16), "memory_kib": 65536,
                                            "iterations": 3, "lanes": 4}  # fmt: skip
    protectors = tuple(
        Protector(bytes([n]) * 16, "passphrase", f"label {n}", n, params, (WrappedKey(1, bytes(60)),)) for n in range(2)
    )
    volume = Volume(
        volume_id=ID, serial=3, created_s=1_700_000_000, block_size=16384, features=(), root_dir_id=ID[::-1],
        kek_version=1, volume_key=WrappedKey(1, bytes(40)), protectors=protectors,
    )  # fmt: skip
    return encode_volume(volume) + bytes(32)


def _parse_volume(data: bytes) -> object:
    volume = parse_volume(data)
    for protector in volume.protectors:
        if protector.kind == "passphrase":
            parse_passphrase(protector.params)
    return volume


SIDECARS = [
    SidecarPayload(),
    SidecarPayload((Run(0, 1 << 40, 100, 0, 1, bytes(40), bytes(16)),)),
    SidecarPayload((Run(3, 9, BLOCK, 1, 2, bytes(120), bytes(48)), Run(9, 10, 7, 0, 1, bytes(40), bytes(16))),
                   ((5, 2),)),
    SidecarPayload(holes=((0, 1 << 51),), xattrs=Sealed(1, 1, bytes(40), b"sealed")),
    SidecarPayload(xattrs_gone=True, target=Sealed(7, 3, bytes(40), b"a target")),
]  # fmt: skip
DIRS = [
    DirPayload(),
    DirPayload((Entry(b"n" * 17, Kind.FILE, ID), Entry(b"m" * 271, Kind.CHAR, ID, 259))),
    DirPayload((Entry(b"n" * 30, Kind.DIR, ID),), (b"g" * 40, b"h" * 17), Sealed(1, 1, bytes(40), b"x")),
    DirPayload(gone=(b"g" * 20,), xattrs_gone=True),
    DirPayload(xattrs=Sealed(1, 1, bytes(40), b"x"), domain=ID),
]


def _log(header: LogHeader, payloads: Sequence[bytes], sizes: Sequence[int]) -> bytes:
    """With MACs of zeros: this is what a parser sees before it has a key."""
    raw, prev = header.encode(), sha256(header.encode())
    for number, (payload, size) in enumerate(zip(payloads, sizes, strict=True)):
        kind = SNAPSHOT if not number else DELTA
        head = Head(kind, number + 1, 0, size, 0, 10, len(payload), sha256(payload), prev)
        prev = bytes([number]) * 32
        raw += head.signed() + prev + payload + encode_foot(head.frame_bytes)
    return raw


FILE_LOG = LogHeader(KIND_FILE, 1, ID, bytes(40))
DIR_LOG = LogHeader(KIND_DIR, 1, ID, bytes(40), b"n" * 72)
HEAD = Head(DELTA, 1 << 40 | 7, 1 << 40, 5000, 0, 2, 99, bytes(32), bytes(32), bytes(32))


def _replay_file(data: bytes) -> object:
    """As a file is opened, if every MAC were right: what authenticates still has to be bounded."""
    replayed = parse(data)
    return build_map(replayed, len(replayed.heads), BLOCK)


def _replay_dir(data: bytes) -> object:
    return [decode_dir(payload) for payload in parse(data).payloads if payload is not None]


def _name(data: bytes) -> object:
    """A name in `tree/`, then the sealed one behind it."""
    sealed = sealed_from_tree(data)
    if sealed is not None:
        assert tree_name(sealed) == data
        NameCipher(bytes(range(64)), ID).open(sealed)
    return sealed


def _sealed_name(data: bytes) -> object:
    return NameCipher(bytes(range(64)), ID).open(data)


def _request(data: bytes) -> object:
    """In one piece, then byte by byte: the same messages, or the same refusal."""
    decoder, whole = RequestDecoder(), RequestDecoder()
    for at in range(0, len(data), 1 + len(data) // 40):
        decoder.feed(data[at : at + 1 + len(data) // 40])
    return whole.feed(data)


def _answer(data: bytes) -> object:
    return AnswerDecoder().feed(data)


NAMES = NameCipher(bytes(range(64)), ID)
STATES = [State(1, 0, clean=True), State(9, 5, clean=False, unclean=((1, 2), (4, 4)))]
REQUESTS = [
    encode_request(1, "hello", {"role": "daemon"}),
    encode_request(2, "unwrap", {"volume_id": ID, "items": [[ID, "block", 1, bytes(80), 7],
                                                            [ID, "attr", 1, bytes(40), 0]]}),
    encode_request(3, "generate", {"volume_id": ID, "id": ID, "purpose": "block", "count": 64}) * 2,
]  # fmt: skip
ANSWERS = [
    encode_reply(1, {"version": "1", "pid": 5, "started_s": 7}),
    encode_failure(2, "locked", "the volume is locked") + encode_push({"event": "locked", "volume_id": ID}),
    encode_reply(3, {"kek_version": 1, "kits": [[ID, bytes(32), bytes(40), b"", b"", bytes(64), bytes(80)]]}),
]

AUDIT_LINES = [
    AuditLine(1, "start", "ok", detail={"pid": 7, "text": "\udcff\n", "flag": True}),
    AuditLine(1_700_000_000_000_000_000, "unwrap", "ok", ID, PeerLine(1, 0, "/usr/bin/python3", "python3", "daemon"),
              (Touched(ID, "block", 5, ((3, 2), (9, 3))), Touched(ID, "attr", 1, (), authentic=False))),
    AuditLine(5, "unlock", "wrong-secret", ID, PeerLine(1, 0), detail={"message": "no"}),
]  # fmt: skip


def _audit_line(data: bytes) -> object:
    """What is accepted is written again, and read again as the same."""
    line = decode_line(data)
    assert decode_line(line.encode()) == line
    return line


def _audit_file(data: bytes) -> object:
    """Without a key: nothing but bounds holds a stranger's bytes back."""
    reading = Reading()
    lines = list(read_frames(data, None, reading))
    assert reading.fault is not None or reading.end == len(data)
    return lines


AUDIT_LOG = _log(LogHeader(KIND_AUDIT, 1, ID, bytes(40)), [line.encode() for line in AUDIT_LINES], [0, 0, 0])

TARGETS = [
    Target("audit line", _audit_line, [line.encode() for line in AUDIT_LINES], (Damaged,)),
    Target("audit file", _audit_file, [AUDIT_LOG], (Damaged,)),
    Target("volume", _parse_volume, [_volume()], (VolumeDamaged, UnsupportedFormat), msgpack_at=16),
    Target("state", decode_slot, [Slot(state, 1, bytes(40)).signed() + bytes(32) for state in STATES], ()),
    Target("log header", decode_header, [FILE_LOG.encode(), DIR_LOG.encode()], (Damaged,)),
    Target("frame head", decode_head, [HEAD.signed() + HEAD.mac], (Damaged,)),
    Target("sidecar payload", lambda data: decode_sidecar(data, BLOCK), [s.encode() for s in SIDECARS], (Damaged,), 0),
    Target("dir payload", decode_dir, [payload.encode() for payload in DIRS], (Damaged,), 0),
    Target("sidecar", _replay_file, [_log(FILE_LOG, [s.encode() for s in SIDECARS[:3]], [0, 9 * BLOCK, 10 * BLOCK])],
           (Damaged,), HEADER_BYTES + 152),
    Target("dir log", _replay_dir, [_log(DIR_LOG, [d.encode() for d in DIRS], [0, 2, 3, 3, 3])], (Damaged,)),
    Target("data header", decode_data_header, [DataHeader(ID, 7).signed() + bytes(32)], (Damaged,)),
    Target("symlink text", decode_target_text, [encode_target_text(ID, 4095)], (Damaged,)),
    Target("tree name", _name, [tree_name(NAMES.seal(b"name")), tree_name(NAMES.seal(b"n" * 175)),
                                tree_name(NAMES.seal(b"n" * 255))], (Damaged,)),
    Target("sealed name", _sealed_name, [NAMES.seal(b"n"), NAMES.seal(b"n" * 255)], (Damaged,)),
    Target("request", _request, REQUESTS, (ProtocolError,), 4),
    Target("answer", _answer, ANSWERS, (ProtocolError,), 4),
]  # fmt: skip
