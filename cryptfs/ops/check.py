"""`cryptfs check`: walk a volume and compare everything with everything that should agree with it.

Reading only; `ops.check_repair` acts on what is found here. Two things go on at once: one task walks directories,
others check batches of files. In a volume that is mounted meanwhile, what looks wrong is looked at again, after the
daemon was asked to write it out, before it counts.
"""

from __future__ import annotations

import os
import stat
import time
from contextlib import suppress
from dataclasses import dataclass, field

import trio

from cryptfs.errors import Damaged
from cryptfs.format.datafile import HEADER_BYTES
from cryptfs.fs.attr_log import find_attr_log
from cryptfs.fs.symlink import decode_target_text, read_target
from cryptfs.fs.xattr import open_set
from cryptfs.names import tree_name
from cryptfs.ops import check_domains
from cryptfs.ops.check_dirs import Absent, Look, Placed, Seen, Stray, join, look, survey, walk_down
from cryptfs.ops.check_files import DirRef, FileJob, check_files
from cryptfs.ops.check_live import Recheck
from cryptfs.ops.check_report import Finding, Report, Severity, Spot, Tally, What
from cryptfs.ops.check_sidecars import Sidecars, list_sidecars
from cryptfs.ops.lost_state import STATE_NEW
from cryptfs.ops.offline import Access, Looking, Settle, open_to_read, shut
from cryptfs.ports import Store
from cryptfs.types import Kind

_WORKERS = 2
_BATCH_FILES = 64
_BATCH_BYTES = 32 << 20
_TOP_LEVEL = frozenset({b"volume", b"state", b"tree", b"sidecars", b"tmp", b"damaged", b"domains", b"shredded"})


async def check_volume(
    access: Access, *, deep: bool = False, settle: Settle | None = None, tally: Tally | None = None
) -> Report:
    """Check a volume, mounted or not; writes nothing. `tally` can be watched meanwhile.

    Raises `VolumeDamaged` (nothing can be checked without `volume` and `state`), OSError, key errors.
    """
    looking = await open_to_read(access, settle)
    try:
        check = Check(looking, deep=deep, tally=tally or Tally())
        return await check.run()
    finally:
        await shut(access, looking)


@dataclass(slots=True)
class _Links:
    count: int
    names: list[tuple[Spot, bytes]]


@dataclass(frozen=True, slots=True)
class LostDir:
    """A directory whose log cannot be relied on. `spot.below` leads to it."""

    spot: Spot
    path: bytes
    dir_id: bytes
    finding: Finding


@dataclass(slots=True)
class _Level:
    """A directory on the way down and what is left to do in it."""

    ref: DirRef
    path: bytes
    chain: tuple[bytes, ...]
    todo: list[Placed] = field(default_factory=list)


class Check:
    """One pass over an open volume. Afterwards `absent`, `strays` and `lost_dirs` hold what a repair starts from."""

    def __init__(self, looking: Looking, *, deep: bool, tally: Tally) -> None:
        self.ctx = looking.ctx
        self.live = looking.live
        self.deep = deep
        self.report = Report(deep, looking.live, looking.left_clean, tally=tally)
        self.absent: list[Absent] = []
        self.strays: list[Stray] = []
        self.lost_dirs: list[LostDir] = []
        self.ids: dict[bytes, int] = {}
        """Ids of entries that are in their place -> inode."""
        self.claims: set[bytes] = set()
        """Ids that an entry or anything in `tree/` names, in its place or not."""
        self.domains: dict[bytes, bytes] = {}
        """Paths of domains' places -> the domain's id."""
        self.sidecars = Sidecars()
        self.complete = True
        """Everything in `tree/` was seen, and every directory's log could be read: all ids in use are in `claims`."""
        self._tmp = looking.tmp
        self._links: dict[int, _Links] = {}
        self._recheck = Recheck(looking.ctx, looking.settle, self.report.busy) if looking.live else None
        self._batch: list[FileJob] = []
        self._batch_bytes = 0

    @property
    def tally(self) -> Tally:
        """How far it is."""
        return self.report.tally

    async def run(self) -> Report:
        """Check everything. Raises OSError for the volume's own directories, key errors."""
        ctx, report = self.ctx, self.report
        self.sidecars = await ctx.in_thread(list_sidecars, ctx)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._measure)
            send, receive = trio.open_memory_channel[list[FileJob]](_WORKERS)
            async with trio.open_nursery() as workers:
                for _ in range(_WORKERS):
                    workers.start_soon(self._work, receive.clone())
                receive.close()
                async with send:
                    await self._walk(send)
            self.tally.measured = True
            nursery.cancel_scope.cancel()
        report.domains = self.domains
        report.findings += check_domains.placed(ctx, self.domains)
        if not self.live:
            self._check_links()
            self._check_leftovers()
        report.findings.sort(key=lambda finding: (finding.path, finding.what))
        report.duration_s = time.monotonic() - report.started_s
        return report

    def any_done(self, what: What | None = None) -> bool:
        """Whether something (of that kind) that was found was put right since."""
        return any(f.action and (what is None or f.what is what) for f in self.report.findings)

    def names_of(self, finding: Finding) -> list[tuple[Spot, bytes]]:
        """All (spot, path) of the inode that a finding about a file names, its own first."""
        assert finding.spot is not None
        links = self._links.get(finding.inode or 0)
        own = (finding.spot, finding.path)
        return [own, *(name for name in links.names if name != own)] if links is not None else [own]

    def add(self, finding: Finding) -> None:
        """One more finding."""
        self.report.findings.append(finding)

    # directories -----------------------------------------------------------------------------------------------

    async def _walk(self, send: trio.MemorySendChannel[list[FileJob]]) -> None:
        store, root_id = self.ctx.store, self.ctx.config.root_dir_id
        levels: list[_Level] = []
        try:
            fd = store.open(store.root(), b"tree", os.O_RDONLY | os.O_DIRECTORY)
            self.ids[root_id] = store.fstat(fd).st_ino
            await self._enter(levels, DirRef(store, fd), Spot(), b"/", root_id, send)
            while levels:
                level = levels[-1]
                if not level.todo:
                    levels.pop().ref.drop()
                    continue
                child = level.todo.pop()
                spot, path = Spot(level.chain, tree_name(child.entry.sealed)), join(level.path, child.name)
                try:
                    fd = store.open(level.ref.fd, spot.name, os.O_RDONLY | os.O_DIRECTORY)
                except OSError as error:
                    if not self._is_gone(level.ref, spot.name, child.seen.st.st_ino):
                        self._unreadable(path, spot, child, error)
                    continue
                await self._enter(levels, DirRef(store, fd), spot, path, child.entry.log_id, send)
            await self._flush(send)
        finally:
            for level in levels:
                level.ref.drop()
            for job in self._batch:
                job.ref.drop()
            self._batch = []

    async def _enter(
        self, levels: list[_Level], ref: DirRef, spot: Spot, path: bytes, dir_id: bytes,
        send: trio.MemorySendChannel[list[FileJob]],
    ) -> None:  # fmt: skip
        """Look at a directory, queue its files, and leave its directories for later."""
        level = _Level(ref, path, spot.below)
        levels.append(level)
        self.tally.directories += 1
        self.claims.add(dir_id)
        try:
            found = await self._look(ref, path, spot.below, dir_id)
        except (Damaged, OSError) as error:
            if len(levels) < 2 or not self._is_gone(levels[-2].ref, spot.name, self.ctx.store.fstat(ref.fd).st_ino):
                await self._lost(ref, spot, path, dir_id, error)
            return
        for finding in found.findings():
            self.add(finding)
        if found.unreadable:
            self.complete = False
        if found.domain:
            self.domains[path] = found.domain
        self.absent += found.absent
        self.strays += found.strays
        self.claims |= found.ids
        for stray in found.strays:
            await self._claim(ref, stray.spot.name, stray.seen)
        for placed in found.placed:
            await self._place(level, placed, send)

    async def _look(self, ref: DirRef, path: bytes, chain: tuple[bytes, ...], dir_id: bytes) -> Look:
        if self._recheck is None:
            return await look(self.ctx, ref.fd, dir_id, path, chain)
        return await self._recheck.look(ref.fd, dir_id, path, chain)

    async def _lost(self, ref: DirRef, spot: Spot, path: bytes, dir_id: bytes, error: Damaged | OSError) -> None:
        """Nothing below this directory can be reached; what lies there still claims its ids.

        Not all of them: those of special files, and of files without a header, only the log knows.
        """
        self.complete = False
        reason = error.reason if isinstance(error, Damaged) else (error.strerror or "unreadable")
        what = What.DIRECTORY if isinstance(error, Damaged) else What.UNREADABLE
        ino = self.ctx.store.fstat(ref.fd).st_ino
        finding = Finding(Severity.DAMAGE, what, path, reason, str(error), dir_id, ino, [], spot)
        self.add(finding)
        if isinstance(error, Damaged):
            self.lost_dirs.append(LostDir(spot, path, dir_id, finding))
        await self._claim_below(ref.fd)

    def _is_gone(self, ref: DirRef, name: bytes, ino: int) -> bool:
        """Whether a directory of a mounted volume was removed or renamed since it was seen."""
        if not self.live:
            return False
        try:
            return self.ctx.store.lstat(ref.fd, name).st_ino != ino
        except OSError:
            return True

    def _unreadable(self, path: bytes, spot: Spot, child: Placed, error: OSError) -> None:
        self.complete = False
        reason = error.strerror or "unreadable"
        ino = child.seen.st.st_ino
        self.add(Finding(Severity.DAMAGE, What.UNREADABLE, path, reason, "", child.entry.log_id, ino, [], spot))

    async def _place(self, level: _Level, placed: Placed, send: trio.MemorySendChannel[list[FileJob]]) -> None:
        entry, seen, path = placed.entry, placed.seen, join(level.path, placed.name)
        spot = Spot(level.chain, tree_name(entry.sealed))
        self.claims.add(entry.log_id)
        if seen.log_id:
            self.claims.add(seen.log_id)
        if entry.kind is Kind.DIR:
            self.ids[entry.log_id] = seen.st.st_ino
            level.todo.append(placed)
            return
        again = self._count_link(path, spot, seen.st)
        known = self.ids.setdefault(entry.log_id, seen.st.st_ino)
        if known != seen.st.st_ino:
            finding = Finding(Severity.DAMAGE, What.DUPLICATE, path, "duplicate", "a copy of another file with its id")
            finding.log_id, finding.inode, finding.spot = entry.log_id, seen.st.st_ino, spot
            self.add(finding)
            return
        if entry.kind is Kind.SYMLINK:
            self.tally.symlinks += 1
            await self._check_symlink(level.ref, path, spot, placed)
            await self._check_xattrs(path, spot, placed)
        elif entry.kind is not Kind.FILE:
            self.tally.others += 1
            if not again:
                await self._check_xattrs(path, spot, placed)
        elif not again:
            job = FileJob(level.ref.keep(), path, spot, entry.log_id, seen.st.st_ino, seen.proof)
            self._batch.append(job)
            self._batch_bytes += seen.st.st_size
            if len(self._batch) >= _BATCH_FILES or self._batch_bytes >= _BATCH_BYTES:
                await self._flush(send)

    # what lies in the tree without a place ---------------------------------------------------------------------

    async def _claim(self, ref: DirRef, name: bytes, seen: Seen) -> None:
        """The ids of something that is not walked."""
        if seen.log_id:
            self.claims.add(seen.log_id)
        if seen.error:
            self.complete = False
        if seen.kind is Kind.DIR:
            # Its log is not read here, and only that knows the ids of special files in it.
            self.complete = False
            try:
                fd = self.ctx.store.open(ref.fd, name, os.O_RDONLY | os.O_DIRECTORY)
            except OSError:
                return
            try:
                await self._claim_below(fd)
            finally:
                self.ctx.store.close(fd)

    async def _claim_below(self, fd: int) -> None:
        self.claims |= await self.ctx.in_thread(_ids_below, self.ctx.store, fd)

    # files -----------------------------------------------------------------------------------------------------

    async def _flush(self, send: trio.MemorySendChannel[list[FileJob]]) -> None:
        batch, self._batch, self._batch_bytes = self._batch, [], 0
        if batch:
            try:
                await send.send(batch)
            except BaseException:
                self._batch = batch
                raise

    async def _work(self, receive: trio.MemoryReceiveChannel[list[FileJob]]) -> None:
        async with receive:
            async for batch in receive:
                try:
                    await check_files(self.ctx, batch, self.tally, deep=self.deep)
                    for job in batch:
                        if job.findings and self._recheck is not None:
                            await self._recheck.file(job, deep=self.deep)
                        self.report.findings += job.findings
                finally:
                    for job in batch:
                        job.ref.drop()

    async def _check_symlink(self, ref: DirRef, path: bytes, spot: Spot, placed: Placed) -> None:
        log_id = placed.entry.log_id
        try:
            target = await read_target(self.ctx, log_id)
            if len(target) != decode_target_text(placed.seen.proof)[1]:
                raise Damaged("length", "its text in tree/ states another length")
        except (Damaged, OSError) as error:
            if self._recheck is not None and await self._recheck.symlink_is_fine(ref.fd, spot.name, log_id):
                return
            reason = error.reason if isinstance(error, Damaged) else (error.strerror or "unreadable")
            ino = placed.seen.st.st_ino
            self.add(Finding(Severity.DAMAGE, What.SYMLINK, path, reason, str(error), log_id, ino, [], spot))

    async def _check_xattrs(self, path: bytes, spot: Spot, placed: Placed) -> None:
        """Of a symlink or special file."""
        log_id = placed.entry.log_id
        try:
            found = await find_attr_log(self.ctx, log_id)
            if found is not None:
                await open_set(self.ctx, log_id, found.xattrs)
        except (Damaged, OSError) as error:
            if placed.entry.kind is Kind.SYMLINK or self.live:
                return  # A symlink whose sidecar is damaged was reported as a whole; what is mounted may be changing.
            ino = placed.seen.st.st_ino
            finding = Finding(Severity.DAMAGE, What.XATTRS, path, "", str(error), log_id, ino, [], spot)
            if isinstance(error, Damaged):
                finding.reason = error.reason
            else:
                # Not given up by a repair: they may be as good as ever.
                finding.what, finding.reason = What.UNREADABLE, error.strerror or "unreadable"
            self.add(finding)

    # at the end ------------------------------------------------------------------------------------------------

    def _count_link(self, path: bytes, spot: Spot, st: os.stat_result) -> bool:
        """Note one name of an inode; whether another name of it was met before."""
        if st.st_nlink < 2:
            return False
        links = self._links.setdefault(st.st_ino, _Links(st.st_nlink, []))
        links.names.append((spot, path))
        return len(links.names) > 1

    def _check_links(self) -> None:
        for ino, links in self._links.items():
            if len(links.names) != links.count:
                detail = f"{links.count} links, {len(links.names)} names"
                self.add(Finding(Severity.NOTICE, What.LINKS, links.names[0][1], "link-count", detail, b"", ino))

    def _check_leftovers(self) -> None:
        store = self.ctx.store
        for path, reason in self.sidecars.foreign:
            self.add(Finding(Severity.NOTICE, What.FOREIGN, path, "foreign", reason))
        for path in self.sidecars.unfinished:
            self.add(Finding(Severity.LEFTOVER, What.UNFINISHED, path, "sidecar", "a rewrite that a crash cut"))
        for log_id, kinds in sorted(self.sidecars.by_id.items()):
            if log_id not in self.claims:
                path = b"sidecars/%02x/%s" % (log_id[0], log_id.hex().encode())
                detail = "no entry and no data file has this id" + ("" if kinds & 1 else "; only its twin is there")
                self.add(Finding(Severity.LEFTOVER, What.ORPHAN, path, "orphan", detail, log_id))
        for name in self._tmp:
            self.add(Finding(Severity.LEFTOVER, What.UNFINISHED, b"tmp/" + name, "tmp", "emptied by the next mount"))
        all_seen = self.complete and not self.lost_dirs and not self.absent and not self.strays
        self.report.findings += check_domains.unnamed(self.ctx, self.domains, all_seen=all_seen)
        for name in store.listdir(store.root()):
            if name in (b"volume.new", STATE_NEW):
                of = name.removesuffix(b".new").decode()
                self.add(Finding(Severity.LEFTOVER, What.UNFINISHED, name, of, "a rewrite that a crash cut"))
            elif name not in _TOP_LEVEL:
                self.add(Finding(Severity.NOTICE, What.FOREIGN, name, "foreign", "not a part of the volume"))

    async def _measure(self) -> None:
        await trio.to_thread.run_sync(_measure, self.ctx.store, self.tally, abandon_on_cancel=False)


def _ids_below(store: Store, fd: int) -> set[bytes]:
    """Every id that anything below the directory behind `fd` claims, as far as it can be read. Blocks."""
    ids: set[bytes] = set()

    def visit(here: int) -> list[bytes]:
        seen = survey(store, here)
        ids.update(each.log_id for each in seen.values() if each.log_id)
        return [name for name, each in seen.items() if each.kind is Kind.DIR]

    with suppress(OSError):
        walk_down(store, fd, visit)
    return ids


def _measure(store: Store, tally: Tally) -> None:
    """Count files and bytes for the estimate, while the check is under way. What cannot be counted is left out."""

    def visit(here: int) -> list[bytes]:
        below = []
        for name in () if tally.measured else store.listdir(here):
            st = store.lstat(here, name)
            if stat.S_ISDIR(st.st_mode):
                below.append(name)
            elif stat.S_ISREG(st.st_mode) and not name.startswith(b"."):
                tally.total_files += 1
                tally.total_bytes += max(0, st.st_size - HEADER_BYTES)
        return below

    with suppress(OSError):
        fd = store.open(store.root(), b"tree", os.O_RDONLY | os.O_DIRECTORY)
        try:
            walk_down(store, fd, visit)
        finally:
            store.close(fd)
    tally.measured = True
