"""Looks for what must not be there: known names and known content in the cipher directory."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from scripts.driver import run

NAME_MIN_BYTES = 8
"""Shorter names turn up by chance: 8 bytes do so once in 10**11 encrypted names."""
LINE_MIN_BYTES = 30
LINES = 400


@dataclass(frozen=True, slots=True)
class Needles:
    """What the plain copy holds, taken from it before it is searched for."""

    names: frozenset[bytes]
    patterns: Path
    """One content line or name per line, for grep -F -f."""


def collect(plain: Path, patterns: Path) -> Needles:
    """Takes every name of some length, and lines of files chosen at random (always the same ones)."""
    names = frozenset(name for name in walk_names(plain) if len(name) >= NAME_MIN_BYTES and b"\n" not in name)
    files = sorted(path for path in plain.rglob("*.py") if path.is_file())
    lines: set[bytes] = set()
    for path in random.Random(3).sample(files, min(LINES, len(files))):
        lines.update(line.strip() for line in path.read_bytes().splitlines()[:40] if len(line.strip()) > LINE_MIN_BYTES)
    patterns.write_bytes(b"".join(text + b"\n" for text in sorted(lines | names)))
    return Needles(names, patterns)


def walk_names(root: Path) -> Iterator[bytes]:
    """Every file and directory name below `root`."""
    for _, directories, files in os.walk(os.fsencode(root)):
        yield from directories
        yield from files


def names_found(needles: Needles, root: Path) -> frozenset[bytes]:
    """Which of the known names are names below `root`."""
    return needles.names & set(walk_names(root))


def files_matching(needles: Needles, root: Path) -> list[str]:
    """Files below `root` that hold a known line or name."""
    done = run(["grep", "-rlaF", "-D", "skip", "-f", needles.patterns, root], env={"LC_ALL": "C"}, expect=(0, 1))
    return done.stdout.splitlines()


def glimpse(cipher_dir: Path, count: int) -> list[str]:
    """A few lines that show what the cipher directory looks like."""
    lines = [f"{path.name}{'/' if path.is_dir() else ''}" for path in sorted(cipher_dir.iterdir())]
    shown = ["cipher directory: " + "  ".join(lines)]
    everything = sorted((cipher_dir / "tree").rglob("*"))
    files = [path for path in everything if path.name != ".dir" and not path.is_symlink() and path.is_file()]
    for path in random.Random(4).sample(files, min(count, len(files))):
        with open(path, "rb") as file:
            start = file.read(88)[-24:].hex(" ", 2)
        name = str(path.relative_to(cipher_dir))
        shown.append(f"{name if len(name) < 60 else name[:57] + '...'}  {path.stat().st_size:>9,} bytes  {start}")
    return shown
