"""DEKs brought ahead for files that programs write: what the kernel holds back is written with them if the agent dies.

The kernel keeps what is written to a file for up to half a minute, or until it is closed or synced, and does not say
how much. What it does do is ask for a capability before every write(2). So a file that is still open shortly after
that has keys for `BLOCKS` blocks ready from then on. One that is made, written and closed at once costs nothing.

Keys end with the max age like others, and are had anew at the next write. A write through a mapping tells nobody.
"""

from __future__ import annotations

from contextlib import suppress

import trio

from cryptfs.errors import CryptfsError
from cryptfs.fs.file import FileNode

BLOCKS = 64
"""For which a file has DEKs, at least."""
FILES_MAX = 32
"""Files that have a reserve at a time: at twice `BLOCKS`, 4096 keys."""
SHORTLY_S = 0.05
"""From a write to its file's keys at most; a file that is closed within half of it has none brought."""


class Reserve:
    """One per volume. Run `serve` beside it."""

    def __init__(self) -> None:
        self._due: set[FileNode] = set()
        self._ripening: set[FileNode] = set()
        self._having: set[FileNode] = set()
        self._wake = trio.Event()

    def about_to_be_written(self, file: FileNode) -> None:
        """A program writes to the file; called for every write(2), before it."""
        if not file.has_deks(BLOCKS):
            self._due.add(file)
            self._wake.set()

    async def serve(self) -> None:
        """Bring keys, for ever. An agent that is away is no concern of this task's."""
        while True:
            await self._wake.wait()
            await trio.sleep(SHORTLY_S / 2)
            due, self._ripening, self._due = self._ripening, self._due, set()
            if not self._ripening:
                self._wake = trio.Event()
            self._having = {file for file in self._having if file.opens and file.has_deks(1)}
            for file in due:
                if file.opens and not file.has_deks(BLOCKS) and len(self._having) < FILES_MAX:
                    self._having.add(file)
                    with suppress(CryptfsError):
                        await file.stock_up(2 * BLOCKS)
