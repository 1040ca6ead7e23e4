"""Content of files, as programs read and write it."""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import random
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from tests.mount.box import Box
from tests.mount.syscalls import drop_pages, refused, reread

pytestmark = pytest.mark.mount

BLOCK = 16 * 1024  # the default block size
BORDERS = (0, 4096, BLOCK, 2 * BLOCK, 5 * BLOCK)
AROUND = sorted({border + step for border in BORDERS for step in (-1, 0, 1)} - {-1})


def noise(count: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(count)


@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, (1 << 20) + 12345])
def test_what_is_written_is_read(here: Path, size: int) -> None:
    content = noise(size)
    (here / "file").write_bytes(content)
    assert (here / "file").stat().st_size == size
    assert reread(here / "file") == content


def test_holes_read_as_zeros(here: Path) -> None:
    file = here / "file"
    expected = bytearray(40 * BLOCK + 100)
    with file.open("wb") as out:
        for at, piece in ((5 * BLOCK + 7, b"a" * 100), (20 * BLOCK, b"b" * BLOCK), (40 * BLOCK, b"c" * 100)):
            out.seek(at)
            out.write(piece)
            expected[at : at + len(piece)] = piece
    assert reread(file) == expected


def test_a_file_larger_than_4_gib(here: Path) -> None:
    file = here / "file"
    places = (0, (1 << 31) - 3, (1 << 32) - 3, 5 << 30, (1 << 40) + 1)
    with file.open("wb") as out:
        for at in places:
            out.seek(at)
            out.write(b"place %d" % at)
    assert file.stat().st_size == places[-1] + len(b"place %d" % places[-1])
    drop_pages(file)
    with file.open("rb") as inp:
        for at in places:
            inp.seek(at)
            text = b"place %d" % at
            assert inp.read(len(text)) == text
        inp.seek(3 << 30)
        assert inp.read(4096) == bytes(4096)


def test_a_size_no_disk_has_is_refused(here: Path) -> None:
    file = here / "file"
    file.write_bytes(b"kept")
    with refused(errno.EFBIG):
        os.truncate(file, (1 << 63) - 1)
    assert reread(file) == b"kept"


@pytest.mark.parametrize("at", AROUND)
@pytest.mark.parametrize("length", [1, 4096, BLOCK - 1, BLOCK, 2 * BLOCK + 1])
def test_overwriting(here: Path, at: int, length: int) -> None:
    content = bytearray(noise(4 * BLOCK + 77))
    file = here / "file"
    file.write_bytes(content)
    drop_pages(file)  # so that the rest of the block has to be fetched and merged
    piece = noise(length, 1)
    with file.open("r+b") as out:
        out.seek(at)
        out.write(piece)
    content[len(content) :] = bytes(max(0, at - len(content)))
    content[at : at + length] = piece
    assert reread(file) == content


@pytest.mark.parametrize("size", AROUND)
def test_a_shorter_file_forgets_what_was_cut_off(here: Path, size: int) -> None:
    content = noise(6 * BLOCK)
    file = here / "file"
    file.write_bytes(content)
    drop_pages(file)
    os.truncate(file, size)
    assert file.stat().st_size == size
    assert reread(file) == content[:size]
    os.truncate(file, len(content))
    assert reread(file) == content[:size] + bytes(len(content) - size)


def test_truncate_to_every_size_down_and_up(here: Path) -> None:
    rng = random.Random(3)
    expected = bytearray(noise(3 * BLOCK))
    file = here / "file"
    file.write_bytes(expected)
    with file.open("r+b") as out:
        for _ in range(60):
            size = rng.choice([*AROUND, rng.randrange(6 * BLOCK)])
            out.truncate(size)
            expected[size:] = b""
            expected += bytes(size - len(expected))
            if rng.random() < 0.3:
                os.fsync(out.fileno())
            if rng.random() < 0.5:
                os.posix_fadvise(out.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            if rng.random() < 0.5 and size:
                at = rng.randrange(size)
                out.seek(at)
                out.write(b"new")
                out.flush()
                expected[at : at + 3] = b"new"
            assert os.pread(out.fileno(), 7 * BLOCK, 0) == expected
    assert reread(file) == expected


def test_ftruncate_of_an_open_file_and_append(here: Path) -> None:
    file = here / "file"
    with file.open("ab") as out:
        out.write(b"x" * BLOCK)
        out.flush()
        os.ftruncate(out.fileno(), 10)
        out.write(b"tail")
    assert reread(file) == b"x" * 10 + b"tail"


def test_mmap_reads_and_writes(here: Path) -> None:
    content = bytearray(noise(5 * BLOCK + 100))
    file = here / "file"
    file.write_bytes(content)
    drop_pages(file)
    with file.open("r+b") as opened, mmap.mmap(opened.fileno(), 0) as mapped:
        assert mapped[:] == content
        for at in (0, BLOCK - 2, 3 * BLOCK + 5, len(content) - 4):
            mapped[at : at + 4] = b"mmap"
            content[at : at + 4] = b"mmap"
        mapped.flush()
        with file.open("rb") as other:
            assert other.read() == content
    assert reread(file) == content


def test_mmap_and_write_see_each_other(here: Path) -> None:
    file = here / "file"
    file.write_bytes(bytes(2 * BLOCK))
    with file.open("r+b", buffering=0) as opened, mmap.mmap(opened.fileno(), 0) as mapped:
        opened.seek(BLOCK - 3)
        opened.write(b"written")
        assert mapped[BLOCK - 3 : BLOCK + 4] == b"written"
        mapped[10:16] = b"mapped"
        assert os.pread(opened.fileno(), 6, 10) == b"mapped"


def test_a_file_that_was_unlinked_while_open(here: Path) -> None:
    file = here / "file"
    content = noise(3 * BLOCK)
    with file.open("w+b", buffering=0) as opened:
        opened.write(content)
        os.fsync(opened.fileno())
        file.unlink()
        assert not file.exists()
        file.write_bytes(b"another of the same name")
        stat = os.fstat(opened.fileno())
        assert (stat.st_nlink, stat.st_size) == (0, len(content))
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert os.pread(opened.fileno(), 4 * BLOCK, 0) == content
        opened.write(b"more")
        os.fsync(opened.fileno())
        opened.truncate(BLOCK + 1)
        os.fchmod(opened.fileno(), 0o600)
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert os.pread(opened.fileno(), 4 * BLOCK, 0) == content[: BLOCK + 1]
        assert os.fstat(opened.fileno()).st_size == BLOCK + 1
    assert reread(file) == b"another of the same name"


def test_an_unlinked_file_is_readable_through_a_second_descriptor(here: Path) -> None:
    file = here / "file"
    file.write_bytes(b"still here")
    with file.open("rb") as one:
        with file.open("rb"):
            file.unlink()
        os.posix_fadvise(one.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert one.read() == b"still here"


APPENDER = """
import os, sys
fd = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND)
for number in range(int(sys.argv[3])):
    record = b"%s %05d " % (sys.argv[2].encode(), number)
    os.write(fd, record.ljust(79, b".") + b"\\n")
"""


def test_processes_that_append_do_not_overwrite_each_other(here: Path) -> None:
    file, count = here / "file", 250
    file.touch()
    writers = [
        subprocess.Popen([sys.executable, "-S", "-c", APPENDER, str(file), f"w{i}", str(count)]) for i in range(4)
    ]
    assert [writer.wait(60) for writer in writers] == [0] * 4
    lines = reread(file).splitlines()
    assert len(lines) == 4 * count
    for i in range(4):
        mine = [line for line in lines if line.startswith(b"w%d " % i)]
        assert [int(line.split()[1]) for line in mine] == list(range(count))
        assert {len(line) for line in mine} == {79}


def test_flags_of_open(here: Path) -> None:
    file = here / "file"
    os.close(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    with pytest.raises(FileExistsError):
        os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    file.write_bytes(b"x" * 3 * BLOCK)
    os.close(os.open(file, os.O_WRONLY | os.O_TRUNC))
    assert reread(file) == b""
    with pytest.raises(FileNotFoundError):
        os.open(here / "missing", os.O_RDWR)
    with pytest.raises(NotADirectoryError):
        os.open(file, os.O_RDONLY | os.O_DIRECTORY)
    with pytest.raises(IsADirectoryError):
        os.open(here, os.O_RDWR)
    (here / "link").symlink_to("file")
    with refused(errno.ELOOP):
        os.open(here / "link", os.O_RDONLY | os.O_NOFOLLOW)


def test_o_direct(here: Path) -> None:
    file = here / "file"
    fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
    try:
        with mmap.mmap(-1, 4 * BLOCK) as aligned:
            aligned[:] = content = noise(len(aligned))
            assert os.pwrite(fd, aligned, 0) == len(aligned)
            aligned[:4096] = b"d" * 4096
            with memoryview(aligned) as view:
                assert os.pwrite(fd, view[:4096], BLOCK + 4096) == 4096
                view[:] = bytes(len(view))
            assert os.preadv(fd, [aligned], 0) == len(aligned)
            expected = content[: BLOCK + 4096] + b"d" * 4096 + content[BLOCK + 8192 :]
            assert aligned[:] == expected
    finally:
        os.close(fd)
    assert reread(file) == expected


@pytest.mark.parametrize("flag", [os.O_SYNC, os.O_DSYNC])
def test_what_a_synchronous_write_has_said_no_kill_takes_back(mounted: Box, flag: int) -> None:
    fd = os.open(mounted.clear / "file", os.O_RDWR | os.O_CREAT | flag, 0o600)
    try:
        for number in range(5):
            assert os.write(fd, b"%d" % number * 3000) == 3000
        mounted.kill_daemon()
    finally:
        with suppress(OSError):
            os.close(fd)
    mounted.mount()
    assert (mounted.clear / "file").read_bytes() == b"".join(b"%d" % number * 3000 for number in range(5))


def test_a_buffered_write_beyond_the_largest_file_fails_at_fsync_and_costs_nothing_else(mounted: Box) -> None:
    path = mounted.clear / "file"
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        assert os.write(fd, b"kept") == 4
        os.fsync(fd)
        assert os.pwrite(fd, b"x", 1 << 62) == 1
        with refused(errno.EFBIG):
            os.fsync(fd)
    finally:
        with suppress(OSError):
            os.close(fd)
    mounted.remount()
    assert path.read_bytes() == b"kept"


def test_fsync_and_fdatasync(here: Path) -> None:
    with (here / "file").open("wb", buffering=0) as out:
        os.fsync(out.fileno())
        for number in range(4):
            out.write(noise(BLOCK + number, number))
            (os.fdatasync if number % 2 else os.fsync)(out.fileno())
    fd = os.open(here, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.fdatasync(fd)
    finally:
        os.close(fd)
    assert reread(here / "file") == b"".join(noise(BLOCK + number, number) for number in range(4))


def test_space_asked_for_ahead(here: Path) -> None:
    with (here / "file").open("w+b", buffering=0) as out:
        out.write(b"start")
        os.posix_fallocate(out.fileno(), 0, 2 * BLOCK)
    assert reread(here / "file") == b"start".ljust(2 * BLOCK, b"\0")


def test_copies_made_by_the_kernel(here: Path) -> None:
    content = noise(300_001)
    (here / "from").write_bytes(content)
    shutil.copyfile(here / "from", here / "sendfile")
    with (here / "from").open("rb") as src, (here / "range").open("wb") as dst:
        done = 0
        while copied := os.copy_file_range(src.fileno(), dst.fileno(), len(content) - done):
            done += copied
    assert reread(here / "sendfile") == reread(here / "range") == content


def test_many_descriptors_on_one_file(here: Path) -> None:
    file = here / "file"
    file.write_bytes(bytes(8 * BLOCK))
    fds = [os.open(file, os.O_RDWR) for _ in range(20)]
    try:
        for number, fd in enumerate(fds):
            os.pwrite(fd, b"%02d" % number, number * 5000)
        for number in range(20):
            assert os.pread(fds[-1 - number], 2, number * 5000) == b"%02d" % number
    finally:
        for fd in fds:
            os.close(fd)


def test_more_open_files_than_a_small_table_holds(here: Path) -> None:
    fds = [os.open(here / str(number), os.O_RDWR | os.O_CREAT, 0o600) for number in range(600)]
    try:
        for number, fd in enumerate(fds):
            os.write(fd, b"%d" % number)
        for fd in fds[::50]:
            os.fsync(fd)
    finally:
        for fd in fds:
            os.close(fd)
    assert all(reread(here / str(number)) == b"%d" % number for number in range(0, 600, 37))


def test_a_block_is_rewritten_many_times_between_and_across_syncs(here: Path) -> None:
    file = here / "file"
    expected = bytearray(2 * BLOCK)
    with file.open("w+b", buffering=0) as out:
        out.write(expected)
        for number in range(60):
            at = number * 97 % (2 * BLOCK - 8)
            os.pwrite(out.fileno(), b"%08d" % number, at)
            expected[at : at + 8] = b"%08d" % number
            if number % 3 == 0:
                os.fdatasync(out.fileno())
            if number % 7 == 0:
                os.posix_fadvise(out.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                assert os.pread(out.fileno(), 2 * BLOCK, 0) == expected
    assert reread(file) == expected


def test_readers_and_a_writer_at_the_same_time(here: Path) -> None:
    # Write number n fills page n % 8 with n: a reader may see a write half done, but nothing that was never written.
    file = here / "file"
    file.write_bytes(b"\0" * 8 * 4096)
    reader = subprocess.Popen(
        [sys.executable, "-S", "-c", READER, str(file)], stdout=subprocess.PIPE, stdin=subprocess.PIPE
    )
    with reader, file.open("r+b", buffering=0) as out:
        for number in range(200):
            os.pwrite(out.fileno(), bytes([number]) * 4096, number % 8 * 4096)
            if number % 10 == 0:
                os.fsync(out.fileno())
                os.posix_fadvise(out.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert reader.stdin is not None
        reader.stdin.close()
        assert reader.wait(30) == 0


READER = """
import os, select, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
while not select.select([0], [], [], 0)[0]:
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    for page in range(8):
        seen = os.pread(fd, 4096, page * 4096)
        assert len(seen) == 4096 and all(number == 0 or number % 8 == page for number in set(seen)), set(seen)
"""


def test_a_sequential_read_of_a_larger_file(here: Path) -> None:
    file = here / "file"
    piece = noise(1 << 20)
    with file.open("wb") as out:
        for number in range(24):
            out.write(piece[number:] + piece[:number])
    drop_pages(file)
    with file.open("rb") as inp:
        digest = hashlib.file_digest(inp, "sha256").hexdigest()
    assert digest == hashlib.sha256(b"".join(piece[n:] + piece[:n] for n in range(24))).hexdigest()
