"""Open files: from an inode to its `FileNode`, and what the last release has to do before the descriptors go.

The last release appends the frame that is owed. If it cannot, or if something acknowledged still stands aside, the file
stays open in `unsettled` and `settling` comes back to it; an `open` meanwhile finds the same `FileNode`.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager

from cryptfs.errors import CryptfsError, Damaged
from cryptfs.format.datafile import HEADER_BYTES
from cryptfs.format.sidecar import Sealed
from cryptfs.fs.context import FsContext, log, open_ours
from cryptfs.fs.entries import Entries
from cryptfs.fs.file import FileNode
from cryptfs.fs.inodes import Inode, InodeTable
from cryptfs.fs.journal import Journal
from cryptfs.fs.opening_closed import wider
from cryptfs.fs.prefetch import Prefetcher
from cryptfs.fs.reaper import Reaper
from cryptfs.fs.sealed_log import Replay
from cryptfs.fs.state import FileState
from cryptfs.ports import Kit


class Opening(Entries):
    """The open files of one volume."""

    def __init__(self, ctx: FsContext, inodes: InodeTable, reaper: Reaper) -> None:
        super().__init__(ctx, inodes)
        self.reaper = reaper
        self.unsettled: set[Inode] = set()
        self.prefetcher = Prefetcher(ctx, inodes)
        inodes.on_dead = self._dead

    async def open(self, inode: Inode, *, writing: bool = False) -> FileNode:
        """Open a regular file once more; pair with `release`.

        Nothing but the data file is touched before it is used.
        """
        file = inode.file
        if file is None:
            where, name = await self.inodes.handle(inode)
            file = inode.file
            if file is None:
                fd, writable = self._open_data(where, name, inode.ino)
                st = self.ctx.store.fstat(fd)
                if st.st_ino != inode.ino or not stat.S_ISREG(st.st_mode):
                    self.ctx.store.close(fd)
                    raise Damaged("exchanged", "another file lies under this name")
                file = self._node(inode, fd, writable=writable)
        file.opens += 1
        try:
            if writing and not file.state.writable:
                raise OSError(errno.EROFS if self.ctx.read_only else errno.EACCES, "not writable below")
            if not file.journal.loaded and self.ctx.store.fstat(file.state.data_fd).st_size <= HEADER_BYTES:
                # The kernel reads nothing from a file it takes for empty: one that was cut to that is found out here.
                await file.journal.load()
        except BaseException:
            await self.release(inode)
            raise
        return file

    def _open_data(self, dir_fd: int, name: bytes, ino: int) -> tuple[int, bool]:
        """(descriptor, writable).

        A file its owner may not open is opened all the same: the kernel checked the caller.
        """
        store = self.ctx.store
        if self.ctx.read_only:
            return open_ours(store, dir_fd, name, os.O_RDONLY), False
        try:
            return open_ours(store, dir_fd, name, os.O_RDWR), True
        except PermissionError:
            with wider(store, dir_fd, name, stat.S_IRUSR | stat.S_IWUSR, ino=ino) as fd:
                return open_ours(store, fd, b"", os.O_RDWR), True
        except OSError as error:
            if error.errno not in (errno.EROFS, errno.ETXTBSY):
                raise
            return open_ours(store, dir_fd, name, os.O_RDONLY), False

    def created(self, inode: Inode, fd: int, kit: Kit, xattrs: Sealed | None = None) -> FileNode:
        """The node of a file that was made just now, opened once."""
        file = self._node(inode, fd, writable=True)
        file.use_stock(kit)
        file.journal.begin(kit.kek_version, kit.log_wrapped, xattrs)
        file.opens = 1
        return file

    def _node(self, inode: Inode, fd: int, *, writable: bool) -> FileNode:
        state = FileState(self.ctx, inode.ino, inode.log_id, fd, writable=writable)
        journal = Journal(self.ctx, state, _Place(self, inode))
        journal.entry_durable = inode.log_id not in self.new_ids and inode.log_id not in self.moved_ids
        inode.file = FileNode(self.ctx, state, journal)
        inode.file.unlinked = inode.is_unnamed
        self.inodes.open_ids.add(inode.log_id)
        return inode.file

    async def release(self, inode: Inode) -> None:
        """One opening less; the last one appends what no frame says yet and lets the descriptors go.

        Never raises OSError.
        """
        file = inode.file
        assert file is not None
        file.opens -= 1
        if file.opens == 0:
            await self._wind_up(inode, file)

    async def _let_go(self, inode: Inode, file: FileNode) -> None:
        """After `_held`: whoever released it last meanwhile left the rest to us."""
        if file.opens == 0 and inode.file is file:
            await self._wind_up(inode, file)

    async def _wind_up(self, inode: Inode, file: FileNode) -> None:
        journal = file.journal
        while not file.unlinked and journal.loaded and not file.opens:
            with held(file):
                await file.state.lock.acquire_exclusive()
                try:
                    file.state.restore_mtime()
                    await journal.commit()
                except (OSError, CryptfsError) as error:
                    # What was written is still in memory and in its homes; the settling task tries again.
                    log.error("inode %d: frame not written, will retry: %s", inode.ino, error)
                    self.unsettled.add(inode)
                    break
                finally:
                    file.state.lock.release_exclusive()
            if not journal.needs_frame:
                break
        if file.opens or inode.file is not file or (journal.needs_frame and not file.unlinked):
            return
        if not file.unlinked and journal.needs_settling:
            self.unsettled.add(inode)
            return
        self.unsettled.discard(inode)
        if not file.unlinked:
            if journal.loaded:
                inode.settled = True
                inode.know_xattrs(journal.xattrs)
            self._close(inode, file)
        # One without a name stays as it is, frames and all, until the kernel forgets it: it may be opened again through
        # an O_PATH descriptor.
        self.inodes.release(inode)

    def _close(self, inode: Inode, file: FileNode) -> None:
        inode.file = None
        self.inodes.open_ids.discard(inode.log_id)
        file.journal.close()
        file.state.close()

    def _dead(self, inode: Inode) -> None:
        """Nobody comes back to something without a name: its sidecar may go."""
        if inode.file is not None:
            self.unsettled.discard(inode)
            self._close(inode, inode.file)
        self.reaper.add_id(inode.log_id)


class _Place:
    """`journal.Owner` for one open file."""

    __slots__ = ("_files", "_inode")

    def __init__(self, files: Opening, inode: Inode) -> None:
        self._files = files
        self._inode = inode

    async def sync_entry(self) -> None:
        await self._files.sync_entry(self._inode)

    def sidecar_read_ahead(self) -> Replay | None:
        return self._files.prefetcher.take(self._inode.log_id)

    async def warm(self, parsed: Replay) -> None:
        await self._files.prefetcher.warm(self._inode, parsed)


@contextmanager
def held(file: FileNode) -> Iterator[None]:
    """Count as an opening while something is awaited: a close or an unlink meanwhile would close the descriptors."""
    file.opens += 1
    try:
        yield
    finally:
        file.opens -= 1
