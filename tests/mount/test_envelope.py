"""Keys: one per version of a block, known to the daemon for a while and only through the agent; none of it on disk."""

from __future__ import annotations

import errno
import mmap
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from cryptfs.cli.mounts import wait_until
from cryptfs.format.log import FOOT_BYTES, HEAD_BYTES, HEADER_BYTES, decode_head, decode_header
from cryptfs.format.sidecar import Run, decode_sidecar
from cryptfs.types import WRAPPED_BYTES
from tests.mount.box import Box
from tests.mount.proxy import NOTHING, OVERSIZED, RUBBISH, AgentProxy
from tests.mount.syscalls import drop_pages, refused, reread

pytestmark = pytest.mark.mount

BLOCK = 16 * 1024
CONTENT = bytes(range(256)) * (6 * BLOCK // 256) + b"the end"


def read_uncached(fd: int) -> bytes:
    """What the daemon has, through a descriptor that is open already."""
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    return os.pread(fd, len(CONTENT) + 1, 0)


def fails_with_enokey(call: Callable[[], object]) -> bool:
    try:
        call()
    except OSError as error:
        if error.errno != errno.ENOKEY:
            raise
        return True
    return False


@contextmanager
def opened(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


# how long a key is known ---------------------------------------------------------------------------------------


def test_without_the_agent_reads_fail_once_the_keys_are_too_old_and_work_again_with_it(box: Box) -> None:
    box.mount("--max-age", "1")
    file = box.clear / "file"
    file.write_bytes(CONTENT)
    (box.clear / "dir").mkdir()
    drop_pages(file)
    with opened(file) as fd:
        assert read_uncached(fd) == CONTENT
        box.kill_agent()
        assert wait_until(lambda: fails_with_enokey(lambda: read_uncached(fd)), 10), "keys did not expire"
        for call in (
            (box.clear / "unknown").stat,
            (box.clear / "new").touch,
            (box.clear / "newer").mkdir,
            lambda: file.rename(box.clear / "renamed"),
        ):
            with refused(errno.ENOKEY):
                call()
        assert wait_until(lambda: fails_with_enokey(file.stat), 5), "the kernel still knows names"
        assert os.fstat(fd).st_size == len(CONTENT), "attributes need no key"
        box.unlock()
        assert read_uncached(fd) == CONTENT, "an open descriptor works again"
    file.rename(box.clear / "renamed")
    assert reread(box.clear / "renamed") == CONTENT
    box.umount()
    assert wait_until(lambda: not box.agent_pids(), 10), "the agent that unlock started has not ended"


@contextmanager
def proxied(box: Box, *options: str) -> Iterator[AgentProxy]:
    """Mounted by a daemon whose way to the agent leads through a proxy."""
    box.unlock()
    path = box.root / "proxy.sock"
    with AgentProxy(path, box.agent_socket) as proxy, box.daemon(path, *options):
        yield proxy


def test_a_key_is_asked_for_again_when_it_is_too_old(box: Box) -> None:
    with proxied(box, "--max-age", "1") as proxy:
        (box.clear / "file").write_bytes(CONTENT)
        assert reread(box.clear / "file") == CONTENT
        for _ in range(2):
            before = proxy.unwraps
            assert wait_until(lambda before=before: proxy.unwraps > before or not reread(box.clear / "file"), 10)  # type: ignore[misc]


def test_a_key_is_asked_for_once_while_it_is_young(box: Box) -> None:
    with proxied(box) as proxy:
        (box.clear / "file").write_bytes(CONTENT)
        before = proxy.unwraps
        for _ in range(10):
            assert reread(box.clear / "file") == CONTENT
        assert proxy.unwraps == before, "keys just made are known"


def test_without_a_cache_each_read_asks(box: Box) -> None:
    with proxied(box, "--no-cache") as proxy:
        (box.clear / "file").write_bytes(CONTENT)
        for _ in range(5):
            before = proxy.unwraps
            assert reread(box.clear / "file") == CONTENT
            assert proxy.unwraps > before


def test_a_key_serves_as_often_as_it_may(box: Box) -> None:
    with proxied(box, "--max-uses", "2") as proxy:
        file = box.clear / "file"
        file.write_bytes(b"one block")
        drop_pages(file)
        with opened(file) as fd:
            # The first one opens the file as well: its log's key and the volume key may have served their time.
            assert read_uncached(fd) == b"one block"
            asked = []
            for _ in range(12):
                before = proxy.unwraps
                assert read_uncached(fd) == b"one block"
                asked.append(proxy.unwraps - before)
        assert set(asked) == {0, 1}, asked
        assert 4 <= sum(asked) <= 6, f"every second or third time: {asked}"


def test_many_keys_come_in_one_request(box: Box) -> None:
    with proxied(box, "--no-cache") as proxy:
        file = box.clear / "file"
        file.write_bytes(bytes(256 * BLOCK))
        drop_pages(file)
        before = proxy.unwraps
        assert file.read_bytes() == bytes(256 * BLOCK)
        assert proxy.unwraps - before < 64


# an agent that fails -------------------------------------------------------------------------------------------


def test_an_agent_that_fails_in_mid_request(box: Box) -> None:
    with proxied(box, "--no-cache") as proxy:
        (box.clear / "file").write_bytes(CONTENT)
        drop_pages(box.clear / "file")
        with opened(box.clear / "file") as fd:
            for answer in (NOTHING, RUBBISH, OVERSIZED):
                proxy.misbehave = answer
                with refused(errno.ENOKEY):
                    read_uncached(fd)
                assert proxy.has_misbehaved
                box.unlock()  # the agent forgot the key when the daemon's connection ended
                assert read_uncached(fd) == CONTENT
        (box.clear / "after").write_bytes(b"after")
        assert reread(box.clear / "after") == b"after"


def test_what_was_written_before_the_agent_died_is_kept(mounted: Box) -> None:
    synced, closed, written = (mounted.clear / name for name in ("synced", "closed", "written"))
    with synced.open("wb") as out:
        out.write(CONTENT)
        out.flush()
        os.fsync(out.fileno())
    closed.write_bytes(CONTENT)
    fd = os.open(written, os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o600)  # in the daemon, and no frame says so
    try:
        with memoryview_of_pages(CONTENT[:BLOCK]) as pages:
            assert os.write(fd, pages) == BLOCK
        mounted.kill_agent()
        assert mounted.logged("flushing")
    finally:
        os.close(fd)
    mounted.umount()
    mounted.mount()
    assert [path.read_bytes() for path in (synced, closed, written)] == [CONTENT, CONTENT, CONTENT[:BLOCK]]


@contextmanager
def memoryview_of_pages(data: bytes) -> Iterator[memoryview]:
    """`data` where O_DIRECT wants it."""
    with mmap.mmap(-1, len(data)) as pages:
        pages[:] = data
        with memoryview(pages) as view:
            yield view


def test_what_the_kernel_holds_when_the_agent_dies_is_written_with_the_keys_at_hand(mounted: Box) -> None:
    with (mounted.clear / "file").open("wb", buffering=0) as out:
        out.write(b"new" * 5000)
        mounted.kill_agent()
        os.fsync(out.fileno())
    mounted.remount()
    assert (mounted.clear / "file").read_bytes() == b"new" * 5000


@pytest.mark.parametrize("size", [50_000, 1 << 20])
def test_what_the_kernel_held_back_when_the_agent_died_survives_the_daemon_too(box: Box, size: int) -> None:
    """Written, neither synced nor closed, and the agent killed: on disk before the mount locks itself."""
    box.mount("--max-age", "3")
    content = os.urandom(size)
    fd = os.open(box.clear / "new", os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        assert os.write(fd, content) == size
        time.sleep(1)  # what docs/KEYS.md grants: the keys are brought once the file is seen to stay open
        box.kill_agent()
        assert wait_until(lambda: "the volume is locked, after" in box.log(), 20)
        box.kill_daemon()
    finally:
        with suppress(OSError):  # the daemon is gone
            os.close(fd)
    box.mount()
    assert (box.clear / "new").read_bytes() == content


def test_what_was_held_back_is_there_after_unlock(box: Box) -> None:
    box.mount("--max-age", "3")
    content = os.urandom(1 << 20)
    with (box.clear / "new").open("w+b", buffering=0) as out:
        out.write(content)
        time.sleep(1)
        box.kill_agent()
        assert wait_until(lambda: "the volume is locked, after" in box.log(), 20)
        box.unlock()
        assert os.pread(out.fileno(), len(content) + 1, 0) == content
        os.fsync(out.fileno())


def test_closing_what_was_written_while_the_volume_is_locked_says_that_it_is_lost(mounted: Box) -> None:
    (mounted.clear / "file").write_bytes(CONTENT)
    fd = os.open(mounted.clear / "file", os.O_WRONLY)
    mounted.run("lock", mounted.clear)
    os.pwrite(fd, bytes(mmap.PAGESIZE), 0)  # whole pages: the kernel takes them without asking
    with refused(errno.EIO, errno.ENOKEY):
        os.close(fd)
    mounted.unlock()
    assert (mounted.clear / "file").read_bytes() == CONTENT


def test_a_write_that_gets_no_key_waits_for_one_as_long_as_a_key_may_live_and_then_says_so(box: Box) -> None:
    mounted = box
    mounted.mount("--max-age", "2")
    file = mounted.clear / "file"
    file.write_bytes(b"before")
    with file.open("r+b", buffering=0) as out:
        mounted.kill_agent()
        out.write(os.urandom(20_000_000))  # more than keys can be in stock
        with refused(errno.ENOKEY, errno.EIO):
            os.fsync(out.fileno())
        mounted.unlock()
        # The kernel tells of a failed write once, and may have dropped what it could not write.
        os.truncate(file, 0)
        os.pwrite(out.fileno(), CONTENT, 0)
        os.fsync(out.fileno())
    mounted.remount()
    assert file.read_bytes() == CONTENT


# what is on disk -----------------------------------------------------------------------------------------------


def runs_of(sidecar: Path) -> list[Run]:
    """All records of a sidecar, those that are void by now included."""
    raw = sidecar.read_bytes()
    decode_header(raw[:HEADER_BYTES])
    at = HEADER_BYTES
    runs: list[Run] = []
    while at < len(raw):
        head = decode_head(raw[at : at + HEAD_BYTES])
        end = at + head.frame_bytes
        runs += decode_sidecar(raw[at + HEAD_BYTES : end - FOOT_BYTES], BLOCK).runs
        at = end
    return runs


def test_each_version_of_each_block_has_a_key_of_its_own(mounted: Box) -> None:
    for number in range(20):
        (mounted.clear / f"file {number}").write_bytes(b"the same in each" * 3000)
    with (mounted.clear / "rewritten").open("w+b", buffering=0) as out:
        for round_ in range(8):
            os.pwrite(out.fileno(), CONTENT, 0)
            os.pwrite(out.fileno(), b"part", BLOCK * (round_ % 5) + 7)
            os.fsync(out.fileno())
    os.truncate(mounted.clear / "rewritten", BLOCK + 5)
    mounted.umount()
    runs = [run for path in (mounted.vault / "sidecars").glob("*/*") if path.suffix == "" for run in runs_of(path)]
    wraps = [run.wrapped[at : at + WRAPPED_BYTES] for run in runs for at in range(0, len(run.wrapped), WRAPPED_BYTES)]
    assert len(wraps) >= 20 * 3 + 8 * 7
    assert len(set(wraps)) == len(wraps)
    assert len({run.tags[at : at + 16] for run in runs for at in range(0, len(run.tags), 16)}) == len(wraps)


def test_equal_blocks_look_different(mounted: Box) -> None:
    (mounted.clear / "a").write_bytes(bytes(4 * BLOCK))
    (mounted.clear / "b").write_bytes(bytes(4 * BLOCK))
    mounted.umount()
    blocks = [
        path.read_bytes()[64:][at : at + BLOCK]
        for path in (mounted.vault / "tree").iterdir()
        if path.name != ".dir"
        for at in range(0, 4 * BLOCK, BLOCK)
    ]
    assert len(blocks) == len(set(blocks)) == 8
    assert bytes(64) not in b"".join(blocks)


def test_neither_content_nor_names_nor_targets_are_found_outside_the_mount(mounted: Box) -> None:
    secrets = [b"SECRET-CONTENT", b"SECRET-NAME", b"SECRET-DIR", b"SECRET-TARGET", b"SECRET-RENAMED", b"SECRET-LONG"]
    top = os.fsencode(mounted.clear)
    os.mkdir(top + b"/SECRET-DIR")
    (mounted.clear / "SECRET-DIR" / "SECRET-NAME").write_bytes(b"SECRET-CONTENT " * 5000)
    (mounted.clear / "SECRET-NAME").write_bytes(b"SECRET-CONTENT")
    (mounted.clear / "SECRET-NAME").rename(mounted.clear / "SECRET-RENAMED")
    (mounted.clear / ("SECRET-LONG" * 20)).write_bytes(b"SECRET-CONTENT")
    (mounted.clear / "link").symlink_to("SECRET-TARGET" * 20)
    with refused(errno.ENOENT):
        os.stat(top + b"/SECRET-NAME")
    mounted.umount()
    searched = 0
    for place, dirs, files in os.walk(os.fsencode(mounted.root)):
        for name in dirs + files:
            path = os.path.join(place, name)
            text = name
            if os.path.islink(path):
                text += os.readlink(path)
            elif os.path.isfile(path):
                with open(path, "rb") as inp:
                    text += inp.read()
            searched += 1
            assert not [secret for secret in secrets if secret in text], path
    assert searched > 10


# the daemon's code ---------------------------------------------------------------------------------------------

FORBIDDEN = re.compile(
    r"\|\s+(cryptfs\.(agent|roots|cli|crypto\.wrap)|argon2|cryptography\.hazmat\.primitives\.(kdf|keywrap))(\.|$)",
    re.MULTILINE,
)


def test_a_daemon_at_work_loads_no_code_that_handles_keks(box: Box) -> None:
    box.unlock()
    with box.daemon(box.agent_socket, python=("-X", "importtime")) as daemon:
        (box.clear / "file").write_bytes(CONTENT)
        (box.clear / "dir").mkdir()
        (box.clear / "link").symlink_to("x")
        assert reread(box.clear / "file") == CONTENT
        assert os.readlink(box.clear / "link") == "x"
        box.kill_agent()
        assert wait_until(lambda: "flushing" in daemon.said(), 10)
        box.unlock()
        (box.clear / "file").rename(box.clear / "dir" / "file")
    trace = daemon.said()
    assert "| cryptfs.fuse.operations" in re.sub(r"\s+", " ", trace)
    assert FORBIDDEN.search(trace) is None


GUARDED = """
import importlib
from cryptfs.daemon import guard
guard.install()
import cryptfs.daemon.main
for name in guard.FORBIDDEN:
    try:
        importlib.import_module(name)
    except ImportError as error:
        assert "must not be imported" in str(error), error
    else:
        raise SystemExit(name)
"""


def test_an_import_of_such_code_in_the_daemon_fails() -> None:
    subprocess.run([sys.executable, "-c", GUARDED], check=True)
