"""A tree to rotate under load, and looking at what may not change by it."""

from __future__ import annotations

import json
import os
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

from cryptfs.cli import rotating
from cryptfs.cli.mounts import wait_until
from cryptfs.ops.info import read_volume
from tests.mount.box import Box

FILES = 40


def content(number: int) -> bytes:
    """The same for the same number: a few bytes to several blocks."""
    rng = random.Random(number)
    return rng.randbytes(rng.choice((0, 7, 4000, 70_000)))


def populate(top: Path, files: int = FILES) -> None:
    """Files in directories, some of them with twins, symlinks, an xattr each, a hard link."""
    for number in range(files):
        path = path_of(top, number)
        path.parent.mkdir(exist_ok=True)
        if number % 4 == 1:
            with path.open("wb") as file:
                file.write(bytes(len(content(number))))
                file.flush()
                # What is written from here on goes to the other home.
                os.fsync(file.fileno())
                file.seek(0)
                file.write(content(number))
        else:
            path.write_bytes(content(number))
        if number % 5 == 0:
            os.symlink(f"target {number}", path.with_suffix(".link"))
        if number % 7 == 0:
            os.setxattr(path, "user.number", str(number).encode())
    os.link(path_of(top, 0), top / "hard link")


def path_of(top: Path, number: int) -> Path:
    return top / f"d{number // 10}" / f"file {number}"


def look(top: Path, files: int = FILES) -> None:
    """That all of it is there."""
    for number in range(files):
        path = path_of(top, number)
        assert path.read_bytes() == content(number), path
        if number % 5 == 0:
            assert os.readlink(path.with_suffix(".link")) == f"target {number}"
        if number % 7 == 0:
            assert os.getxattr(path, "user.number") == str(number).encode()
    assert (top / "hard link").read_bytes() == content(0)


def data_files(vault: Path) -> dict[str, tuple[bytes, int]]:
    """Name, content and time of change of all data files and twins: all that holds data, encrypted."""
    out = {}
    for path in sorted([*(vault / "tree").rglob("*"), *(vault / "sidecars").rglob("*.twin")]):
        if path.name != ".dir" and path.is_file() and not path.is_symlink():
            out[str(path)] = (path.read_bytes(), path.stat().st_mtime_ns)
    return out


def status(box: Box) -> dict[str, object]:
    """`rotate --status --json`."""
    shown: dict[str, object] = json.loads(box.run("rotate", box.vault, "--status", "--json").stdout)
    return shown


def wait_for(box: Box, *states: str, limit_s: float = 90) -> dict[str, object]:
    """Until the rotation is in one of these; what `status` says then. The agent is asked without starting a command."""
    volume = read_volume(box.vault)

    def is_there() -> bool:
        known = rotating.known(volume)
        return known is not None and known.report is not None and known.report.state in states

    with mock.patch.dict(os.environ, box.environment):
        there = wait_until(is_there, limit_s)
    now = status(box)
    assert there, now
    return now


@contextmanager
def somebody_there(top: Path) -> Iterator[None]:
    """A program that asks for something all the time: beside it everything is rewritten slowly.

    It goes on where the daemon was killed.
    """
    gone = threading.Event()

    def ask() -> None:
        while not gone.wait(0.05):
            with suppress(OSError):
                os.statvfs(top)

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        yield
    finally:
        gone.set()
        asking.join()


@dataclass
class Work:
    """A writer and a reader. `failures` must stay empty."""

    top: Path
    rounds: int = 0
    reads: int = 0
    failures: list[str] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)
    expected: bytearray = field(default_factory=bytearray)

    def write(self) -> None:
        try:
            with open(self.top / "written", "w+b", buffering=0) as out:
                while not self.stop.is_set():
                    self.rounds += 1
                    rng = random.Random(self.rounds)
                    at, data = rng.randrange(200_000), rng.randbytes(rng.choice((10, 5000, 40_000)))
                    self.expected.extend(bytes(max(0, at + len(data) - len(self.expected))))
                    self.expected[at : at + len(data)] = data
                    os.pwrite(out.fileno(), data, at)
                    if self.rounds % 5 == 0:
                        os.fsync(out.fileno())
                    path = self.top / f"short {self.rounds % 7}"
                    path.write_bytes(data)
                    assert path.read_bytes() == data
                    if self.rounds % 3 == 0:
                        path.rename(self.top / "d0" / "renamed")
                        (self.top / "d0" / "renamed").unlink()
        except (OSError, AssertionError) as error:
            self.failures.append(f"writer: {error!r}")

    def read(self) -> None:
        try:
            while not self.stop.is_set():
                number = self.reads % FILES
                path = path_of(self.top, number)
                fd = os.open(path, os.O_RDONLY)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                with open(fd, "rb", buffering=0) as file:
                    assert file.read() == content(number), path
                self.reads += 1
        except (OSError, AssertionError) as error:
            self.failures.append(f"reader: {error!r}")


@contextmanager
def at_work(top: Path) -> Iterator[Work]:
    """Both, for the length of a block."""
    work = Work(top)
    threads = [threading.Thread(target=call) for call in (work.write, work.read)]
    for thread in threads:
        thread.start()
    try:
        yield work
    finally:
        work.stop.set()
        for thread in threads:
            thread.join()
