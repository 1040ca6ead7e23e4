"""Several processes in the same directories at once, and one directory with very many entries."""

from __future__ import annotations

import os
import random
import stat
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.mount.box import Box

pytestmark = [pytest.mark.mount, pytest.mark.slow]

PROCESSES, OPERATIONS = 4, 600

# Makes, links, renames, exchanges, removes and rewrites names all processes share. Losing a race is fine; any other
# error is not. A file's content always says which file it is, so a name can never show another one's content.
WORKER = """
import errno, os, random, sys
sys.path.insert(0, sys.argv[3])
from tests.mount.syscalls import RENAME_EXCHANGE, RENAME_NOREPLACE, renameat2
os.chdir(sys.argv[1])
rng = random.Random(int(sys.argv[2]))
RACES = {errno.ENOENT, errno.EEXIST, errno.ENOTEMPTY, errno.EISDIR, errno.ENOTDIR, errno.EINVAL, errno.EPERM,
         errno.ELOOP, errno.ESTALE, errno.EMLINK}

def name():
    return rng.choice(["", "d0/", "d1/", "d2/"]) + rng.choice(["a", "b", "c", "d", "e" * 200])

def create():
    fd = os.open(name(), os.O_CREAT | os.O_RDWR | rng.choice([0, os.O_EXCL, os.O_TRUNC]), 0o600)
    try:
        os.pwrite(fd, rng.randbytes(8) * rng.choice([1, 600, 5000]), 0)
        if rng.random() < 0.1:
            os.fsync(fd)
    finally:
        os.close(fd)

def read():
    fd = os.open(name(), os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.pread(fd, 50000, 0)
    finally:
        os.close(fd)

def listing():
    for entry in os.scandir(rng.choice([".", "d0", "d1", "d2"])):
        entry.stat(follow_symlinks=False)

calls = [
    (create, 20), (read, 15), (listing, 5), (lambda: os.unlink(name()), 10), (lambda: os.rename(name(), name()), 15),
    (lambda: renameat2(name(), name(), RENAME_EXCHANGE), 5), (lambda: renameat2(name(), name(), RENAME_NOREPLACE), 5),
    (lambda: os.link(name(), name()), 5), (lambda: os.symlink(name(), name()), 3), (lambda: os.mkdir(name()), 3),
    (lambda: os.rmdir(name()), 3), (lambda: os.truncate(name(), rng.choice([0, 5, 20000])), 5),
    (lambda: os.stat(name()), 5), (lambda: os.rename("d0", "moved"), 1), (lambda: os.rename("moved", "d0"), 4),
]
for call in rng.choices([c for c, _ in calls], [w for _, w in calls], k=int(sys.argv[4])):
    try:
        call()
    except OSError as error:
        if error.errno not in RACES:
            raise
"""


def test_processes_that_work_in_the_same_directories(mounted: Box) -> None:
    for number in range(3):
        (mounted.clear / f"d{number}").mkdir()
    source_root = str(Path(__file__).resolve().parents[2])
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, mounted.clear, str(seed), source_root, str(OPERATIONS)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for seed in range(PROCESSES)
    ]
    said = [worker.communicate(timeout=120)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * PROCESSES, (said, mounted.log())
    before = everything(mounted.clear)
    assert " ERROR " not in mounted.log()
    mounted.remount()
    assert everything(mounted.clear) == before
    assert " ERROR " not in mounted.log()


def everything(top: Path) -> dict[str, tuple[int, int, bytes]]:
    """By path: inode number, links, content. Each listed name once, and each with as many names as it says."""
    found: dict[str, tuple[int, int, bytes]] = {}
    names: Counter[int] = Counter()
    for place, dirs, files in os.walk(top):
        assert set(Counter(dirs + files).values()) <= {1}
        for name in files + dirs:
            path = Path(place, name)
            st = path.lstat()
            content = os.readlink(os.fsencode(path)) if path.is_symlink() else b""
            if stat.S_ISREG(st.st_mode):
                content = path.read_bytes()
                names[st.st_ino] += 1
                found[str(path)] = (st.st_ino, st.st_nlink, content)
            else:
                found[str(path)] = (st.st_ino, 0, content)
    for ino, links, _ in found.values():
        assert ino not in names or links == names[ino]
    return found


@pytest.mark.parametrize("entries", [20_000, pytest.param(100_000, marks=pytest.mark.torture)])
def test_a_directory_with_very_many_entries(mounted: Box, entries: int) -> None:
    big = mounted.clear / "big"
    big.mkdir()
    expected = {f"entry {number:06d}" for number in range(entries)}
    fd = os.open(big, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for number, name in enumerate(sorted(expected)):
            os.mknod(name, (stat.S_IFREG if number % 20 == 0 else stat.S_IFIFO) | 0o600, dir_fd=fd)
        assert Counter(os.listdir(fd)) == Counter(expected)
    finally:
        os.close(fd)
    some = random.Random(7).sample(range(0, entries, 20), 300)
    for number in some[:100]:
        (big / f"entry {number:06d}").write_bytes(b"%d" % number)
    for number in some[100:200]:
        (big / f"entry {number:06d}").unlink()
    for number in some[200:]:
        (big / f"entry {number:06d}").rename(big / f"renamed {number:06d}")
    mounted.remount()
    expected -= {f"entry {number:06d}" for number in some[100:]}
    expected |= {f"renamed {number:06d}" for number in some[200:]}
    assert set(os.listdir(big)) == expected
    assert all((big / f"entry {number:06d}").read_bytes() == b"%d" % number for number in some[:100])
    with os.scandir(big) as listing:
        kinds = Counter(stat.S_IFMT(entry.stat().st_mode) for entry in listing)
    assert kinds == {stat.S_IFREG: entries // 20 - 100, stat.S_IFIFO: entries - entries // 20}
    assert " ERROR " not in mounted.log()
