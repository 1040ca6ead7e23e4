"""What is timed. Each workload prepares, times and clears away in a directory of its own in the target."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from scripts.bench.targets import Target

KIB = 1024
MIB = 1 << 20
IO_BYTES = 128 * KIB


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much work one round is."""

    sequential_bytes: int = 256 * MIB
    small_files: int = 2000
    small_file_bytes: int = 4 * KIB
    random_file_bytes: int = 64 * MIB
    random_operations: int = 4000

    @classmethod
    def quick(cls) -> Sizes:
        """An eighth of it: for a first look."""
        return cls(32 * MIB, 250, 4 * KIB, 8 * MIB, 500)


@dataclass(slots=True)
class Round:
    """One workload on one target: `seconds` fills up with what was timed, by name."""

    target: Target
    sizes: Sizes
    archive: Path
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def place(self) -> Path:
        """The directory to work in."""
        return self.target.root / "bench"

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Times what is inside."""
        began = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - began


@dataclass(frozen=True, slots=True)
class Workload:
    """A group of timings that share their preparation."""

    name: str
    timings: tuple[str, ...]
    run: Callable[[Round], None]


def sequential(turn: Round) -> None:
    """One large file in 128 KiB pieces: written and fsynced, read cold, read again."""
    piece = random.Random(1).randbytes(IO_BYTES)
    path = turn.place / "large"
    with turn.timed("sequential write + fsync"), open(path, "wb", buffering=0) as file:
        file.writelines(piece for _ in range(turn.sizes.sequential_bytes // IO_BYTES))
        os.fsync(file.fileno())
    turn.target.make_cold()
    for name in ("sequential read, cold", "sequential read, warm"):
        with turn.timed(name), open(path, "rb", buffering=0) as file:
            buffer = bytearray(IO_BYTES)
            while file.readinto(buffer):
                pass


def small_files(turn: Round) -> None:
    """Many small files in directories of a hundred: created, then cold: stat, read, and unlinked."""
    content = random.Random(2).randbytes(turn.sizes.small_file_bytes)
    paths = [turn.place / f"d{number // 100}" / f"file-{number}.txt" for number in range(turn.sizes.small_files)]
    with turn.timed("small files, create"):
        for path in paths:
            if not path.parent.exists():
                path.parent.mkdir()
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            os.write(descriptor, content)
            os.close(descriptor)
    turn.target.make_cold()
    with turn.timed("small files, stat cold"):
        for path in paths:
            os.stat(path)
    turn.target.make_cold()
    with turn.timed("small files, read cold"):
        for path in paths:
            descriptor = os.open(path, os.O_RDONLY)
            os.read(descriptor, turn.sizes.small_file_bytes)
            os.close(descriptor)
    with turn.timed("small files, unlink"):
        for path in paths:
            os.unlink(path)


def random_access(turn: Round) -> None:
    """4 KiB pieces at random offsets of one file: read cold, then written and fsynced."""
    size, count = turn.sizes.random_file_bytes, turn.sizes.random_operations
    path = turn.place / "random"
    rng = random.Random(3)
    path.write_bytes(rng.randbytes(size))
    offsets = [rng.randrange(size // (4 * KIB)) * 4 * KIB for _ in range(count)]
    turn.target.make_cold()
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        with turn.timed("random 4 KiB read, cold"):
            for offset in offsets:
                os.pread(descriptor, 4 * KIB, offset)
        piece = rng.randbytes(4 * KIB)
        with turn.timed("random 4 KiB write + fsync"):
            for offset in reversed(offsets):
                os.pwrite(descriptor, piece, offset)
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def source_tree(turn: Round) -> None:
    """A source distribution: unpacked and synced, walked cold, searched, removed."""
    tree = turn.place / "tree"
    tree.mkdir()
    with turn.timed("unpack a source tree + syncfs"):
        subprocess.run(["tar", "-xf", turn.archive, "-C", tree, "--no-same-owner"], check=True)
        subprocess.run(["sync", "-f", tree], check=True)
    turn.target.make_cold()
    with turn.timed("find + stat a source tree, cold"):
        subprocess.run(["find", tree, "-size", "+1000M"], check=True, stdout=subprocess.DEVNULL)
    turn.target.make_cold()
    with turn.timed("grep -r a source tree, cold"):
        subprocess.run(["grep", "-rq", "no such words are in it", tree], check=False)
    with turn.timed("rm -rf a source tree"):
        shutil.rmtree(tree)


WORKLOADS = (
    Workload("sequential", ("sequential write + fsync", "sequential read, cold", "sequential read, warm"), sequential),
    Workload(
        "small",
        ("small files, create", "small files, stat cold", "small files, read cold", "small files, unlink"),
        small_files,
    ),
    Workload("random", ("random 4 KiB read, cold", "random 4 KiB write + fsync"), random_access),
    Workload(
        "tree",
        (
            "unpack a source tree + syncfs",
            "find + stat a source tree, cold",
            "grep -r a source tree, cold",
            "rm -rf a source tree",
        ),
        source_tree,
    ),
)
