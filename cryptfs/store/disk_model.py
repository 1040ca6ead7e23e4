"""A disk that can lose power: the state behind `MemoryStore`, and what a crash may leave of it.

What the page cache shows and what the disk has are kept apart, per file and per directory:

- A file is a map of 512-byte sectors and a size. Each write adds one change per sector (the whole sector as the page
  cache then holds it) and one for a larger size; each cut adds one. A power cut keeps any subset of the changes that
  are not yet durable, applied in their order: writes are torn at sectors, and size and data are independent.
- A directory is a map of names. One call is one transaction, also when it changes two directories: rename is atomic,
  as on every journalling filesystem. Which transactions survive together is the `Order`.
- `fsync` makes one file or one directory durable, never the name of the file it is called on.
- After a sync that failed, the changes it should have written stay in doubt for ever: a later sync that succeeds says
  nothing about them (Linux marks the pages clean; see fsync(2) and LWN "PostgreSQL's fsync() surprise", 2018).

Modes, owners and times survive as they were at the last `fsync` or as they are now.
"""

from __future__ import annotations

import enum
import itertools
import random
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

SECTOR_BYTES = 512
ROOT_INO = 1


class Order(enum.Enum):
    """Which unsynced directory changes may survive a power cut without which others."""

    ANY = "any"
    """Each on its own: weaker than any filesystem in use."""
    DIRECTORY = "directory"
    """Changes of one directory in their order; those of different directories independently (btrfs' log tree)."""
    JOURNAL = "journal"
    """All changes in their order (the journal of ext4 or XFS)."""


@dataclass(frozen=True, slots=True)
class SectorWritten:
    """Sector `index` became `data` (512 bytes)."""

    index: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Grown:
    """The size became at least `size_bytes`."""

    size_bytes: int


@dataclass(frozen=True, slots=True)
class Cut:
    """The size became `size_bytes`; what was past it is zeros for ever after."""

    size_bytes: int


Change = SectorWritten | Grown | Cut


class Fate(enum.Enum):
    """What a later power cut may do with a change."""

    PENDING = "pending"
    IN_DOUBT = "in doubt"
    DURABLE = "durable"


@dataclass(slots=True)
class Extent:
    """Content of a regular file: sectors that were ever written, and the size in bytes."""

    sectors: dict[int, bytes] = field(default_factory=dict)
    size_bytes: int = 0

    def copy(self) -> Extent:
        """An independent copy; sectors are immutable and shared."""
        return Extent(dict(self.sectors), self.size_bytes)

    def apply(self, change: Change) -> None:
        """Do what `change` says. A sector past the size stays: a later `Grown` may reveal it."""
        match change:
            case SectorWritten(index, data):
                self.sectors[index] = data
            case Grown(size_bytes):
                self.size_bytes = max(self.size_bytes, size_bytes)
            case Cut(size_bytes):
                self.size_bytes = size_bytes
                self.trim()

    def trim(self) -> None:
        """Forget what lies past the size."""
        last, kept_bytes = divmod(self.size_bytes, SECTOR_BYTES)
        for index in [i for i in self.sectors if i > last or (i == last and not kept_bytes)]:
            del self.sectors[index]
        if kept_bytes and last in self.sectors:
            self.sectors[last] = self.sectors[last][:kept_bytes].ljust(SECTOR_BYTES, b"\0")

    def read(self, offset: int, count: int) -> bytes:
        """Up to `count` bytes from `offset`, short at the end of the file."""
        count = max(0, min(count, self.size_bytes - offset))
        if not count:
            return b""
        first, skip = divmod(offset, SECTOR_BYTES)
        last = (offset + count - 1) // SECTOR_BYTES
        hole = bytes(SECTOR_BYTES)
        return b"".join(self.sectors.get(i, hole) for i in range(first, last + 1))[skip : skip + count]


@dataclass(frozen=True, slots=True)
class Attributes:
    """What stat(2) tells besides size and links; `mode` includes the file type."""

    mode: int
    uid: int = 0
    gid: int = 0
    atime_ns: int = 0
    mtime_ns: int = 0
    ctime_ns: int = 0


@dataclass(slots=True)
class Inode:
    """One file of any type: as the page cache shows it, and as the disk has it."""

    ino: int
    attributes: Attributes
    durable_attributes: Attributes
    rdev: int = 0
    target: bytes = b""
    links: int = 0
    content: Extent = field(default_factory=Extent)
    durable_content: Extent = field(default_factory=Extent)
    changes: list[tuple[Change, Fate]] = field(default_factory=list)
    entries: dict[bytes, int] = field(default_factory=dict)
    durable_entries: dict[bytes, int] = field(default_factory=dict)

    @property
    def is_dir(self) -> bool:
        """Whether this is a directory."""
        return stat.S_ISDIR(self.attributes.mode)

    def copy(self) -> Inode:
        """An independent copy."""
        # Not `dataclasses.replace`: crash tests copy millions of inodes.
        return Inode(
            self.ino,
            self.attributes,
            self.durable_attributes,
            self.rdev,
            self.target,
            self.links,
            self.content.copy(),
            self.durable_content.copy(),
            list(self.changes),
            dict(self.entries),
            dict(self.durable_entries),
        )

    def change(self, change: Change) -> None:
        """Apply `change` in the page cache; it is pending on disk."""
        self.content.apply(change)
        self.changes.append((change, Fate.PENDING))

    @property
    def in_doubt(self) -> bool:
        """Whether a sync failed: some of this may never reach the disk, whatever a later one says."""
        return any(fate is Fate.IN_DOUBT for _, fate in self.changes)

    def make_content_durable(self) -> None:
        """The effect of a successful fdatasync."""
        if self.in_doubt:
            self.changes = [(c, Fate.DURABLE if fate is Fate.PENDING else fate) for c, fate in self.changes]
        else:
            self.durable_content = self.content.copy()
            self.changes = []

    def lose_content(self) -> None:
        """The effect of a failed fdatasync: nobody will write these changes again, and nobody knows which were."""
        self.changes = [(c, Fate.IN_DOUBT if fate is Fate.PENDING else fate) for c, fate in self.changes]


Edit = tuple[int, bytes, int | None]
"""(directory's inode number, name, what it names from now on or None)."""


@dataclass(slots=True)
class Disk:
    """All inodes, and the directory transactions that are not durable yet."""

    order: Order = Order.DIRECTORY
    inodes: dict[int, Inode] = field(default_factory=dict)
    transactions: list[tuple[Edit, ...]] = field(default_factory=list)
    next_ino: int = ROOT_INO
    now_ns: int = 1_700_000_000_000_000_000
    lock_holder: object = None

    def __post_init__(self) -> None:
        """Make the root directory of a disk that has none."""
        if not self.inodes:
            root = self.new_inode(Attributes(stat.S_IFDIR | 0o755))
            root.links = 2

    def tick(self) -> int:
        """The model's clock: nanoseconds, a microsecond later at each call."""
        self.now_ns += 1000
        return self.now_ns

    def new_inode(self, attributes: Attributes) -> Inode:
        """A fresh inode that no directory names yet."""
        now_ns = self.tick()
        attributes = replace(attributes, atime_ns=now_ns, mtime_ns=now_ns, ctime_ns=now_ns)
        inode = Inode(self.next_ino, attributes, attributes)
        self.inodes[inode.ino] = inode
        self.next_ino += 1
        return inode

    def commit(self, *edits: Edit) -> None:
        """One call's directory changes, atomic."""
        for dir_ino, name, ino in edits:
            directory = self.inodes[dir_ino]
            if ino is None:
                del directory.entries[name]
            else:
                directory.entries[name] = ino
            now_ns = self.tick()
            directory.attributes = replace(directory.attributes, mtime_ns=now_ns, ctime_ns=now_ns)
        self.transactions.append(edits)

    def sync_directory(self, ino: int) -> None:
        """The effect of fsync on a directory: its changes are durable, and with each what its order puts before it."""
        wanted = {ino}
        kept: list[tuple[Edit, ...]] = []
        durable: list[tuple[Edit, ...]] = []
        for edits in reversed(self.transactions):
            touched = {edit[0] for edit in edits}
            if (self.order is Order.JOURNAL and durable) or touched & wanted:
                durable.append(edits)
                if self.order is Order.DIRECTORY:
                    wanted |= touched
            else:
                kept.append(edits)
        self.transactions = kept[::-1]
        for edits in reversed(durable):
            self._apply_durably(edits)

    def sync_all(self) -> None:
        """The effect of syncfs."""
        for inode in self.inodes.values():
            inode.durable_attributes = inode.attributes
            inode.make_content_durable()
        for edits in self.transactions:
            self._apply_durably(edits)
        self.transactions = []

    def _apply_durably(self, edits: tuple[Edit, ...]) -> None:
        for dir_ino, name, ino in edits:
            directory = self.inodes.get(dir_ino)
            if directory is None:
                continue
            if ino is None:
                directory.durable_entries.pop(name, None)
            else:
                directory.durable_entries[name] = ino

    def clone(self) -> Disk:
        """An independent copy, page cache included, locked by nobody."""
        inodes = {ino: inode.copy() for ino, inode in self.inodes.items()}
        return Disk(self.order, inodes, list(self.transactions), self.next_ino, self.now_ns)

    def crash_states(self, rng: random.Random, limit: int) -> Iterator[Disk]:
        """What a power cut now may leave: all of it if that is at most `limit` states, else a sample of distinct ones.

        The sample starts with the telling ones (nothing, everything, everything but one change, one change alone).
        """
        optional: list[tuple[int, int]] = [(0, i) for i in range(len(self.transactions))]
        for ino, inode in self.inodes.items():
            optional += [(ino, i) for i, (_, fate) in enumerate(inode.changes) if fate is not Fate.DURABLE]
            if inode.attributes != inode.durable_attributes:
                optional.append((ino, -1))
        seen: set[frozenset[tuple[int, int]]] = set()
        for choice in _choices(optional, rng, limit):
            closed = self._closed(choice)
            if closed not in seen:
                seen.add(closed)
                yield self._after_power_cut(closed)
                if len(seen) == limit:
                    return

    def _closed(self, kept: frozenset[tuple[int, int]]) -> frozenset[tuple[int, int]]:
        """`kept` without the transactions that the order does not let survive."""
        if self.order is Order.ANY:
            return kept
        dropped: set[tuple[int, int]] = set()
        closed_dirs: set[int] = set()
        for i, edits in enumerate(self.transactions):
            touched = {0} if self.order is Order.JOURNAL else {edit[0] for edit in edits}
            if (0, i) not in kept or touched & closed_dirs:
                dropped.add((0, i))
                closed_dirs |= touched
        return kept - dropped

    def _after_power_cut(self, kept: frozenset[tuple[int, int]]) -> Disk:
        after = Disk(self.order, {}, [], self.next_ino, self.now_ns)
        after.inodes.clear()
        tables = {ino: dict(inode.durable_entries) for ino, inode in self.inodes.items()}
        for i, edits in enumerate(self.transactions):
            if (0, i) in kept:
                for dir_ino, name, target in edits:
                    if target is None:
                        tables[dir_ino].pop(name, None)
                    else:
                        tables[dir_ino][name] = target
        todo = [ROOT_INO]
        while todo:
            ino = todo.pop()
            after.inodes[ino] = inode = self._survivor(self.inodes[ino], kept)
            inode.links = 2 if inode.is_dir else 0
            inode.entries = {}
            for name, child in tables[ino].items():
                if self.inodes[child].is_dir and (child in after.inodes or child in todo):
                    continue  # only `Order.ANY` leaves one directory under two names; keep the first
                inode.entries[name] = child
                if child not in after.inodes and child not in todo:
                    todo.append(child)
            inode.durable_entries = dict(inode.entries)
        for inode in after.inodes.values():
            for child in inode.entries.values():
                if after.inodes[child].is_dir:
                    inode.links += 1
                else:
                    after.inodes[child].links += 1
        return after

    @staticmethod
    def _survivor(inode: Inode, kept: frozenset[tuple[int, int]]) -> Inode:
        content = inode.durable_content.copy()
        for i, (change, fate) in enumerate(inode.changes):
            if fate is Fate.DURABLE or (inode.ino, i) in kept:
                content.apply(change)
        content.trim()
        attributes = inode.attributes if (inode.ino, -1) in kept else inode.durable_attributes
        return Inode(inode.ino, attributes, attributes, inode.rdev, inode.target, 0, content, content.copy())


def _choices(optional: list[tuple[int, int]], rng: random.Random, limit: int) -> Iterator[frozenset[tuple[int, int]]]:
    """Subsets of `optional`: all of them if there are at most `limit`, else the telling ones and then random ones."""
    if len(optional) < limit.bit_length():
        for flags in itertools.product((False, True), repeat=len(optional)):
            yield frozenset(itertools.compress(optional, flags))
        return
    everything = frozenset(optional)
    yield frozenset()
    yield everything
    singles = rng.sample(optional, min(len(optional), limit // 4))
    for item in singles:
        yield everything - {item}
        yield frozenset({item})
    for _ in range(4 * limit):  # more than `limit`, as some turn out equal
        chance = rng.choice((0.1, 0.5, 0.9))
        yield frozenset(item for item in optional if rng.random() < chance)
