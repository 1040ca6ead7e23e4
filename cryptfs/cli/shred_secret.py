"""Where a volume's shred secret is kept outside the agent: a key file of 32 bytes, whose path the volume names.

The path is a convenience and proves nothing: what the file holds is checked against the volume by the agent.
`CRYPTFS_SHRED_KEYFILE` names another one, for a medium that is mounted elsewhere today.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from cryptfs.errors import ShredSecretMissing, UsageError

if TYPE_CHECKING:
    from cryptfs.format.volume import Volume

AGENT = "agent"
KEYFILE = "keyfile"
ENVIRONMENT_VARIABLE = "CRYPTFS_SHRED_KEYFILE"
SECRET_BYTES = 32


def path_of(volume: Volume) -> Path | None:
    """The key file of a volume whose shred secret lies in one; None for others."""
    if volume.shred is None or volume.shred.kind != KEYFILE:
        return None
    named = os.environ.get(ENVIRONMENT_VARIABLE)
    path = volume.shred.params.get("path")
    return Path(named) if named else Path(path) if isinstance(path, str) else None


def read(volume: Volume) -> bytes:
    """The secret for the agent, which keeps the others itself: empty for those. Raises `ShredSecretMissing`."""
    if volume.shred is None or volume.shred.kind == AGENT:
        return b""
    path = path_of(volume)
    if path is None:
        raise ShredSecretMissing(
            f"the volume's shred secret is kept in a way this program does not know: {volume.shred.kind}"
        )
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK), "rb") as file:
            secret = file.read(SECRET_BYTES + 1)
    except OSError as error:
        raise ShredSecretMissing(
            f"the volume's shred secret cannot be read from {path}: {error.strerror}; "
            f"{ENVIRONMENT_VARIABLE} names another file"
        ) from error
    if len(secret) != SECRET_BYTES or not any(secret):
        raise ShredSecretMissing(f"{path} is no shred secret: those have {SECRET_BYTES} bytes")
    return secret


def make(path: Path) -> bytes:
    """A new secret in a new file at `path` (mode 0600), durable when this returns. Raises `UsageError`."""
    secret = os.urandom(SECRET_BYTES)
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
            file.write(secret)
            file.flush()
            os.fsync(file.fileno())
        _sync_directory(path)
    except OSError as error:
        raise UsageError(f"cannot make the shred key file {path}: {error.strerror}") from error
    return secret


def destroy(path: Path) -> bool:
    """Overwrite and remove a key file; whether there was one. Raises `ShredSecretMissing`.

    Zeros are synced before the name goes: a crash leaves the secret, or a file of zeros, which is none.
    """
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW), "wb", buffering=0) as file:
            file.write(bytes(SECRET_BYTES))
            os.fsync(file.fileno())
        path.unlink()
        _sync_directory(path)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise ShredSecretMissing(f"the shred secret {path} cannot be destroyed: {error.strerror}") from error
    return True


def _sync_directory(path: Path) -> None:
    fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
