"""One line of the audit log (docs/AUDIT.md): a JSON object, in UTF-8, ended by a newline.

`encode` writes the fields in one order and without spaces; `decode_line` takes any order, refuses unknown fields,
wrong types and numbers out of range, and raises `Damaged("audit-line")` for whatever is no line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cryptfs.errors import Damaged
from cryptfs.types import ID_BYTES

VERBS = frozenset(
    {
        # what is asked for
        "about", "accept", "accept-volume", "attach", "audit", "begin", "commit", "create", "destroy-keks", "detach",
        "feature-add", "floors", "generate", "hello", "keep", "kits", "lock", "lock-path", "locked", "policy-set",
        "protector-add", "protector-change", "protector-remove", "record", "report", "reports", "rewrap",
        "rotate-cancel", "rotate-kek", "rotate-start", "rotation", "rotation-get", "shred", "status", "stop", "unlock",
        "unwrap",
        # what happens
        "connect", "end", "expire", "forget", "limit", "message", "missed", "policy", "reverify", "start",
        "unknown",
    }
)  # fmt: skip
"""All that the agent writes of its own accord; a refused request of no verb may have any other word."""
LINE_MAX_BYTES = 2 << 20
"""4096 keys of as many files take some 400 KiB."""
WORD_MAX_CHARS = 32
TEXT_MAX_CHARS = 4096
DETAILS_MAX = 16
_NUMBER_MAX = (1 << 64) - 1
_INT_DIGITS = 20

_WORD = re.compile(r"[a-z][a-z0-9-]{0,31}\Z")
_FIELDS = frozenset({"time_ns", "verb", "outcome", "volume", "peer", "keys", "files", "detail"})
_PEER_FIELDS = frozenset({"pid", "uid", "exe", "comm", "role"})
_FILE_FIELDS = frozenset({"id", "purpose", "blocks", "keys", "authentic"})

Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Touched:
    """Keys of one purpose of one log. `blocks`: (first, count) each, for block keys that were unwrapped.

    `keys` counts all of them. `authentic` is false where the wraps were not, and no key was handed out.
    """

    log_id: bytes
    purpose: str
    keys: int
    blocks: Ranges = ()
    authentic: bool = True


@dataclass(frozen=True, slots=True)
class PeerLine:
    """Who asked, as the kernel says: process, user, program (None: hidden from us), and its name; `role` is its word.

    All of it is of the moment it connected.
    """

    pid: int
    uid: int
    exe: str | None = None
    comm: str | None = None
    role: str | None = None

    def encode(self) -> str:
        """The JSON object."""
        return json.dumps(
            {"pid": self.pid, "uid": self.uid, "exe": self.exe, "comm": self.comm, "role": self.role},
            separators=(",", ":"),
        )


@dataclass(frozen=True, slots=True)
class AuditLine:
    """One request or event. `outcome` is ``ok``, an error code of the protocol, or a word of docs/AUDIT.md."""

    time_ns: int
    verb: str
    outcome: str
    volume_id: bytes | None = None
    peer: PeerLine | None = None
    files: tuple[Touched, ...] = ()
    detail: Mapping[str, str | int | bool] = field(default_factory=dict)

    @property
    def keys(self) -> int:
        """Keys handed out: none if the request was refused, and none where the wraps were not authentic."""
        return sum(touched.keys for touched in self.files if touched.authentic) if self.outcome == "ok" else 0

    def encode(self) -> bytes:
        """The line, with its newline."""
        return encode_line(
            self.time_ns, self.verb, self.outcome, self.volume_id.hex() if self.volume_id is not None else None,
            self.peer.encode() if self.peer is not None else "null", self.files, self.detail,
        )  # fmt: skip


def encode_line(
    time_ns: int, verb: str, outcome: str, volume: str | None, peer: str, files: Sequence[Touched],
    detail: Mapping[str, str | int | bool],
) -> bytes:  # fmt: skip
    """As `AuditLine.encode`, with volume (hexadecimal) and peer (JSON) encoded already: the agent's hot path.

    Raises `ValueError` for a verb, outcome or purpose that is no word: it would be put into the JSON as it is.
    """
    if not (is_word(verb) and is_word(outcome)):
        raise ValueError("no word")
    keys = 0
    parts = []
    for touched in files:
        if touched.authentic:
            keys += touched.keys
        blocks = ",".join([f"[{first},{count}]" for first, count in touched.blocks])
        refused = "" if touched.authentic else ',"authentic":false'
        if not is_word(touched.purpose):
            raise ValueError("no word")
        parts.append(
            f'{{"id":"{touched.log_id.hex()}","purpose":"{touched.purpose}","keys":{touched.keys},'
            f'"blocks":[{blocks}]{refused}}}'
        )
    ending = f',"detail":{json.dumps(dict(detail), separators=(",", ":"))}' if detail else ""
    where = "null" if volume is None else f'"{volume}"'
    return (
        f'{{"time_ns":{time_ns},"verb":"{verb}","outcome":"{outcome}","volume":{where},"peer":{peer},'
        f'"keys":{keys if outcome == "ok" else 0},"files":[{",".join(parts)}]{ending}}}\n'
    ).encode("ascii")


def is_word(text: str) -> bool:
    """Whether it may stand in a line as verb, outcome, purpose or role: 1 … 32 of ``a-z 0-9 -``, a letter first."""
    return _WORD.match(text) is not None


def decode_line(data: bytes) -> AuditLine:
    """Raises `Damaged("audit-line")`."""
    if len(data) > LINE_MAX_BYTES or not data.endswith(b"\n"):
        raise Damaged("audit-line", "too long, or without its end")
    try:
        value = json.loads(data.decode("utf-8"), parse_float=_refuse, parse_constant=_refuse, parse_int=_int,
                           object_pairs_hook=_object)  # fmt: skip
    # `ValueError` covers JSON, UTF-8 and what the hooks refuse.
    except (ValueError, RecursionError):
        raise Damaged("audit-line", "not JSON of the kind that is written") from None
    fields = _fields(value, _FIELDS, optional={"detail"})
    volume, peer = fields["volume"], fields["peer"]
    line = AuditLine(
        time_ns=_number(fields["time_ns"]),
        verb=_word(fields["verb"]),
        outcome=_word(fields["outcome"]),
        volume_id=None if volume is None else _id(volume),
        peer=None if peer is None else _peer(peer),
        files=tuple(_touched(row) for row in _array(fields["files"])),
        detail=_detail(fields.get("detail", {})),
    )
    if _number(fields["keys"]) != line.keys:
        raise Damaged("audit-line", "its keys do not add up")
    return line


def _refuse(_: str) -> Any:  # noqa: ANN401 - json's own shape
    raise ValueError("no such value in a line")


def _int(text: str) -> int:
    # Before Python makes a number of it: a long one takes quadratic time.
    if len(text) > _INT_DIGITS:
        raise ValueError("a number out of range")
    return int(text)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a field twice")
    return out


def _fields(value: object, known: frozenset[str], optional: set[str]) -> dict[str, Any]:
    if type(value) is not dict or not known - optional <= value.keys() <= known:
        raise Damaged("audit-line", "not the fields of a line")
    return value


def _array(value: object) -> list[Any]:
    if type(value) is not list:
        raise Damaged("audit-line", "no array")
    return value


def _number(value: object) -> int:
    if type(value) is not int or not 0 <= value <= _NUMBER_MAX:
        raise Damaged("audit-line", "no number, or one out of range")
    return value


def _word(value: object) -> str:
    if type(value) is not str or not _WORD.match(value):
        raise Damaged("audit-line", "no word")
    return value


def _text(value: object) -> str:
    if type(value) is not str or len(value) > TEXT_MAX_CHARS:
        raise Damaged("audit-line", "no text, or too long")
    return value


def _id(value: object) -> bytes:
    if type(value) is not str or len(value) != 2 * ID_BYTES or value != value.lower():
        raise Damaged("audit-line", "no id")
    try:
        log_id = bytes.fromhex(value)
    except ValueError:
        raise Damaged("audit-line", "no id") from None
    if len(log_id) != ID_BYTES:
        raise Damaged("audit-line", "no id")
    return log_id


def _peer(value: object) -> PeerLine:
    fields = _fields(value, _PEER_FIELDS, optional=set())
    exe, comm, role = fields["exe"], fields["comm"], fields["role"]
    return PeerLine(
        _number(fields["pid"]),
        _number(fields["uid"]),
        None if exe is None else _text(exe),
        None if comm is None else _text(comm),
        None if role is None else _word(role),
    )


def _touched(value: object) -> Touched:
    fields = _fields(value, _FILE_FIELDS, optional={"authentic"})
    authentic = fields.get("authentic", True)
    if type(authentic) is not bool:
        raise Damaged("audit-line", "authentic is no truth value")
    blocks = []
    for row in _array(fields["blocks"]):
        if type(row) is not list or len(row) != 2:
            raise Damaged("audit-line", "no range of blocks")
        blocks.append((_number(row[0]), _number(row[1])))
    keys = _number(fields["keys"])
    if blocks and sum(count for _, count in blocks) != keys:
        raise Damaged("audit-line", "its blocks do not add up")
    return Touched(_id(fields["id"]), _word(fields["purpose"]), keys, tuple(blocks), authentic)


def _detail(value: object) -> dict[str, str | int | bool]:
    if type(value) is not dict or len(value) > DETAILS_MAX:
        raise Damaged("audit-line", "no details")
    for name, item in value.items():
        if len(name) > WORD_MAX_CHARS or type(item) not in (str, int, bool):
            raise Damaged("audit-line", "a detail of a wrong kind")
        if type(item) is str:
            _text(item)
        elif type(item) is int:
            _number(item)
    return value
