"""The disk below is full or read-only: the program is told which, nothing hangs, what was acknowledged stays."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from tests.mount.box import Box, boxed
from tests.mount.syscalls import drop_pages, refused

pytestmark = pytest.mark.mount

CONTENT = bytes(range(256)) * 400


def on_tmpfs(root: None, template: Path, short_tmp: Path, options: str) -> Iterator[Box]:
    """A volume on a small disk of its own, mounted."""
    with boxed(short_tmp) as box:
        box.vault.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "small", box.vault], check=True)
        try:
            shutil.copytree(template, box.vault, symlinks=True, dirs_exist_ok=True)
            box.mount()
            yield box
        finally:
            box.close()
            subprocess.run(["umount", box.vault], check=True)


@pytest.fixture
def small(root: None, template: Path, short_tmp: Path) -> Iterator[Box]:
    yield from on_tmpfs(root, template, short_tmp, "size=8m,mode=700")


@pytest.fixture
def few_inodes(root: None, template: Path, short_tmp: Path) -> Iterator[Box]:
    yield from on_tmpfs(root, template, short_tmp, "size=64m,nr_inodes=400,mode=700")


def write_synced(path: Path, content: bytes) -> None:
    with path.open("wb", buffering=0) as out:
        out.write(content)
        os.fsync(out.fileno())


def fill(path: Path) -> None:
    """Until nothing fits any more. Raises OSError."""
    with path.open("wb", buffering=0) as out:
        for _ in range(40):
            out.write(os.urandom(1 << 19))
            os.fsync(out.fileno())


def test_a_full_disk(small: Box) -> None:
    clear = small.clear
    write_synced(clear / "before", CONTENT)
    (clear / "dir").mkdir()
    with refused(errno.ENOSPC):
        fill(clear / "large")
    with refused(errno.ENOSPC):
        for number in range(2000):
            write_synced(clear / "dir" / str(number), CONTENT)
    drop_pages(clear / "before")
    assert (clear / "before").read_bytes() == CONTENT
    with refused(errno.ENOSPC):
        write_synced(clear / "before", CONTENT * 20)
    # Removing makes room, and then everything works again.
    shutil.rmtree(clear / "dir")
    (clear / "large").unlink()
    small.remount()
    write_synced(clear / "after", CONTENT * 10)
    (clear / "after").rename(clear / "renamed")
    small.remount()
    assert (clear / "renamed").read_bytes() == CONTENT * 10
    assert set(os.listdir(clear)) == {"before", "renamed"}
    assert "Traceback" not in small.log()


def test_overwriting_on_a_full_disk_keeps_what_was_synced(small: Box) -> None:
    clear = small.clear
    write_synced(clear / "before", CONTENT * 10)
    with refused(errno.ENOSPC):
        fill(clear / "large")
    fd = os.open(clear / "before", os.O_WRONLY)
    try:
        with refused(errno.ENOSPC):
            for _ in range(4):
                os.pwrite(fd, b"new" * 300_000, 0)
                os.fsync(fd)
    finally:
        with suppress(OSError):  # it may have something to say, or not
            os.close(fd)
    small.kill_daemon()
    small.mount()
    (clear / "large").unlink()  # what a crash left is settled with a frame, and that needs room
    found = (clear / "before").read_bytes()
    assert len(found) in (len(CONTENT * 10), 900_000)
    blocks = {found[at : at + 16384] for at in range(0, 900_000, 16384)}
    good = {whole[at : at + 16384] for whole in (CONTENT * 10, b"new" * 300_000) for at in range(0, 900_000, 16384)}
    mixed = blocks - good
    assert len(mixed) <= 1, "at most the block at the border of old and new is of both"


def test_no_inode_is_left(few_inodes: Box) -> None:
    clear = few_inodes.clear
    write_synced(clear / "before", CONTENT)
    with refused(errno.ENOSPC):
        for number in range(1000):
            (clear / str(number)).mkdir()
    with refused(errno.ENOSPC):
        for number in range(1000):
            (clear / f"file {number}").write_bytes(b"x")
    with refused(errno.ENOSPC):
        for number in range(1000):
            (clear / f"link {number}").symlink_to("x")
    drop_pages(clear / "before")
    assert (clear / "before").read_bytes() == CONTENT
    for path in clear.iterdir():
        if path.is_dir():
            path.rmdir()
    few_inodes.remount()
    names = os.listdir(clear)
    assert all((clear / name).lstat() for name in names)
    write_synced(clear / "after", CONTENT)
    assert "Traceback" not in few_inodes.log()


def test_a_read_only_disk(root: None, mounted: Box) -> None:
    (mounted.clear / "file").write_bytes(CONTENT)
    mounted.umount()
    subprocess.run(["mount", "--bind", mounted.vault, mounted.vault], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", mounted.vault], check=True)
        said = mounted.mount(code=19)
        assert "error: Read-only file system" in said
        assert not mounted.is_mounted
        mounted.mount("--read-only")
        assert (mounted.clear / "file").read_bytes() == CONTENT
        with refused(errno.EROFS):
            (mounted.clear / "file").write_bytes(b"")
        mounted.umount()
    finally:
        mounted.close()
        subprocess.run(["umount", mounted.vault], check=True)
    mounted.mount()
    assert (mounted.clear / "file").read_bytes() == CONTENT


@contextmanager
def ext4(path: Path) -> Iterator[str]:
    """A small ext4 on `path`, from a loop device; yields the device. Skips where there is none."""
    image = path.with_name("image")
    with image.open("wb") as out:
        out.truncate(48 << 20)
    if shutil.which("mkfs.ext4") is None:
        pytest.skip("needs mkfs.ext4")
    subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
    if subprocess.run(["mount", "-o", "loop", image, path], check=False, capture_output=True).returncode:
        pytest.skip("needs loop devices")
    try:
        device = subprocess.run(["findmnt", "-no", "SOURCE", path], check=True, capture_output=True, text=True).stdout
        yield device.strip()
    finally:
        subprocess.run(["umount", path], check=True)


def test_a_disk_that_becomes_read_only(root: None, template: Path, short_tmp: Path) -> None:
    with boxed(short_tmp) as box:
        box.vault.mkdir()
        with ext4(box.vault) as device, ExitStack() as stack:
            shutil.copytree(template, box.vault, symlinks=True, dirs_exist_ok=True)
            stack.callback(box.close)
            box.mount()
            write_synced(box.clear / "before", CONTENT)
            with (box.clear / "before").open("r+b", buffering=0) as opened:
                drop_pages(box.clear / "before")
                assert opened.read() == CONTENT
                opened.seek(0)
                # As after an error of the disk: ext4 gives up writing, whoever has files open.
                subprocess.run(["mount", "-o", "remount,abort", device, box.vault], check=False)
                with refused(errno.EROFS, errno.EIO):
                    opened.write(b"new" * 5000)
                    os.fsync(opened.fileno())
                for call in (
                    (box.clear / "new").touch,
                    (box.clear / "new").mkdir,
                    (box.clear / "before").unlink,
                    lambda: (box.clear / "before").rename(box.clear / "after"),
                ):
                    with refused(errno.EROFS, errno.EIO):
                        call()
                drop_quietly(opened.fileno())
                assert (box.clear / "before").stat().st_size == len(CONTENT)
                assert os.pread(opened.fileno(), len(CONTENT) + 1, 0) == CONTENT
            box.umount()
            assert "not left clean" in box.log()
            assert "Traceback" not in box.log()


def drop_quietly(fd: int) -> None:
    """Drop what cannot be written any more."""
    with suppress(OSError):
        os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def test_a_cipher_directory_that_is_moved_while_mounted(mounted: Box) -> None:
    (mounted.clear / "file").write_bytes(CONTENT)
    moved = mounted.vault.with_name("moved")
    mounted.vault.rename(moved)
    drop_pages(mounted.clear / "file")
    assert (mounted.clear / "file").read_bytes() == CONTENT
    (mounted.clear / "new").write_bytes(CONTENT)
    mounted.umount()
    moved.rename(mounted.vault)
    mounted.mount()
    assert (mounted.clear / "new").read_bytes() == CONTENT
