"""Random operations on one file, beside a `bytearray` that says what it must hold (after fsx, Apple 1991).

What differs is shown with the operations that led to it; the same seed does the same again.
"""

from __future__ import annotations

import mmap
import os
import random
from collections.abc import Callable
from pathlib import Path


class Exerciser:
    """`path` is the file; `remount` unmounts and mounts again. Sizes stay below `size_max` bytes."""

    def __init__(self, path: Path, seed: int, *, size_max: int, remount: Callable[[], None] | None = None) -> None:
        self.path = path
        self.size_max = size_max
        self.remount = remount
        self.seed = seed
        self.rng = random.Random(seed)
        self.expected = bytearray()
        self.history: list[str] = []
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)

    def run(self, count: int) -> None:
        """`count` operations, then a last look at the whole file."""
        weighted: list[tuple[Callable[[], None], int]] = [
            (self.read, 20), (self.write, 30), (self.append, 5), (self.truncate, 12), (self.map_read, 8),
            (self.map_write, 12), (self.sync, 3), (self.drop, 12), (self.reopen, 4), (self.rename, 1),
            (self.replace, 1), (self.open_cut, 3),
        ]  # fmt: skip
        calls, weights = zip(*weighted, strict=True)
        remount_at = count * 2 // 3 if self.remount else -1
        for number in range(count):
            self.rng.choices(calls, weights)[0]()
            if number == remount_at:
                self.remounted()
        self.sync()
        self.drop()
        self.check(0, len(self.expected) + 1)

    def note(self, what: str) -> None:
        self.history.append(what)

    def close(self) -> None:
        os.close(self.fd)

    # choosing --------------------------------------------------------------------------------------------------

    def offset(self, end: int) -> int:
        """Somewhere up to `end`, often at or beside a border of pages or blocks."""
        at = self.rng.randint(0, end)
        if self.rng.random() < 0.4:
            border = self.rng.choice((4096, 16384))
            at = at // border * border + self.rng.choice((-1, 0, 0, 1))
        return min(max(at, 0), end)

    def length(self) -> int:
        return self.rng.choice((1, self.rng.randint(1, 300), 4096, self.rng.randint(1, 70_000)))

    def content(self, count: int) -> bytes:
        """Zeros now and then: they must not be taken for a hole."""
        return bytes(count) if self.rng.random() < 0.05 else self.rng.randbytes(count)

    # checking --------------------------------------------------------------------------------------------------

    def check(self, at: int, count: int) -> None:
        self.compare(at, os.pread(self.fd, count, at), self.expected[at : at + count])
        size = os.fstat(self.fd).st_size
        assert size == len(self.expected), self.told(f"size {size}, expected {len(self.expected)}")

    def compare(self, at: int, found: bytes, expected: bytes | bytearray) -> None:
        if found == expected:
            return
        first = next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), -1)
        raise AssertionError(
            self.told(f"{len(found)} bytes at {at}, expected {len(expected)}; first difference at {at + first}")
        )

    def told(self, what: str) -> str:
        return f"seed {self.seed}: {what}\nafter:\n" + "\n".join(self.history[-60:])

    # operations ------------------------------------------------------------------------------------------------

    def read(self) -> None:
        at, count = self.offset(len(self.expected)), self.length()
        self.note(f"read {at} +{count}")
        self.check(at, count)

    def put(self, at: int, data: bytes) -> None:
        if at > len(self.expected):
            self.expected += bytes(at - len(self.expected))
        self.expected[at : at + len(data)] = data

    def write(self) -> None:
        at = self.offset(min(len(self.expected) * 3 // 2 + 100, self.size_max))
        data = self.content(min(self.length(), self.size_max - at))
        self.note(f"write {at} +{len(data)}")
        assert os.pwrite(self.fd, data, at) == len(data)
        self.put(at, data)

    def append(self) -> None:
        data = self.content(max(0, min(self.length(), self.size_max - len(self.expected))))
        self.note(f"append +{len(data)}")
        fd = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        try:
            assert os.write(fd, data) == len(data)
        finally:
            os.close(fd)
        self.put(len(self.expected), data)

    def truncate(self) -> None:
        size = self.offset(min(len(self.expected) * 5 // 4 + 100, self.size_max))
        self.note(f"truncate {size}")
        (os.ftruncate if self.rng.random() < 0.5 else self.truncate_by_name)(self.fd, size)
        self.expected[size:] = b""
        self.expected += bytes(size - len(self.expected))

    def truncate_by_name(self, fd: int, size: int) -> None:
        os.truncate(self.path, size)

    def map_read(self) -> None:
        if self.expected:
            at, count = self.offset(len(self.expected)), self.length()
            self.note(f"mmap read {at} +{count}")
            with mmap.mmap(self.fd, 0, prot=mmap.PROT_READ) as mapped:
                self.compare(at, mapped[at : at + count], self.expected[at : at + count])

    def map_write(self) -> None:
        if self.expected:
            at = self.offset(len(self.expected) - 1)
            data = self.content(min(self.length(), len(self.expected) - at))
            flush = self.rng.random() < 0.5
            self.note(f"mmap write {at} +{len(data)}{', msync' if flush else ''}")
            with mmap.mmap(self.fd, 0) as mapped:
                mapped[at : at + len(data)] = data
                if flush:
                    mapped.flush()
            self.put(at, data)

    def sync(self) -> None:
        call = self.rng.choice((os.fsync, os.fdatasync))
        self.note(call.__name__)
        call(self.fd)

    def drop(self) -> None:
        """Make the daemon answer the next reads: of everything, or only of what it was given already."""
        whole = self.rng.random() < 0.2
        self.note("fsync, drop" if whole else "drop")
        if whole:
            os.fsync(self.fd)
        os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def reopen(self) -> None:
        self.note("close, open")
        os.close(self.fd)
        self.fd = os.open(self.path, os.O_RDWR)

    def open_cut(self) -> None:
        """O_TRUNC, which FUSE leaves to the daemon."""
        data = self.content(self.length() % self.size_max)
        self.note(f"O_TRUNC, write +{len(data)}")
        fd = os.open(self.path, os.O_WRONLY | os.O_TRUNC)
        try:
            assert os.write(fd, data) == len(data)
        finally:
            os.close(fd)
        self.expected[:] = data

    def rename(self) -> None:
        self.note("rename")
        new = self.path.with_name(f"file {self.rng.randrange(1000)}")
        self.path.rename(new)
        self.path = new

    def replace(self) -> None:
        """A new file with the same content takes the name, as editors do it."""
        self.note("replace")
        fresh = self.path.with_name("fresh")
        fresh.write_bytes(self.expected)
        fresh.rename(self.path)
        self.reopen()

    def remounted(self) -> None:
        assert self.remount is not None
        self.note("remount")
        os.close(self.fd)
        self.remount()
        self.fd = os.open(self.path, os.O_RDWR)
        self.check(0, len(self.expected) + 1)
