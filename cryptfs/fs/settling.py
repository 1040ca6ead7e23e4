"""In the background and at the end: frames that are owed, syncs that others wait for, logs that are bloated.

What fails is logged and tried again. A file counts as opened while something of it is awaited (`opening.held`).
"""

from __future__ import annotations

from collections.abc import Iterator

import trio

from cryptfs.errors import CryptfsError
from cryptfs.fs.context import FsContext, log
from cryptfs.fs.file import FileNode
from cryptfs.fs.inodes import Inode, InodeTable
from cryptfs.fs.opening import Opening, held
from cryptfs.fs.reaper import Reaper

_SETTLE_INTERVAL_S = 2.0
_NEW_MAX = 200_000


class Settling(Opening):
    """What is owed for the open files and directories of one volume."""

    def __init__(self, ctx: FsContext, inodes: InodeTable, reaper: Reaper) -> None:
        super().__init__(ctx, inodes, reaper)
        self._complained: set[int] = set()

    async def serve(self) -> None:
        """Settle now and then, for ever.

        Frames too: what a program that keeps its file open and never syncs wrote is then lost to a killed daemon for
        seconds only.
        """
        while True:
            await trio.sleep(_SETTLE_INTERVAL_S)
            await self.commit_all()
            await self.settle()

    async def settle(self) -> None:
        """Sync what waits for it and close what nobody needs. Errors are logged; it is tried again."""
        self.unsettled.update(i for i in self.inodes.with_files() if i.file is not None and i.file.journal.bloated)
        for inode in list(self.unsettled):
            file = inode.file
            if file is None:
                self.unsettled.discard(inode)
                continue
            good = False
            with held(file):
                try:
                    await file.journal.fsync(data_only=True)
                    await file.journal.compact()
                    good = True
                    self._complained.discard(inode.ino)
                except (OSError, CryptfsError) as error:
                    self._complain(inode, f"not settled: {error}")
            if file.opens == 0 and (good or file.unlinked):
                await self._wind_up(inode, file)
            elif good and not file.journal.needs_settling:
                self.unsettled.discard(inode)
        for node in self.inodes.open_dirs():
            if not node.pins and node.lock.idle:
                try:
                    await node.compact(self.sync_targets)
                except (OSError, CryptfsError) as error:
                    log.error("directory inode %d: log not compacted: %s", node.ino, error)
        if len(self.new_ids) + len(self.moved_ids) > _NEW_MAX:
            before = self.new_ids | self.moved_ids
            try:
                await self.ctx.sync_everything()
                self.new_ids -= before
                self.moved_ids -= before
            except OSError as error:
                log.error("the file system could not be synced: %s", error)

    async def commit_all(self) -> bool:
        """Append every frame that is owed; False if one could not be."""
        good = True
        for inode, file in self._worth_keeping():
            with held(file):
                await file.state.lock.acquire_exclusive()
                try:
                    await file.journal.commit()
                    self._complained.discard(inode.ino)
                except (OSError, CryptfsError) as error:
                    self._complain(inode, f"frame not written: {error}")
                    good = False
                finally:
                    file.state.lock.release_exclusive()
            await self._let_go(inode, file)
        for node in self.inodes.open_dirs():
            try:
                await node.flush()
            except (OSError, CryptfsError) as error:
                log.error("directory inode %d: frame not written: %s", node.ino, error)
                good = False
        return good

    async def sync_all(self) -> bool:
        """Sync every file somebody has open or that is not settled; False if one could not be."""
        good = True
        for inode, file in self._worth_keeping():
            with held(file):
                try:
                    await file.journal.fsync()
                except (OSError, CryptfsError) as error:
                    log.error("inode %d: not synced: %s", inode.ino, error)
                    good = False
            await self._let_go(inode, file)
        for node in self.inodes.open_dirs():
            try:
                if node.sync_failed:
                    await node.sync()
            except (OSError, CryptfsError) as error:
                log.error("directory inode %d: not synced: %s", node.ino, error)
                good = False
        return good

    def _worth_keeping(self) -> Iterator[tuple[Inode, FileNode]]:
        """Open files that have a name and were read or written; each is looked at when its turn comes."""
        for inode in self.inodes.with_files():
            file = inode.file
            if file is not None and not file.unlinked and file.journal.loaded:
                yield inode, file

    def _complain(self, inode: Inode, text: str) -> None:
        """Log what failed, once until it succeeds.

        It is tried again every few seconds, for as long as the agent is away.
        """
        if inode.ino not in self._complained:
            self._complained.add(inode.ino)
            log.error("inode %d: %s", inode.ino, text)
