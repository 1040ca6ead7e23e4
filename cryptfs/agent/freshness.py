"""What this machine has seen of its volumes, outside their cipher directories (design §4, docs/FRESHNESS.md).

Per volume one SQLite database in the agent's state directory: how new each log must be at least (its *floor*), which
logs were deleted, and the floors of `state` and `volume`. Everything in it was durable in the volume before it was
recorded, so a power cut never leaves the volume behind it: whatever is, was put there.

The database is read once, into a second one in memory, when a volume is first asked about; from then on floors are
looked up there, on the loop, and only writing touches the disk, in a thread. A database that is there but cannot be
read or written is an error, never an empty record; one that is not there means that the volume is seen for the first
time.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import trio

from cryptfs import durable
from cryptfs.agent.places import private_state_dir
from cryptfs.errors import FreshnessUnavailable, RolledBack, VolumeBusy
from cryptfs.ports import Clock
from cryptfs.types import DELETED, EPOCH_SHIFT, ID_BYTES

log = logging.getLogger(__name__)

GENERATION_BYTES = 8
TOMBSTONE_AGE_S = 90 * 86400
TOMBSTONES_MAX = 1_000_000
"""Some 30 MB; beyond it the oldest go first."""

_APPLICATION_ID = 0x43465246  # "CFRF"
_SCHEMA_VERSION = 1
_BUSY_S = 0.5
_SCHEMA = f"""
    PRAGMA application_id = {_APPLICATION_ID};
    PRAGMA user_version = {_SCHEMA_VERSION};
    CREATE TABLE volume (
        one INTEGER PRIMARY KEY CHECK (one = 1), volume_id BLOB NOT NULL,
        serial INTEGER NOT NULL, kek_version INTEGER NOT NULL, state_sequence INTEGER NOT NULL
    );
    CREATE TABLE logs (log_id BLOB PRIMARY KEY, generation BLOB NOT NULL, gone_s INTEGER) WITHOUT ROWID;
    CREATE INDEX gone ON logs (gone_s) WHERE gone_s IS NOT NULL;
"""
# Generations are u64, which SQLite's integers cannot hold: as 8 bytes, big-endian, they compare the same.
_RAISE = """
    INSERT INTO logs (log_id, generation) VALUES (?, ?) ON CONFLICT (log_id) DO UPDATE
    SET generation = excluded.generation WHERE excluded.generation > generation AND gone_s IS NULL
"""
_BURY = "UPDATE logs SET gone_s = ? WHERE log_id = ? AND gone_s IS NULL"
_SET = "INSERT OR REPLACE INTO logs (log_id, generation) VALUES (?, ?)"
_FIND = "SELECT generation, gone_s FROM logs WHERE log_id = ?"
_EXPIRE = "DELETE FROM logs WHERE gone_s < ?"
_COUNT_GONE = "SELECT count(*) FROM logs WHERE gone_s IS NOT NULL"
_DROP_OLDEST = """
    DELETE FROM logs WHERE log_id IN (SELECT log_id FROM logs WHERE gone_s IS NOT NULL ORDER BY gone_s LIMIT ?)
"""


@dataclass(frozen=True, slots=True)
class Seen:
    """The floors of a volume's two files; all 0 on first sight."""

    serial: int = 0
    kek_version: int = 0
    state_sequence: int = 0

    def refuse_older(self, serial: int, kek_version: int) -> None:
        """Raise `RolledBack` for a `volume` file from before what was seen."""
        if serial < self.serial or kek_version < self.kek_version:
            raise RolledBack("the volume file is older than this machine has seen it")

    def raised(self, said: Seen) -> Seen:
        """Each the larger of what is known and what is said."""
        return Seen(
            max(self.serial, said.serial),
            max(self.kek_version, said.kek_version),
            max(self.state_sequence, said.state_sequence),
        )


@dataclass(frozen=True, slots=True)
class Changes:
    """What became durable: (log id, generation as 8 bytes) pairs, deleted logs, the volume's floors (None: as before).

    With `exactly`, floors are set and not raised, and tombstones lifted; with `afresh`, all older ones are forgotten
    first. Both only on the owner's word.
    """

    logs: Sequence[tuple[bytes, bytes]] = ()
    gone: Sequence[bytes] = ()
    seen: Seen | None = None
    exactly: bool = False
    afresh: bool = False


class Record:
    """One volume's record: the database on disk, and its copy in memory. Not thread-safe: one call at a time."""

    def __init__(self, path: str, disk: sqlite3.Connection, seen: Seen) -> None:
        self.path = path
        self.seen = seen
        self._disk = disk
        self._memory = sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None)
        disk.backup(self._memory)
        self._tombstones: int = self._memory.execute(_COUNT_GONE).fetchone()[0]

    # on the loop, in memory ------------------------------------------------------------------------------------

    @property
    def first_sight(self) -> bool:
        """Nothing was recorded of this volume yet."""
        return self.seen == Seen()

    def floor(self, log_id: bytes) -> int:
        """The generation the log must have at least; 0 if it was never seen, `DELETED` if it was deleted."""
        row = self._memory.execute(_FIND, (log_id,)).fetchone()
        if row is None:
            return 0
        return DELETED if row[1] is not None else int.from_bytes(row[0], "big")

    def hold(self, changes: Changes, now_s: int) -> None:
        """Take over into memory what `write` has made durable."""
        with self._memory:
            self._memory.execute("BEGIN")
            grown = self._apply(self._memory, changes, now_s)
        self._tombstones += grown
        self.seen = changes.seen or self.seen

    # in a thread, on disk --------------------------------------------------------------------------------------

    @classmethod
    def open(cls, directory: str, volume_id: bytes) -> Record:
        """The record in `directory`; a new one if there is none. Blocks.

        Raises `FreshnessUnavailable` if it is damaged, of another volume, or not to be read or written; `VolumeBusy` if
        another agent has it open.
        """
        private_state_dir(directory, "the key agent's state directory", FreshnessUnavailable)
        path = os.path.join(directory, f"{volume_id.hex()}.sqlite")
        try:
            if not os.path.lexists(path):
                _create(path, volume_id)
                log.info("volume %s is seen for the first time on this machine: trusted as it is", volume_id.hex())
            disk = _connect(path)
            try:
                return cls(path, disk, _check(disk, volume_id))
            except BaseException:
                disk.close()
                raise
        except sqlite3.Error as error:
            raise _unavailable(path, error) from error
        except OSError as error:
            raise FreshnessUnavailable(f"the freshness record {path} cannot be used: {error.strerror}") from error

    @classmethod
    def in_memory(cls, volume_id: bytes) -> Record:
        """One that is gone with this process, as the volume's KEK is. Blocks for a moment."""
        disk = sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None)
        _fill(disk, volume_id)
        return cls(":memory:", disk, Seen())

    def write(self, changes: Changes, now_s: int) -> None:
        """Make changes durable, all or none. Blocks. Raises `FreshnessUnavailable`."""
        try:
            with self._disk:
                self._disk.execute("BEGIN IMMEDIATE")
                self._apply(self._disk, changes, now_s)
        except sqlite3.Error as error:
            raise _unavailable(self.path, error) from error

    def newest_epoch(self) -> int:
        """The latest mount epoch any log was seen in. Looks at all of them."""
        row = self._memory.execute("SELECT max(generation) FROM logs").fetchone()
        return int.from_bytes(row[0] or b"", "big") >> EPOCH_SHIFT

    def close(self) -> None:
        """Close both. Blocks for a moment."""
        self._memory.close()
        with contextlib.suppress(sqlite3.Error):
            self._disk.close()

    def _apply(self, database: sqlite3.Connection, changes: Changes, now_s: int) -> int:
        """The same statements on disk and in memory; by how many the tombstones grew."""
        if changes.afresh:
            database.execute("DELETE FROM logs")
        database.executemany(_SET if changes.exactly else _RAISE, changes.logs)
        grown = 0
        if changes.gone:
            grown = database.executemany(_BURY, ((now_s, log_id) for log_id in changes.gone)).rowcount
            grown -= database.execute(_EXPIRE, (now_s - TOMBSTONE_AGE_S,)).rowcount
            over = self._tombstones + grown - TOMBSTONES_MAX
            if over > 0:
                grown -= database.execute(_DROP_OLDEST, (over + TOMBSTONES_MAX // 10,)).rowcount
        if changes.afresh or changes.exactly:
            grown = database.execute(_COUNT_GONE).fetchone()[0] - self._tombstones
        if changes.seen is not None:
            seen = changes.seen
            row = (seen.serial, seen.kek_version, seen.state_sequence)
            database.execute("UPDATE volume SET serial = ?, kek_version = ?, state_sequence = ?", row)
        return grown


class Records:
    """The records of all volumes the agent has to do with: opened when needed, closed when not."""

    def __init__(self, directory: str, clock: Clock) -> None:
        """`directory` is made when the first record is; nothing is touched before."""
        self.directory = directory
        self._clock = clock
        self._open: dict[bytes, Record] = {}
        self._ephemeral: set[bytes] = set()
        self._busy = trio.Lock()

    def get(self, volume_id: bytes) -> Record | None:
        """The volume's record, if it is open."""
        return self._open.get(volume_id)

    def only_in_memory(self, volume_id: bytes) -> None:
        """Of a volume whose KEK is never stored: nothing of its record either, until it is locked for good."""
        self._ephemeral.add(volume_id)

    def would_vanish_under(self, mountpoint: str) -> bool:
        """Whether a mount there would cover the directory. By name only: nothing is touched."""
        here = os.path.normpath(mountpoint) if mountpoint else ""
        return bool(here) and f"{self.directory}/".startswith(here.rstrip("/") + "/")

    async def opened(self, volume_id: bytes) -> Record:
        """The volume's record. Raises `FreshnessUnavailable`, `VolumeBusy`."""
        async with self._busy:
            return await self._opened(volume_id)

    async def _opened(self, volume_id: bytes) -> Record:
        record = self._open.get(volume_id)
        if record is None:
            if volume_id in self._ephemeral:
                record = await trio.to_thread.run_sync(Record.in_memory, volume_id)
            else:
                record = await trio.to_thread.run_sync(Record.open, self.directory, volume_id)
            self._open[volume_id] = record
        return record

    async def change(self, volume_id: bytes, changes: Changes) -> Record:
        """Make changes durable, then let `floor` know. Raises `FreshnessUnavailable`; then nothing has changed."""
        now_s = self._clock.time_ns() // 1_000_000_000
        async with self._busy:
            record = await self._opened(volume_id)
            if changes.seen is not None and not changes.afresh:
                changes = replace(changes, seen=record.seen.raised(changes.seen))
            await trio.to_thread.run_sync(record.write, changes, now_s)
            record.hold(changes, now_s)
        return record

    async def newest_epoch(self, volume_id: bytes) -> int:
        """See `Record.newest_epoch`. Raises `FreshnessUnavailable`."""
        async with self._busy:
            return await trio.to_thread.run_sync((await self._opened(volume_id)).newest_epoch)

    async def close_but(self, wanted: Iterable[bytes]) -> None:
        """Close all records but those of the `wanted` volumes."""
        async with self._busy:
            keep = set(wanted)
            self._ephemeral &= keep
            for volume_id in self._open.keys() - keep:
                await trio.to_thread.run_sync(self._open.pop(volume_id).close)


def _create(path: str, volume_id: bytes) -> None:
    """A new database, complete before it has its name: an empty file under it is never one of ours."""
    fresh = f"{path}.new"
    for leftover in (fresh, fresh + "-journal"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(leftover)
    # The file is made first, because SQLite would make it with the umask's mode.
    os.close(os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
    with contextlib.closing(sqlite3.connect(fresh, isolation_level=None)) as database:
        _fill(database, volume_id)
    os.rename(fresh, path)
    durable.sync_directory(os.path.dirname(path))


def _fill(database: sqlite3.Connection, volume_id: bytes) -> None:
    database.executescript(_SCHEMA)
    database.execute("INSERT INTO volume VALUES (1, ?, 0, 0, 0)", (volume_id,))


def _connect(path: str) -> sqlite3.Connection:
    """A connection of which there is only one: the copy in memory would not see what another one writes."""
    if os.path.islink(path):
        raise FreshnessUnavailable(f"the freshness record {path} is a symlink")
    database = sqlite3.connect(path, timeout=_BUSY_S, check_same_thread=False, isolation_level=None)
    try:
        database.execute("PRAGMA locking_mode = EXCLUSIVE")
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")
        database.execute("PRAGMA temp_store = MEMORY")  # the agent may write nowhere but below its own directories
        database.execute("PRAGMA journal_size_limit = 4194304")
        database.execute("BEGIN EXCLUSIVE")  # takes the lock now, and keeps it
        database.execute("COMMIT")
    except BaseException:
        database.close()
        raise
    return database


def _check(database: sqlite3.Connection, volume_id: bytes) -> Seen:
    """The volume's floors. Raises `sqlite3.DatabaseError` for anything but an intact record of this volume."""
    if database.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
        raise sqlite3.DatabaseError("its pages are damaged")
    kind = (
        database.execute("PRAGMA application_id").fetchone()[0],
        database.execute("PRAGMA user_version").fetchone()[0],
    )
    if kind != (_APPLICATION_ID, _SCHEMA_VERSION):
        raise sqlite3.DatabaseError("it is not a record of this version")
    rows = database.execute("SELECT volume_id, serial, kek_version, state_sequence FROM volume").fetchall()
    if len(rows) != 1 or rows[0][0] != volume_id or not all(type(n) is int and n >= 0 for n in rows[0][1:]):
        raise sqlite3.DatabaseError("it is another volume's")
    return Seen(*rows[0][1:])


def _unavailable(path: str, error: sqlite3.Error) -> FreshnessUnavailable | VolumeBusy:
    code = getattr(error, "sqlite_errorcode", None)
    if code is not None and code & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return VolumeBusy(f"another key agent of this user has the volume: its freshness record {path} is in use")
    return FreshnessUnavailable(f"the freshness record {path} cannot be used: {error}")


def split_ids(joined: bytes) -> list[bytes]:
    """Ids of 16 bytes each."""
    return [joined[at : at + ID_BYTES] for at in range(0, len(joined), ID_BYTES)]


def split_logs(joined: bytes) -> list[tuple[bytes, bytes]]:
    """(id, generation as 8 bytes) of 24 bytes each."""
    width = ID_BYTES + GENERATION_BYTES
    return [(joined[at : at + ID_BYTES], joined[at + ID_BYTES : at + width]) for at in range(0, len(joined), width)]
