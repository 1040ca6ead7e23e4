"""Directories under FORMAT.md §6 on `MemoryStore`: the order of frames and tree calls, and the reader's rule.

A `.dir` is a header sector and two equal sectors per frame, in JSON instead of MACs and msgpack: what counts is which
writes survive together. A file is one sector with its id and the epoch it was made in. Names in capitals stand for
names of more than 175 bytes: in the tree only their hash shows, so only `.dir` can say what they are.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from cryptfs.store.disk_model import SECTOR_BYTES
from cryptfs.store.memory import MemoryStore

FILE, DIR = "file", "dir"
ROOT = "root"
UNKNOWN = "?"
"""The id of a file whose header did not reach the disk: it is new, and empty."""

CREATE = os.O_RDWR | os.O_CREAT | os.O_EXCL
Binding = tuple[str, str]
"""(kind, id)."""
Place = tuple[str, str]
"""(directory's id, name)."""
Namespace = dict[Place, Binding]


def is_long(name: str) -> bool:
    return name.isupper()


def on_disk(name: str) -> bytes:
    return (f"~{hash_of(name)}" if is_long(name) else name).encode()


def hash_of(name: str) -> str:
    return str(sum(name.encode()))


def sector(value: object) -> bytes:
    raw = json.dumps(value).encode()
    assert len(raw) <= SECTOR_BYTES
    return raw.ljust(SECTOR_BYTES, b" ")


def parse(raw: bytes) -> Any:  # noqa: ANN401 - whatever was packed
    try:
        return json.loads(raw)
    except ValueError:
        return None


@dataclass
class DirLog:
    """A `.dir` as the reader finds it. `said`: bindings that frames not known to be durable put in force or ended."""

    dir_id: str
    born: int
    epoch: int
    entries: dict[str, Binding] = field(default_factory=dict)
    said: dict[str, set[Binding]] = field(default_factory=dict)
    frames: int = 0
    last: tuple[int, int] = (0, 0)


def read_log(raw: bytes, crashed: frozenset[int]) -> DirLog | None:
    """None if not even the header and the first frame are there."""
    header = parse(raw[:SECTOR_BYTES])
    if header is None:
        return None
    log = DirLog(header["id"], 0, 0)
    at = SECTOR_BYTES
    frames: list[Any] = []
    while at < len(raw):
        head, tail = raw[at : at + SECTOR_BYTES], raw[at + SECTOR_BYTES : at + 2 * SECTOR_BYTES]
        frame = parse(head)
        if frame is None or head != tail or frame["previous"] != (frames[-1]["generation"] if frames else None):
            break
        frames.append(frame)
        at += 2 * SECTOR_BYTES
    durable = max((tuple(frame["durable_up_to"]) for frame in frames), default=(0, 0))
    for frame in frames:
        touched = {*frame["set"], *frame["gone"], *(log.entries if frame["snapshot"] else ())}
        before = {name: log.entries[name] for name in touched if name in log.entries}
        if frame["snapshot"]:
            log.entries = {}
        for name in frame["gone"]:
            log.entries.pop(name, None)
        log.entries.update({name: (kind, entry_id) for name, (kind, entry_id) in frame["set"].items()})
        if tuple(frame["generation"]) <= durable or frame["generation"][0] not in crashed:
            log.said = {}
        else:
            for name, binding in before.items():
                log.said.setdefault(name, set()).add(binding)
    log.frames = len(frames)
    if not frames:
        return None
    log.last = tuple(frames[-1]["generation"])
    log.born, log.epoch = frames[0]["generation"][0], frames[-1]["generation"][0]
    return log


@dataclass
class Look:
    """All that a reader sees: bindings, and what it takes for damage."""

    seen: Namespace = field(default_factory=dict)
    damage: list[str] = field(default_factory=list)
    lost: list[tuple[int, bytes]] = field(default_factory=list)
    logs: dict[str, DirLog] = field(default_factory=dict)
    fds: dict[str, int] = field(default_factory=dict)


class Reader:
    """The rule of FORMAT.md §6 for what an entry is after a crash. Subclasses get it wrong."""

    def __init__(self, store: MemoryStore, crashed: frozenset[int]) -> None:
        self.store = store
        self.crashed = crashed

    def look(self) -> Look:
        """Read the whole tree."""
        look = Look()
        tree = self.store.open(self.store.root(), b"tree", os.O_RDONLY | os.O_DIRECTORY)
        log = self.log_of(tree)
        if log is None or log.dir_id != ROOT:
            look.damage.append("root")
            return look
        self._directory(tree, log, look)
        return look

    def log_of(self, fd: int) -> DirLog | None:
        try:
            inner = self.store.open(fd, b".dir", os.O_RDONLY)
        except FileNotFoundError:
            return None
        raw = self.store.pread(inner, 1 << 20, 0)
        self.store.close(inner)
        return read_log(raw, self.crashed)

    def touched(self, log: DirLog) -> bool:
        """Whether a crash can have come between this log and its tree."""
        return any(epoch >= log.epoch for epoch in self.crashed)

    def _directory(self, fd: int, log: DirLog, look: Look) -> None:
        look.logs[log.dir_id], look.fds[log.dir_id] = log, fd
        there = {name for name in self.store.listdir(fd) if not name.startswith(b".")}
        known = {on_disk(name): name for name in [*log.said, *log.entries]}
        for name in log.entries:
            if on_disk(name) not in there and not self.touched(log):
                look.damage.append(f"{name} is missing")
        for hidden in sorted(there):
            name = known.get(hidden, hidden.decode())
            found, born, inner = self.identify(fd, hidden)
            verdict = self.verdict(log, name, found, born)
            if verdict == "shown":
                look.seen[log.dir_id, name] = found
            elif verdict == "absent":
                look.lost.append((fd, hidden))
            else:
                look.damage.append(f"{name}: {verdict}")
            if verdict == "shown" and found[0] == DIR and inner is not None:
                below = self.store.open(fd, hidden, os.O_RDONLY | os.O_DIRECTORY)
                if inner.dir_id in look.logs:
                    look.damage.append(f"{name}: a directory in two places")
                else:
                    self._directory(below, inner, look)

    def identify(self, fd: int, hidden: bytes) -> tuple[Binding, int, DirLog | None]:
        """((kind, id), epoch of its creation, its log)."""
        if stat.S_ISDIR(self.store.lstat(fd, hidden).st_mode):
            inner_fd = self.store.open(fd, hidden, os.O_RDONLY | os.O_DIRECTORY)
            log = self.log_of(inner_fd)
            self.store.close(inner_fd)
            return ((DIR, log.dir_id), log.born, log) if log else ((DIR, UNKNOWN), 0, None)
        file_fd = self.store.open(fd, hidden, os.O_RDONLY)
        header = parse(self.store.pread(file_fd, SECTOR_BYTES, 0))
        self.store.close(file_fd)
        return ((FILE, header["id"]), header["born"], None) if header else ((FILE, UNKNOWN), 0, None)

    def verdict(self, log: DirLog, name: str, found: Binding, born: int) -> str:
        """ "shown", "absent" (a creation that a crash cut short), or what is wrong."""
        if found == log.entries.get(name):
            return "shown"
        if not self.touched(log):
            return "differs without a crash"
        if name.startswith("~"):  # nobody knows the name: that creation's frame is lost
            return "absent" if found[1] == UNKNOWN or born in self.crashed else "unknown long name"
        if found[1] == UNKNOWN:
            return "shown" if found[0] == FILE else "absent"
        if born in self.crashed or found in log.said.get(name, ()):
            return "shown"
        return "older than the crash and never here"


class Ops:
    """A writer that obeys the format. Subclasses override one method each to get it wrong."""

    reader: type[Reader] = Reader

    def __init__(self, store: MemoryStore, epoch: int = 0, crashed: frozenset[int] = frozenset()) -> None:
        """Mount `store` (new if `epoch` is 0): `epoch` was its last, `crashed` are those that ended uncleanly."""
        self.store = store
        self.counter = 0
        self.made = 0
        self.crashed = crashed
        self.epoch = epoch + 1
        self.synced: set[str] = set()
        """Directories whose log's name and whose own are durable, as are those of all their ancestors."""
        self.durable_up_to: dict[str, tuple[int, int]] = {}
        self.parent: dict[str, Place] = {}
        if not epoch:
            for name in (b"tree", b"tmp"):
                store.mkdir(store.root(), name)
            self._new_log(store.open(store.root(), b"tree", os.O_RDONLY | os.O_DIRECTORY), ROOT)
        store.syncfs(store.root())
        self._load()
        self._settle()

    def _load(self) -> None:
        self.found = self.reader(self.store, self.crashed).look()
        self.names = dict(self.found.seen)
        self.logs, self.fds = self.found.logs, self.found.fds
        self.synced = set(self.logs)
        self.parent = {entry_id: place for place, (kind, entry_id) in self.names.items() if kind == DIR}
        self.durable_up_to = {dir_id: log.last for dir_id, log in self.logs.items()}

    def _settle(self) -> None:
        """Clear away creations cut short, give unknown files an id, and bring every log in line with its tree."""
        for fd, hidden in self.found.lost:
            self.store.rename(fd, hidden, self._tmp(), f"lost{self.epoch}.{self._fresh()}".encode())
            self.sync_clearance(fd)
        given: dict[int, str] = {}
        for place, binding in list(self.names.items()):
            if binding == (FILE, UNKNOWN):
                fd = self.store.open(self.fds[place[0]], on_disk(place[1]), os.O_RDWR)
                inode = self.store.fstat(fd).st_ino  # by which all its names get the same id
                if inode not in given:
                    given[inode] = self._new_id()
                    self._write_header(fd, given[inode])
                self.names[place] = (FILE, given[inode])
                self.store.close(fd)
        for dir_id, log in self.logs.items():
            now = {name: binding for (where, name), binding in self.names.items() if where == dir_id}
            changed = {name: binding for name, binding in now.items() if log.entries.get(name) != binding}
            gone = [name for name in log.entries if name not in now]
            if changed or gone:
                self.frame(dir_id, changed, gone)

    def sync_clearance(self, fd: int) -> None:
        """What was absent must not come back when a later frame knows its name."""
        self.store.fsync(fd)

    # -- plumbing

    def _fresh(self) -> int:
        self.counter += 1
        return self.counter

    def _new_id(self) -> str:
        self.made += 1
        return f"{self.epoch}.{self.made}"

    def _tmp(self) -> int:
        return self.store.open(self.store.root(), b"tmp", os.O_RDONLY | os.O_DIRECTORY)

    def _write_header(self, fd: int, file_id: str) -> None:
        self.store.pwrite(fd, sector({"id": file_id, "born": self.epoch}), 0)

    def _frame_bytes(self, log: DirLog, *, snapshot: bool, changed: dict[str, Binding], gone: Iterable[str]) -> bytes:
        previous = list(log.last) if log.frames and not snapshot else None
        log.last = (self.epoch, self._fresh())
        one = sector(
            {
                "generation": log.last,
                "previous": previous,
                "durable_up_to": self.durable_up_to.get(log.dir_id, (0, 0)),
                "snapshot": snapshot,
                "set": changed,
                "gone": list(gone),
            }
        )
        return one + one

    def _new_log(self, fd: int, dir_id: str) -> DirLog:
        log = DirLog(dir_id, self.epoch, self.epoch)
        inner = self.store.open(fd, b".dir", CREATE)
        first = self._frame_bytes(log, snapshot=True, changed={}, gone=())
        self.store.pwrite(inner, sector({"id": dir_id}) + first, 0)
        self.store.close(inner)
        log.frames = 1
        return log

    def _open_log(self, dir_id: str) -> int:
        return self.store.open(self.fds[dir_id], b".dir", os.O_RDWR)

    def frame(self, dir_id: str, changed: dict[str, Binding], gone: Iterable[str] = ()) -> None:
        """Append what becomes true of `dir_id`."""
        log = self.logs[dir_id]
        raw = self._frame_bytes(log, snapshot=not log.frames, changed=changed, gone=gone)
        fd = self._open_log(dir_id)
        self.store.ftruncate(fd, SECTOR_BYTES * (1 + 2 * log.frames))  # what a crash left behind the last frame
        self.store.pwrite(fd, raw, SECTOR_BYTES * (1 + 2 * log.frames))
        self.store.close(fd)
        log.frames += 1

    # -- durability

    def sync_log(self, dir_id: str) -> None:
        """The log's content; not the tree."""
        fd = self._open_log(dir_id)
        self.store.fdatasync(fd)
        self.store.close(fd)

    def sync_place(self, dir_id: str) -> None:
        """Make it durable that `dir_id` exists where it is, and its log with it: bottom up, as far as is not yet so."""
        while dir_id not in self.synced:
            self.sync_log(dir_id)
            self.store.fsync(self.fds[dir_id])
            self.synced.add(dir_id)
            if dir_id != ROOT:
                dir_id = self.parent[dir_id][0]
                self.sync_log(dir_id)
                self.store.fsync(self.fds[dir_id])

    def sync_before_arrival(self, dir_id: str) -> None:
        """Before an existing entry is renamed into `dir_id`: the log that says so, and the directory's own place."""
        self.sync_log(dir_id)
        self.sync_place(dir_id)

    def fsync_dir(self, dir_id: str) -> None:
        self.sync_new_children(dir_id)
        self.sync_names(dir_id)
        self.durable_up_to[dir_id] = self.logs[dir_id].last

    def sync_new_children(self, dir_id: str) -> None:
        """A directory whose log is lost is lost, so whoever acknowledges its name must sync its log."""
        for (where, _), (kind, entry_id) in self.names.items():
            if where == dir_id and kind == DIR and entry_id not in self.synced:
                self.sync_log(entry_id)
                self.store.fsync(self.fds[entry_id])

    def sync_names(self, dir_id: str) -> None:
        self.sync_log(dir_id)
        self.store.fsync(self.fds[dir_id])
        self.sync_place(dir_id)

    def fsync_file(self, place: Place) -> None:
        fd = self.store.open(self.fds[place[0]], on_disk(place[1]), os.O_RDWR)
        self.store.fdatasync(fd)
        self.store.close(fd)
        self.sync_names(place[0])

    # -- what programs do

    def create(self, place: Place) -> None:
        dir_id, name = place
        binding = (FILE, self._new_id())
        self.frame(dir_id, {name: binding})
        if is_long(name):
            self.sync_before_long_name(dir_id)
        fd = self.store.open(self.fds[dir_id], on_disk(name), CREATE)
        self._write_header(fd, binding[1])
        self.store.close(fd)
        self.names[place] = binding

    def sync_before_long_name(self, dir_id: str) -> None:
        """Nothing: a new file whose long name is lost was never acknowledged."""

    def mkdir(self, place: Place) -> None:
        dir_id, name = place
        new_id = self._new_id()
        self.frame(dir_id, {name: (DIR, new_id)})
        tmp = self._tmp()
        hidden = f"new{self.epoch}.{self._fresh()}".encode()
        self.store.mkdir(tmp, hidden)
        fd = self.store.open(tmp, hidden, os.O_RDONLY | os.O_DIRECTORY)
        self.logs[new_id], self.fds[new_id] = self._new_log(fd, new_id), fd
        self.store.rename(tmp, hidden, self.fds[dir_id], on_disk(name))
        self.parent[new_id] = place
        self.names[place] = (DIR, new_id)

    def unlink(self, place: Place) -> None:
        self.frame(place[0], {}, [place[1]])
        self.store.unlink(self.fds[place[0]], on_disk(place[1]))
        del self.names[place]

    def rename(self, src: Place, dst: Place) -> None:
        """Also over an existing file. The frames first; the one at the destination durable before the call."""
        binding = self.names[src]
        if src[0] == dst[0]:
            self.frame(dst[0], {dst[1]: binding}, [src[1]])
        else:
            self.frame(dst[0], {dst[1]: binding})
            self.frame(src[0], {}, [src[1]])
        self.sync_before_arrival(dst[0])
        self.store.rename(self.fds[src[0]], on_disk(src[1]), self.fds[dst[0]], on_disk(dst[1]))
        del self.names[src]
        self.names[dst] = binding
        if binding[0] == DIR:
            self.parent[binding[1]] = dst

    def link(self, src: Place, dst: Place) -> None:
        self.frame(dst[0], {dst[1]: self.names[src]})
        self.sync_before_arrival(dst[0])
        self.store.link(self.fds[src[0]], on_disk(src[1]), self.fds[dst[0]], on_disk(dst[1]))
        self.names[dst] = self.names[src]

    def compact(self, dir_id: str) -> None:
        """The tree durable, the new log durable, then renamed over the old one."""
        self.sync_tree_before_compaction(dir_id)
        log = self.logs[dir_id]
        now = {name: binding for (where, name), binding in self.names.items() if where == dir_id}
        fd = self.store.open(self.fds[dir_id], b".dir.new", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        first = self._frame_bytes(log, snapshot=True, changed=now, gone=())
        self.store.pwrite(fd, sector({"id": dir_id}) + first, 0)
        self.sync_new_log(fd)
        self.store.close(fd)
        self.store.rename(self.fds[dir_id], b".dir.new", self.fds[dir_id], b".dir")
        log.frames = 1

    def sync_tree_before_compaction(self, dir_id: str) -> None:
        self.fsync_dir(dir_id)

    def sync_new_log(self, fd: int) -> None:
        self.store.fdatasync(fd)


class CompactLazily(Ops):
    """Right: the tree's calls come before the rename of the new log in the same directory, so it needs no sync."""

    def sync_tree_before_compaction(self, dir_id: str) -> None:
        pass


class EvidenceOnly(Reader):
    """Forgives only a log whose last frame is of a crashed epoch: right only if the writer leaves that evidence."""

    def touched(self, log: DirLog) -> bool:
        return log.epoch in self.crashed


class EvidenceFirst(Ops):
    """Right: a directory's first frame in an epoch is durable before the first call on its tree."""

    reader = EvidenceOnly

    def frame(self, dir_id: str, changed: dict[str, Binding], gone: Iterable[str] = ()) -> None:
        first = self.logs[dir_id].last[0] != self.epoch
        super().frame(dir_id, changed, gone)
        if first:
            self.sync_log(dir_id)
            self.store.fsync(self.fds[dir_id])


# -- wrong on purpose


class NoArrivalSync(Ops):
    """Renames an existing entry into a directory whose log may forget it."""

    def sync_before_arrival(self, dir_id: str) -> None:
        pass


class NoPlaceSync(Ops):
    """Renames an existing entry into a directory that may itself be lost, and syncs only that log."""

    def sync_place(self, dir_id: str) -> None:
        pass


class FsyncWithoutDirectory(Ops):
    """fsync of a file leaves its name out."""

    def fsync_file(self, place: Place) -> None:
        fd = self.store.open(self.fds[place[0]], on_disk(place[1]), os.O_RDWR)
        self.store.fdatasync(fd)
        self.store.close(fd)


class FsyncWithoutChildren(Ops):
    """fsync of a directory acknowledges the name of a new one whose log may be lost."""

    def sync_new_children(self, dir_id: str) -> None:
        pass


class ClearanceNotSynced(Ops):
    """Goes on while what a crash left under a long name may come back."""

    def sync_clearance(self, fd: int) -> None:
        pass


class DurableTooEarly(Ops):
    """Says that the tree has what only the log has."""

    def sync_log(self, dir_id: str) -> None:
        super().sync_log(dir_id)
        self.durable_up_to[dir_id] = self.logs[dir_id].last


class CompactUnsynced(Ops):
    """Renames a new log over the old one before it is durable."""

    def sync_new_log(self, fd: int) -> None:
        pass


class Unforgiving(Reader):
    """Takes what a crash left for damage."""

    def touched(self, log: DirLog) -> bool:
        return False


class UnforgivingOps(Ops):
    reader = Unforgiving


class Credulous(Reader):
    """Takes whatever in the tree is authentic, wherever it lies: files may be exchanged unnoticed."""

    def verdict(self, log: DirLog, name: str, found: Binding, born: int) -> str:
        return "shown" if self.touched(log) else super().verdict(log, name, found, born)


class EvidenceOnlyOps(Ops):
    """Wrong: the first frame of an epoch may be lost while the call on the tree survives."""

    reader = EvidenceOnly
