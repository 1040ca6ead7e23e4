"""A directory's names and its log as it is appended to.

A change is one frame first and the call on the tree second. A crash between the two, or a power cut that keeps one
without the other, leaves `.dir` and the tree of two minds about one entry; its epoch did not end cleanly, and
`reconcile` lets the tree decide.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

import trio

from cryptfs.crypto.siv import NameCipher
from cryptfs.errors import CryptfsError
from cryptfs.format.dirlog import DirPayload, Entry
from cryptfs.format.log import LogHeader
from cryptfs.format.sidecar import Sealed
from cryptfs.fs.context import FsContext
from cryptfs.fs.locks import SharedLock
from cryptfs.fs.sealed_log import Frame, SealedLog
from cryptfs.names import tree_name
from cryptfs.ports import KeyRun
from cryptfs.types import ID_BYTES, Purpose


@dataclass(frozen=True, slots=True)
class DirKeys:
    """A directory's keys in clear; good until the next await."""

    log_key: memoryview
    names: NameCipher


class DirEntries:
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
        self.times_ns: tuple[int, int] | None = None
        """atime and mtime while the log is rewritten, which moves the directory's own for as long as it takes."""
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

    async def flush(self) -> None:
        """Write what the log could not take before. Raises OSError."""
        if self.has_pending:
            self._sweep()
            self._flush((await self.keys()).log_key)
            if self._strays:
                raise OSError(errno.EIO, "something that failed half-way could not be taken back")
        if self.lock.idle:
            self.settled()

    def _flush(self, log_key: memoryview) -> None:
        self.log.mend(self.ctx.store)
        if self._owed:
            there = tuple(self.entries[sealed] for sealed in self._owed if sealed in self.entries)
            self._append(log_key, DirPayload(there, tuple(s for s in self._owed if s not in self.entries)))
            self._owed.clear()

    @property
    def has_pending(self) -> bool:
        """Log or tree is not what it must be: this directory must not be dropped from memory."""
        return bool(self._owed or self._strays or self._distrusted) or (self._log is not None and self._log.torn)

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
            if not self.removed:
                self.ctx.freshness.wrote(self.dir_id, self.last_gen)

    def _hold(self, payload: DirPayload) -> None:
        for sealed in payload.gone:
            self.entries.pop(sealed, None)
        for entry in payload.entries:
            self.entries[entry.sealed] = entry
        if payload.flags:
            self.xattrs = payload.xattrs
        self.domain = payload.domain or self.domain

    def close_log(self) -> None:
        """Close the log's descriptor."""
        if self._log is not None:
            self.ctx.store.close(self._log.fd)
            self._log = None

    def close(self) -> None:
        """Close the directory's descriptors."""
        self.close_log()
        self.ctx.store.close(self.fd)


def key_runs(header: LogHeader) -> list[KeyRun]:
    """Log key and names key of a directory, for one unwrap."""
    return [
        KeyRun(header.log_id, Purpose.LOG_DIR, header.kek_version, (header.log_wrapped,)),
        KeyRun(header.log_id, Purpose.NAMES, header.kek_version, (header.names_wrapped,)),
    ]
