"""Changing a `volume` file from the command line: unlocked for as long as it takes, one editor at a time.

The agent makes the file's new bytes, this process puts them in its place, the agent is told that they count. What a
crash in between leaves is said in `ops.volume_file` and `agent.edit_verbs`.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from cryptfs.cli import key_agent
from cryptfs.errors import CryptfsError
from cryptfs.ops.info import read_volume, read_volume_file
from cryptfs.ops.volume_file import VolumeEdit, editing

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from cryptfs.cli.protectors import Given
    from cryptfs.format.volume import Volume
    from cryptfs.keys.agent_client import AgentClient


@contextlib.contextmanager
def opened(cipher_dir: Path, given: Given, check: Callable[[Volume], object]) -> Iterator[Volume]:
    """The volume, unlocked; if it was locked before it is so again afterwards.

    `check` sees it first, so that what cannot be done is said before any secret is asked for. Raises what that and
    `unlock_volume` raise.
    """
    from cryptfs.cli.unlock import unlock_volume

    volume = read_volume(cipher_dir)
    check(volume)
    unlocked_here = unlock_volume(cipher_dir, given)
    try:
        yield volume
    finally:
        if unlocked_here:
            with contextlib.suppress(CryptfsError):
                key_agent.lock(volume.volume_id)


class Edit:
    """A `volume` file held for one change (`ops.volume_file.editing`)."""

    def __init__(self, edit: VolumeEdit) -> None:
        self._edit = edit

    @property
    def data(self) -> bytes:
        """The file's bytes now."""
        return self._edit.data

    @classmethod
    @contextlib.contextmanager
    def of(cls, cipher_dir: Path) -> Iterator[Edit]:
        """Raises `VolumeBusy` if somebody else is changing it."""
        with editing(cipher_dir) as edit:
            yield cls(edit)

    def change(self, make: Callable[[AgentClient, bytes], Awaitable[bytes]], in_place: Callable[[], None]) -> None:
        """Replace the file by what `make` has the agent make of it; `in_place` is called once that has come about.

        Raises what `make` raises, `StoreFailed`, and what the agent says when it is told.
        """
        from cryptfs.format.volume import parse_volume
        from cryptfs.keys.edit_requests import commit

        before = self._edit.data
        volume_id = parse_volume(before).volume_id
        data = key_agent.ask(lambda client: make(client, before))
        try:
            self._edit.replace(data)
        except BaseException:
            # It may have failed only after the rename: then the new file is there, and so is all that belongs to it.
            with contextlib.suppress(CryptfsError):
                if read_volume_file(self._edit.cipher_dir) == data:
                    in_place()
            raise
        try:
            key_agent.ask(lambda client: commit(client, volume_id, data))
        finally:
            # Also if the agent is gone now: the next unlock goes by the file.
            in_place()
