"""One file under the sealed-log scheme (FORMAT.md §5, §7, §8, §9): the reader's rule, and a writer that obeys it.

A block is two cells, each a sector of its own; a frame is two sectors. Ciphertext is modelled by what authenticates:
a sector of a block carries the block's version, and a record accepts its home only if all sectors carry its version.
Directories are one sector that names the log (`("name",)`), because all that matters here is when a rename of the
log becomes durable.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from tests.model.disk import Disk, View

CELLS = 2
BLOCKS = 3

Generation = tuple[int, int]
NEVER: Generation = (0, 0)
Content = tuple[str, ...]
HOLE = ""


@dataclass(frozen=True)
class Record:
    """One version of one block: `length` cells in `home` ("D" data file, "T" twin); `frame`: who carries it."""

    version: Generation
    length: int
    home: str
    frame: Generation = NEVER


@dataclass(frozen=True)
class Frame:
    """`records`: (block, its new record or None for a hole)."""

    generation: Generation
    previous: Generation | None
    snapshot: bool
    size: int
    records: tuple[tuple[int, Record | None], ...]
    durable_up_to: Generation


@dataclass(frozen=True)
class Epoch:
    """The `state` file."""

    number: int
    clean: bool
    unclean: frozenset[int]

    @property
    def crashed(self) -> frozenset[int]:
        """Epochs that ended uncleanly, seen by someone who finds this state on disk."""
        return self.unclean if self.clean else self.unclean | {self.number}


@dataclass(frozen=True)
class Recovered:
    """What the reader says: content (None: damaged), and how far the log counts."""

    content: Content | None
    frames: tuple[Frame, ...]
    records: dict[int, Record]
    log: int


def epoch_of(view: View) -> Epoch:
    found = view.get(("state",))
    return found if isinstance(found, Epoch) else Epoch(0, True, frozenset())


def frames_of(view: View, log: int) -> tuple[Frame, ...]:
    """The chain of intact frames."""
    out: list[Frame] = []
    for i in itertools.count():
        head, tail = view.get(("log", log, i, 0)), view.get(("log", log, i, 1))
        previous = out[-1].generation if out else None
        if not isinstance(head, Frame) or head != tail or head.previous != previous:
            return tuple(out)
        out.append(head)
    raise AssertionError


def block_of(view: View, block: int, record: Record) -> list[str] | None:
    """The cells of a block if its home holds exactly this version."""
    cells = [view.get((record.home, block, j)) for j in range(record.length)]
    if any(not isinstance(cell, tuple) or cell[0] != record.version for cell in cells):
        return None
    return [cell[1][j] for j, cell in enumerate(cells) if isinstance(cell, tuple)]


def replay(frames: tuple[Frame, ...]) -> tuple[int, dict[int, Record]]:
    """(size, records in force)."""
    size = 0
    records: dict[int, Record] = {}
    for frame in frames:
        size = frame.size
        if frame.snapshot:
            records = {}
        for block, record in frame.records:
            records.pop(block, None)
            if record is not None:
                records[block] = record
        records = {block: record for block, record in records.items() if CELLS * block < size}
    return size, records


def recover(view: View, *, forgive_always: bool = False) -> Recovered:
    """FORMAT.md §9. `forgive_always` is a wrong reader, for the controls."""
    name = view.get(("name",))
    log = name if isinstance(name, int) else 0
    frames = frames_of(view, log) if log else ()
    crashed = epoch_of(view).crashed
    last = frames[-1].generation if frames else NEVER
    more = any(key[:2] == ("log", log) and value and int(key[2]) >= len(frames) for key, value in view.items())
    if more and not forgive_always and not any(epoch >= last[0] for epoch in crashed):
        return Recovered(None, frames, {}, log)
    durable = max((frame.durable_up_to for frame in frames), default=NEVER)
    kept = len(frames)
    forgiven = forgive_always or last[0] in crashed
    while forgiven and kept and frames[kept - 1].generation > durable:
        _, records = replay(frames[:kept])
        doubtful = {b: r for b, r in records.items() if r.frame > durable and (forgive_always or r.frame[0] in crashed)}
        if all(block_of(view, block, record) is not None for block, record in doubtful.items()):
            break
        if kept > 1 and frames[kept - 2].generation < durable:
            break
        kept -= 1
    size, records = replay(frames[:kept])
    content: list[str] = []
    for block in range(-(-size // CELLS)):
        share = min(CELLS, size - CELLS * block)
        cells = block_of(view, block, records[block]) if block in records else []
        if cells is None or len(cells) > share:
            return Recovered(None, frames[:kept], records, log)
        content += (cells + [HOLE] * CELLS)[:share]
    return Recovered(tuple(content), frames[:kept], records, log)


class Crashed(Exception):
    """Mounting found what must not be."""


class File:
    """A writer that obeys the format. Subclasses override one method each to get it wrong."""

    frame_per_write = True

    def __init__(self, disk: Disk) -> None:
        self.disk = disk
        self.history: list[Content] = []
        self.mount()

    def clone(self) -> File:
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.disk = self.disk.clone()
        other.records, other.durable = dict(self.records), dict(self.durable)
        other.pending, other.history = dict(self.pending), list(self.history)
        return other

    # -- mount and unmount

    def mount(self) -> None:
        self.sync_at_mount()
        before = epoch_of(self.disk.view())
        self.epoch = before.number + 1
        self.counter = 0
        self.disk.write(("state",), Epoch(self.epoch, False, before.crashed))
        self.sync_epoch()
        found = recover(self.disk.view())
        if found.content is None:
            raise Crashed("damaged at mount")
        if self.history and found.content not in self.history:
            raise Crashed("not in history at mount")
        self.content, self.frames, self.records, self.log = found.content, found.frames, found.records, found.log
        self.history = [self.content]
        for key, value in self.disk.view().items():  # settle: cut the log back to what counts
            if key[0] == "log" and value and (key[1] != self.log or int(key[2]) >= len(self.frames)):
                self.disk.write(key, None)
        self.durable = dict(self.records)
        self.durable_up_to = self.frames[-1].generation if self.frames else NEVER
        self.name_durable = bool(self.log)
        self.pending: dict[int, Record | None] = {}

    def sync_at_mount(self) -> None:
        self.disk.sync()

    def sync_epoch(self) -> None:
        self.disk.sync(lambda key: key == ("state",))

    def unmount(self) -> None:
        if self.pending or not self.frames or self.frames[-1].size != len(self.content):
            self.frame()
        self.disk.sync()
        self.disk.write(("state",), Epoch(self.epoch, True, epoch_of(self.disk.view()).unclean))
        self.disk.sync()
        self.history = [self.content]

    # -- what programs do

    def write(self, start: int, end: int) -> None:
        mark = "x{}.{}".format(*self.fresh())
        content = list(self.content) + [HOLE] * (end - len(self.content))
        content[start:end] = [mark] * (end - start)
        self.change(tuple(content))

    def truncate(self, size: int) -> None:
        self.change((self.content + (HOLE,) * size)[:size])

    def fsync(self) -> None:
        self.frame()
        self.make_durable()
        self.durable, self.durable_up_to = dict(self.records), self.frames[-1].generation
        self.history = [self.content]
        self.cut()

    def compact(self) -> None:
        """A new log beside the old one, durable before it is renamed over, and only when all it names is durable."""
        self.fsync()
        self.rewrite_log()

    # -- how

    def fresh(self) -> Generation:
        self.counter += 1
        return self.epoch, self.counter

    def home(self, block: int) -> str:
        """The home that the last durable version does not occupy."""
        record = self.durable.get(block)
        return "D" if record is None or record.home == "T" else "T"

    def change(self, content: Content) -> None:
        before, self.content = self.content, content
        for block in range(BLOCKS):
            new, old = (each[CELLS * block : CELLS * block + CELLS] for each in (content, before))
            if new == old:
                continue
            if not any(new) and (not new or block not in self.records):
                self.records.pop(block, None)
                self.pending[block] = None
                continue
            record = Record(self.fresh(), len(new), self.home(block))
            for j in range(len(new)):
                self.disk.write((record.home, block, j), (record.version, new))
            self.records[block] = self.pending[block] = record
        if content != before:
            self.history.append(content)
        self.after_change()
        if self.frame_per_write:
            self.frame()

    def after_change(self) -> None:
        """For wrong variants."""

    def append(self, frame: Frame, log: int, index: int) -> None:
        for half in (0, 1):
            self.disk.write(("log", log, index, half), frame)

    def frame(self) -> None:
        generation = self.fresh()
        if not self.log:
            self.log = self.new_log_number()
            self.disk.write(("name",), self.log)
            self.name_durable = False
        previous = self.frames[-1].generation if self.frames else None
        pending = {b: r and Record(r.version, r.length, r.home, generation) for b, r in self.pending.items()}
        made = Frame(
            generation, previous, not self.frames, len(self.content), tuple(pending.items()), self.durable_up_to
        )
        self.append(made, self.log, len(self.frames))
        self.frames = (*self.frames, made)
        for block, record in pending.items():
            if record is not None and block in self.records:
                self.records[block] = record
        self.pending = {}

    def new_log_number(self) -> int:
        epoch, counter = self.fresh()
        return epoch << 20 | counter

    def make_durable(self) -> None:
        """Data, twin and log; and the directory, if the log's name in it is new."""
        name = not self.name_durable
        self.disk.sync(lambda key: key[0] in {"D", "T"} or key[:2] == ("log", self.log) or (name and key == ("name",)))
        self.name_durable = True

    def rewrite_log(self) -> None:
        generation, log = self.fresh(), self.new_log_number()
        records = {b: Record(r.version, r.length, r.home, generation) for b, r in self.records.items()}
        made = Frame(generation, None, True, len(self.content), tuple(records.items()), self.durable_up_to)
        self.append(made, log, 0)
        self.sync_new_log(log)
        self.disk.write(("name",), log)
        self.name_durable = False
        self.log, self.frames, self.records = log, (made,), records

    def rotate(self) -> None:
        """The log under other keys; as for compaction, only when all it names is durable."""
        self.fsync()
        self.rewrap_log()

    def rewrap_log(self) -> None:
        """A snapshot with the number of the last frame, and an empty frame with a new one."""
        last, log = self.frames[-1].generation, self.new_log_number()
        records = {b: Record(r.version, r.length, r.home, last) for b, r in self.records.items()}
        snapshot = Frame(last, None, True, len(self.content), tuple(records.items()), last)
        word = Frame(self.fresh(), last, False, len(self.content), (), last)
        for index, frame in enumerate((snapshot, word)):
            self.append(frame, log, index)
        self.sync_new_log(log)
        self.disk.write(("name",), log)
        self.name_durable = False
        self.log, self.frames, self.records = log, (snapshot, word), records

    def sync_new_log(self, log: int) -> None:
        self.disk.sync(lambda key: key[:2] == ("log", log))

    def cut(self) -> None:
        """Cut the data file to a size that is durable."""
        for cell in range(len(self.content), BLOCKS * CELLS):
            key = ("D", cell // CELLS, cell % CELLS)
            if self.disk.get(key):
                self.disk.write(key, None)


class FrameAtFsync(File):
    """Right, and cheaper: frames only at fsync and unmount."""

    frame_per_write = False


# -- wrong on purpose: the explorer must find a crash that each of these does not survive


class NoMountSync(File):
    """Takes what an earlier daemon left in the page cache for durable."""

    def sync_at_mount(self) -> None:
        pass


class EpochNotDurable(File):
    """Writes in an epoch that a power cut takes back, so that generations are used twice."""

    def sync_epoch(self) -> None:
        pass


class EagerCut(File):
    """Cuts the data file before the smaller size is durable."""

    def after_change(self) -> None:
        self.cut()


class DurableHome(File):
    """Overwrites the durable version."""

    def home(self, block: int) -> str:
        return "D"


class TailInPlace(File):
    """Grows a partial last block where it is."""

    tail: int | None = None

    def change(self, content: Content) -> None:
        self.tail = len(self.content) // CELLS if len(content) > len(self.content) else None
        super().change(content)

    def home(self, block: int) -> str:
        record = self.durable.get(block)
        return record.home if record is not None and block == self.tail else super().home(block)


class DurableTooEarly(File):
    """Counts a frame as durable when it is written."""

    def frame(self) -> None:
        super().frame()
        self.durable, self.durable_up_to = dict(self.records), self.frames[-1].generation


class NameNotSynced(File):
    """fsync leaves the log's directory out."""

    def make_durable(self) -> None:
        self.name_durable = True
        super().make_durable()


class CompactUnsynced(File):
    """Renames the new log over the old one before the new one is durable."""

    def sync_new_log(self, log: int) -> None:
        pass


class CompactDirty(File):
    """Compacts while data named by the snapshot is not durable: the log of the durable version is gone."""

    def compact(self) -> None:
        if self.frames:
            self.frame()
            self.rewrite_log()


class RotateDirty(File):
    """Rewrites the log under other keys while data named by the snapshot is not durable."""

    def rotate(self) -> None:
        if self.frames:
            self.frame()
            self.rewrap_log()


class CompactTrustsRename(File):
    """Compacts with the data durable but not the old log, and counts on the rename that is not durable yet."""

    def compact(self) -> None:
        self.frame()
        self.disk.sync(lambda key: key[0] in {"D", "T"})
        self.rewrite_log()
        self.durable, self.durable_up_to = dict(self.records), self.frames[-1].generation
