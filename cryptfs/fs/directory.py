"""One directory: its sealed log, its names, what it says it holds.

A change is one frame first and the call on the tree second. A crash between the two, or a power cut that keeps one
without the other, leaves
`.dir` and the tree of two minds about one entry; its epoch did not end cleanly, and `reconcile` lets the tree decide.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import trio

from cryptfs.crypto.siv import NameCipher
from cryptfs.errors import CryptfsError, Damaged
from cryptfs.format.dirlog import DirPayload, Entry, decode_dir
from cryptfs.format.log import DELTA, KIND_DIR, Head, LogHeader
from cryptfs.format.sidecar import Sealed
from cryptfs.fs.context import FsContext, open_log
from cryptfs.fs.freshness import check
from cryptfs.fs.locks import SharedLock
from cryptfs.fs.log_gap import acknowledged_in_tail
from cryptfs.fs.resync import log_again
from cryptfs.fs.rewrapping import Rewrapping
from cryptfs.fs.sealed_log import Frame, Replay, SealedLog, authenticate, parse, read_log
from cryptfs.names import DIR_LOG, tree_name
from cryptfs.ports import KeyRun, Kit
from cryptfs.types import ID_BYTES, Purpose, epoch_of

_COMPACT_MIN_BYTES = 64 * 1024
_FRAME_BYTES = 160


@dataclass(frozen=True, slots=True)
class DirKeys:
    """A directory's keys in clear; good until the next await."""

    log_key: memoryview
    names: NameCipher


class DirNode:
    """An open directory. `entries`: sealed name -> entry, in the order they were made.

    `lock` is held alone by whoever changes the directory; looking a name up takes no lock, since no change awaits
    half-way.
    """

    def __init__(self, ctx: FsContext, ino: int, fd: int, header: LogHeader) -> None:
        self.ctx = ctx
        self.ino = ino
        self.fd = fd
        self.header = header
        self.entries: dict[bytes, Entry] = {}
        self.xattrs: Sealed | None = None
        """The xattr set, sealed; None: there are none."""
        self.domain = b""
        """The id of the volume whose place this is (`fs.domain`); then it has no entries."""
        self.lock = SharedLock()
        self.pins = 0
        self.removed = False
        self.writable = True
        self.listed = False
        """Somebody listed it: its files may be read in that order next."""
        self.durable_gen = 0
        self.last_gen = 0
        self.done_gen = 0
        """The newest frame whose call on the tree is done: what comes after it is not durable by syncing both."""
        self._log: SealedLog | None = None
        self.unsure: set[bytes] = set()
        """Sealed names recorded in an epoch that ended uncleanly: what they name may never have reached the disk."""
        self.bindings: dict[bytes, list[Entry]] = {}
        """After a crash only: what each sealed name was bound to since the log was last known to be durable."""
        self._distrusted = False
        self._doubts = 0
        self._syncing = trio.Lock()
        self._owed: dict[bytes, None] = {}
        """Sealed names about which the log could not be told the truth (disk full): said before anything else is."""
        self._strays: list[bytes] = []
        """Names in the tree that stand for nothing and could not be taken away."""

    @property
    def dir_id(self) -> bytes:
        """16 bytes."""
        return self.header.log_id

    @property
    def log(self) -> SealedLog:
        """The open log."""
        assert self._log is not None
        return self._log

    def key_runs(self) -> list[KeyRun]:
        """What to unwrap to use this directory."""
        return key_runs(self.header)

    async def keys(self) -> DirKeys:
        """Log key and names, from the cache or the agent; good until the next await."""
        peek = self.ctx.keys.peek
        while True:
            header = self.header
            log_key, names_key = peek(header.log_wrapped), peek(header.names_wrapped)
            if log_key is None or names_key is None:
                (log_key,), (names_key,) = await self.ctx.keys.unwrap(key_runs(header))
            # A rotation gives the log another key; whoever waited must not append with the one before.
            if header is self.header:
                # A cipher object per use costs less than 2 µs; kept, it would keep the key past its time.
                return DirKeys(log_key, NameCipher(names_key, self.dir_id))

    def names_nowait(self) -> NameCipher | None:
        """The name cipher if its key is in the cache."""
        key = self.ctx.keys.peek(self.header.names_wrapped)
        return NameCipher(key, self.dir_id) if key is not None else None

    # changing --------------------------------------------------------------------------------------------------

    def apply(self, log_key: memoryview, entries: Iterable[Entry] = (), gone: Iterable[bytes] = ()) -> None:
        """Append one frame, then hold it true. Raises OSError; then nothing has changed.

        The caller holds the lock and does the call on the tree next, without an await between.
        """
        if not self.writable:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        payload = DirPayload(tuple(entries), tuple(gone))
        try:
            self._sweep(payload.entries)
            self._flush(log_key)
            self._append(log_key, payload)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT) or payload.entries:
                raise
            # Removing must work on a full disk: it is how one makes room. The frame follows when there is some.
            self._owe(payload)
        self._hold(payload)

    def set_xattrs(self, log_key: memoryview, xattrs: Sealed | None) -> None:
        """Another xattr set, in a frame. Raises OSError; then nothing has changed. The caller holds the lock."""
        if not self.writable:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        self._sweep()
        self._flush(log_key)
        payload = DirPayload(xattrs=xattrs, xattrs_gone=xattrs is None)
        self._append(log_key, payload)
        self._hold(payload)

    def revert(self, log_key: memoryview, entries: Iterable[Entry] = (), gone: Iterable[bytes] = ()) -> None:
        """After the call on the tree failed: say that things are as before. Never raises; at worst it is said later."""
        payload = DirPayload(tuple(entries), tuple(gone))
        self._hold(payload)
        self._owe(payload)
        with suppress(OSError):
            self._flush(log_key)

    async def take_back(self, entries: Iterable[Entry] = (), gone: Iterable[bytes] = ()) -> None:
        """As `revert`, for whoever has awaited since the frame: things are as before at once, also without keys."""
        payload = DirPayload(tuple(entries), tuple(gone))
        self._hold(payload)
        self._owe(payload)
        with suppress(OSError, CryptfsError):
            await self.flush()

    def discard(self, name: bytes) -> None:
        """Take away what a failed call left in the tree under `name`; at worst it is done later, before it matters."""
        self._strays.append(name)
        self._sweep()

    def _sweep(self, wanted: Iterable[Entry] = ()) -> None:
        """Take strays away. Raises OSError if one stays whose name is wanted."""
        left: list[bytes] = []
        names = {tree_name(entry.sealed) for entry in wanted} if self._strays else set()
        failed: OSError | None = None
        for name in self._strays:
            try:
                self._take_away(name)
            except OSError as error:
                left.append(name)
                failed = error if name in names else failed
        self._strays = left
        if failed is not None:
            raise failed

    def _take_away(self, name: bytes) -> None:
        store = self.ctx.store
        with suppress(FileNotFoundError):
            try:
                store.unlink(self.fd, name)
            except IsADirectoryError:
                store.rename(self.fd, name, self.ctx.dir_fd(b"tmp"), self.ctx.random(ID_BYTES).hex().encode())

    def _owe(self, payload: DirPayload) -> None:
        self._owed.update(dict.fromkeys([*payload.gone, *(entry.sealed for entry in payload.entries)]))

    def _flush(self, log_key: memoryview) -> None:
        self.log.mend(self.ctx.store)
        if self._owed:
            there = tuple(self.entries[sealed] for sealed in self._owed if sealed in self.entries)
            self._append(log_key, DirPayload(there, tuple(s for s in self._owed if s not in self.entries)))
            self._owed.clear()

    async def flush(self) -> None:
        """Write what the log could not take before. Raises OSError."""
        if self.has_pending:
            self._sweep()
            self._flush((await self.keys()).log_key)
            if self._strays:
                raise OSError(errno.EIO, "something that failed half-way could not be taken back")
        if self.lock.idle:
            self.settled()

    @property
    def has_pending(self) -> bool:
        """Log or tree is not what it must be: this directory must not be dropped from memory."""
        return bool(self._owed or self._strays or self._distrusted) or (self._log is not None and self._log.torn)

    @property
    def sync_failed(self) -> bool:
        """A sync of this directory, or of everything, failed: the next one is believed only after `log_again`."""
        return self._distrusted or self._doubts != self.ctx.doubts

    def _append(self, log_key: memoryview, payload: DirPayload) -> None:
        generation = self.ctx.next_generation()
        gone = {sealed for sealed in payload.gone if sealed in self.entries}
        come = sum(e.sealed in gone or e.sealed not in self.entries for e in payload.entries)
        size = len(self.entries) - len(gone) + come
        frame = Frame(generation, self.durable_gen, size, payload.encode(), flags=payload.flags)
        self.log.append(self.ctx.store, log_key, frame)
        self.last_gen = generation

    def settled(self) -> None:
        """No change is under way: the tree has all that the log says, and, unless something is pending, no more."""
        if self.done_gen != self.last_gen and not self.has_pending:
            self.done_gen = self.last_gen
            self.ctx.freshness.wrote(self.dir_id, self.last_gen)

    def _hold(self, payload: DirPayload) -> None:
        for sealed in payload.gone:
            self.entries.pop(sealed, None)
        for entry in payload.entries:
            self.entries[entry.sealed] = entry
        if payload.flags:
            self.xattrs = payload.xattrs
        self.domain = payload.domain or self.domain

    # durability ------------------------------------------------------------------------------------------------

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
        before = self.ctx.store.fstat(self.fd)
        try:
            self._log = await self.ctx.in_thread(
                self.log.rewrite, self.ctx.store, self.fd, DIR_LOG, key, header, *frames
            )
        finally:
            key[:] = bytes(len(key))
        self.header = header
        self.last_gen = frames[-1].generation
        self.settled()
        # The log's new name is not a change of the directory the user sees.
        self.ctx.store.futimens(self.fd, before.st_atime_ns, before.st_mtime_ns)

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

    async def rotate(self, kek_version: int, prepare: Callable[[DirNode], Awaitable[None]]) -> None:
        """Rewrite the log under the newest KEK, at least `kek_version`, with a new MAC key; nothing to do if it is.

        `prepare` as for `compact`. The new log is on disk; that it has the name is not durable before the directory's
        next sync. It need not be: what comes into the tree later does not outlast a crash without it. Raises OSError,
        key errors; then the log is as it was.
        """
        self.pins += 1
        try:
            async with self.lock.exclusive():
                if not self.removed and not self.is_under(kek_version):
                    await prepare(self)
                    async with self._syncing:
                        await self._rotate(Rewrapping(self.ctx.keys, self.dir_id, kek_version))
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

    def close_log(self) -> None:
        """Close the log's descriptor."""
        if self._log is not None:
            self.ctx.store.close(self._log.fd)
            self._log = None

    def close(self) -> None:
        """Close the directory's descriptors."""
        self.close_log()
        self.ctx.store.close(self.fd)

    # making and opening ----------------------------------------------------------------------------------------

    @classmethod
    def create(cls, ctx: FsContext, fd: int, kit: Kit, xattrs: Sealed | None = None) -> DirNode:
        """Write a new log without entries into the directory behind `fd`. Synchronous: the kit's keys are good.

        Raises OSError.
        """
        assert kit.names_wrapped is not None
        header = LogHeader(KIND_DIR, kit.kek_version, kit.log_id, kit.log_wrapped, kit.names_wrapped)
        node = cls(ctx, 0, fd, header)
        generation = ctx.next_generation()
        payload = DirPayload(xattrs=xattrs)
        frame = Frame(generation, 0, 0, payload.encode(), flags=payload.flags)
        node.xattrs = xattrs
        node._log = SealedLog.create(ctx.store, fd, DIR_LOG, header, kit.log_key, frame)
        node._doubts = ctx.doubts
        node.last_gen = generation
        node.settled()
        return node

    @classmethod
    async def open(cls, ctx: FsContext, ino: int, fd: int, dir_id: bytes) -> DirNode:
        """Read and verify the log of the directory behind `fd`, which the node owns from now on.

        Raises `Damaged`, OSError, key errors.
        """
        store = ctx.store
        try:
            log_fd, writable = open_log(store, fd, DIR_LOG, writable=not ctx.read_only)
        except FileNotFoundError:
            raise Damaged("missing-dir-log") from None
        try:
            raw = read_log(store, log_fd)
            parsed = parse(raw)
            header = parsed.header
            if header.kind != KIND_DIR or header.log_id != dir_id:
                raise Damaged("id-mismatch", "the directory is another one")
            node = cls(ctx, ino, fd, header)
            node.writable = writable
            (log_key,), _ = await ctx.keys.unwrap(key_runs(header))
            node._adopt(log_fd, authenticate(parsed, log_key), log_key, ctx.freshness.floor(dir_id))
        except BaseException:
            store.close(log_fd)
            raise
        return node

    def _adopt(self, log_fd: int, replayed: Replay, log_key: memoryview, floor: int) -> None:
        ctx = self.ctx
        heads = replayed.heads
        last = heads[-1].generation if heads else 0
        assert ctx.state is not None
        torn = bool(replayed.tail) or None in replayed.payloads
        keep = len(heads)
        if torn:
            if not (ctx.crashed_since(last) and epoch_of(last) < ctx.state.epoch):
                raise Damaged("dir-log", "a frame is damaged")
            keep = next((i for i, payload in enumerate(replayed.payloads) if payload is None), keep)
        # Frames of epochs that ended cleanly are durable whether a later one says so or not.
        settled = (head.generation for head in heads if ctx.is_settled(head.generation))
        if not keep or (keep < len(heads) and heads[keep].generation <= max(replayed.durable_up_to, floor, *settled)):
            raise Damaged("dir-log", "a frame is damaged")
        if replayed.tail and acknowledged_in_tail(replayed, log_key, ctx.is_settled) > heads[keep - 1].generation:
            raise Damaged("dir-log", "an acknowledged frame is damaged")
        check(heads[keep - 1].generation, floor)
        crashed = ctx.crashed_since(last) and epoch_of(last) < ctx.state.epoch
        for head, payload in zip(heads[:keep], replayed.payloads[:keep], strict=True):
            assert payload is not None
            decoded = decode_dir(payload)
            if decoded.flags != head.flags:
                raise Damaged("payload", "xattrs that the head does not announce, or none that it does")
            if crashed:
                self._bind(head, decoded, max(replayed.durable_up_to, floor))
            self._hold(decoded)
        if self.domain and self.entries:
            raise Damaged("payload", "entries in a domain's place")
        if crashed and not self.bindings:
            self.bindings = {sealed: [entry] for sealed, entry in self.entries.items()}
        self._log = SealedLog.resume(log_fd, replayed, keep)
        if torn and not ctx.read_only:
            ctx.store.ftruncate(log_fd, self._log.end)
        self.last_gen = self.done_gen = heads[keep - 1].generation
        old = [h.generation for h in heads[:keep] if epoch_of(h.generation) < ctx.state.epoch]
        self.durable_gen = max([h.durable_up_to for h in heads[:keep]] + old)

    def _bind(self, head: Head, decoded: DirPayload, durable: int) -> None:
        """Remember every id a name had since the log was last known to be durable.

        The tree may still have any of them.
        """
        if head.generation <= durable or not self.ctx.forgives(head.generation):
            # Everything up to here is durable: earlier bindings are history.
            self.bindings = {}
            return
        if not self.bindings:
            self.bindings = {sealed: [entry] for sealed, entry in self.entries.items()}
        for entry in decoded.entries:
            self.bindings.setdefault(entry.sealed, []).append(entry)
            if head.kind == DELTA:
                self.unsure.add(entry.sealed)

    @property
    def needs_reconciling(self) -> bool:
        """Whether a crash since its last frame may have left log and tree of two minds."""
        state = self.ctx.state
        assert state is not None
        return epoch_of(self.last_gen) < state.epoch and self.ctx.crashed_since(self.last_gen)


def key_runs(header: LogHeader) -> list[KeyRun]:
    """Log key and names key of a directory, for one unwrap."""
    return [
        KeyRun(header.log_id, Purpose.LOG_DIR, header.kek_version, (header.log_wrapped,)),
        KeyRun(header.log_id, Purpose.NAMES, header.kek_version, (header.names_wrapped,)),
    ]


@contextmanager
def pinned(node: DirNode) -> Iterator[None]:
    """Keep a directory's descriptors while something is awaited."""
    node.pins += 1
    try:
        yield
    finally:
        node.pins -= 1
