"""Looking again, in a volume that is mounted meanwhile: what is only on its way to the disk is no damage.

A file that a program writes to is behind on disk until it is synced or closed: blocks without a record, a data file
longer than its sidecar says. So the daemon is asked to write it out (an fsync through the mount), and what is still
wrong afterwards, while nothing of it changes any more, is damage. What never stands still long enough is reported as
busy, not as good and not as damaged.
"""

from __future__ import annotations

import os

import trio

from cryptfs.errors import Damaged
from cryptfs.fs.context import FsContext, sidecar_name, twin_name
from cryptfs.fs.symlink import decode_target_text, read_target
from cryptfs.ops.check_dirs import Look, look
from cryptfs.ops.check_files import FileJob, check_files
from cryptfs.ops.check_report import Tally
from cryptfs.ops.offline import Settle

_WAITS_S = (0.02, 0.1, 0.3, 0.6)
"""Pauses before the second look and those after it."""


class Recheck:
    """For one check of a live volume. `busy` collects paths of files that could not be judged."""

    def __init__(self, ctx: FsContext, settle: Settle | None, busy: list[bytes]) -> None:
        self.ctx = ctx
        self.settle = settle
        self.busy = busy

    async def look(self, fd: int, dir_id: bytes, path: bytes, above: tuple[bytes, ...]) -> Look:
        """As `check_dirs.look`, with only what is found every time. Raises only what is raised every time."""
        keys: set[tuple[str, bytes, str]] | None = None
        for wait_s in (0.0, *_WAITS_S):
            await trio.sleep(wait_s)
            try:
                now = await look(self.ctx, fd, dir_id, path, above)
            except Damaged:
                if wait_s == _WAITS_S[-1]:
                    raise
                continue
            found = {finding.key for finding in now.findings()}
            keys = found if keys is None else keys & found
            if not keys:
                break
        else:
            now = await look(self.ctx, fd, dir_id, path, above)
        now.keep(keys or set())
        return now

    async def file(self, job: FileJob, *, deep: bool) -> None:
        """Judge a file with findings anew; what is left of them are its findings."""
        before = None
        for wait_s in _WAITS_S:
            if self.settle is not None:
                await self.settle(job.path)
            now = self._stamp(job)
            if now is None:
                job.findings = []
                return
            job.findings, job.fd, job.replay = [], -1, None
            job.header = now[0]
            await check_files(self.ctx, [job], Tally(), deep=deep)
            if not job.findings:
                return
            steady = before is not None and now == before and now == self._stamp(job)
            if steady and (self.settle is not None or not self._touched(job)):
                return
            before = now
            await trio.sleep(wait_s)
        if self._stamp(job) is not None:
            self.busy.append(job.path)
        job.findings = []

    async def symlink_is_fine(self, dir_fd: int, name: bytes, log_id: bytes) -> bool:
        """Whether a symlink that looked wrong is gone or right by now."""
        await trio.sleep(_WAITS_S[1])
        try:
            found, length = decode_target_text(self.ctx.store.readlink(dir_fd, name))
            return found != log_id or len(await read_target(self.ctx, log_id)) == length
        except FileNotFoundError:
            return True
        except (Damaged, OSError):
            return False

    def _stamp(self, job: FileJob) -> tuple[bytes, tuple[tuple[int, int], ...]] | None:
        """The header, and size and time of data file, sidecar and twin; None if it is gone from its place."""
        store, where = self.ctx.store, self.ctx.sidecar_dir(job.file_id)
        try:
            st = store.lstat(job.ref.fd, job.spot.name)
            if st.st_ino != job.inode:
                return None
            fd = store.open(job.ref.fd, job.spot.name, os.O_RDONLY)
            try:
                header = store.pread(fd, len(job.header) or 64, 0)
            finally:
                store.close(fd)
        except FileNotFoundError:
            return None
        except OSError:
            header = job.header
            st = store.lstat(job.ref.fd, job.spot.name)
        stamps = [(st.st_size, st.st_mtime_ns)]
        for name in (sidecar_name(job.file_id), twin_name(job.file_id)):
            try:
                other = store.lstat(where, name)
            except OSError:
                stamps.append((-1, 0))
            else:
                stamps.append((other.st_size, other.st_mtime_ns))
        return header, tuple(stamps)

    def _touched(self, job: FileJob) -> bool:
        """Written to since the volume was mounted: with nobody to ask, it may simply not be written out."""
        store = self.ctx.store
        mounted_ns = store.lstat(store.root(), b"state").st_mtime_ns
        return store.lstat(job.ref.fd, job.spot.name).st_mtime_ns >= mounted_ns
