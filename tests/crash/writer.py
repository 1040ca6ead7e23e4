"""Programs that write, and log outside what was acknowledged; and what must then be found after a crash.

    python -m tests.crash.writer TOP LOGS SEED SECONDS

Each job is a process of its own: it logs `begin …` before it changes something and `ack …` once fsync(2), msync(2) or
COMMIT has returned, and ends at the first error. `check` reads the log and then the files. What was acknowledged must
be there; of what was begun later the kernel may have written any page or none.
"""

from __future__ import annotations

import mmap
import os
import random
import sqlite3
import struct
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

_STAMP = struct.Struct(">II")


class Log:
    """Lines that were written before and after; survives the mount, not the machine."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def __call__(self, *words: object) -> None:
        os.write(self._fd, (" ".join(map(str, words)) + "\n").encode())


def bytes_of(tag: str, count: int) -> bytes:
    """The same for the same tag."""
    return random.Random(tag).randbytes(count)


class Job(ABC):
    """One program in a directory of its own. `steps` does one thing after the other, for ever."""

    def __init__(self, top: Path, logs: Path, seed: int) -> None:
        self.name = type(self).__name__.lower()
        self.top = top / self.name
        self.log_path = logs / f"{self.name}.log"
        self.seed = seed
        self.rng = random.Random(f"{seed} {self.name}")

    def run(self, seconds: float) -> None:
        """Until an error or the end of the time."""
        self.log = Log(self.log_path)
        end = time.monotonic() + seconds
        try:
            self.top.mkdir()
            for _ in self.steps():
                if time.monotonic() > end:
                    return
        except (OSError, sqlite3.Error):
            return

    def lines(self) -> list[list[str]]:
        """What was logged, in words; the last line may be cut short by nothing: it is one write(2)."""
        return [line.split(" ") for line in self.log_path.read_text().splitlines()] if self.log_path.exists() else []

    def problems(self) -> list[str]:
        """Compares log and files. Whatever cannot be read is a problem, too."""
        try:
            return [f"{self.name}, seed {self.seed}: {problem}" for problem in self.check()]
        except (OSError, sqlite3.Error) as error:
            return [f"{self.name}, seed {self.seed}: {error!r}"]

    @abstractmethod
    def steps(self) -> Iterator[None]: ...

    @abstractmethod
    def check(self) -> Iterator[str]: ...


def begun_and_acked(lines: list[list[str]], initial: int = 0) -> tuple[int, int]:
    """The last number of a `begin` and of an `ack` line."""
    begun = [int(words[1]) for words in lines if words[0] == "begin"]
    acked = [int(words[1]) for words in lines if words[0] == "ack"]
    return max(begun, default=initial), max(acked, default=initial)


def wrong_bytes(found: bytes, expected: bytes, firm: int) -> str | None:
    """Of a file that only grew: up to `firm` it is as expected, after that it may have holes."""
    if found[:firm] != expected[:firm]:
        return f"{len(found)} bytes, wrong within the {firm} acknowledged"
    if len(found) > len(expected):
        return f"{len(found)} bytes, never more than {len(expected)}"
    if any(a not in (0, b) for a, b in zip(found[firm:], expected[firm:], strict=False)):
        return "bytes after the acknowledged ones that were never written"
    return None


class Appender(Job):
    """Appends pieces and syncs now and then."""

    def stream(self, upto: int) -> bytes:
        out = bytearray()
        number = 0
        while len(out) < upto:
            out += self.piece(number)
            number += 1
        return bytes(out)

    def piece(self, number: int) -> bytes:
        size = random.Random(f"{self.seed} size {number}").choice((1, 100, 3000, 9000, 70_000))
        return bytes_of(f"{self.seed} append {number}", size)

    def steps(self) -> Iterator[None]:
        fd, size, number = os.open(self.top / "file", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), 0, 0
        while True:
            piece = self.piece(number)
            self.log("begin", size + len(piece))
            assert os.write(fd, piece) == len(piece)
            size += len(piece)
            number += 1
            if self.rng.random() < 0.6:
                self.rng.choice((os.fsync, os.fdatasync))(fd)
                self.log("ack", size)
            yield

    def check(self) -> Iterator[str]:
        begun, acked = begun_and_acked(self.lines())
        path = self.top / "file"
        if acked or path.exists():
            problem = wrong_bytes(path.read_bytes(), self.stream(begun)[:begun], acked)
            if problem:
                yield problem


class Stamped(Job):
    """A file of slots, each filled with its number and version; slots are rewritten in place."""

    slots, slot_bytes = 40, 5000

    def stamp(self, slot: int, version: int) -> bytes:
        return _STAMP.pack(slot, version) * (self.slot_bytes // _STAMP.size)

    def make(self) -> int:
        fd = os.open(self.top / "file", os.O_RDWR | os.O_CREAT, 0o600)
        os.write(fd, b"".join(self.stamp(slot, 0) for slot in range(self.slots)))
        os.fsync(fd)
        self.log("made")
        return fd

    def check(self) -> Iterator[str]:
        lines = self.lines()
        if ["made"] not in lines:
            return
        begun, acked = dict.fromkeys(range(self.slots), 0), dict.fromkeys(range(self.slots), 0)
        for verb, *words in lines:
            if verb in {"begin", "ack"}:
                (begun if verb == "begin" else acked)[int(words[0])] = int(words[1])
        content = (self.top / "file").read_bytes()
        if len(content) != self.slots * self.slot_bytes:
            yield f"{len(content)} bytes"
            return
        for slot in range(self.slots):
            found = set(_STAMP.iter_unpack(content[slot * self.slot_bytes : (slot + 1) * self.slot_bytes]))
            bad = {(s, v) for s, v in found if s != slot or not acked[slot] <= v <= begun[slot]}
            if bad:
                yield f"slot {slot} is {sorted(bad)}, acknowledged {acked[slot]}, begun {begun[slot]}"


class Overwriter(Stamped):
    """With pwrite(2) and fsync(2)."""

    def steps(self) -> Iterator[None]:
        fd = self.make()
        versions = dict.fromkeys(range(self.slots), 0)
        while True:
            some = self.rng.sample(range(self.slots), self.rng.randint(1, 4))
            for slot in some:
                versions[slot] += 1
                self.log("begin", slot, versions[slot])
                os.pwrite(fd, self.stamp(slot, versions[slot]), slot * self.slot_bytes)
            self.rng.choice((os.fsync, os.fdatasync))(fd)
            for slot in some:
                self.log("ack", slot, versions[slot])
            yield


class Mapper(Stamped):
    """Through a shared mapping and msync(2)."""

    slots, slot_bytes = 200, 512

    def steps(self) -> Iterator[None]:
        with mmap.mmap(self.make(), 0) as mapped:
            versions = dict.fromkeys(range(self.slots), 0)
            while True:
                some = self.rng.sample(range(self.slots), self.rng.randint(1, 6))
                for slot in some:
                    versions[slot] += 1
                    self.log("begin", slot, versions[slot])
                    mapped[slot * self.slot_bytes : (slot + 1) * self.slot_bytes] = self.stamp(slot, versions[slot])
                mapped.flush()
                for slot in some:
                    self.log("ack", slot, versions[slot])
                yield


class Cutter(Job):
    """Cuts, stretches and appends, and syncs after each."""

    def change(self, content: bytes, kind: str, size: int, number: int) -> bytes:
        if kind == "append":
            return content + bytes_of(f"{self.seed} {number}", size)
        return content[:size].ljust(size, b"\0")

    def steps(self) -> Iterator[None]:
        fd, content, number = os.open(self.top / "file", os.O_RDWR | os.O_CREAT, 0o600), b"", 0
        while True:
            number += 1
            kind, size = "append", self.rng.choice((10, 4000, 20_000))
            if self.rng.random() < 0.5 and content:
                kind, size = "cut", self.rng.randrange(len(content) * 5 // 4)
            self.log("begin", number, kind, size)
            after = self.change(content, kind, size, number)
            os.ftruncate(fd, size) if kind == "cut" else os.pwrite(fd, after[len(content) :], len(content))
            os.fsync(fd)
            self.log("ack", number)
            content = after
            yield

    def check(self) -> Iterator[str]:
        content, may_be, firm = b"", b"", True
        kind = "cut"
        for verb, *words in self.lines():
            if verb == "begin":
                kind, firm = words[1], False
                may_be = self.change(content, kind, int(words[2]), int(words[0]))
            else:
                content, firm = may_be, True
        path = self.top / "file"
        if not content and not path.exists():
            return
        found = path.read_bytes()
        if found in (content, may_be):
            return
        problem = wrong_bytes(found, may_be, len(content)) if kind == "append" and not firm else f"{len(found)} bytes"
        if problem:
            yield f"{problem}; acknowledged {len(content)}, then {kind} to {len(may_be)}"


class Replacer(Job):
    """Writes a new file, syncs it, renames it over the old one, syncs the directory: as editors do."""

    def content(self, version: int) -> bytes:
        return b"%d\n" % version + bytes_of(f"{self.seed} {version}", version * 997 % 50_000)

    def steps(self) -> Iterator[None]:
        here = os.open(self.top, os.O_RDONLY | os.O_DIRECTORY)
        version = 0
        while True:
            version += 1
            self.log("begin", version)
            fd = os.open(self.top / "new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with open(fd, "wb", buffering=0) as out:
                out.write(self.content(version))
                os.fsync(fd)
            os.rename(self.top / "new", self.top / "file")
            os.fsync(here)
            self.log("ack", version)
            yield

    def check(self) -> Iterator[str]:
        begun, acked = begun_and_acked(self.lines())
        path = self.top / "file"
        if not acked and not path.exists():
            return
        found = path.read_bytes()
        if found not in [self.content(version) for version in range(max(acked, 1), begun + 1)]:
            yield f"{len(found)} bytes, {found[:8]!r}, not of version {acked} … {begun}"


class Maker(Job):
    """New files in new directories, each synced by itself; some renamed, some removed, with the directory synced."""

    def content(self, number: int) -> bytes:
        return bytes_of(f"{self.seed} file {number}", number * 613 % 30_000)

    def path(self, number: int) -> Path:
        return self.top / f"d{number // 6}" / f"f{number}"

    def steps(self) -> Iterator[None]:
        number = 0
        while True:
            path = self.path(number)
            path.parent.mkdir(exist_ok=True)
            self.log("begin", number)
            with path.open("xb", buffering=0) as out:
                out.write(self.content(number))
                os.fsync(out.fileno())
            self.log("ack", number)
            if number % 4 == 3:
                self.sync("move", number, path, path.with_suffix(".moved"))
            if number % 5 == 4:
                self.sync("remove", number - 2, self.path(number - 2))
            number += 1
            yield

    def sync(self, verb: str, number: int, path: Path, target: Path | None = None) -> None:
        """Rename `path` to `target`, or remove it, and sync its directory."""
        self.log(f"{verb}?", number)
        if target is not None:
            path.rename(target)
        else:
            path.unlink(missing_ok=True)
        fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        os.fsync(fd)
        os.close(fd)
        self.log(verb, number)

    def check(self) -> Iterator[str]:
        said: dict[int, set[str]] = {}
        for verb, words in self.lines():
            said.setdefault(int(words), set()).add(verb)
        for number, verbs in said.items():
            path = self.path(number)
            moved = path.with_suffix(".moved")
            there = [each for each in (path, moved) if each.exists()]
            if "ack" in verbs and "remove?" not in verbs and len(there) != 1:
                yield f"file {number} is at {len(there)} places, {verbs}"
            if "remove" in verbs and path in there:
                yield f"file {number} is back"
            if "move" in verbs and path in there:
                yield f"file {number} is at its old place"
            for each in there:
                found = each.read_bytes()
                if found != self.content(number) and ("ack" in verbs or wrong_bytes(found, self.content(number), 0)):
                    yield f"file {number}: {len(found)} bytes, {verbs}"


class Database(Job):
    """SQLite, with a rollback journal or a write-ahead log."""

    def connect(self) -> sqlite3.Connection:
        db = sqlite3.connect(self.top / "db", isolation_level=None, timeout=30)
        db.execute(f"PRAGMA journal_mode={('DELETE', 'WAL')[self.seed % 2]}")
        # Not FULL: that leaves out the directory after the journal is unlinked, and a power cut brings it back.
        db.execute("PRAGMA synchronous=EXTRA")
        return db

    def steps(self) -> Iterator[None]:
        with closing(self.connect()) as db:
            db.execute("CREATE TABLE t (i INTEGER PRIMARY KEY, v BLOB)")
            number = 0
            while True:
                number += 1
                self.log("begin", number)
                db.execute("BEGIN IMMEDIATE")
                db.execute("INSERT INTO t VALUES (?, ?)", (number, bytes_of(f"{self.seed} {number}", 2000)))
                db.execute("UPDATE t SET v = v WHERE i % 7 = ?", (number % 7,))
                db.execute("COMMIT")
                self.log("ack", number)
                yield

    def check(self) -> Iterator[str]:
        begun, acked = begun_and_acked(self.lines())
        if not acked:
            return
        with closing(self.connect()) as db:
            said = db.execute("PRAGMA integrity_check").fetchall()
            if said != [("ok",)]:
                yield f"integrity_check: {said[:3]}"
            rows = dict(db.execute("SELECT i, v FROM t").fetchall())
        if not acked <= len(rows) <= begun or set(rows) != set(range(1, len(rows) + 1)):
            yield f"{len(rows)} rows, acknowledged {acked}, begun {begun}"
        if any(value != bytes_of(f"{self.seed} {number}", 2000) for number, value in rows.items()):
            yield "a row is not what was inserted"


JOBS: tuple[type[Job], ...] = (Appender, Overwriter, Mapper, Cutter, Replacer, Maker, Database)


def acknowledged(logs: Path) -> int:
    """How many acknowledgements the logs of a round hold."""
    return sum(path.read_text().count("\nack ") for path in logs.iterdir())


def problems(top: Path, logs: Path, seed: int) -> list[str]:
    """What is missing or wrong, of all jobs."""
    return [problem for job in JOBS for problem in job(top, logs, seed).problems()]


def main(top: Path, logs: Path, seed: int, seconds: float) -> None:
    """All jobs, each in its own process."""
    children = []
    for job in JOBS:
        pid = os.fork()
        if pid == 0:
            try:
                job(top, logs, seed).run(seconds)
            finally:
                os._exit(0)
        children.append(pid)
    for pid in children:
        os.waitpid(pid, 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
