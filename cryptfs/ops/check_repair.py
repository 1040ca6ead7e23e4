"""`cryptfs check --repair`: rounds of checking and putting right, until a round finds nothing it can put right.

What can be proven goes back to its place: `.dir` says which id belongs under which name, and headers and logs prove
ids. What cannot be placed goes to the quarantine. Nothing a user wrote is deleted: what could not be read is kept as
ciphertext in `damaged/`.

Order, and what a crash after each step leaves (always a volume that opens; its epoch then did not end cleanly, so the
next mount or repair settles it first, by the tree, like after any crash):

0. A `state` that is lost is made anew (`lost_state`). One rename.
1. An unclean volume, or one with crashed epochs, is settled by opening every directory and file the normal way, and
   left clean. A crash: the same volume, more of it settled.
2. Sidecars that lie under each other's names are exchanged back, and those that an earlier repair took for orphans come
   back from `damaged/` (`check_restore`). One rename each.
3. A directory's log that cannot be relied on: old log linked into `damaged/`, a new empty one written beside it,
   synced, renamed over it. The names key is kept if it still unwraps. A crash: either log.
4. What lies in the wrong place and is named elsewhere is renamed back, directories first. One rename each; `.dir` says
   already how it should be. A crash: some are back.
5. Other strays move to the quarantine: made and synced first, then its frame, then the rename (or, for what is none
   of ours: a copy, synced, then the stray is removed). A crash: a stray, or it is in the quarantine, or both.
6. A damaged file: what can be read is written to a new file and synced; ciphertext linked into `damaged/` and synced;
   then the old name goes, frame first; then, if everything could be read, the new file takes the old name.
   A crash: the damaged file is there, and perhaps the salvaged one too; or only that.
7. Entries whose object is gone leave `.dir`.
8. Leftovers are deleted, last; orphans (kept in `damaged/` if anything was wrong with the volume) only if every
   directory and every header in the tree could be read.
"""

from __future__ import annotations

import time
from contextlib import suppress

import trio

from cryptfs.errors import Damaged, StoreFailed
from cryptfs.fs.context import sidecar_name, twin_name
from cryptfs.fs.volume import Volume
from cryptfs.ops import check_domains
from cryptfs.ops.check import Check
from cryptfs.ops.check_logs import exchange_sidecars, renew_log
from cryptfs.ops.check_place import place_back
from cryptfs.ops.check_report import Finding, Report, Severity, Tally, What
from cryptfs.ops.check_rescue import Rescue
from cryptfs.ops.check_restore import restore_sidecars
from cryptfs.ops.lost_state import mend_state
from cryptfs.ops.offline import Access, Looking, open_to_repair, shut
from cryptfs.ops.quarantine import Quarantine, open_chain
from cryptfs.types import Kind

ROUNDS_MAX = 8


async def repair_volume(access: Access, *, deep: bool = False, tally: Tally | None = None) -> Report:
    """Check and put right. Idempotent: what it reports as done is not found again.

    Raises `VolumeBusy` (mounted), `VolumeDamaged`, `StoreFailed` (it could not be left clean), OSError, key errors.
    """
    tally = tally or Tally()
    state = await mend_state(access)
    looking = await open_to_repair(access)
    tmp, left_clean = looking.tmp, looking.left_clean
    try:
        if looking.ctx.crashed_before:
            tally.stage = "settling what a crash left"
            await settle(looking.volume)
            if not await shut(access, looking):
                raise StoreFailed("the volume could not be left clean")
            looking = await open_to_repair(access)
        looking.tmp = tmp
        started_s = time.monotonic()
        report = await Repair(looking, deep=deep, tally=tally).run()
        report.left_clean, report.duration_s = left_clean and state is None, time.monotonic() - started_s
        if state is not None:
            report.findings.insert(0, state)
            report.repaired = True
    except BaseException:
        # Every step is whole or was taken back: the volume may be left as clean as it was.
        with trio.CancelScope(shield=True):
            await shut(access, looking)
        raise
    if not await shut(access, looking):
        raise StoreFailed("the volume could not be left clean")
    return report


async def settle(volume: Volume) -> None:
    """Open every directory and file once, which settles what a crash left of it. Damage is left to the check."""
    todo = [volume.root]
    while todo:
        inode = todo.pop()
        try:
            if (await volume.inodes.dir(inode)).domain:
                continue
            entries = await volume.names.listing(inode)
        except (Damaged, OSError):
            continue
        for entry in entries:
            if entry.kind not in (Kind.DIR, Kind.FILE):
                continue
            try:
                [described] = await volume.names.described(inode, [entry])
            except (Damaged, OSError):
                continue
            attr = described[1] if described is not None else None
            if attr is None:
                continue
            attr.inode.lookups += 1
            if entry.kind is Kind.DIR:
                todo.append(attr.inode)
            else:
                volume.inodes.forget(attr.inode.ino, 1)


class Repair:
    """The rounds of one repair: first what can be seen without reading blocks, then, if asked for, the blocks."""

    def __init__(self, looking: Looking, *, deep: bool, tally: Tally) -> None:
        self.looking = looking
        self.volume = looking.volume
        self.ctx = looking.ctx
        self.deep = deep
        self.tally = tally
        self.quarantine = Quarantine(looking.volume)
        self.rescue = Rescue(self.volume, self.quarantine)
        self._findings: dict[tuple[str, bytes, str], Finding] = {}
        self._done: list[Finding] = []

    async def run(self) -> Report:
        """Rounds until nothing more can be done; every finding, with what was done about it."""
        report = await self._rounds(deep=False)
        if self.deep:
            self.tally.restart("reading every block")
            report = await self._rounds(deep=True)
        await self.quarantine.tidy()
        report.deep, report.tally = self.deep, self.tally
        report.findings = [*self._done, *self._findings.values()]
        report.findings.sort(key=lambda finding: (finding.path, finding.what))
        report.quarantine, report.repaired = self.quarantine.path, bool(self._done)
        return report

    async def _rounds(self, *, deep: bool) -> Report:
        check = Check(self.looking, deep=deep, tally=self.tally)
        report = await check.run()
        self._note(check)
        for _ in range(ROUNDS_MAX):
            self.looking.tmp = []
            acted = await self._round(check)
            self._note(check)
            if not acted:
                break
            await self._sync()
            check = Check(self.looking, deep=False, tally=Tally())
            await check.run()
            self._note(check, gone=True)
        return report

    def _note(self, check: Check, *, gone: bool = False) -> None:
        """Remember findings and what was done. `gone`: `check` is new, what it does not find any more was put right."""
        present = {finding.key: finding for finding in check.report.findings}
        if gone:
            for key, finding in list(self._findings.items()):
                if key in present or (finding.what is What.BLOCKS and not check.deep):
                    continue
                del self._findings[key]
                if finding.severity is not Severity.NOTICE:
                    finding.action = "put right"
                    self._done.append(finding)
        for key, finding in present.items():
            if not finding.action:
                self._findings[key] = finding
            elif not any(finding is done for done in self._done):
                self._findings.pop(key, None)
                self._done.append(finding)

    async def _round(self, check: Check) -> bool:
        """Whether anything was done. Each step leaves to the next round what it makes possible."""
        await exchange_sidecars(self.volume, check)
        if await restore_sidecars(self.volume, check):
            # Whether they are whole, and what they say, is the next round's to find.
            return True
        for lost in check.lost_dirs:
            try:
                await renew_log(self.volume, self.quarantine, lost)
            except (Damaged, OSError) as error:
                lost.finding.detail = f"not put right: {error}"
        if await place_back(self.volume, check) or check.any_done(What.DIRECTORY):
            # What was found below has moved, or can be named only now.
            return True
        await self.rescue.strays(check)
        await self.rescue.files(check)
        await self.rescue.absent(check)
        if not check.any_done():
            self._remove_leftovers(check)
        return check.any_done()

    # the last step ---------------------------------------------------------------------------------------------

    def _remove_leftovers(self, check: Check) -> None:
        for finding in check.report.findings:
            if finding.severity is Severity.LEFTOVER:
                try:
                    self._remove(check, finding)
                except OSError as error:
                    finding.detail = f"not removed: {error.strerror}"

    def _remove(self, check: Check, finding: Finding) -> None:
        store = self.ctx.store
        if finding.what is What.ORPHAN and check.complete:
            if self._done or check.report.damage:
                # Something was wrong with this volume: these may be the keys of files that a backup still has.
                self.quarantine.keep_sidecar_aside(finding.log_id)
            where = self.ctx.sidecar_dir(finding.log_id)
            for name in (sidecar_name(finding.log_id), twin_name(finding.log_id)):
                with suppress(FileNotFoundError):
                    store.unlink(where, name)
        elif finding.what is not What.UNFINISHED:
            return
        elif finding.spot is not None:
            fd = open_chain(self.ctx, finding.spot.above)
            try:
                store.unlink(fd, finding.spot.name)
            finally:
                store.close(fd)
        elif finding.path.startswith(b"sidecars/"):
            _, prefix, name = finding.path.split(b"/")
            store.unlink(self.ctx.dir_fd(b"sidecars", prefix), name)
        elif finding.path.startswith(b"domains/"):
            if not check_domains.remove(self.ctx, finding.path):
                return
        elif not finding.path.startswith(b"tmp/"):
            store.unlink(store.root(), finding.path)
        finding.action = "removed"

    async def _sync(self) -> None:
        await self.ctx.in_thread(self.ctx.store.syncfs, self.ctx.store.root())
        await self.volume.reaper.flush()
