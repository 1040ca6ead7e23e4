"""Telling the freshness record what is durable, and refusing logs that are older than it says (docs/FRESHNESS.md).

A log's floor may only ever be what a power cut cannot take back, or a crash would look like an attack. So what was
appended is told in two steps: `wrote` when a frame is in its file, and, once it is known to be on disk, because it was
synced itself (`durable`) or because all of the file system was since (`sync`), it goes to the record, in batches and
off everybody's path.

A file's frames are told of when it is closed. While it is open, a block whose frame was not synced by its own `fsync`
may be overwritten where it lies (`file`): a `sync` in between makes the frame durable, and the block it names need not
stay. Once closed and opened again, nothing that a frame names is overwritten in place.

Within this process a log must also not become older than it was written here, durable or not: its page cache is one.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence

import trio

from cryptfs.errors import CryptfsError, Damaged
from cryptfs.ports import FreshnessRecord
from cryptfs.types import DELETED

log = logging.getLogger("cryptfs")

RECORD_INTERVAL_S = 5.0
SYNC_INTERVAL_S = 30.0
MANY = 20_000
"""Logs written since the last sync that make the next one come early."""
KEPT_MAX = 300_000
"""Logs whose state the record could not be told: beyond it, it is not told of them (some 60 MB)."""


class Freshness:
    """One volume's. Run `serve` in the background; `sync` and `record` once more at unmount."""

    def __init__(
        self, record: FreshnessRecord, sync_store: Callable[[], Awaitable[None]], doubts: Callable[[], int]
    ) -> None:
        """`sync_store` syncs all of the file system; `doubts` counts how often that failed, whoever asked for it."""
        self._record = record
        self._sync_store = sync_store
        self._doubts = doubts
        self._doubts_known = 0
        self._newest: dict[bytes, int] = {}
        """Generations this process wrote and the record does not know."""
        self._told: dict[bytes, int] = {}
        """Those it was told last: an answer that was under way then does not have them."""
        self._unsynced: dict[bytes, int] = {}
        self._durable: dict[bytes, int] = {}
        self._gone: dict[bytes, None] = {}
        self._doubtful: set[bytes] = set()
        """Logs that a failed sync was about: only their own next one, which writes all again, says anything of them."""
        self._accepted: set[bytes] = set()
        self._telling = trio.Lock()
        self._many = trio.Event()

    # checking --------------------------------------------------------------------------------------------------

    def floor(self, log_id: bytes) -> int:
        """The generation a log must have at least, after its key was asked for and before the next await.

        0: any will do. Raises `Damaged("deleted")` for one that must not be there at all.
        """
        if log_id in self._accepted:
            return 0
        floor = self._record.floor(log_id)
        if floor == DELETED or log_id in self._gone:
            raise Damaged("deleted", "this machine has seen it deleted")
        return max(floor, self._newest.get(log_id, 0), self._told.get(log_id, 0))

    async def check_unborn(self, log_id: bytes) -> None:
        """That nothing of a log without a single frame was ever known to be durable.

        Raises `Damaged("rolled-back")`, `Damaged("deleted")`, key errors.
        """
        if log_id in self._accepted:
            return
        (floor,) = await self._record.ask_floors([log_id])
        if floor == DELETED:
            raise Damaged("deleted", "this machine has seen it deleted")
        check(0, max(floor, self._newest.get(log_id, 0), self._told.get(log_id, 0)))

    async def deleted(self, log_ids: Sequence[bytes]) -> set[bytes]:
        """Which of these must not be there at all. Raises key errors."""
        if not log_ids:
            return set()
        floors = await self._record.ask_floors(log_ids)
        dead = {log_id for log_id, floor in zip(log_ids, floors, strict=True) if floor == DELETED}
        return (dead | self._gone.keys()).intersection(log_ids) - self._accepted

    def accept(self, log_id: bytes) -> None:
        """On the owner's word: from now on the log is taken as it is, however old."""
        self._accepted.add(log_id)

    # telling ---------------------------------------------------------------------------------------------------

    def wrote(self, log_id: bytes, generation: int) -> None:
        """A frame was appended, and all it names lies in its place."""
        self._newest[log_id] = generation
        if log_id not in self._doubtful:
            self._unsynced[log_id] = generation
            if len(self._unsynced) >= MANY:
                self._many.set()

    def durable(self, log_id: bytes, generation: int) -> None:
        """The log's own sync succeeded: all it says up to this generation is on disk, and its place in the tree too."""
        self._doubtful.discard(log_id)
        self._know(log_id, generation)

    @contextlib.contextmanager
    def doubted_on_failure(self, log_id: bytes) -> Iterator[None]:
        """Around a log's own sync. A kernel reports a failure once: a later sync that succeeds would prove nothing."""
        try:
            yield
        except OSError:
            self._doubtful.add(log_id)
            self._unsynced.pop(log_id, None)
            raise

    def _know(self, log_id: bytes, generation: int) -> None:
        if log_id in self._doubtful:
            return
        if self._newest.get(log_id, 0) < generation:
            self._newest[log_id] = generation
        self._durable[log_id] = max(generation, self._durable.get(log_id, 0))

    def gone(self, log_ids: Iterable[bytes]) -> None:
        """These were deleted, and that is on disk."""
        for log_id in log_ids:
            self._gone[log_id] = None
            for known in (self._newest, self._told, self._unsynced, self._durable):
                known.pop(log_id, None)

    async def sync(self) -> None:
        """Sync the file system: what was written before is durable. Raises OSError; then it never counts as that."""
        self._doubt_what_is_unsynced()
        batch, self._unsynced = self._unsynced, {}
        try:
            await self._sync_store()
        except OSError:
            self._doubtful.update(batch)
            self._doubt_what_is_unsynced()
            raise
        except BaseException:
            self._unsynced = batch | self._unsynced
            raise
        if self._doubts() != self._doubts_known:
            # Another one failed meanwhile: the kernel says so only once, and it may have been about these.
            self._doubtful.update(batch)
            self._doubt_what_is_unsynced()
            return
        for log_id, generation in batch.items():
            if log_id not in self._gone:
                self._know(log_id, generation)

    def _doubt_what_is_unsynced(self) -> None:
        if self._doubts() != self._doubts_known:
            self._doubts_known = self._doubts()
            self._doubtful.update(self._unsynced)
            self._unsynced.clear()

    async def record(self, state_sequence: int | None = None) -> None:
        """Tell the record what is durable. Raises what the record raises; then it is told the next time."""
        async with self._telling:
            logs, gone = dict(self._durable), list(self._gone)
            await self._record.record(logs, gone, state_sequence)
            self._told = logs
            for log_id, generation in logs.items():
                for known in (self._durable, self._newest):
                    if known.get(log_id) == generation:
                        del known[log_id]
            for log_id in gone:
                del self._gone[log_id]

    async def serve(self) -> None:
        """Sync when something was written that no sync followed, and tell the record, now and then, for ever."""
        synced_s = trio.current_time()
        failing = False
        while True:
            with trio.move_on_after(RECORD_INTERVAL_S):
                await self._many.wait()
            many, self._many = self._many.is_set(), trio.Event()
            try:
                if self._unsynced and (many or trio.current_time() >= synced_s + SYNC_INTERVAL_S):
                    synced_s = trio.current_time()
                    await self.sync()
                if self._durable or self._gone:
                    await self.record()
                failing = False
            except OSError as error:
                log.warning("sync failed: what it should have written is not recorded as fresh: %s", error.strerror)
            except CryptfsError as error:
                if not failing:
                    log.warning("the freshness record was not told what is durable, will retry: %s", error)
                failing = True
                self._drop_excess()

    def _drop_excess(self) -> None:
        if len(self._newest) + len(self._gone) > KEPT_MAX:
            log.error("the freshness record will not be told of %d logs", len(self._newest) + len(self._gone))
            for known in (self._newest, self._durable, self._gone):
                known.clear()


def check(generation: int, floor: int) -> None:
    """Raises `Damaged("rolled-back")` if a log ends at an older generation than was seen of it."""
    if generation < floor:
        raise Damaged("rolled-back", f"it ends at generation {generation:#x}, this machine has seen {floor:#x}")
