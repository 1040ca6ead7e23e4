"""Locking a domain of a mount, or all of it."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import stat
import subprocess
from pathlib import Path

import pytest

from tests.mount.box import Box
from tests.mount.domains import CONTENT, SECRET, cipher_dir, create, states, unlock
from tests.mount.syscalls import refused, reread

pytestmark = pytest.mark.mount


def test_lock_of_one_leaves_the_rest_and_listing_it(mounted: Box, pay: Path) -> None:
    inner, plain = pay / "inner", mounted.clear / "plain"
    inner.write_bytes(CONTENT)
    create(mounted, mounted.clear / "other")
    (mounted.clear / "other" / "file").write_bytes(CONTENT)
    pay.chmod(0o710)
    fd, outside = os.open(inner, os.O_RDWR), os.open(plain, os.O_RDWR)
    try:
        assert os.pread(fd, 4096, 0) == CONTENT[:4096]
        mounted.run("lock", pay)
        for call in (
            lambda: os.pread(fd, 4096, 0),
            lambda: os.listdir(pay),
            inner.stat,
            inner.read_bytes,
            (pay / "new").touch,
            (pay / "new").mkdir,
            lambda: os.rmdir(pay),
            lambda: os.pwrite(fd, b"x", 3),
        ):
            with refused(errno.ENOKEY):
                call()
        shown = subprocess.run(["ls", "-l", mounted.clear], capture_output=True, text=True, check=True)
        assert shown.stderr == ""
        assert "drwx--x---" in shown.stdout
        assert "pay" in os.listdir(mounted.clear)
        assert stat.S_IMODE(pay.stat().st_mode) == 0o710
        os.pwrite(outside, b"outside", 0)
        os.fsync(outside)
        assert plain.read_bytes()[:9] == b"outside" + CONTENT[7:9]
        assert (mounted.clear / "other" / "file").read_bytes() == CONTENT
        unlock(mounted, pay, code=0)
        assert os.pread(fd, 4096, 4096) == CONTENT[4096:8192]
        os.pwrite(fd, b"inside", 0)
        os.fsync(fd)
        assert reread(inner) == b"inside" + CONTENT[6:]
    finally:
        os.close(fd)
        os.close(outside)


def test_lock_drops_its_pages_out_of_the_kernel_and_nobody_elses(mounted: Box, pay: Path) -> None:
    inner, plain = pay / "inner", mounted.clear / "plain"
    inner.write_bytes(CONTENT)
    opened = [os.open(path, os.O_RDONLY) for path in (inner, plain)]
    maps = [mmap.mmap(fd, 0, access=mmap.ACCESS_COPY) for fd in opened]
    try:
        assert all(view[:] == CONTENT for view in maps)
        assert all(resident(view) == len(CONTENT) // mmap.PAGESIZE for view in maps)
        mounted.run("lock", pay)
        with refused(errno.ENOKEY):
            os.pread(opened[0], 10, 0)
        assert resident(maps[1]) == len(CONTENT) // mmap.PAGESIZE
        assert resident(maps[0]) == 0
    finally:
        for view in maps:
            view.close()
        for fd in opened:
            os.close(fd)


def resident(view: mmap.mmap) -> int:
    """Pages of a mapped file in the page cache (mincore(2))."""
    pages = (ctypes.c_ubyte * -(-len(view) // mmap.PAGESIZE))()
    start = (ctypes.c_char * len(view)).from_buffer(view)
    assert ctypes.CDLL(None).mincore(start, ctypes.c_size_t(len(view)), pages) == 0
    return sum(page & 1 for page in pages)


def test_lock_of_the_volume_locks_its_domains(mounted: Box, pay: Path) -> None:
    (pay / "inner").write_bytes(CONTENT)
    fd = os.open(pay / "inner", os.O_RDONLY)
    try:
        mounted.run("lock", mounted.clear)
        assert set(states(mounted).values()) == {"locked"}
        with refused(errno.ENOKEY):
            os.pread(fd, 10, 0)
        mounted.unlock()
        assert os.listdir(mounted.clear)
        with refused(errno.ENOKEY):
            os.listdir(pay)
        unlock(mounted, pay)
        assert os.pread(fd, 10, 0) == CONTENT[:10]
    finally:
        os.close(fd)
    mounted.umount()
    assert states(mounted) == {}, "an unmounted volume's domains are locked"


def test_a_domain_that_was_never_entered_is_locked_with_its_volume(mounted: Box, pay: Path) -> None:
    mounted.remount()
    unlock(mounted, pay)
    assert states(mounted)[cipher_dir(mounted).name] == "unlocked"
    mounted.umount()
    assert states(mounted) == {}
    assert pay.parent == mounted.clear


def test_keep_unlocked_keeps_the_domains_too(mounted: Box, pay: Path) -> None:
    (pay / "inner").write_bytes(CONTENT)
    mounted.run("umount", "--keep-unlocked", mounted.clear)
    assert set(states(mounted).values()) == {"unlocked"}
    mounted.mount()
    assert (pay / "inner").read_bytes() == CONTENT


def test_a_wrong_passphrase_opens_nothing(mounted: Box, pay: Path) -> None:
    (pay / "inner").write_bytes(CONTENT)
    mounted.run("lock", pay)
    mounted.run("unlock", pay, code=13)
    with refused(errno.ENOKEY):
        (pay / "inner").read_bytes()
    unlock(mounted, pay)
    assert (pay / "inner").read_bytes() == CONTENT
    assert SECRET not in mounted.log()
