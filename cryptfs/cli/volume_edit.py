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
from cryptfs.ops.volume_file import VolumeEdit

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
    from cryptfs.cli.unlock import unlocked

    volume = read_volume(cipher_dir)
    check(volume)
    with unlocked(cipher_dir, volume.volume_id, given):
        yield volume


class Edit(VolumeEdit):
    """A `volume` file held for one change that the agent makes."""

    def change(self, make: Callable[[AgentClient, bytes], Awaitable[bytes]], in_place: Callable[[], None]) -> None:
        """Replace the file by what `make` has the agent make of it; `in_place` is called once that has come about.

        Raises what `make` raises, `StoreFailed`, and what the agent says when it is told.
        """
        from cryptfs.format.volume import parse_volume
        from cryptfs.keys.edit_requests import commit

        before = self.data
        volume_id = parse_volume(before).volume_id
        data = key_agent.ask(lambda client: make(client, before))
        try:
            self.replace(data)
        except BaseException:
            # It may have failed only after the rename: then the new file is there, and so is all that belongs to it.
            with contextlib.suppress(CryptfsError):
                if read_volume_file(self.cipher_dir) == data:
                    in_place()
            raise
        try:
            key_agent.ask(lambda client: commit(client, volume_id, data))
        finally:
            # Also if the agent is gone now: the next unlock goes by the file.
            in_place()
