"""Keys of a directory's next small files, fetched along with those of the one that is opened.

A program that walks a tree (`grep -r`, `tar`, a compiler, a backup) lists a directory and then reads its files one by
one. Each would cost a round trip to the agent; asked for together, keys cost a hundredth of that. Only after a
directory was listed, and only when a key was missing anyway.

The sidecars are read on a thread, and kept parsed until their files are opened. They are kept only if no sidecar was
written meanwhile.
"""

from __future__ import annotations

import itertools
import os
from collections import OrderedDict

from cryptfs.errors import Damaged
from cryptfs.fs.context import FsContext, sidecar_name
from cryptfs.fs.history import decoded_payload
from cryptfs.fs.inodes import Inode, InodeTable
from cryptfs.fs.sealed_log import Replay, parse, read_log
from cryptfs.ports import KeyRun
from cryptfs.types import WRAPPED_BYTES, Kind, Purpose

SMALL_LOG_BYTES = 16 * 1024
_FIRST_DEKS = 8
_NEIGHBOURS = 48
_KEPT = 256


class Prefetcher:
    """One per volume. `sidecars`: what was read ahead, by id."""

    def __init__(self, ctx: FsContext, inodes: InodeTable) -> None:
        self.ctx = ctx
        self.inodes = inodes
        self._sidecars: OrderedDict[bytes, Replay] = OrderedDict()

    def take(self, log_id: bytes) -> Replay | None:
        """The sidecar of a file that is being opened, if it was read ahead. Handed out once."""
        return self._sidecars.pop(log_id, None)

    async def warm(self, inode: Inode, parsed: Replay) -> None:
        """Get the keys of a small file, and those of its neighbours, into the cache.

        Never fails: the strict way comes next.
        """
        runs = first_keys(parsed, self.ctx.config.block_size)
        ids = self._neighbours(inode)
        if ids:
            writes = self.ctx.sidecar_writes
            found = await self.ctx.in_thread(self._read, ids)
            if writes == self.ctx.sidecar_writes:
                # One that was opened meanwhile will be written by its own journal, which never asks here again.
                self._sidecars.update((i, log) for i, log in found.items() if not self.inodes.is_open(i))
                while len(self._sidecars) > _KEPT:
                    self._sidecars.popitem(last=False)
            for other in found.values():
                runs += first_keys(other, self.ctx.config.block_size)
        await self.ctx.keys.warm(runs)

    def _neighbours(self, inode: Inode) -> list[bytes]:
        """Ids of the regular files after this one in its directory's order, if somebody has listed that."""
        if inode.path is None:
            return []
        parent = inode.path[0]
        node = self.inodes.dir_nowait(parent)
        if node is None or not node.listed:
            return []
        entries = itertools.dropwhile(lambda e: e.log_id != inode.log_id, node.entries.values())
        files = (e.log_id for e in itertools.islice(entries, 1, 1 + 2 * _NEIGHBOURS) if e.kind == Kind.FILE)
        wanted = [log_id for log_id in files if log_id not in self._sidecars and not self.inodes.is_open(log_id)]
        return wanted[:_NEIGHBOURS]

    def _read(self, ids: list[bytes]) -> dict[bytes, Replay]:
        """Small sidecars, parsed. On a thread; what cannot be read is left for whoever opens it."""
        ctx, out = self.ctx, {}
        for log_id in ids:
            try:
                fd = ctx.store.open(ctx.sidecar_dir(log_id), sidecar_name(log_id), os.O_RDONLY)
            except OSError:
                continue
            try:
                if ctx.store.fstat(fd).st_size <= SMALL_LOG_BYTES:
                    out[log_id] = parse(read_log(ctx.store, fd))
            except (OSError, Damaged):
                continue
            finally:
                ctx.store.close(fd)
        return out


def first_keys(parsed: Replay, block_size: int) -> list[KeyRun]:
    """What opening and reading the start of a small file takes: its log key and the DEKs its newest records name.

    From a log that is not authenticated: at worst keys are asked for that nobody needs or that do not exist.
    """
    header = parsed.header
    runs = [KeyRun(header.log_id, Purpose.LOG_FILE, header.kek_version, (header.log_wrapped,))]
    for frame in reversed(range(len(parsed.heads))):
        try:
            decoded = decoded_payload(parsed, frame, block_size)
        except Damaged:
            break
        if decoded is None:
            break
        if decoded.runs:
            run = decoded.runs[0]
            count = min(run.count, _FIRST_DEKS)
            wraps = [run.wrapped[i * WRAPPED_BYTES : (i + 1) * WRAPPED_BYTES] for i in range(count)]
            runs.append(KeyRun(header.log_id, Purpose.BLOCK, run.kek_version, wraps, run.first))
            break
    return runs
