"""Whether the files of the audit logs are what was written, all of it: a judgement of what the agent says of each file.

Pure: reports in, verdicts out. docs/AUDIT.md says what a clean verdict proves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cryptfs.types import ID_BYTES

MAC_BYTES = 8
AGENT = bytes(ID_BYTES)
"""In place of a volume's id: the agent's own log."""

_FAULTS = {
    "header": "its header is not what was written",
    "edited": "a line was edited, or bytes were put in",
    "reordered": "a line was removed, repeated or moved",
    "cut": "it is shorter than what was written",
    "gone": "it was removed while it was written",
}


_UNREAD = frozenset({"header", "gone"})
"""Nothing of such a file is known."""


@dataclass(frozen=True, slots=True)
class Place:
    """What a line of one log says of where another ended: file, line, the first 8 bytes of its MAC."""

    volume_id: bytes
    file: int
    line: int
    mac: bytes


@dataclass(frozen=True, slots=True)
class FileReport:
    """One file, as the agent read it. `macs`: 8 bytes for each line that is right, from `first_line` on.

    `end`: bytes that are right, of `size`. `begin`: what its first line says of the file before.
    """

    number: int
    size: int
    end: int
    fault: str | None
    first_line: int
    macs: bytes
    begin: Mapping[str, str | int | bool]
    expired: int
    missed: int
    places: tuple[Place, ...]

    @property
    def lines(self) -> int:
        """How many are right."""
        return len(self.macs) // MAC_BYTES

    @property
    def last_line(self) -> int:
        """The number of the last line that is right."""
        return self.first_line + self.lines - 1

    def mac_of(self, line: int) -> bytes | None:
        """The MAC of a line; None if it is not among those that are right."""
        at = (line - self.first_line) * MAC_BYTES
        return self.macs[at : at + MAC_BYTES] if 0 <= at < len(self.macs) else None


@dataclass(slots=True)
class Verdict:
    """One log. `damage` proves that it was changed; `notes` do not."""

    volume_id: bytes
    files: int = 0
    lines: int = 0
    damage: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def judge(volume_id: bytes, reports: Sequence[FileReport]) -> Verdict:
    """One log's files, in order of their numbers."""
    out = Verdict(volume_id, len(reports), sum(report.lines for report in reports))
    expired = max((report.expired for report in reports), default=0)
    for number, report in enumerate(reports):
        before = reports[number - 1] if number else None
        last = number + 1 == len(reports)
        _judge_file(out, report, last=last)
        _judge_link(out, report, before, expired)
        if report.missed:
            out.notes.append(f"file {report.number}: {report.missed} lines could not be written at the time")
    return out


def _judge_file(out: Verdict, report: FileReport, *, last: bool) -> None:
    where = f"file {report.number}"
    if report.begin.get("file") != report.number and report.fault not in _UNREAD:
        out.damage.append(f"{where}: its first line is not that of file {report.number}")
    if report.fault == "torn":
        if last:
            out.notes.append(f"{where}: the last line is torn ({report.size - report.end} bytes), as a crash leaves it")
    elif report.fault is not None:
        line = f" after line {report.last_line}" if report.lines else ""
        out.damage.append(f"{where}{line}, byte {report.end}: {_FAULTS.get(report.fault, report.fault)}")


def _judge_link(out: Verdict, report: FileReport, before: FileReport | None, expired: int) -> None:
    said = report.begin
    first_missing = before.number + 1 if before is not None else 1
    if report.number > first_missing and report.number - 1 > expired:
        gone = f"{first_missing} to {report.number - 1}" if report.number - 1 > first_missing else f"{first_missing}"
        out.damage.append(f"file {gone}: missing")
    if before is None or before.number != report.number - 1 or {report.fault, before.fault} & _UNREAD:
        return
    where = f"file {before.number}"
    line, mac, end = said.get("previous-line"), str(said.get("previous-mac", "")), said.get("previous-end")
    if line != before.last_line or mac[: 2 * MAC_BYTES] != before.macs[-MAC_BYTES:].hex():
        lines = line if type(line) is int else 0
        what = f"{lines - before.last_line} lines less than" if lines > before.last_line else "not"
        out.damage.append(f"{where}: it ends at line {before.last_line}, {what} where file {report.number} says")
    elif end != before.end:
        out.damage.append(f"{where}: it ends at byte {before.end}, not where file {report.number} says")
    elif before.fault == "torn" or "previous-torn" in said:
        torn = said.get("previous-torn", 0)
        if torn == before.size - before.end:
            out.notes.append(f"{where}: the last line was torn by a crash ({torn} bytes); nothing whole was lost")
        else:
            out.damage.append(f"{where}: {before.size - before.end} bytes after its last line; {torn} were torn")


def compare(logs: Mapping[bytes, Sequence[FileReport]], verdicts: Mapping[bytes, Verdict]) -> list[str]:
    """What the logs say of each other's ends, added to the verdicts; what is said of logs that are not there at all.

    `logs`: all that could be read, by volume id.
    """
    gone: list[str] = []
    for reports in logs.values():
        for place in (place for report in reports for place in report.places):
            other = logs.get(place.volume_id)
            if other is None:
                gone.append(place.volume_id.hex())
                continue
            why = _contradiction(place, other)
            if why is not None:
                verdicts[place.volume_id].damage.append(why)
    return sorted(set(gone))


def _contradiction(place: Place, reports: Sequence[FileReport]) -> str | None:
    report = next((report for report in reports if report.number == place.file), None)
    if report is None:
        # Older than the oldest: `judge` says whether it may be gone.
        return None if reports and place.file < reports[0].number else f"file {place.file}: missing"
    mac = report.mac_of(place.line)
    if mac == place.mac:
        return None
    if mac is None:
        # What is behind a fault is damaged anyway.
        return None if report.fault not in (None, "torn") else f"file {place.file}: line {place.line} was cut off"
    return f"file {place.file}: line {place.line} is another one than it was"
