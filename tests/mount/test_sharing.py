"""Several processes in one file: locks between them, and what one wrote seen by another at once, however they look."""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mount.box import Box

pytestmark = [pytest.mark.mount, pytest.mark.slow]

TIMEOUT_S = 60
PROCESSES, ROUNDS = 4, 120

F_OFD_SETLK, F_OFD_SETLKW = 37, 38

# Adds one to a number under a lock; without the lock additions are lost.
COUNT = """
import fcntl, os, struct, sys
path, kind, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3])
fd = os.open(path, os.O_RDWR)
def change(how):
    if kind == "flock":
        fcntl.flock(fd, how)
    elif kind == "posix":
        fcntl.lockf(fd, how, 8, 0)
    else:
        code = fcntl.F_WRLCK if how == fcntl.LOCK_EX else fcntl.F_UNLCK
        fcntl.fcntl(fd, 38, struct.pack("hhqqi4x", code, os.SEEK_SET, 0, 8, 0))
for _ in range(rounds):
    change(fcntl.LOCK_EX)
    [number] = struct.unpack("<q", os.pread(fd, 8, 0))
    os.sched_yield()
    os.pwrite(fd, struct.pack("<q", number + 1), 0)
    change(fcntl.LOCK_UN)
"""


def end_well(started: list[subprocess.Popen[bytes]]) -> None:
    """All of them end, with 0."""
    try:
        assert [process.wait(TIMEOUT_S) for process in started] == [0] * len(started)
    finally:
        for process in started:
            process.kill()
            process.wait()


@pytest.mark.parametrize("kind", ["flock", "posix", "ofd"])
def test_locks_exclude(here: Path, kind: str) -> None:
    path = here / "counter"
    path.write_bytes(bytes(8))
    started = [subprocess.Popen([sys.executable, "-c", COUNT, path, kind, str(ROUNDS)]) for _ in range(PROCESSES)]
    end_well(started)
    assert struct.unpack("<q", path.read_bytes()) == (PROCESSES * ROUNDS,)


def held_elsewhere(path: Path, code: str) -> subprocess.Popen[bytes]:
    """Another process that has run `code` on `fd` and waits for the end of its input."""
    words = f"import fcntl, os, struct, sys; fd = os.open(sys.argv[1], os.O_RDWR); {code}; print(flush=True); input()"
    process = subprocess.Popen(
        [sys.executable, "-c", words, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"\n"
    return process


def test_locks_of_others_are_refused_and_end_with_their_holder(here: Path) -> None:
    path = here / "f"
    path.write_bytes(b"0123456789")
    ofd_write = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 5, 0)
    for code, call in (
        ("fcntl.flock(fd, fcntl.LOCK_EX)", lambda fd: fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)),
        ("fcntl.lockf(fd, fcntl.LOCK_EX, 5, 0)", lambda fd: fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 4)),
        (f"fcntl.fcntl(fd, {F_OFD_SETLKW}, {ofd_write!r})", lambda fd: fcntl.fcntl(fd, F_OFD_SETLK, ofd_write)),
    ):
        fd = os.open(path, os.O_RDWR)
        holder = held_elsewhere(path, code)
        try:
            with pytest.raises(BlockingIOError):
                call(fd)
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 5, 5)
            holder.kill()
            holder.wait()
            call(fd)
        finally:
            holder.kill()
            holder.communicate()
            os.close(fd)


# coherence -----------------------------------------------------------------------------------------------------------

SIZE = 3 * 16384 + 100
# Does what it is told on its own descriptors, one line each: `how offset hex`, and answers with what it reads there.
OTHER = """
import mmap, os, sys
path, size = sys.argv[1], int(sys.argv[2])
fd, direct = os.open(path, os.O_RDWR), os.open(path, os.O_RDWR | os.O_DIRECT)
mapped = mmap.mmap(fd, size)
page = mmap.mmap(-1, 4096)
for line in sys.stdin:
    how, offset, data = line.rstrip("\\n").split(" ")
    offset, data = int(offset), bytes.fromhex(data)
    start = offset // 4096 * 4096
    if how == "write":
        os.pwrite(fd, data, offset)
    elif how == "map":
        mapped[offset : offset + len(data)] = data
    elif how == "direct":
        os.preadv(direct, [page], start)
        page[offset - start : offset - start + len(data)] = data
        os.pwritev(direct, [page], start)
    elif how == "sync":
        mapped.flush()
    got = [os.pread(fd, 16, offset), bytes(mapped[offset : offset + 16])]
    os.preadv(direct, [page], start)
    got.append(page[offset - start : offset - start + 16])
    print(" ".join(each.hex() for each in got), flush=True)
"""


class Other:
    """A process with the same file open, mapped, and open past the page cache."""

    def __init__(self, path: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", OTHER, path, str(SIZE)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def tell(self, how: str, offset: int, data: bytes = b"") -> list[bytes]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{how} {offset} {data.hex()}\n")
        self.process.stdin.flush()
        return [bytes.fromhex(each) for each in self.process.stdout.readline().split(" ")]

    def end(self) -> None:
        self.process.communicate(timeout=TIMEOUT_S)


def test_what_one_wrote_the_other_sees(here: Path) -> None:
    """By write, mapping and O_DIRECT, read by each of the three, in both processes, in every mixture."""
    path = here / "f"
    content = bytearray(os.urandom(SIZE))
    path.write_bytes(content)
    others = [Other(path), Other(path)]
    try:
        number = 0
        for how in ("write", "map", "direct") * 8:
            for writer, reader in (others, others[::-1]):
                number += 1
                offset = (number * 7919) % (SIZE // 4096) * 4096 + number % 1000
                data = struct.pack("<qq", number, -number)
                content[offset : offset + 16] = data
                assert writer.tell(how, offset, data)[:2] == [data, data], how
                assert reader.tell("look", offset) == [data] * 3, how
    finally:
        for other in others:
            other.end()
    assert path.read_bytes() == bytes(content)


def test_appends_of_several_processes_are_all_there(here: Path) -> None:
    path = here / "log"
    code = (
        "import os, sys; fd = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT)\n"
        "for n in range(200): os.write(fd, (sys.argv[2] + ' ' + str(n) + ' ' + 'x' * (n * 13 % 300) + '\\n').encode())"
    )
    started = [subprocess.Popen([sys.executable, "-c", code, path, str(n)]) for n in range(PROCESSES)]
    end_well(started)
    lines = path.read_text("ascii").splitlines()
    expected = {f"{who} {n} {'x' * (n * 13 % 300)}" for who in range(PROCESSES) for n in range(200)}
    assert len(lines) == len(expected)
    assert set(lines) == expected


# holes ---------------------------------------------------------------------------------------------------------------

HOLE = 64 << 20
PIECE = 16384


def sparse_file(path: Path) -> bytes:
    """64 MiB with a piece at its start, in its middle and at its end. Returns the three."""
    pieces = [os.urandom(PIECE) for _ in range(3)]
    with path.open("wb") as file:
        for piece, offset in zip(pieces, (0, HOLE // 2, HOLE - PIECE), strict=True):
            os.pwrite(file.fileno(), piece, offset)
    return b"".join(pieces)


def disk_bytes(path: Path) -> int:
    return path.stat().st_blocks * 512


def pieces_of(path: Path) -> bytes:
    with path.open("rb") as file:
        found = [os.pread(file.fileno(), PIECE, offset) for offset in (0, HOLE // 2, HOLE - PIECE)]
        assert not any(os.pread(file.fileno(), 1 << 20, 5 << 20))
    return b"".join(found)


def test_holes_cost_nothing_and_survive(mounted: Box) -> None:
    path = mounted.clear / "sparse"
    content = sparse_file(path)
    cipher = sum(each.stat().st_blocks * 512 for each in mounted.vault.rglob("*"))
    assert disk_bytes(path) < 1 << 20
    with path.open("r+b") as file:
        os.pwrite(file.fileno(), b"y" * 100, 3 << 20)  # a block of its own, holes around it
        os.pwrite(file.fileno(), bytes(100), 3 << 20)
        os.fsync(file.fileno())
    assert pieces_of(path) == content
    for command in (
        ("cp", "--sparse=always", "sparse", "copy"),
        ("cp", "--sparse=auto", "sparse", "auto"),
        ("rsync", "-S", "sparse", "synced"),
        ("sh", "-c", "tar -Scf a.tar sparse && mkdir x && tar -Sxf a.tar -C x && mv x/sparse untarred"),
    ):
        subprocess.run(command, cwd=mounted.clear, check=True, timeout=TIMEOUT_S)
    mounted.remount()
    for name in ("sparse", "copy", "synced", "untarred"):
        assert (mounted.clear / name).stat().st_size == HOLE
        assert pieces_of(mounted.clear / name) == content, name
        assert disk_bytes(mounted.clear / name) < 1 << 20, name
    assert pieces_of(mounted.clear / "auto") == content
    (mounted.clear / "auto").unlink()
    said = subprocess.run(["du", "-sB1", mounted.clear], check=True, capture_output=True, text=True).stdout
    assert int(said.split()[0]) < 8 << 20
    assert sum(each.stat().st_blocks * 512 for each in mounted.vault.rglob("*")) < cipher + (8 << 20)
