"""Whether the `volume` file that a command says is in its place is the one that lies there.

`commit` raises floors, and a floor above the file on the disk makes the volume refuse to mount (FRESHNESS.md). So the
agent looks for itself, where it can: it may read everything its user can (`agent.sandbox` takes only writing from it).
Where it cannot, as nobody said where the volume lies, it was moved since, or its disk hangs, the command is believed.
"""

from __future__ import annotations

import os

import trio

from cryptfs.errors import CryptfsError, UsageError
from cryptfs.format.volume import FILE_MAX_BYTES, parse_volume

PATIENCE_S = 5.0


async def check_in_place(cipher_dir: bytes, volume_id: bytes, data: bytes) -> None:
    """Raises `UsageError` if another `volume` file of this volume than `data` lies in `cipher_dir` (empty: unknown)."""
    if not cipher_dir:
        return
    found = None
    # A thread of its own: the directory may lie in a mount of ours, whose daemon waits for this very loop.
    with trio.move_on_after(PATIENCE_S):
        found = await trio.to_thread.run_sync(_read, cipher_dir, abandon_on_cancel=True)
    if found is not None and found != data and _is_of(volume_id, found):
        raise UsageError(f"another volume file lies in {os.fsdecode(cipher_dir)}: nothing counts that is not there")


def _read(cipher_dir: bytes) -> bytes | None:
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        with os.fdopen(os.open(os.path.join(cipher_dir, b"volume"), flags), "rb") as file:
            return file.read(FILE_MAX_BYTES + 1)
    except OSError:
        return None


def _is_of(volume_id: bytes, data: bytes) -> bool:
    try:
        return parse_volume(data).volume_id == volume_id
    except CryptfsError:
        return False
