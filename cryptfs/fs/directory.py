"""One directory: its names (`dir_entries`), its log read (`dir_loading`), and here, made durable and rewritten.

Once a log is all on disk under another name it takes the old one's place. A crash leaves one of the two. Both say the
same, but where the directory is given to a domain (`give_to_domain`).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

from cryptfs.format.dirlog import DirPayload
from cryptfs.format.log import LogHeader
from cryptfs.format.sidecar import Sealed
from cryptfs.fs.dir_loading import DirLoading
from cryptfs.fs.resync import log_again
from cryptfs.fs.rewrapping import Rewrapping
from cryptfs.fs.sealed_log import Frame
from cryptfs.names import DIR_LOG

_COMPACT_MIN_BYTES = 64 * 1024
_FRAME_BYTES = 160


class DirNode(DirLoading):
    """An open directory."""

    @property
    def sync_failed(self) -> bool:
        """A sync of this directory, or of everything, failed: the next one is believed only after `log_again`."""
        return self._distrusted or self._doubts != self.ctx.doubts

    async def sync(self) -> None:
        """Make the log and the directory durable. Raises OSError."""
        # One at a time: of two at once only one would be told of an error, and a rewriting would close the log under
        # their hands.
        async with self._syncing:
            await self._sync()

    async def _sync(self) -> None:
        await self._written_again()
        await self.flush()
        # A change may be under way that has its frame and waits for something before its call on the tree.
        generation, store = self.done_gen, self.ctx.store

        def both() -> None:
            store.fdatasync(self.log.fd)
            store.fsync(self.fd)

        # Believed only if it returns: see `resync`.
        self._distrusted = True
        with self.ctx.freshness.doubted_on_failure(self.dir_id):
            await self.ctx.in_thread(both)
        self._distrusted = False
        self.durable_gen = max(self.durable_gen, generation)
        self.ctx.freshness.durable(self.dir_id, generation)

    async def _written_again(self) -> None:
        """After a sync that failed."""
        if self.sync_failed:
            doubts = self.ctx.doubts
            await log_again(self.ctx, self.log, bytearray((await self.keys()).log_key), self.durable_gen)
            self._doubts = doubts

    async def sync_log(self) -> None:
        """Make the log durable, and nothing of the tree. Raises OSError."""
        async with self._syncing:
            await self._written_again()
            before, self._distrusted = self._distrusted, True
            with self.ctx.freshness.doubted_on_failure(self.dir_id):
                await self.ctx.in_thread(self.ctx.store.fdatasync, self.log.fd)
            self._distrusted = before

    async def compact(self, prepare: Callable[[DirNode], Awaitable[None]] | None = None) -> None:
        """Rewrite the log as one snapshot when most of it is dead frames.

        `prepare` makes the targets of new symlinks durable: what a snapshot names is not new any more.
        """
        live = sum(len(e.sealed) + 24 for e in self.entries.values()) + _FRAME_BYTES
        live += len(self.xattrs.sealed) if self.xattrs is not None else 0
        if self._log is None or self.log.end < _COMPACT_MIN_BYTES + 3 * live or self.removed or self.ctx.read_only:
            return
        self.pins += 1
        try:
            async with self.lock.exclusive():
                if prepare is not None:
                    await prepare(self)
                await self._rewrite()
        finally:
            self.pins -= 1

    async def give_to_domain(self, domain_id: bytes) -> None:
        """Make this the place of a volume. Raises OSError, key errors; then it is what the log on disk says.

        The caller holds the lock, and there are no entries. The log is rewritten: an older prefix of it that says
        nothing of the domain would show an empty directory to write into.
        """
        if not self.writable:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        before, generation = self.domain, self.last_gen
        self.domain = domain_id
        try:
            await self._rewrite()
        finally:
            if self.last_gen == generation:
                self.domain = before

    async def _rewrite(self) -> None:
        async with self._syncing:
            await self.flush()
            frame = self._snapshot(self.ctx.next_generation(), self.xattrs)
            await self._replace(bytearray((await self.keys()).log_key), self.header, frame)
            await self._replaced()

    def _snapshot(self, generation: int, xattrs: Sealed | None) -> Frame:
        payload = DirPayload(tuple(self.entries.values()), xattrs=xattrs, domain=self.domain)
        return Frame(generation, self.durable_gen, len(self.entries), payload.encode(), flags=payload.flags)

    async def _replace(self, key: bytearray, header: LogHeader, *frames: Frame) -> None:
        """Put a log of these frames in this one's place. `key` is wiped. Raises OSError; then nothing has changed."""
        with self._times_kept():
            try:
                self._log = await self.ctx.in_thread(
                    self.log.rewrite, self.ctx.store, self.fd, DIR_LOG, key, header, *frames
                )
            finally:
                key[:] = bytes(len(key))
            self.header = header
            self.last_gen = frames[-1].generation
            self.settled()

    @contextmanager
    def _times_kept(self) -> Iterator[None]:
        """The log's new name is no change of the directory the user sees. Those that are set meanwhile are kept."""
        before = self.ctx.store.fstat(self.fd)
        self.times_ns = before.st_atime_ns, before.st_mtime_ns
        try:
            yield
        finally:
            times_ns, self.times_ns = self.times_ns, None
            self.ctx.store.futimens(self.fd, *times_ns)

    def set_times(self, atime_ns: int, mtime_ns: int) -> None:
        """Raises OSError."""
        self.ctx.store.futimens(self.fd, atime_ns, mtime_ns)
        if self.times_ns is not None:
            self.times_ns = atime_ns, mtime_ns

    @property
    def mtime_ns(self) -> int | None:
        """What to show; None: the directory's own in `tree/`."""
        return None if self.times_ns is None else self.times_ns[1]

    async def _replaced(self) -> None:
        """After `_replace`: make it durable that the new log has the name. Raises OSError."""
        before_sync, self._distrusted = self._distrusted, True
        with self.ctx.freshness.doubted_on_failure(self.dir_id):
            await self.ctx.in_thread(self.ctx.store.fsync, self.fd)
        self._distrusted = before_sync

    # rotation --------------------------------------------------------------------------------------------------

    def is_under(self, kek_version: int) -> bool:
        """Whether everything that using this directory takes is wrapped under this KEK or a newer one."""
        return self.header.kek_version >= kek_version and (
            self.xattrs is None or self.xattrs.kek_version >= kek_version
        )

    async def rotate(
        self, kek_version: int, prepare: Callable[[DirNode], Awaitable[None]], *, at_once: bool = False
    ) -> None:
        """Rewrite the log under the newest KEK, at least `kek_version`, with a new MAC key; nothing to do if it is.

        `prepare` as for `compact`, `at_once` as for `Journal.rotate`. Without it, that the new log has the name is not
        durable before the directory's next sync. It need not be: what comes into the tree later does not outlast a
        crash without it. Raises OSError, key errors; then the log is as it was, or, if only the last sync failed, the
        new one.
        """
        self.pins += 1
        try:
            async with self.lock.exclusive():
                if not self.removed and not self.is_under(kek_version):
                    await prepare(self)
                    async with self._syncing:
                        await self._rotate(Rewrapping(self.ctx.keys, self.dir_id, kek_version))
                        if at_once:
                            await self._replaced()
        finally:
            self.pins -= 1

    async def _rotate(self, anew: Rewrapping) -> None:
        await self.flush()
        xattrs = await anew.sealed(self.xattrs)
        header, key = await anew.names_and_log_key(self.header)
        # See `Journal._rotate`: the snapshot is what the last frame said, under its number.
        snapshot = self._snapshot(self.last_gen, xattrs)
        word = Frame(self.ctx.next_generation(), self.durable_gen, len(self.entries), DirPayload().encode())
        await self._replace(key, header, snapshot, word)
        self.xattrs = xattrs


@contextmanager
def pinned(node: DirNode) -> Iterator[None]:
    """Keep a directory's descriptors while something is awaited."""
    node.pins += 1
    try:
        yield
    finally:
        node.pins -= 1
