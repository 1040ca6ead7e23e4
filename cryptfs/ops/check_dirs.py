"""One directory of a check: what its `.dir` says against what `tree/` has, both ways."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, field

from cryptfs.crypto.siv import NameCipher
from cryptfs.errors import Damaged
from cryptfs.format.datafile import HEADER_BYTES, decode_data_header
from cryptfs.format.dirlog import Entry
from cryptfs.format.log import HEADER_BYTES as LOG_HEADER_BYTES
from cryptfs.format.log import decode_header
from cryptfs.format.sidecar import Sealed
from cryptfs.fs.context import FsContext
from cryptfs.fs.directory import DirNode
from cryptfs.fs.reconcile import KIND_OF_MODE, reconcile
from cryptfs.fs.symlink import decode_target_text
from cryptfs.fs.xattr import open_set
from cryptfs.names import DIR_LOG, DIR_LOG_NEW, sealed_from_tree, tree_name
from cryptfs.ops.check_report import Finding, Severity, Spot, What
from cryptfs.ops.offline import open_for_reading
from cryptfs.ports import Store
from cryptfs.types import Kind

_WITH_ID = (Kind.FILE, Kind.DIR, Kind.SYMLINK)


@dataclass(frozen=True, slots=True)
class Seen:
    """An entry as `tree/` has it. `proof`: the bytes that say its id; `error`: why they could not be read."""

    st: os.stat_result
    kind: Kind
    proof: bytes
    error: str = ""

    @property
    def log_id(self) -> bytes:
        """The id it claims, b"" if it claims none that can be understood."""
        try:
            if self.kind is Kind.FILE:
                return decode_data_header(self.proof).file_id
            if self.kind is Kind.DIR:
                return decode_header(self.proof).log_id
            if self.kind is Kind.SYMLINK:
                return decode_target_text(self.proof)[0]
        except Damaged:
            return b""
        return b""


@dataclass(frozen=True, slots=True)
class Placed:
    """An entry on which `.dir` and `tree/` agree; `name` is the plaintext one."""

    entry: Entry
    name: bytes
    seen: Seen


@dataclass(frozen=True, slots=True)
class Absent:
    """An entry that `.dir` names and whose object is not there; `name` is the plaintext one."""

    spot: Spot
    path: bytes
    entry: Entry
    finding: Finding


@dataclass(frozen=True, slots=True)
class Stray:
    """Something in `tree/` that no `.dir` names there. `name`: plaintext if it could be opened, else as found."""

    spot: Spot
    path: bytes
    name: bytes
    seen: Seen
    finding: Finding


@dataclass(slots=True)
class Look:
    """One look at a directory."""

    placed: list[Placed] = field(default_factory=list)
    absent: list[Absent] = field(default_factory=list)
    strays: list[Stray] = field(default_factory=list)
    others: list[Finding] = field(default_factory=list)
    ids: set[bytes] = field(default_factory=set)
    """Every id that the log names."""
    xattrs: Sealed | None = None
    """The directory's own."""
    domain: bytes = b""
    """The id of the volume whose place it is."""
    unreadable: bool = False
    """Something in it could not be read: what lies below or behind that may be anything, under any id."""

    def findings(self) -> list[Finding]:
        """All of them."""
        out = {id(finding): finding for finding in self.others}
        out.update((id(absent.finding), absent.finding) for absent in self.absent)
        out.update((id(stray.finding), stray.finding) for stray in self.strays)
        return list(out.values())

    def keep(self, keys: set[tuple[str, bytes, str]]) -> None:
        """Forget what was not found again."""
        self.absent = [item for item in self.absent if item.finding.key in keys]
        self.strays = [item for item in self.strays if item.finding.key in keys]
        self.others = [finding for finding in self.others if finding.key in keys]


def survey(store: Store, fd: int, names: list[bytes] | None = None) -> dict[bytes, Seen]:
    """Everything in the directory behind `fd`, `.dir` included, or what there is of `names`. Blocks."""
    out: dict[bytes, Seen] = {}
    for name in store.listdir(fd) if names is None else names:
        try:
            st = store.lstat(fd, name)
        except FileNotFoundError:
            continue
        kind = KIND_OF_MODE[stat.S_IFMT(st.st_mode)]
        try:
            out[name] = Seen(st, kind, _proof(store, fd, name, kind))
        except FileNotFoundError:
            continue
        except OSError as error:
            out[name] = Seen(st, kind, b"", error.strerror or "unreadable")
    return out


def _proof(store: Store, fd: int, name: bytes, kind: Kind) -> bytes:
    if kind is Kind.SYMLINK:
        return store.readlink(fd, name)
    if kind is Kind.FILE:
        inner = open_for_reading(store, fd, name)
        try:
            return store.pread(inner, HEADER_BYTES, 0)
        finally:
            store.close(inner)
    if kind is Kind.DIR:
        inner = store.open(fd, name, os.O_RDONLY | os.O_DIRECTORY)
        try:
            log_fd = store.open(inner, DIR_LOG, os.O_RDONLY | os.O_NONBLOCK)
        except FileNotFoundError:
            return b""
        finally:
            store.close(inner)
        try:
            return store.pread(log_fd, LOG_HEADER_BYTES, 0)
        finally:
            store.close(log_fd)
    return b""


def walk_down(store: Store, fd: int, visit: Callable[[int], list[bytes]]) -> None:
    """Call `visit` with a descriptor of the directory behind `fd` and each one below.

    It returns the names of those to go down to. Holds one descriptor per level. Raises OSError.
    """
    levels = [(-1, visit(fd))]
    try:
        while levels:
            here, names = levels[-1]
            if not names:
                levels.pop()
                if here >= 0:
                    store.close(here)
                continue
            below = store.open(fd if here < 0 else here, names.pop(), os.O_RDONLY | os.O_DIRECTORY)
            try:
                levels.append((below, visit(below)))
            except BaseException:
                store.close(below)
                raise
    finally:
        for here, _ in levels:
            if here >= 0:
                store.close(here)


def opened_name(names: NameCipher | None, name: bytes) -> bytes:
    """The plaintext of a short name in `tree/`, or the name itself if it is none of `names`'."""
    sealed = sealed_from_tree(name)
    if names is not None and sealed is not None:
        try:
            return names.open(sealed)
        except Damaged:
            return name
    return name


def join(path: bytes, name: bytes) -> bytes:
    """`path` and a name below it."""
    return path + name if path.endswith(b"/") else path + b"/" + name


async def look(ctx: FsContext, fd: int, dir_id: bytes, path: bytes, above: tuple[bytes, ...]) -> Look:
    """Compare the directory behind `fd` (which stays open) with its log.

    Raises `Damaged` if the log says nothing that can be relied on, OSError, key errors.
    """
    node = await DirNode.open(ctx, ctx.store.fstat(fd).st_ino, fd, dir_id)
    try:
        if ctx.read_only and node.needs_reconciling:
            await reconcile(node)
        seen = await ctx.in_thread(survey, ctx.store, fd)
        names = (await node.keys()).names
        out = _compare(node, names, seen, path, above)
        out.xattrs, out.domain = node.xattrs, node.domain
        try:
            await open_set(ctx, dir_id, node.xattrs)
        except Damaged as error:
            spot = Spot(above[:-1], above[-1]) if above else Spot()
            ino = node.ino
            out.others.append(
                Finding(Severity.DAMAGE, What.XATTRS, path, error.reason, str(error), dir_id, ino, [], spot)
            )
        return out
    finally:
        node.close_log()


def _compare(node: DirNode, names: NameCipher, seen: dict[bytes, Seen], path: bytes, above: tuple[bytes, ...]) -> Look:
    out = Look()
    left = dict(seen)
    left.pop(DIR_LOG, None)
    out.unreadable = any(found.error for found in left.values())
    if left.pop(DIR_LOG_NEW, None) is not None:
        finding = Finding(Severity.LEFTOVER, What.UNFINISHED, path, "dir-log", "a rewrite of its log that a crash cut")
        finding.spot = Spot(above, DIR_LOG_NEW)
        out.others.append(finding)
    out.ids = {entry.log_id for entry in node.entries.values()}
    for sealed, entry in node.entries.items():
        below = tree_name(sealed)
        try:
            name = names.open(sealed)
        except Damaged as error:
            out.others.append(Finding(Severity.DAMAGE, What.DIRECTORY, path, error.reason, str(error), node.dir_id))
            continue
        spot, there = Spot(above, below), join(path, name)
        found = left.pop(below, None)
        if found is None:
            finding = Finding(Severity.DAMAGE, What.MISSING, there, "missing", "", entry.log_id, None, [], spot)
            out.absent.append(Absent(spot, there, entry, finding))
            continue
        finding = Finding(
            Severity.DAMAGE, What.EXCHANGED, there, "exchanged", "", entry.log_id, found.st.st_ino, [], spot
        )  # fmt: skip
        if found.kind is not entry.kind or (entry.rdev and entry.rdev != found.st.st_rdev):
            finding.detail = f"a {found.kind.name.lower()} where .dir has a {entry.kind.name.lower()}"
        elif found.error:
            finding.what, finding.reason = What.UNREADABLE, found.error
            out.others.append(finding)
            continue
        elif found.log_id != entry.log_id and (found.log_id or entry.kind is Kind.SYMLINK) and entry.kind in _WITH_ID:
            finding.reason, finding.detail = "id-mismatch", f"it is {found.log_id.hex() or 'none of ours'}"
        elif entry.kind is Kind.DIR and not found.log_id and sealed in node.unsure:
            finding.severity, finding.what, finding.reason = Severity.LEFTOVER, What.UNSETTLED, "missing-dir-log"
            finding.detail = "made just before a crash; the next mount starts its log anew"
            out.others.append(finding)
            continue
        else:
            out.placed.append(Placed(entry, name, found))
            continue
        out.absent.append(Absent(spot, there, entry, finding))
        out.strays.append(Stray(spot, there, name, found, finding))
    for below, found in left.items():
        name, spot = opened_name(names, below), Spot(above, below)
        finding = Finding(
            Severity.DAMAGE, What.STRAY, join(path, name), "stray", f"a {found.kind.name.lower()}, not in .dir",
            found.log_id, found.st.st_ino, [], spot,
        )  # fmt: skip
        out.strays.append(Stray(spot, finding.path, name, found, finding))
    return out
