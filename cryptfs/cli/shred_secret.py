"""Where a volume's shred secret is kept outside the agent: in a key file of 32 bytes, or behind a key in a token.

The volume names the file's path, which is a convenience and proves nothing: what the file holds is checked against the
volume by the agent. `CRYPTFS_SHRED_KEYFILE` names another one, for a medium that is mounted elsewhere today. A token's
PIN is asked for, or stands in `CRYPTFS_SHRED_PIN` (tests, containers).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from cryptfs import durable
from cryptfs.errors import ShredSecretMissing, UsageError

if TYPE_CHECKING:
    from cryptfs.format.volume import Volume

AGENT = "agent"
KEYFILE = "keyfile"
TOKEN = "pkcs11"  # noqa: S105 - a kind of place
ENVIRONMENT_VARIABLE = "CRYPTFS_SHRED_KEYFILE"
PIN_VARIABLE = "CRYPTFS_SHRED_PIN"
SECRET_BYTES = 32


def path_of(volume: Volume) -> Path | None:
    """The key file of a volume whose shred secret lies in one; None for others."""
    if volume.shred is None or volume.shred.kind != KEYFILE:
        return None
    named = os.environ.get(ENVIRONMENT_VARIABLE)
    path = volume.shred.params.get("path")
    return Path(named) if named else Path(path) if isinstance(path, str) else None


def read(volume: Volume) -> bytes:
    """What the agent needs to have the secret: a key file's content, a token's PIN; empty if it keeps it itself.

    Raises `ShredSecretMissing`, `UsageError` if a PIN is needed and nobody can be asked.
    """
    if volume.shred is None or volume.shred.kind == AGENT:
        return b""
    if volume.shred.kind == TOKEN:
        return ask_pin(str(volume.shred.params.get("token_label", "")))
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


def ask_pin(token: str) -> bytes:
    """The PIN of the token that has the shred secret. Raises `UsageError` if nobody can be asked."""
    from cryptfs.cli import passphrase
    from cryptfs.cli.advice import hinted

    if (given := _pin_from_environment) is not None:
        return given
    words = passphrase.Words("PIN of the shred secret's token", "", PIN_VARIABLE)
    try:
        return passphrase.ask(f"PIN of the token {token!r}, which has the shred secret: ", words)
    except UsageError as failure:
        raise hinted(UsageError(str(failure)), f"or give it with the variable {PIN_VARIABLE}") from None


def claim_environment() -> None:
    """Move the PIN out of the environment, so that no child inherits it; as `passphrase.claim_environment`."""
    global _pin_from_environment  # noqa: PLW0603  the environment is one per process
    _pin_from_environment = os.environb.pop(PIN_VARIABLE.encode(), None)


_pin_from_environment: bytes | None = None


def make(path: Path) -> bytes:
    """A new secret in a new file at `path` (mode 0600), durable when this returns. Raises `UsageError`."""
    secret = os.urandom(SECRET_BYTES)
    try:
        durable.write_new(path, secret)
        durable.sync_directory(path.parent)
    except OSError as error:
        raise UsageError(f"cannot make the shred key file {path}: {error.strerror}") from error
    return secret


def destroy(path: Path) -> bool:
    """Overwrite and remove a key file; whether there was one. Raises `ShredSecretMissing`.

    Zeros are synced before the name goes: a crash leaves the secret, or a file of zeros, which is none.
    """
    try:
        durable.destroy(path, SECRET_BYTES)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise ShredSecretMissing(f"the shred secret {path} cannot be destroyed: {error.strerror}") from error
    return True
