"""Replacing a `volume` file: one editor at a time, all of the new file or all of the old one.

The lock is flock(2) on the file itself (the mount's lock is on the directory, and a mounted volume may be edited). The
file that is locked may have been replaced while we waited: then the new one is locked instead.

A crash between any two calls leaves:

- before the rename: the old file, and perhaps a `volume.new`, which the next edit replaces and readers pass over;
- after it: the new file, or until the directory is synced the old one. Only after that sync may anybody be told that
  the new file counts: a floor recorded before it would turn a power cut into an alarm.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from cryptfs import durable
from cryptfs.errors import NotAVolume, StoreFailed, VolumeBusy
from cryptfs.ops.info import VOLUME_FILE, read_volume_file

FRESH = "volume.new"


class VolumeEdit:
    """The `volume` file of one cipher directory, locked. `data`: its bytes now."""

    def __init__(self, cipher_dir: Path, data: bytes) -> None:
        self.cipher_dir = cipher_dir
        self.data = data

    @classmethod
    @contextlib.contextmanager
    def of(cls, cipher_dir: Path) -> Iterator[Self]:
        """Hold the file's lock. Raises `VolumeBusy` if another process edits it, and as `read_volume_file`."""
        fd = _locked(cipher_dir)
        try:
            yield cls(cipher_dir, read_volume_file(cipher_dir))
        finally:
            os.close(fd)

    def replace(self, data: bytes) -> None:
        """Put other bytes in its place, durable when this returns. Raises `StoreFailed`; then it is as it was.

        If only syncing the directory fails, the new file is there: saying so would not make it less so.
        """
        fresh = self.cipher_dir / FRESH
        try:
            with contextlib.suppress(FileNotFoundError):
                fresh.unlink()
            try:
                _write(fresh, data, self.cipher_dir / VOLUME_FILE)
                os.rename(fresh, self.cipher_dir / VOLUME_FILE)
            except BaseException:
                with contextlib.suppress(OSError):
                    fresh.unlink()
                raise
            self.data = data
            durable.sync_directory(self.cipher_dir)
        except OSError as error:
            raise StoreFailed(f"{self.cipher_dir / VOLUME_FILE} cannot be replaced: {error.strerror}") from error

    def overwrite(self) -> None:
        """Destroy the file: zeros over it, synced, then no file. Raises `StoreFailed`.

        A crash in between leaves the file, or one of zeros, which is no volume.
        """
        path = self.cipher_dir / VOLUME_FILE
        try:
            with contextlib.suppress(FileNotFoundError):
                (self.cipher_dir / FRESH).unlink()
            durable.destroy(path, len(self.data))
        except OSError as error:
            raise StoreFailed(f"{path} cannot be destroyed: {error.strerror}") from error


def _locked(cipher_dir: Path) -> int:
    path = cipher_dir / VOLUME_FILE
    while True:
        read_volume_file(cipher_dir)  # for its errors
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as error:
            raise NotAVolume(f"{path}: {error.strerror}") from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_same(fd, path):
                return fd
        except BlockingIOError:
            os.close(fd)
            raise VolumeBusy("the volume's keys are being changed by another process") from None
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _is_same(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except FileNotFoundError:
        return False


def _write(path: Path, data: bytes, like: Path) -> None:
    """A new file of the mode and owner of `like`, synced."""
    there = os.lstat(like)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(path, flags, 0o600), "wb", buffering=0) as file:
        if (there.st_uid, there.st_gid) != (os.geteuid(), os.getegid()):
            try:
                os.fchown(file.fileno(), there.st_uid, there.st_gid)
            except PermissionError as error:
                raise OSError(errno.EPERM, "it belongs to another user") from error
        os.fchmod(file.fileno(), there.st_mode & 0o777)
        durable.write_all(file.fileno(), data)
        os.fsync(file.fileno())
