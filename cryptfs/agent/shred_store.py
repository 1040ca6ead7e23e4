"""Shred secrets that this machine keeps: one file of 32 bytes per volume, in the agent's state directory.

A crash between any two calls leaves:

- in `put`: a stray `.new`, which the next `put` replaces, or the whole secret, durable before any volume needs it;
- in `destroy`: the secret, or a file of zeros, which counts as none, or nothing. Zeros are written and synced before
  the name goes: a file system that overwrites in place then has no copy. Flash and copy-on-write file systems may.
"""

from __future__ import annotations

import contextlib
import os

from cryptfs import durable
from cryptfs.agent.places import private_state_dir
from cryptfs.crypto.secret import Secret
from cryptfs.crypto.shred import SECRET_BYTES
from cryptfs.errors import ShredSecretMissing, UsageError
from cryptfs.types import Buffer

KIND = "agent"
"""The kind of a shred secret that lies here."""


class ShredStore:
    """The secrets in `directory`, which is made when the first one comes. Every call may block for a moment."""

    def __init__(self, directory: str) -> None:
        self.directory = directory

    def put(self, volume_id: bytes, secret: Buffer) -> None:
        """Keep a secret. Raises `ShredSecretMissing` if it cannot be kept, `UsageError` if there is another one."""
        private_state_dir(self.directory, "the directory of shred secrets", ShredSecretMissing)
        path = self._path(volume_id)
        try:
            if (there := self.get(volume_id)) is not None:
                with there, Secret.of(secret) as given:
                    if there.equals(given):
                        return
                raise UsageError("this machine keeps another shred secret for this volume already")
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path + ".new")
            durable.write_new(path + ".new", secret)
            os.rename(path + ".new", path)
            durable.sync_directory(self.directory)
        except OSError as error:
            raise ShredSecretMissing(f"the shred secret {path} cannot be kept: {error.strerror}") from error

    def get(self, volume_id: bytes) -> Secret | None:
        """The secret, for the caller to wipe; None if there is none. Raises `ShredSecretMissing` if unreadable."""
        path = self._path(volume_id)
        data = bytearray(SECRET_BYTES + 1)
        try:
            with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb", buffering=0) as file:
                count = file.readinto(data)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ShredSecretMissing(f"the shred secret {path} cannot be read: {error.strerror}") from error
        if count != SECRET_BYTES:
            raise ShredSecretMissing(f"the shred secret {path} is damaged")
        del data[SECRET_BYTES:]
        return Secret(data) if any(data) else None

    def destroy(self, volume_id: bytes) -> bool:
        """Overwrite and remove a secret; whether there was one. Raises `ShredSecretMissing` if that fails."""
        path = self._path(volume_id)
        try:
            durable.destroy(path, SECRET_BYTES)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise ShredSecretMissing(f"the shred secret {path} cannot be destroyed: {error.strerror}") from error
        return True

    def _path(self, volume_id: bytes) -> str:
        return os.path.join(self.directory, volume_id.hex())
