"""Key files: reading one, making one, and saying when one lies where it protects nothing."""

from __future__ import annotations

import os
from pathlib import Path

from cryptfs import durable
from cryptfs.cli import passphrase, ui
from cryptfs.errors import StoreFailed, UsageError
from cryptfs.format.protectors import KEYFILE_MAX_BYTES, KEYFILE_MIN_BYTES

NEW_BYTES = 64
_FEW_VALUES = 12
"""32 random bytes have 30 different values on average, and hexadecimal digits 16."""


def read_keyfile(path: Path) -> bytes:
    """All bytes of a key file. Warns if other users may open it or it does not look random. Raises `UsageError`."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY)
        try:
            status = os.fstat(fd)
            parts = bytearray()
            while len(parts) <= KEYFILE_MAX_BYTES and (part := os.read(fd, KEYFILE_MAX_BYTES + 1 - len(parts))):
                parts += part
        finally:
            os.close(fd)
    except OSError as failure:
        raise UsageError(f"cannot read the key file {path}: {failure.strerror}") from failure
    if not KEYFILE_MIN_BYTES <= len(parts) <= KEYFILE_MAX_BYTES:
        raise UsageError(f"{path} is no key file: those have {KEYFILE_MIN_BYTES} to {KEYFILE_MAX_BYTES} bytes")
    passphrase.warn_if_open(path, status)
    return bytes(parts)


def check_random(path: Path, content: bytes) -> None:
    """Warn if a file that is to become a key file was hardly made by a random generator."""
    is_text = b" " in content.strip() and content.decode("ascii", "replace").replace("\n", "").isprintable()
    if len(set(content)) < _FEW_VALUES or is_text:
        ui.warning(f"{path} does not look random: whoever guesses what is in it opens the volume, at no cost per guess")


def make_keyfile(path: Path) -> bytes:
    """A new file of 64 random bytes, mode 0600, durable when this returns.

    Raises `UsageError` if there is something at `path` already, `StoreFailed`; then no file is left.
    """
    content = os.urandom(NEW_BYTES)
    write_secret_file(path, content)
    return content


def write_secret_file(path: Path, content: bytes) -> None:
    """`content` as a new file of mode 0600, durable when this returns. Raises as `make_keyfile`."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise UsageError(f"{path} exists already: it is not overwritten") from None
    except OSError as failure:
        raise StoreFailed(f"cannot make {path}: {failure.strerror}") from failure
    try:
        try:
            os.fchmod(fd, 0o600)  # whatever the umask is
            durable.write_all(fd, content)
            os.fsync(fd)
        finally:
            os.close(fd)
        durable.sync_directory(path.parent)
    except OSError as failure:
        path.unlink(missing_ok=True)
        raise StoreFailed(f"cannot write {path}: {failure.strerror}") from failure
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def warn_of_place(path: Path, cipher_dir: Path, mountpoint: str | None) -> None:
    """Warn if a key file is inside what it opens: in the cipher directory, or in the mounted volume itself."""
    where = Path(os.path.realpath(path))
    if where.is_relative_to(cipher_dir):
        ui.warning(f"{path} is inside {cipher_dir}: whoever copies the volume copies its key, and it protects nothing")
    elif mountpoint and where.is_relative_to(mountpoint):
        ui.warning(f"{path} is inside the volume that it opens: once that is locked, nobody can read it")
