"""Lines of the audit logs, read from disk without a key: in order of time, filtered, and as they are shown.

Reading proves nothing; `audit verify` does. What cannot be read is left out here and found there.
"""

from __future__ import annotations

import heapq
import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from cryptfs.errors import Damaged, UsageError
from cryptfs.format.audit import AuditLine, Touched, decode_line

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_NS = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Shown:
    """A line and where it stands; `log` is ``agent`` or a volume's id."""

    log: str
    file: int
    number: int
    line: AuditLine


@dataclass(slots=True)
class Filter:
    """Which lines are wanted; times in nanoseconds since 1970, inclusive."""

    since_ns: int | None
    until_ns: int | None
    process: str | None
    verbs: frozenset[str]
    refused: bool = False
    volume_id: bytes | None = None
    ids: frozenset[bytes] | None = None

    def takes(self, line: AuditLine) -> bool:
        """Whether the line is wanted."""
        if self.since_ns is not None and line.time_ns < self.since_ns:
            return False
        if self.until_ns is not None and line.time_ns > self.until_ns:
            return False
        if (self.verbs and line.verb not in self.verbs) or (self.refused and line.outcome in ("ok", "asked")):
            return False
        if self.volume_id is not None and line.volume_id != self.volume_id:
            return False
        if self.ids is not None and not any(touched.log_id in self.ids for touched in line.files):
            return False
        return self.process is None or _is_of(line, self.process)


def _is_of(line: AuditLine, process: str) -> bool:
    peer = line.peer
    if peer is None:
        return False
    if process.isdecimal():
        return peer.pid == int(process)
    return any(process in text for text in (peer.exe, peer.comm, peer.role) if text is not None)


def moment(text: str | None) -> int | None:
    """A time as nanoseconds since 1970: ``now``, so long ago (``90m``), or ISO 8601, local unless it says otherwise.

    Raises `UsageError`.
    """
    if text is None:
        return None
    if text == "now":
        return time.time_ns()
    ago = re.fullmatch(r"([0-9]{1,9})([smhd])", text)
    try:
        if ago:
            when = datetime.now(UTC) - timedelta(seconds=int(ago[1]) * _UNITS[ago[2]])
        else:
            when = datetime.fromisoformat(text)
        return int(when.timestamp() * _NS)
    except (ValueError, OverflowError, OSError):
        raise UsageError(f"{text!r} is no time: say 2026-01-31, 2026-01-31T12:00, or 90m, 24h, 7d") from None


def log_names(directory: str) -> list[str]:
    """The logs there are: ``agent`` and volume ids. None if there is no directory."""
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return []
    return sorted(name for name in names if name == "agent" or re.fullmatch(r"[0-9a-f]{32}", name))


Ends = Mapping[str, tuple[int, int]]
"""By log: its newest file, and that one's size in bytes."""


def ends_of(directory: str) -> Ends:
    """Where the logs end now."""
    from cryptfs.agent.audit_log import file_name, file_numbers

    ends: dict[str, tuple[int, int]] = {}
    for name in log_names(directory):
        with suppress(OSError, IndexError):
            number = file_numbers(os.path.join(directory, name))[-1]
            ends[name] = number, os.stat(os.path.join(directory, name, file_name(number))).st_size
    return ends


def all_lines(directory: str, ends: Ends | None = None) -> Iterator[Shown]:
    """All lines of all logs, up to where those ended (`ends_of`).

    The oldest first; of one log always in the order in which they were written, whatever the clock said.
    """
    known = ends_of(directory) if ends is None else ends
    return heapq.merge(*(_lines_of(directory, name, end) for name, end in known.items()), key=_time)


def _time(shown: Shown) -> int:
    return shown.line.time_ns


def _lines_of(directory: str, name: str, end: tuple[int, int]) -> Iterator[Shown]:
    from cryptfs.agent.audit_log import file_numbers

    last, size = end
    with suppress(OSError):
        for number in file_numbers(os.path.join(directory, name)):
            if number <= last:
                yield from read_file(directory, name, number, most_bytes=size if number == last else None)


def read_file(
    directory: str, name: str, number: int, after: int = 0, *, most_bytes: int | None = None
) -> Iterator[Shown]:
    """The lines of one file whose numbers are greater than `after`, and that lie within its first bytes."""
    from cryptfs.agent.audit_file import Reading, read_frames, read_whole
    from cryptfs.agent.audit_log import file_name

    try:
        raw = read_whole(os.path.join(directory, name, file_name(number)))
    except (OSError, Damaged):
        return
    for frame in read_frames(raw[:most_bytes], None, Reading()):
        if frame.generation > after:
            with suppress(Damaged):
                yield Shown(name, number, frame.generation, decode_line(frame.line))


@dataclass
class Follower:
    """What is written from now on."""

    directory: str
    _seen: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    """By log: file, its size, and its last line, when it was last looked at."""

    def __post_init__(self) -> None:
        for _ in self.fresh():
            pass

    def fresh(self) -> list[Shown]:
        """The lines since the last call."""
        from cryptfs.agent.audit_log import file_name, file_numbers

        out: list[Shown] = []
        for name in log_names(self.directory):
            known = self._seen.get(name)
            with suppress(OSError):
                for number in file_numbers(os.path.join(self.directory, name)):
                    if known is not None and number < known[0]:
                        continue
                    size = os.stat(os.path.join(self.directory, name, file_name(number))).st_size
                    if known is not None and known[:2] == (number, size):
                        continue
                    after = known[2] if known is not None else 0
                    lines = list(read_file(self.directory, name, number, after))
                    out += lines
                    known = self._seen[name] = (number, size, lines[-1].number if lines else after)
        return sorted(out, key=_time)


# as shown ------------------------------------------------------------------------------------------------------


def _stamp(time_ns: int) -> str:
    seconds, rest = divmod(time_ns, _NS)
    try:
        return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{rest // 1000:06d}Z"
    except (ValueError, OverflowError, OSError):
        return f"{time_ns} ns"


def _named(touched: Touched, known: Mapping[bytes, Sequence[bytes]]) -> str:
    paths = known.get(touched.log_id)
    return os.fsdecode(paths[0]) if paths else touched.log_id.hex()


def as_text(shown: Shown, known: Mapping[bytes, Sequence[bytes]]) -> str:
    """For people, on one line."""
    line = shown.line
    parts = [_stamp(line.time_ns), line.verb, line.outcome]
    if line.volume_id is not None:
        parts.append(f"volume {line.volume_id.hex()[:8]}")
    if line.peer is not None:
        who = line.peer.exe or line.peer.comm or "?"
        parts.append(f"process {line.peer.pid} ({who}{', ' + line.peer.role if line.peer.role else ''})")
        if line.peer.uid != os.geteuid():
            parts.append(f"uid {line.peer.uid}")
    if line.files:
        parts.append(f"{line.keys} keys:")
        parts.append("; ".join(_file(touched, known) for touched in line.files))
    parts += [f"{name}={value}" for name, value in line.detail.items() if not name.endswith("-mac")]
    return " ".join(parts)


def _file(touched: Touched, known: Mapping[bytes, Sequence[bytes]]) -> str:
    what = touched.purpose
    if touched.blocks:
        ranges = [f"{first}" if count == 1 else f"{first}-{first + count - 1}" for first, count in touched.blocks]
        what = f"blocks {','.join(ranges)}"
    return f"{_named(touched, known)} {what}{'' if touched.authentic else ' NOT AUTHENTIC'}"


def as_json(shown: Shown, known: Mapping[bytes, Sequence[bytes]]) -> str:
    """The line's own object, with where it stands, and the paths."""
    value = json.loads(shown.line.encode())
    for row in value["files"]:
        row["paths"] = [os.fsdecode(path) for path in known.get(bytes.fromhex(row["id"]), ())]
    return json.dumps({"log": shown.log, "file": shown.file, "line": shown.number, **value})
