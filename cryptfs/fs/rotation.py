"""KEK rotation: every sidecar and `.dir` is rewritten with fresh wraps under the newest KEK; no data file is touched.

A log is rewritten by whoever it belongs to: a file's by its `Journal`, a directory's by its `DirNode`, a symlink's or
special file's by `Xattrs`. So there is one way to it, with its locks, whether programs use it meanwhile or not. This
module finds all of them:

1. Nothing made under an older KEK is handed out any more (`DekProvider.renew`), and whatever took such a thing before
   has come to its end (`_quiet`). From here on nothing new is under an older KEK.
2. The tree is walked from the root. What gets another name meanwhile is told by `Namespace.on_arrival`, so that
   nothing slips from where the walk has not been to where it has.
3. Files that are open and have no name any more, and what the kernel can still open without one.
4. `state` is written anew, under a new key (`epoch.reseal`).
5. Everything is synced, then `sidecars/` is looked through once more.

Each log is one replacement (`SealedLog.rewrite`): a crash between any two calls leaves the old log, perhaps with a
stray `.new` beside it, or the new one. Both are whole, and say the same. What is done is told by the logs' own KEK
versions and nothing else, so whoever begins anew goes on where the crash was.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Awaitable, Callable
from collections.abc import Set as AbstractSet
from contextlib import ExitStack
from dataclasses import dataclass

import trio

from cryptfs.errors import CryptfsError, Damaged
from cryptfs.format.dirlog import Entry
from cryptfs.fs.context import log
from cryptfs.fs.directory import DirNode, pinned
from cryptfs.fs.epoch import reseal
from cryptfs.fs.inodes import Inode
from cryptfs.fs.older import SIDECAR_DIRS, older, sidecar_ids
from cryptfs.fs.pace import Pace, Turn
from cryptfs.fs.volume import Volume
from cryptfs.types import Kind

_PASSES = 3
"""Walks before what is left counts as left. The second one finds what was busy being made during the first."""
_SKIPS = 1000
"""Entries passed over before other tasks get their turn."""
_DIRS_WALKED = 8
"""Directories at a time, if there is nobody to disturb."""
_DIRS_AT_ONCE, _SCAN_AT_ONCE = 16, 64
_STOPS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE})
"""What is wrong with everything, not with one file."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Logs: all there are to rewrite (as far as is known), those rewritten, those that could not be."""

    total: int
    done: int
    failed: int


class Rotation:
    """To KEK `kek_version` or a newer one. `run` it; cancelled or failed, it can be run again, here or elsewhere."""

    def __init__(self, volume: Volume, kek_version: int, pace: Pace | None = None) -> None:
        """`pace`: without one, one log after the other without a rest."""
        self.kek_version = kek_version
        self.left: frozenset[bytes] = frozenset()
        """After `run`: ids of logs that need an older KEK. Empty: no older KEK is needed by anything."""
        self.failures: dict[bytes, str] = {}
        """Why a log could not be rewritten, by id."""
        self._volume = volume
        self._ctx = volume.ctx
        self._pace = Pace() if pace is None else pace
        self._doubts = 0
        self._done = 0
        self._expected = 0
        self._seen_dirs: set[bytes] = set()
        self._blind = False
        """Some directory cannot be read: what is in it was not found."""
        self._arrivals: list[tuple[Inode, bytes]] = []
        self._met: set[bytes] = set()

    @property
    def progress(self) -> Progress:
        """Now."""
        failed = len(self.failures)
        return Progress(max(self._expected, self._done + failed), self._done, failed)

    async def run(self) -> None:
        """Rewrite everything that needs it, and find out what is `left`.

        Raises OSError if the disk is full or read-only, key errors; what is done by then stays done.
        """
        if self._ctx.read_only:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        names = self._volume.names
        assert names.on_arrival is None, "one rotation at a time"
        names.on_arrival = self._arrived
        # Those that still fail are met again; those that were deleted or mended meanwhile are not.
        self.failures.clear()
        self._doubts = self._ctx.doubts
        try:
            self._ctx.keys.renew(self.kek_version)
            await self._quiet()
            # Once, so that what programs made and did not sync costs no syncs of its own.
            await self._ctx.freshness.sync()
            needing = await self._scan(deep=False)
            self._expected = self._done + len(needing)
            await self._everything(needing)
            await reseal(self._ctx)
            await self._look_again()
        finally:
            names.on_arrival = None
            self._forget_arrivals()

    async def _look_again(self) -> None:
        """Whether the walk missed anything; and whatever a power cut may take back is no rewriting."""
        for _ in range(_PASSES):
            needing = await self._scan(deep=True)
            if not needing:
                break
            done = self._done
            self._met.clear()
            await self._everything(needing)
            if self._done == done:
                break
        else:
            needing = await self._scan(deep=True)
        await self._ctx.freshness.sync()
        if self._ctx.doubts != self._doubts:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        # A sidecar that no name leads to is a crash's leaving. If some directory cannot be read, it may be a file's.
        named = needing - self._volume.reaper.dead if self._blind else needing & self._met
        self.left = frozenset(self.failures) | named
        self._expected = 0

    async def _quiet(self) -> None:
        """Wait for the end of whatever may have taken a kit or a key before `renew`.

        A kit is taken under the lock of the directory that it is for.
        """
        for node in self._volume.inodes.open_dirs():
            with pinned(node):
                async with node.lock.shared():
                    pass
        await self._volume.inodes.quiet()
        await self._volume.xattrs.quiet()

    async def _scan(self, *, deep: bool) -> frozenset[bytes]:
        """Ids of sidecars that name an older KEK."""
        found: list[bytes] = []
        for first in range(0, SIDECAR_DIRS, _DIRS_AT_ONCE):
            ids = await self._ctx.in_thread(sidecar_ids, self._ctx, range(first, first + _DIRS_AT_ONCE))
            for at in range(0, len(ids), _SCAN_AT_ONCE):
                piece = ids[at : at + _SCAN_AT_ONCE]
                async with await self._pace.turn():
                    found += await self._ctx.in_thread(self._older, piece, deep)
        return frozenset(found)

    def _older(self, ids: list[bytes], deep: bool) -> list[bytes]:  # noqa: FBT001 - a thread's call takes no keywords
        return older(self._ctx, ids, self.kek_version, deep=deep)

    # all there is ----------------------------------------------------------------------------------------------

    async def _everything(self, wanted: AbstractSet[bytes]) -> None:
        """What has a name, what got another one meanwhile, what is open: of these ids; and all directories."""
        self._seen_dirs.clear()
        self._blind = False
        await self._walk(self._volume.root, wanted)
        while True:
            while self._arrivals:
                parent, log_id = self._arrivals.pop()
                try:
                    await self._one_arrival(parent, log_id, wanted)
                finally:
                    self._let_go(parent)
            for inode in self._volume.inodes.with_files():
                await self._open_file(inode)
            for inode in self._volume.inodes.unnamed():
                await self._unnamed(inode)
            if not self._arrivals:
                return

    async def _walk(self, top: Inode, wanted: AbstractSet[bytes]) -> None:
        """What is below a directory, and it itself: several directories at a time if there is nobody to disturb."""
        todo, failed, at_work, ended = [self._hold(top)], list[Exception](), 0, trio.Event()
        try:
            async with trio.open_nursery() as nursery:

                async def one(inode: Inode) -> None:
                    nonlocal at_work
                    try:
                        await self._directory(inode, wanted, todo)
                    except (OSError, CryptfsError) as error:
                        failed.append(error)
                        nursery.cancel_scope.cancel()
                    finally:
                        self._let_go(inode)
                        at_work -= 1
                        ended.set()

                while todo or at_work:
                    if todo and at_work < (_DIRS_WALKED if self._pace.hurries else 1):
                        at_work += 1
                        nursery.start_soon(one, todo.pop())
                    else:
                        ended = trio.Event()
                        await ended.wait()
        finally:
            for inode in todo:
                self._let_go(inode)
        if failed:
            raise failed[0]

    async def _directory(self, inode: Inode, wanted: AbstractSet[bytes], todo: list[Inode]) -> None:
        """One directory's own log and what is in it, but for directories, which are added to `todo`."""
        if inode.log_id in self._seen_dirs:
            return
        self._seen_dirs.add(inode.log_id)
        with ExitStack() as kept:
            async with await self._pace.turn():
                node = await self._opened(inode)
                if node is None:
                    return
                kept.enter_context(pinned(node))
                await self._try(inode.log_id, lambda: self._own_log(node), lambda: not node.removed)
            await self._entries(inode, node, wanted, todo)

    async def _entries(self, inode: Inode, node: DirNode, wanted: AbstractSet[bytes], todo: list[Inode]) -> None:
        failed: list[Exception] = []
        async with trio.open_nursery() as nursery:

            async def one(entry: Entry, turn: Turn) -> None:
                try:
                    async with turn:
                        # What went elsewhere meanwhile has arrived there.
                        if _is_in(node, entry):
                            await self._entry(inode, node, entry, todo, turn)
                except (OSError, CryptfsError) as error:
                    failed.append(error)
                    nursery.cancel_scope.cancel()

            for number, entry in enumerate(list(node.entries.values())):
                if self._is_to_do(entry, wanted):
                    nursery.start_soon(one, entry, await self._pace.turn())
                elif number % _SKIPS == 0:
                    await trio.lowlevel.checkpoint()
        if failed:
            raise failed[0]

    async def _opened(self, inode: Inode) -> DirNode | None:
        """A directory; None if it is gone, or cannot be read, and with it nothing that is in it."""
        found: list[DirNode] = []

        async def work() -> bool:
            if inode.last_st is None:
                found.append(self._volume.inodes.dir_nowait(inode) or await self._volume.inodes.dir(inode))
            return False

        await self._try(inode.log_id, work, lambda: inode.last_st is None)
        if not found and inode.log_id in self.failures:
            self._blind = True
        return found[0] if found else None

    async def _own_log(self, node: DirNode) -> bool:
        if node.is_under(self.kek_version):
            return False
        self._expected += 1
        await node.rotate(self.kek_version, self._volume.files.sync_targets, at_once=self._at_once)
        return True

    async def _one_arrival(self, parent: Inode, log_id: bytes, wanted: AbstractSet[bytes]) -> None:
        todo: list[Inode] = []
        async with await self._pace.turn() as turn:
            node = await self._opened(parent)
            if node is None:
                return
            with pinned(node):
                for entry in [e for e in node.entries.values() if e.log_id == log_id]:
                    if self._is_to_do(entry, wanted):
                        await self._entry(parent, node, entry, todo, turn)
        while todo:
            inode = todo.pop()
            try:
                await self._walk(inode, wanted)
            finally:
                self._let_go(inode)

    @property
    def _at_once(self) -> bool:
        """Whether each log is made durable by itself. A program's next fsync would wait for what was left undone here.

        Above all for the old log's blocks to be freed, where the file system discards them (ext4(5), `discard`).
        """
        return not self._pace.hurries

    # one thing -------------------------------------------------------------------------------------------------

    def _is_to_do(self, entry: Entry, wanted: AbstractSet[bytes]) -> bool:
        """A directory where the walk was not yet; or a log that was found to need it."""
        if entry.kind == Kind.DIR:
            return entry.log_id not in self._seen_dirs
        if entry.log_id in wanted:
            self._met.add(entry.log_id)
            return True
        return False

    async def _entry(self, parent: Inode, node: DirNode, entry: Entry, todo: list[Inode], turn: Turn) -> None:
        log_id = entry.log_id
        if entry.kind != Kind.DIR:
            await self._try(log_id, lambda: self._leaf(parent, node, entry, turn), lambda: _is_in(node, entry))
            return
        below: list[Inode] = []
        await self._try(log_id, lambda: self._below(parent, node, entry, below), lambda: _is_in(node, entry))
        self._blind = self._blind or (not below and log_id in self.failures)
        todo += below

    async def _below(self, parent: Inode, node: DirNode, entry: Entry, below: list[Inode]) -> bool:
        below.append(self._hold((await self._volume.names.behind(parent, node, entry)).inode))
        return False

    async def _leaf(self, parent: Inode, node: DirNode, entry: Entry, turn: Turn) -> bool:
        inode = self._hold((await self._volume.names.behind(parent, node, entry)).inode)
        try:
            if entry.kind == Kind.FILE:
                return await self._file(inode, turn)
            # Nobody has such a thing open, which would keep its sidecar from being deleted under our hands.
            async with self._volume.reaper.burying:
                if not _is_in(node, entry):
                    return False
                await self._volume.xattrs.rotate(inode, self.kek_version, at_once=self._at_once)
                return True
        finally:
            self._let_go(inode)

    async def _file(self, inode: Inode, turn: Turn) -> bool:
        """Rewrite a file's log, opening the file if nobody has it open; whether there was anything to do."""
        file = await self._volume.files.open(inode)
        try:
            if not file.journal.loaded:
                await file.journal.load(to_read=False)
            if file.journal.is_under(self.kek_version):
                return False
            await file.journal.rotate(self.kek_version, turn.rest, at_once=self._at_once)
            return True
        finally:
            await self._volume.files.release(inode)

    async def _open_file(self, inode: Inode) -> None:
        """One that was open when the walk had ended: also one without a name, or without a frame."""
        file = inode.file
        if file is None or (file.journal.loaded and file.journal.is_under(self.kek_version)):
            return
        if not file.journal.loaded and not file.unlinked:
            return  # It has a name, and its sidecar was looked at there.
        async with await self._pace.turn() as turn:
            await self._try(inode.log_id, lambda: self._file(inode, turn), lambda: inode.file is not None)

    async def _unnamed(self, inode: Inode) -> None:
        """What nobody has open, and the kernel can still come back to (`Inode.kept_fd`)."""
        self._hold(inode)
        try:
            async with await self._pace.turn() as turn:
                await self._try(inode.log_id, lambda: self._by_itself(inode, turn), lambda: inode.lookups > 1)
        finally:
            self._let_go(inode)

    async def _by_itself(self, inode: Inode, turn: Turn) -> bool:
        if inode.kind == Kind.FILE:
            return await self._file(inode, turn)
        return await self._volume.xattrs.rotate(inode, self.kek_version, at_once=self._at_once)

    async def _try(self, log_id: bytes, work: Callable[[], Awaitable[bool]], is_there: Callable[[], bool]) -> None:
        """Do it and count it. One that fails is left as it is; one that is not there any more is none."""
        try:
            if await work():
                self._done += 1
        except Damaged as error:
            reason = str(error)
        except OSError as error:
            if error.errno in _STOPS:
                raise
            reason = error.strerror or str(error)
        else:
            self.failures.pop(log_id, None)
            return
        if not is_there():
            self.failures.pop(log_id, None)
        elif self.failures.get(log_id) != reason:
            self.failures[log_id] = reason
            log.error("log %s: not rewritten under KEK version %d: %s", log_id.hex(), self.kek_version, reason)

    # references ------------------------------------------------------------------------------------------------

    def _hold(self, inode: Inode) -> Inode:
        inode.lookups += 1
        return inode

    def _let_go(self, inode: Inode) -> None:
        inode.lookups -= 1
        self._volume.inodes.release(inode)

    def _arrived(self, parent: Inode, log_id: bytes) -> None:
        self._arrivals.append((self._hold(parent), log_id))

    def _forget_arrivals(self) -> None:
        while self._arrivals:
            self._let_go(self._arrivals.pop()[0])


def _is_in(node: DirNode, entry: Entry) -> bool:
    return node.entries.get(entry.sealed) == entry
