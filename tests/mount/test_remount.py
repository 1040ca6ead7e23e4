"""After unmounting and mounting again everything is as it was, inode numbers included; and the volume is tidy."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from cryptfs.format.volume import parse_volume
from tests.mount.box import Box, boxed
from tests.mount.syscalls import refused
from tests.mount.test_names import NAMES

pytestmark = pytest.mark.mount


def build(top: bytes, seed: int = 1) -> None:
    """A bit of everything."""
    rng = random.Random(seed)
    dirs = [top]
    for level in range(4):
        dirs.append(os.path.join(dirs[-1], b"level %d" % level))
        os.mkdir(dirs[-1])
    for number, name in enumerate(NAMES):
        path = os.path.join(rng.choice(dirs), name)
        with open(path, "xb") as out:
            if number % 3:
                out.seek(rng.choice((0, 5, 16384, 100_000)))
                out.write(rng.randbytes(rng.choice((1, 4096, 16384, 70_000))))
        os.chmod(path, rng.choice((0o600, 0o644, 0o755, 0o4711)))
    long_dir = os.path.join(top, b"long " + b"n" * 240)
    os.mkdir(long_dir, 0o2755)
    with open(os.path.join(long_dir, b"original"), "xb") as out:
        out.write(b"of several names")
    for place in dirs:
        os.link(os.path.join(long_dir, b"original"), os.path.join(place, b"hard link"))
    with open(os.path.join(top, b"empty"), "xb"):
        os.link(os.path.join(top, b"empty"), os.path.join(long_dir, b"empty, too"))
    for length in (1, 60, 4095):
        os.symlink(rng.randbytes(length).replace(b"\0", b"_"), os.path.join(dirs[2], b"symlink %d" % length))
    os.mkfifo(os.path.join(top, b"fifo"), 0o640)
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(os.path.join(top, b"socket"))
    if os.geteuid() == 0:
        os.mknod(os.path.join(top, b"device"), stat.S_IFCHR | 0o600, os.makedev(1, 3))
        os.chown(os.path.join(top, b"fifo"), 12, 34)
    for path in walk(top):
        os.utime(path, ns=(rng.randrange(10**18), rng.randrange(10**18)), follow_symlinks=False)


def walk(top: bytes) -> Iterator[bytes]:
    """Everything below, deepest first."""
    for place, dirs, files in os.walk(top, topdown=False):
        yield from (os.path.join(place, name) for name in files + dirs)


def snapshot(top: bytes) -> dict[bytes, tuple[object, ...]]:
    """All that must survive, by path."""
    out: dict[bytes, tuple[object, ...]] = {}
    for path in walk(top):
        st = os.lstat(path)
        content: bytes | str = b""
        if stat.S_ISLNK(st.st_mode):
            content = os.readlink(path)
        elif stat.S_ISREG(st.st_mode):
            with open(path, "rb") as inp:
                content = hashlib.file_digest(inp, "sha256").hexdigest()
        out[path.removeprefix(top)] = (
            st.st_ino, st.st_mode, st.st_uid, st.st_gid, st.st_size if not stat.S_ISDIR(st.st_mode) else 0,
            st.st_mtime_ns, st.st_nlink, st.st_rdev, content,
        )  # fmt: skip
    return out


@pytest.mark.parametrize("block_size", ["4K", "1M"])
def test_everything_survives(short_tmp: Path, fuse: None, block_size: str) -> None:
    with boxed(short_tmp) as box:
        box.init("--block-size", block_size)
        assert parse_volume((box.vault / "volume").read_bytes()).block_size == {"4K": 4096, "1M": 1 << 20}[block_size]
        box.mount()
        _everything_survives(box)


def _everything_survives(box: Box) -> None:
    top = os.fsencode(box.clear)
    build(top)
    before = snapshot(top)
    assert len(before) > 35
    box.remount()
    assert snapshot(top) == before
    # Once more: now nothing was in the daemon's memory when it ended.
    box.remount("--read-only")
    assert snapshot(top) == before
    with refused(errno.EROFS):
        os.mkdir(top + b"/new")


def test_changes_survive(mounted: Box) -> None:
    top = os.fsencode(mounted.clear)
    build(top)
    mounted.remount()
    os.rename(top + b"/level 0/level 1", top + b"/moved")
    os.unlink(top + b"/level 0/hard link")
    os.truncate(top + b"/moved/hard link", 5)
    with open(top + b"/moved/hard link", "ab") as out:
        out.write(b"appended")
    os.mkdir(top + b"/level 0/level 1")
    os.link(top + b"/moved/hard link", top + b"/level 0/level 1/" + b"n" * 255)
    before = snapshot(top)
    mounted.remount()
    assert snapshot(top) == before
    with open(top + b"/level 0/level 1/" + b"n" * 255, "rb") as inp:
        assert inp.read() == b"of seappended"


def test_what_is_removed_leaves_nothing_behind(mounted: Box) -> None:
    empty = files_of(mounted.vault)
    build(os.fsencode(mounted.clear))
    with (mounted.clear / "rewritten").open("w+b", buffering=0) as out:
        for _ in range(3):
            os.pwrite(out.fileno(), b"x" * 100_000, 0)
            os.fsync(out.fileno())
        assert len(files_of(mounted.vault)) > len(empty) + 35
        (mounted.clear / "rewritten").unlink()
        os.pwrite(out.fileno(), b"y" * 100_000, 0)
    for path in walk(os.fsencode(mounted.clear)):
        os.rmdir(path) if os.path.isdir(path) and not os.path.islink(path) else os.unlink(path)
    assert os.listdir(mounted.clear) == []
    mounted.umount()
    assert files_of(mounted.vault) == empty


def files_of(vault: Path) -> set[str]:
    return {str(path.relative_to(vault)) for path in vault.rglob("*") if not path.is_dir()} | {
        str(path.relative_to(vault)) for path in (vault / "tmp").iterdir()
    }


def test_a_file_opened_with_o_trunc_is_empty_for_good(mounted: Box) -> None:
    paths = [mounted.clear / name for name in ("emptied", "shorter", "read-only")]
    for path in paths:
        path.write_bytes(b"long enough" * 5000)
    mounted.remount()
    os.close(os.open(paths[0], os.O_WRONLY | os.O_TRUNC))
    paths[1].write_bytes(b"short")
    os.close(os.open(paths[2], os.O_RDONLY | os.O_TRUNC))
    assert [path.read_bytes() for path in paths] == [b"", b"short", b""]
    mounted.remount()
    assert [path.read_bytes() for path in paths] == [b"", b"short", b""]


def test_the_time_of_the_last_change_is_the_programs(mounted: Box) -> None:
    """What the daemon does to the data file at the next sync or unmount does not count."""
    hows = ("truncate", "overwrite", "append", "fsync")
    paths = {(how, what): mounted.clear / f"{how} {what}" for how in hows for what in ("now", "set")}
    for path in paths.values():
        path.write_bytes(b"content" * 10_000)
    mounted.remount()
    for (how, what), path in paths.items():
        with path.open("r+b", buffering=0) as out:
            if how == "truncate":
                os.ftruncate(out.fileno(), 5)
            else:
                out.seek(0, os.SEEK_END if how == "append" else os.SEEK_SET)
                out.write(b"changed" * 3000)
            if how == "fsync":
                os.fsync(out.fileno())
        if what == "set":
            os.utime(path, ns=(1, 1_000_000_007))
    before = {key: path.stat().st_mtime_ns for key, path in paths.items()}
    assert {before[how, "set"] for how in hows} == {1_000_000_007}
    mounted.remount()
    assert {key: path.stat().st_mtime_ns for key, path in paths.items()} == before
