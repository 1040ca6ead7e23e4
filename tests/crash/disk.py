"""A disk whose power can be cut: ext4 in a file behind a loop device, shut down without a flush (ioctl_ext4(2)).

`EXT4_IOC_SHUTDOWN` with NOLOGFLUSH stops all writing at once: what the journal and the page cache had not written by
then is gone, as after a power cut. Root only.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SHUTDOWN = 0x8004587D
"""_IOR('X', 125, __u32)"""
NO_LOG_FLUSH = 2


class CannotMake(Exception):
    """There is no loop device, no mkfs.ext4, or no permission; says which."""


@dataclass(frozen=True)
class LoopDisk:
    """`image` is the file, `place` where it is mounted."""

    image: Path
    place: Path

    def mount(self) -> None:
        _run("mount", "-o", "loop", str(self.image), str(self.place))

    def umount(self) -> None:
        _run("umount", str(self.place))

    def cut_power(self) -> None:
        """From here on nothing reaches the disk, and everybody is told EIO."""
        fd = os.open(self.place, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.ioctl(fd, SHUTDOWN, struct.pack("I", NO_LOG_FLUSH))
        finally:
            os.close(fd)


def _run(*command: str) -> None:
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise CannotMake(f"{command[0]}: {ended.stderr.strip()}")


@contextmanager
def loop_disk(root: Path, place: Path, *, size_mib: int = 256) -> Iterator[LoopDisk]:
    """An empty ext4 mounted at `place`. Raises `CannotMake`."""
    if os.geteuid() != 0:
        raise CannotMake("only root may mount a file system")
    if shutil.which("mkfs.ext4") is None:
        raise CannotMake("no mkfs.ext4")
    disk = LoopDisk(root / "disk.img", place)
    with disk.image.open("xb") as out:
        out.truncate(size_mib << 20)
    _run("mkfs.ext4", "-q", "-F", "-m", "0", str(disk.image))
    place.mkdir(exist_ok=True)
    disk.mount()
    try:
        try:
            disk.cut_power()
        except OSError as error:
            raise CannotMake(f"this ext4 cannot be shut down: {error.strerror}") from error
        disk.umount()
        disk.mount()
        (place / "lost+found").rmdir()
        yield disk
    finally:
        if place.is_mount():
            disk.umount()
