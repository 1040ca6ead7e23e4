"""Compares two trees entry by entry: type, mode, owner, size, links, targets, times that both must share, SHA-256."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

NOT_COMPARED = {b"src/.git/index"}
"""Git's index holds inode numbers and change times; `git ls-files --stage` is compared instead."""


@dataclass(frozen=True, slots=True)
class Entry:
    """What is compared of one path."""

    kind: str
    mode: int
    owner: tuple[int, int]
    size: int | None
    """Bytes; None for directories, whose size is the file system's own business."""
    mtime_ns: int
    first_name: bytes
    """The first of the paths that are hard links of one another."""
    content: str
    """SHA-256 of a file, target of a symlink."""


@dataclass(frozen=True, slots=True)
class Tree:
    """All entries below a directory, by path relative to it."""

    entries: dict[bytes, Entry]
    file_bytes: int

    def count(self, kind: str) -> int:
        """How many entries are of `kind` (file, directory, symlink, other)."""
        return sum(entry.kind == kind for entry in self.entries.values())


def read_tree(root: Path, advance: Callable[[int], None]) -> Tree:
    """Reads everything below `root`; `advance` is told every number of entries done."""
    top = os.fsencode(root)
    entries: dict[bytes, Entry] = {}
    first_names: dict[int, bytes] = {}
    file_bytes = 0
    for directory, directories, files in os.walk(top):
        directories.sort()
        for name in sorted(directories + files):
            path = os.path.join(directory, name)
            relative = os.path.relpath(path, top)
            status = os.lstat(path)
            first_name = relative
            if stat.S_ISREG(status.st_mode) and status.st_nlink > 1:
                first_name = first_names.setdefault(status.st_ino, relative)
            entries[relative] = _entry(path, status, first_name, skip=relative in NOT_COMPARED)
            file_bytes += status.st_size if stat.S_ISREG(status.st_mode) else 0
        advance(len(directories) + len(files))
    return Tree(entries, file_bytes)


def _entry(path: bytes, status: os.stat_result, first_name: bytes, *, skip: bool) -> Entry:
    kind, content = "other", ""
    if stat.S_ISREG(status.st_mode):
        kind = "file"
        if not skip:
            with open(path, "rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
    elif stat.S_ISLNK(status.st_mode):
        kind, content = "symlink", os.fsdecode(os.readlink(path))
    elif stat.S_ISDIR(status.st_mode):
        kind = "directory"
    return Entry(
        kind=kind,
        mode=status.st_mode,
        owner=(status.st_uid, status.st_gid),
        size=None if kind == "directory" or skip else status.st_size,
        mtime_ns=status.st_mtime_ns,
        first_name=first_name,
        content=content,
    )


def differences(plain: Tree, volume: Tree, started_ns: int) -> list[str]:
    """One line per path that differs; modification times count where they were set to a time before `started_ns`."""
    found = []
    for path in sorted(plain.entries.keys() | volume.entries.keys()):
        name = os.fsdecode(path).encode("unicode_escape", "surrogateescape").decode("ascii", "replace")
        expected, got = plain.entries.get(path), volume.entries.get(path)
        if expected is None or got is None:
            found.append(f"{name}: only in {'the volume' if expected is None else 'the plain copy'}")
            continue
        found += [
            f"{name}: {field.name} is {getattr(got, field.name)!r}, expected {getattr(expected, field.name)!r}"
            for field in fields(Entry)
            if getattr(expected, field.name) != getattr(got, field.name)
            and (field.name != "mtime_ns" or expected.mtime_ns < started_ns)
        ]
    return found
