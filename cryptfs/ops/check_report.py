"""What a check finds, and the report that people and programs get of it (docs/CLI_ABI.md lists the fields)."""

from __future__ import annotations

import enum
import os
import time
from dataclasses import dataclass, field
from typing import Any

SHREDDED = "shredded"
"""Reason of the notice that a domain was shredded."""


class Severity(enum.StrEnum):
    """How much a finding matters.

    `DAMAGE`: something is not what was written, and the mount answers EIO for it. `LEFTOVER`: costs space and nothing
    else, `--repair` removes it. `NOTICE`: worth knowing, nothing to put right.
    """

    DAMAGE = "damage"
    LEFTOVER = "leftover"
    NOTICE = "notice"


class What(enum.StrEnum):
    """What a finding is about."""

    DIRECTORY = "directory"
    """A directory's own log: its entries cannot be known."""
    MISSING = "missing"
    """`.dir` names it, `tree/` does not have it."""
    STRAY = "stray"
    """`tree/` has it, `.dir` does not name it."""
    EXCHANGED = "exchanged"
    """Something of another kind or id lies under the entry's name."""
    DUPLICATE = "duplicate"
    """Two inodes carry one file's id: a copy."""
    FILE = "file"
    """A file as a whole: header, sidecar, size."""
    BLOCKS = "blocks"
    """Blocks of a file that cannot be read."""
    XATTRS = "xattrs"
    """A file's, directory's or special file's extended attributes; the rest of it is not concerned."""
    SYMLINK = "symlink"
    LINKS = "links"
    """The link count differs from the number of names."""
    UNREADABLE = "unreadable"
    """The system refused to show it."""
    ORPHAN = "orphan"
    """A sidecar or twin that no entry and no data file names."""
    UNFINISHED = "unfinished"
    """What an interrupted rewrite or a removal left."""
    UNSETTLED = "unsettled"
    """What a crash left and the next mount settles by itself."""
    DOMAIN = "domain"
    """A domain's place without its volume, or a volume in `domains/` without a place."""
    STATE = "state"
    """The volume's own file of that name."""
    FOREIGN = "foreign"
    """A file in a place of the cipher directory where none of ours has that name."""


@dataclass(frozen=True, slots=True)
class Spot:
    """Where an entry lies: the names in `tree/` of the directories down to it, and its own (b"" for the root)."""

    above: tuple[bytes, ...] = ()
    name: bytes = b""

    @property
    def below(self) -> tuple[bytes, ...]:
        """As a directory's own chain of names."""
        return (*self.above, self.name) if self.name else self.above


@dataclass(slots=True)
class Finding:
    """One thing found. `path`: plaintext path from the volume's root, or a path in the cipher directory.

    `blocks`: (first block, count) ranges that cannot be read. `moved_to` and `action` are filled in by a repair.
    """

    severity: Severity
    what: What
    path: bytes
    reason: str
    detail: str = ""
    log_id: bytes = b""
    inode: int | None = None
    blocks: list[tuple[int, int]] = field(default_factory=list)
    spot: Spot | None = None
    action: str = ""
    moved_to: bytes = b""
    lost_bytes: list[tuple[int, int]] = field(default_factory=list)
    """(offset, length) of plaintext that a salvage could not read."""

    @property
    def key(self) -> tuple[str, bytes, str]:
        """The same for the same thing seen again."""
        return self.what, self.path, self.reason

    def as_json(self) -> dict[str, Any]:
        """As docs/CLI_ABI.md lists it."""
        return {
            "severity": self.severity.value,
            "what": self.what.value,
            "path": os.fsdecode(self.path),
            "reason": self.reason,
            "detail": self.detail,
            "id": self.log_id.hex() or None,
            "inode": self.inode,
            "blocks": [list(pair) for pair in self.blocks],
            "action": self.action or None,
            "moved_to": os.fsdecode(self.moved_to) or None,
            "lost": [list(pair) for pair in self.lost_bytes],
        }

    def line(self) -> str:
        """For people."""
        out = f"{os.fsdecode(self.path)}: {self.what.value}: {self.reason}"
        if self.detail:
            out += f" ({self.detail})"
        if self.blocks:
            out += ": blocks " + ", ".join(str(a) if n == 1 else f"{a}-{a + n - 1}" for a, n in self.blocks)
        if self.action:
            out += f" -> {self.action}"
        if self.moved_to:
            out += f", see {os.fsdecode(self.moved_to)}"
        return out


@dataclass(slots=True)
class Tally:
    """How far a check is. Totals are 0 until they are known; bytes are of plaintext."""

    stage: str = "reading the tree"
    directories: int = 0
    files: int = 0
    symlinks: int = 0
    others: int = 0
    done_bytes: int = 0
    total_files: int = 0
    total_bytes: int = 0
    measured: bool = False

    def restart(self, stage: str) -> None:
        """Count from nothing again."""
        fresh = Tally(stage)
        for name in self.__slots__:
            setattr(self, name, getattr(fresh, name))


@dataclass(slots=True)
class Report:
    """The outcome. `busy`: paths of files in use that could not be judged while mounted."""

    deep: bool
    mounted: bool
    left_clean: bool
    findings: list[Finding] = field(default_factory=list)
    busy: list[bytes] = field(default_factory=list)
    domains: dict[bytes, bytes] = field(default_factory=dict)
    """Paths of domains' places -> the domain's volume id; what is in them is not in this report."""
    of_domains: dict[bytes, Report | None] = field(default_factory=dict)
    """By path, the reports of those that were checked too; None: locked, or shredded."""
    quarantine: bytes = b""
    repaired: bool = False
    tally: Tally = field(default_factory=Tally)
    started_s: float = field(default_factory=time.monotonic)
    duration_s: float = 0.0

    @property
    def damage(self) -> list[Finding]:
        """Findings that are damage and were not put right."""
        return [f for f in self.findings if f.severity is Severity.DAMAGE and not f.action]

    @property
    def leftovers(self) -> list[Finding]:
        """Leftovers that were not removed."""
        return [f for f in self.findings if f.severity is Severity.LEFTOVER and not f.action]

    @property
    def shredded(self) -> set[bytes]:
        """Paths of domains that were shredded."""
        return {finding.path for finding in self.findings if finding.reason == SHREDDED}

    def with_domains(self) -> list[Report]:
        """This one and those of the domains that were checked."""
        return [self, *(inner for report in self.of_domains.values() if report for inner in report.with_domains())]

    @property
    def result(self) -> str:
        """`clean`, `repaired` or `damaged`."""
        if self.damage:
            return "damaged"
        return "repaired" if self.repaired else "clean"

    def as_json(self) -> dict[str, Any]:
        """As docs/CLI_ABI.md lists it."""
        return {
            "result": self.result,
            "deep": self.deep,
            "mounted": self.mounted,
            "left_clean": self.left_clean,
            "directories": self.tally.directories,
            "files": self.tally.files,
            "symlinks": self.tally.symlinks,
            "others": self.tally.others,
            "bytes": self.tally.done_bytes,
            "duration_s": round(self.duration_s, 3),
            "quarantine": os.fsdecode(self.quarantine) or None,
            "busy": [os.fsdecode(path) for path in self.busy],
            "findings": [finding.as_json() for finding in self.findings],
            "domains": [
                {
                    "path": os.fsdecode(path),
                    "volume_id": domain_id.hex(),
                    "report": report.as_json() if (report := self.of_domains.get(path)) is not None else None,
                }
                for path, domain_id in sorted(self.domains.items())
            ],
        }
