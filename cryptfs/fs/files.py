"""Attributes and open files: from an inode to its `FileNode` and back, and everything that ends in a sync."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import trio

from cryptfs.errors import CryptfsError, Damaged
from cryptfs.format.datafile import HEADER_BYTES
from cryptfs.format.sidecar import Sealed
from cryptfs.fs.context import FsContext, log, open_ours
from cryptfs.fs.directory import DirNode
from cryptfs.fs.file import FileNode
from cryptfs.fs.inodes import Inode, InodeTable
from cryptfs.fs.journal import Journal
from cryptfs.fs.prefetch import Prefetcher
from cryptfs.fs.reaper import Reaper
from cryptfs.fs.reconcile import KIND_OF_MODE
from cryptfs.fs.resync import symlink_again
from cryptfs.fs.sealed_log import Replay
from cryptfs.fs.state import FileState
from cryptfs.fs.symlink import decode_target_text, read_target
from cryptfs.ports import Kit
from cryptfs.types import Kind

_SETTLE_INTERVAL_S = 2.0
_NEW_MAX = 200_000


@dataclass(frozen=True, slots=True)
class Attr:
    """What `stat` shows: the entry's own in `tree/`, with the plaintext size in bytes."""

    inode: Inode
    st: os.stat_result
    size: int
    mtime_ns: int | None = None
    """None: the one in `st`."""


@dataclass(frozen=True, slots=True)
class Changes:
    """What setattr asks for; None leaves a field as it is. Times in nanoseconds."""

    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    size: int | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None


_NOTHING = Changes()


class Files:
    """Open files and attributes of one volume."""

    def __init__(self, ctx: FsContext, inodes: InodeTable, reaper: Reaper) -> None:
        self.ctx = ctx
        self.inodes = inodes
        self.reaper = reaper
        self.new_ids: set[bytes] = set()
        """Files and directories made in this epoch whose entry is not known to be durable."""
        self.moved_ids: set[bytes] = set()
        """Those that got another name since it was: an fsync makes that durable, too, as it does on other systems."""
        self.unsettled: set[Inode] = set()
        self.prefetcher = Prefetcher(ctx, inodes)
        self._complained: set[int] = set()

    # attributes ------------------------------------------------------------------------------------------------

    async def attr(self, inode: Inode) -> Attr:
        """Attributes now. Raises ESTALE, `Damaged`, key errors."""
        file = inode.file
        if file is not None:
            return self._attr_open(inode, file)
        if inode.last_st is not None:
            node = self.inodes.dir_nowait(inode) if inode.kind == Kind.DIR else None
            if node is not None:
                # Removed, and somebody has it open: its mode, owner and times can still be changed.
                return Attr(inode, without_links(self.ctx.store.fstat(node.fd)), inode.last_st.st_size)
            header = HEADER_BYTES if inode.kind == Kind.FILE else 0
            return Attr(inode, inode.last_st, max(0, inode.last_st.st_size - header))
        if inode is self.inodes.root or inode.kind == Kind.DIR:
            node = self.inodes.dir_nowait(inode) or await self.inodes.dir(inode)
            st = self.ctx.store.fstat(node.fd)
            return Attr(inode, st, st.st_size)
        node, name = await self.inodes.where(inode)
        st = self.ctx.store.lstat(node.fd, name)
        if st.st_ino != inode.ino:
            raise Damaged("exchanged", "another file lies under this name")
        return await self.attr_of(inode, node, name, st)

    async def attr_of(self, inode: Inode, node: DirNode, name: bytes, st: os.stat_result) -> Attr:
        """Attributes of an entry whose `lstat` is at hand."""
        if inode.kind == Kind.FILE:
            if inode.file is not None:
                return self._attr_open(inode, inode.file)
            if self.ctx.crashed_before and not inode.settled:
                # Its size may not be arithmetic yet: find out, once.
                file = await self.open(inode)
                try:
                    await file.journal.load()
                    return self._attr_open(inode, file)
                finally:
                    await self.release(inode)
            if st.st_size < HEADER_BYTES:
                raise Damaged("data-header", f"{st.st_size} bytes")
            return Attr(inode, st, st.st_size - HEADER_BYTES)
        if inode.kind == Kind.SYMLINK:
            log_id, length = decode_target_text(self.ctx.store.readlink(node.fd, name))
            if log_id != inode.log_id:
                raise Damaged("id-mismatch", "the symlink is another one")
            return Attr(inode, st, length)
        return Attr(inode, st, st.st_size)

    def _attr_open(self, inode: Inode, file: FileNode) -> Attr:
        st = self.ctx.store.fstat(file.state.data_fd)
        size = file.size if file.journal.loaded else max(0, st.st_size - HEADER_BYTES)
        return Attr(inode, st, size, file.state.mtime_ns)

    async def setattr(self, inode: Inode, want: Changes) -> Attr:
        """Change attributes, size first. Raises OSError and what `FileNode.truncate` raises."""
        if inode.last_st is not None and inode.file is None and inode.kind != Kind.DIR:
            # Its last name and its last opening are gone; the kernel still writes back what it kept of its times.
            return await self.attr(inode)
        if want.size is not None:
            await self._set_size(inode, want.size)
        if inode.file is not None:
            inode.file.state.meta_unsynced = True
            where, name = inode.file.state.data_fd, b""
        elif inode.kind == Kind.DIR:
            where, name = (await self.inodes.dir(inode)).fd, b""
        else:
            node, name = await self.inodes.where(inode)
            where = node.fd
        if want.uid is not None or want.gid is not None or want == _NOTHING:
            # chown(-1, -1) arrives as nothing at all and moves ctime, which the same call does below.
            self._chown(where, name, -1 if want.uid is None else want.uid, -1 if want.gid is None else want.gid)
        if want.mode is not None:
            self._chmod(where, name, stat.S_IMODE(want.mode))
        if want.atime_ns is not None or want.mtime_ns is not None:
            self._set_times(inode, where, name, want)
        return await self.attr(inode)

    # Each of these works on `name` in the directory behind `where`, or on `where` itself if there is no name.

    def _chown(self, where: int, name: bytes, uid: int, gid: int) -> None:
        if name:
            self.ctx.store.chown(where, name, uid, gid)
        else:
            self.ctx.store.fchown(where, uid, gid)

    def _chmod(self, where: int, name: bytes, mode: int) -> None:
        if name:
            self.ctx.store.chmod(where, name, mode)
        else:
            self.ctx.store.fchmod(where, mode)

    def _set_times(self, inode: Inode, where: int, name: bytes, want: Changes) -> None:
        store = self.ctx.store
        now = store.lstat(where, name) if name else store.fstat(where)
        known = now.st_mtime_ns if inode.file is None else inode.file.state.mtime_ns
        atime_ns = now.st_atime_ns if want.atime_ns is None else want.atime_ns
        mtime_ns = known if want.mtime_ns is None else want.mtime_ns
        if name:
            store.utimens(where, name, atime_ns, mtime_ns)
        else:
            store.futimens(where, atime_ns, mtime_ns)
        if inode.file is not None:
            inode.file.state.mtime_ns = mtime_ns
            inode.file.state.mtime_stale = False

    @staticmethod
    def drop_set_id(file: FileNode, in_group: Callable[[int], bool]) -> bool:
        """Take set-user-id and set-group-id from an open file, as its being cut by an ordinary user does.

        Set-group-id without group execute is no right, and stays for members of the file's group (`in_group`, given the
        gid). Whether there was anything to take: then the kernel has to be told.
        """
        store = file.state.ctx.store
        st = store.fstat(file.state.data_fd)
        mode = stat.S_IMODE(st.st_mode)
        taken = mode & (stat.S_ISUID | stat.S_ISGID)
        if taken & stat.S_ISGID and not mode & stat.S_IXGRP and in_group(st.st_gid):
            taken &= ~stat.S_ISGID
        if not taken:
            return False
        store.fchmod(file.state.data_fd, mode & ~taken)
        file.state.meta_unsynced = True
        return True

    async def touch(self, inode: Inode) -> None:
        """Move its ctime and nothing else. Raises OSError."""
        file = inode.file
        if file is not None:
            file.state.meta_unsynced = True
            where, name = file.state.data_fd, b""
        elif inode.kind == Kind.DIR:
            where, name = (await self.inodes.dir(inode)).fd, b""
        else:
            node, name = await self.inodes.where(inode)
            where = node.fd
        self._set_times(inode, where, name, Changes())

    async def _set_size(self, inode: Inode, size: int) -> None:
        if inode.kind != Kind.FILE:
            code = errno.EISDIR if inode.kind == Kind.DIR else errno.EINVAL
            raise OSError(code, os.strerror(code))
        file = await self.open(inode, writing=True)
        try:
            await file.truncate(size)
        finally:
            await self.release(inode)

    async def readlink(self, inode: Inode) -> bytes:
        """A symlink's target."""
        return await read_target(self.ctx, inode.log_id)

    # open files ------------------------------------------------------------------------------------------------

    async def open(self, inode: Inode, *, writing: bool = False) -> FileNode:
        """Open a regular file once more; pair with `release`.

        Nothing but the data file is touched before it is used.
        """
        file = inode.file
        if file is None:
            node, name = await self.inodes.where(inode)
            file = inode.file
            if file is None:
                fd, writable = self._open_data(node.fd, name)
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

    def _open_data(self, dir_fd: int, name: bytes) -> tuple[int, bool]:
        """(descriptor, writable).

        A file its owner may not open is opened all the same: the kernel checked the caller.
        """
        store = self.ctx.store
        if self.ctx.read_only:
            return open_ours(store, dir_fd, name, os.O_RDONLY), False
        try:
            return open_ours(store, dir_fd, name, os.O_RDWR), True
        except PermissionError:
            mode = stat.S_IMODE(store.lstat(dir_fd, name).st_mode)
            store.chmod(dir_fd, name, mode | stat.S_IRUSR | stat.S_IWUSR)
            try:
                return open_ours(store, dir_fd, name, os.O_RDWR), True
            finally:
                store.chmod(dir_fd, name, mode)
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
            with _held(file):
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
        if journal.loaded:
            inode.settled = True
            inode.know_xattrs(journal.xattrs)
        inode.file = None
        self.inodes.open_ids.discard(inode.log_id)
        journal.close()
        file.state.close()
        if file.unlinked:
            self.reaper.add_id(inode.log_id)
        self.inodes.release(inode)

    # durability ------------------------------------------------------------------------------------------------

    async def sync_entry(self, inode: Inode) -> None:
        """Make the way to a file durable: its directory, and those above that are new or moved themselves."""
        undo = self.new_ids if inode.log_id in self.new_ids else self.moved_ids
        self.new_ids.discard(inode.log_id)
        self.moved_ids.discard(inode.log_id)
        try:
            if inode.paths:
                await self.sync_dirs(inode.paths[-1][0])
        except BaseException:
            undo.add(inode.log_id)
            raise

    def moved(self, inode: Inode | None, log_id: bytes) -> None:
        """Something has a name it had not when its entry became durable."""
        if log_id not in self.new_ids:
            self.moved_ids.add(log_id)
            if inode is not None and inode.file is not None:
                inode.file.journal.entry_durable = False

    async def sync_dirs(self, inode: Inode) -> None:
        """Make a directory durable, and those above it as far as they are new or moved. Raises OSError."""
        here: Inode | None = inode
        done: list[bytes] = []
        while here is not None:
            node = await self.inodes.dir(here)
            node.pins += 1
            try:
                await node.sync()
                await self.sync_targets(node)
            finally:
                node.pins -= 1
            done.append(here.log_id)
            onward = here.log_id in self.new_ids or here.log_id in self.moved_ids
            here = here.paths[-1][0] if onward and here.paths else None
        # Only now: whoever finds one of them durable goes no further up.
        self.new_ids.difference_update(done)
        self.moved_ids.difference_update(done)

    async def sync_targets(self, node: DirNode) -> None:
        """Sidecars of new symlinks in a directory: their targets are part of the entry."""
        if len(self.new_ids) == 0:
            return
        new = [e for e in node.entries.values() if e.kind == Kind.SYMLINK and e.log_id in self.new_ids]
        if new and self.ctx.doubts:
            for entry in new:
                await symlink_again(self.ctx, entry.log_id)
        elif new:
            await self.ctx.sync_everything()
        self.new_ids.difference_update(e.log_id for e in new)

    def _complain(self, inode: Inode, text: str) -> None:
        """Log what failed, once until it succeeds.

        It is tried again every few seconds, for as long as the agent is away.
        """
        if inode.ino not in self._complained:
            self._complained.add(inode.ino)
            log.error("inode %d: %s", inode.ino, text)

    async def settle(self) -> None:
        """Sync what waits for it and close what nobody needs. Errors are logged; it is tried again."""
        self.unsettled.update(i for i in self.inodes.with_files() if i.file is not None and i.file.journal.bloated)
        for inode in list(self.unsettled):
            file = inode.file
            if file is None:
                self.unsettled.discard(inode)
                continue
            good = False
            with _held(file):
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

    async def serve(self) -> None:
        """Settle now and then, for ever.

        Frames too: what a program that keeps its file open and never syncs wrote is then lost to a killed daemon for
        seconds only.
        """
        while True:
            await trio.sleep(_SETTLE_INTERVAL_S)
            await self.commit_all()
            await self.settle()

    async def sync_all(self) -> bool:
        """Sync every file somebody has open or that is not settled; False if one could not be."""
        good = True
        for inode in self.inodes.with_files():
            file = inode.file
            if file is None or file.unlinked or not file.journal.loaded:
                continue
            with _held(file):
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

    async def commit_all(self) -> bool:
        """Append every frame that is owed; False if one could not be."""
        good = True
        for inode in self.inodes.with_files():
            file = inode.file
            if file is None or file.unlinked or not file.journal.loaded:
                continue
            with _held(file):
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


_STAT_EXTRAS = ("st_atime_ns", "st_mtime_ns", "st_ctime_ns", "st_blocks", "st_blksize", "st_rdev")


def without_links(st: os.stat_result) -> os.stat_result:
    """The same attributes with a link count of 0."""
    fields = list(st)
    fields[stat.ST_NLINK] = 0
    return os.stat_result(fields, {name: getattr(st, name) for name in _STAT_EXTRAS})


class _Place:
    """`journal.Owner` for one open file."""

    __slots__ = ("_files", "_inode")

    def __init__(self, files: Files, inode: Inode) -> None:
        self._files = files
        self._inode = inode

    async def sync_entry(self) -> None:
        await self._files.sync_entry(self._inode)

    def sidecar_read_ahead(self) -> Replay | None:
        return self._files.prefetcher.take(self._inode.log_id)

    async def warm(self, parsed: Replay) -> None:
        await self._files.prefetcher.warm(self._inode, parsed)


@contextmanager
def _held(file: FileNode) -> Iterator[None]:
    """Count as an opening while something is awaited: a close or an unlink meanwhile would close the descriptors."""
    file.opens += 1
    try:
        yield
    finally:
        file.opens -= 1


def kind_of(st: os.stat_result) -> Kind:
    """What an `lstat` says an entry is."""
    return KIND_OF_MODE[stat.S_IFMT(st.st_mode)]
