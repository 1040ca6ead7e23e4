"""What every part of one mounted volume shares. Made once by a composition root, handed down, never global."""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import trio

from cryptfs.blocks.codec import BlockCodec, Slots
from cryptfs.crypto.mac import mac, same
from cryptfs.errors import Damaged
from cryptfs.format.datafile import DataHeader
from cryptfs.format.state import State
from cryptfs.fs.freshness import Freshness
from cryptfs.ports import Clock, DekProvider, KeyRun, Kit, Random, Store
from cryptfs.types import EPOCH_SHIFT, Purpose, epoch_of

log = logging.getLogger("cryptfs")

T = TypeVar("T")

_OTHER_KINDS = frozenset({errno.ELOOP, errno.ENXIO, errno.EISDIR, errno.ENOTDIR})


@dataclass(frozen=True, slots=True)
class VolumeConfig:
    """The authenticated part of `volume` the filesystem needs."""

    volume_id: bytes
    block_size: int
    root_dir_id: bytes
    volume_key_kek: int
    volume_key_wrapped: bytes


class FsContext:
    """Store, keys, epoch and small shared helpers of one volume."""

    def __init__(
        self, config: VolumeConfig, store: Store, keys: DekProvider, clock: Clock, random: Random, *,
        read_only: bool = False,
    ) -> None:  # fmt: skip
        self.config = config
        self.store = store
        self.keys = keys
        self.clock = clock
        self.random = random
        self.read_only = read_only
        self.codec = BlockCodec(config.volume_id, config.block_size)
        self.state: State | None = None
        self.farewell = b""
        """The `state` slot that ends this epoch, signed at the mount: whoever unmounts may lack the key."""
        self._counter = 0
        self.doubts = 0
        """How often syncing the whole file system failed: what was written before is believed only if written again."""
        self.spawn: Callable[..., None] | None = None
        """Starts a background task; None while nobody serves the volume."""
        self.sidecar_writes = 0
        """Counts every write to a sidecar: whoever reads one on a thread sees whether it may be old."""
        self.synced_gen = 0
        """What was written up to this generation is durable, since all of the file system was synced after it."""
        self.renamed_logs: dict[bytes, int] = {}
        """Sidecars that were replaced by a rename which no sync made durable yet, and the generation they ended at.

        A crash may bring the old one back: nothing that only the new one says may count as durable before.
        """
        self._slots: list[Slots] = []
        self._buffers: list[memoryview] = []
        self._dirs: dict[bytes, int] = {}
        self.threads = trio.CapacityLimiter(16)
        self.freshness = Freshness(keys, self.sync_everything, lambda: self.doubts)

    # generations -----------------------------------------------------------------------------------------------

    def next_generation(self) -> int:
        """A number never used before in this volume: the epoch was made durable before its first use."""
        assert self.state is not None
        self._counter += 1
        return self.state.epoch << EPOCH_SHIFT | self._counter

    def forgives(self, generation: int) -> bool:
        """Whether what was written at `generation` may be missing: its epoch ended uncleanly."""
        assert self.state is not None
        return self.state.is_unclean(epoch_of(generation))

    def is_settled(self, generation: int) -> bool:
        """Whether what was written at `generation` is durable, or is this daemon's own."""
        return self.state is None or not self.forgives(generation)

    def crashed_since(self, generation: int) -> bool:
        """Whether an epoch not older than that of `generation` ended uncleanly: what came after it may be torn."""
        assert self.state is not None
        return any(last >= epoch_of(generation) for _, last in self.state.unclean)

    @property
    def crashed_before(self) -> bool:
        """Whether any epoch of this volume ended uncleanly."""
        assert self.state is not None
        return bool(self.state.unclean)

    @property
    def crash_generation(self) -> int:
        """For what is found to have been made in an epoch that ended uncleanly: a generation of the last one."""
        assert self.state is not None
        return self.state.unclean[-1][1] << EPOCH_SHIFT

    # keys ------------------------------------------------------------------------------------------------------

    async def volume_key(self) -> memoryview:
        """32 bytes; good until the next await."""
        config = self.config
        key = self.keys.peek(config.volume_key_wrapped)
        if key is not None:
            return key
        run = KeyRun(bytes(16), Purpose.VOLUME, config.volume_key_kek, (config.volume_key_wrapped,))
        return (await self.keys.unwrap([run]))[0][0]

    async def log_key_of(self, kit: Kit) -> memoryview:
        """The log key of a kit that was taken some awaits ago; good until the next await."""
        key = self.keys.peek(kit.log_wrapped)
        if key is not None:
            return key
        purpose = Purpose.LOG_FILE if kit.names_wrapped is None else Purpose.LOG_DIR
        return (await self.keys.unwrap([KeyRun(kit.log_id, purpose, kit.kek_version, (kit.log_wrapped,))]))[0][0]

    async def adopt_volume_key(self, kek_version: int, wrapped: bytes) -> None:
        """From now on the volume key is found by another wrap of it, as `volume` has it after a rotation.

        Raises `Damaged("wrap")` if that is another key, or none; key errors. Then nothing has changed.
        """
        run = KeyRun(bytes(16), Purpose.VOLUME, kek_version, (wrapped,))
        theirs = bytearray((await self.keys.unwrap([run]))[0][0])  # outlives the next await
        try:
            if not same(theirs, await self.volume_key()):
                raise Damaged("wrap", "the volume file has another volume key")
        finally:
            theirs[:] = bytes(len(theirs))
        self.config = replace(self.config, volume_key_kek=kek_version, volume_key_wrapped=wrapped)

    def sign_header(self, volume_key: memoryview, header: DataHeader) -> bytes:
        """A data file's first 64 bytes."""
        signed = header.signed()
        return signed + mac(volume_key, self.config.volume_id, signed)

    def check_header(self, volume_key: memoryview, header: DataHeader) -> None:
        """Raises `Damaged("data-header")`."""
        if not same(mac(volume_key, self.config.volume_id, header.signed()), header.mac):
            raise Damaged("data-header", "not authentic")

    # scratch memory --------------------------------------------------------------------------------------------

    def take_slots(self, count: int) -> Slots:
        """Scratch for at least `count` blocks, to be given back."""
        if self._slots and self._slots[-1].count >= count:
            return self._slots.pop()
        # One WRITE carries at most 1 MiB: that, and two ragged ends, is the size worth keeping.
        usual = (1 << 20) // self.config.block_size + 2
        return Slots(self.config.block_size, max(count, usual))

    def give_slots(self, slots: Slots) -> None:
        """Return scratch; a few are kept."""
        if len(self._slots) < 4:
            self._slots.append(slots)

    def take_buffer(self, count: int) -> memoryview:
        """Memory for `count` bytes of plaintext and two ragged blocks; holds whatever it held. To be given back."""
        wanted = count + 2 * self.config.block_size
        if self._buffers and len(self._buffers[-1]) >= wanted:
            return self._buffers.pop()
        return memoryview(bytearray(max(wanted, (1 << 20) + 2 * self.config.block_size)))

    def give_buffer(self, buffer: memoryview) -> None:
        """Return it; a few are kept."""
        if len(self._buffers) < 4:
            self._buffers.append(buffer)

    def forget_plaintext(self) -> None:
        """Overwrite the scratch memory that is not in use. What is in use is overwritten when it is given back."""
        self._slots.clear()
        for buffer in self._buffers:
            buffer[:] = bytes(len(buffer))

    # storage ---------------------------------------------------------------------------------------------------

    async def in_thread(self, call: Callable[..., T], *args: object) -> T:
        """Run a call that may wait for the disk. Not cancelled half-way: what it did must be known."""
        return await trio.to_thread.run_sync(call, *args, limiter=self.threads)

    async def in_threads(self, calls: Sequence[tuple[Callable[[int], None], int]]) -> None:
        """Run several such calls at the same time. All are waited for; raises the first OSError."""
        if len(calls) == 1:
            await self.in_thread(*calls[0])
            return
        errors: list[OSError] = []

        async def one(call: Callable[[int], None], fd: int) -> None:
            try:
                await self.in_thread(call, fd)
            except OSError as error:
                errors.append(error)

        async with trio.open_nursery() as nursery:
            for call, fd in calls:
                nursery.start_soon(one, call, fd)
        if errors:
            raise errors[0]

    async def sync_everything(self) -> None:
        """syncfs(2). Raises OSError; from then on no sync of what was written before proves anything (`resync`)."""
        renamed, doubts = dict(self.renamed_logs), self.doubts
        # A generation is taken and its frame written in one stretch, but for logs that are replaced, which see to it.
        newest = self.state.epoch << EPOCH_SHIFT | self._counter if self.state is not None else 0
        try:
            await self.in_thread(self.store.syncfs, self.store.root())
        except OSError:
            self.doubts += 1
            raise
        if self.doubts != doubts:
            return  # Another one failed meanwhile: it may have been about these.
        self.synced_gen = max(self.synced_gen, newest)
        for log_id, generation in renamed.items():
            # One that was replaced once more during the sync goes on waiting.
            if self.renamed_logs.get(log_id) == generation:
                del self.renamed_logs[log_id]

    def dir_fd(self, *names: bytes) -> int:
        """A descriptor of one of the volume's own directories (`tree`, `sidecars/ab`, `tmp`), kept open."""
        path = b"/".join(names)
        fd = self._dirs.get(path)
        if fd is None:
            above = self.dir_fd(*names[:-1]) if len(names) > 1 else self.store.root()
            fd = self.store.open(above, names[-1], os.O_RDONLY | os.O_DIRECTORY)
            self._dirs[path] = fd
        return fd

    def sidecar_dir(self, log_id: bytes) -> int:
        """The directory of this id's sidecar and twin."""
        return self.dir_fd(b"sidecars", b"%02x" % log_id[0])

    def close(self) -> None:
        """Close the descriptors this object holds."""
        for fd in self._dirs.values():
            self.store.close(fd)
        self._dirs.clear()
        self._slots.clear()
        for buffer in self._buffers:
            buffer[:] = bytes(len(buffer))
        self._buffers.clear()


def open_ours(store: Store, dir_fd: int, name: bytes, flags: int) -> int:
    """openat(2) of a file or directory of the volume's own.

    Raises OSError; `Damaged("exchanged")` if something of another kind lies there: a link, a fifo, a directory.
    """
    try:
        fd = store.open(dir_fd, name, flags)
    except OSError as error:
        if error.errno not in _OTHER_KINDS:
            raise
        raise Damaged("exchanged", "something of another kind lies there") from None
    # For reading only, the kernel opens a directory as well.
    if not flags & (os.O_DIRECTORY | os.O_ACCMODE) and stat.S_ISDIR(store.fstat(fd).st_mode):
        store.close(fd)
        raise Damaged("exchanged", "something of another kind lies there")
    return fd


def open_log(store: Store, dir_fd: int, name: bytes, *, writable: bool) -> tuple[int, bool]:
    """(descriptor, whether it can be written): a disk that has become read-only still has to be read."""
    if writable:
        try:
            return open_ours(store, dir_fd, name, os.O_RDWR), True
        except OSError as error:
            if error.errno != errno.EROFS:
                raise
    return open_ours(store, dir_fd, name, os.O_RDONLY), False


def write_all(store: Store, fd: int, data: bytes, offset: int) -> None:
    """pwrite(2) until everything is there; short writes are continued, errors raised as they come."""
    done = 0
    while done < len(data):
        done += store.pwrite(fd, memoryview(data)[done:], offset + done)


def sidecar_name(log_id: bytes) -> bytes:
    """Name of an id's sealed log."""
    return log_id.hex().encode()


def twin_name(log_id: bytes) -> bytes:
    """Name of an id's twin."""
    return log_id.hex().encode() + b".twin"
