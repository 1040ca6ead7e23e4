"""Looking into a volume without mounting it: unmounted, under its lock; or mounted by someone else, read-only.

A mounted volume changes under whoever looks at it this way. Its epoch is open and counts as neither clean nor
unclean, as it does for the daemon that has it: nothing is forgiven that the daemon would not forgive.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from cryptfs.errors import VolumeBusy
from cryptfs.fs.context import FsContext, VolumeConfig
from cryptfs.fs.epoch import read_state
from cryptfs.fs.opening_closed import wider
from cryptfs.fs.volume import Volume, open_volume
from cryptfs.ports import Clock, DekProvider, Random, Store

Settle = Callable[[bytes], Awaitable[None]]
"""Asks whoever has the volume mounted to write out the file at this plaintext path. Never raises."""


@dataclass(frozen=True, slots=True)
class Access:
    """How to open one volume, any number of times: `make_store` gives a store of its own each time.

    `close_store` gives it up again, and with it the volume's lock.
    """

    config: VolumeConfig
    make_store: Callable[[], Store]
    close_store: Callable[[Store], None]
    keys: DekProvider
    clock: Clock
    random: Random


@dataclass(slots=True)
class Looking:
    """An open volume. `live`: it is mounted. `left_clean`: its last epoch ended cleanly (a live one: so far).

    `settle` is None if nobody can be asked.
    """

    volume: Volume
    store: Store
    live: bool
    left_clean: bool
    tmp: list[bytes] = field(default_factory=list)
    """What lay in `tmp/` before it was opened."""
    settle: Settle | None = None

    @property
    def ctx(self) -> FsContext:
        """The volume's context."""
        return self.volume.ctx


async def open_to_read(access: Access, settle: Settle | None = None) -> Looking:
    """Open for reading, mounted or not. Writes nothing. Raises `VolumeDamaged`, OSError, key errors."""
    store = access.make_store()
    try:
        left_clean, tmp = await _was_left_clean(access, store), _tmp_names(store)
        try:
            volume = await open_volume(
                access.config, store, access.keys, access.clock, access.random, read_only=True
            )  # fmt: skip
        except VolumeBusy:
            volume = await _open_live(access, store)
            return Looking(volume, store, live=True, left_clean=True, settle=settle)
        return Looking(volume, store, live=False, left_clean=left_clean, tmp=tmp)
    except BaseException:
        access.close_store(store)
        raise


async def open_to_repair(access: Access) -> Looking:
    """Open for changes, beginning an epoch. Raises `VolumeBusy` if it is mounted, `VolumeDamaged`, OSError."""
    store = access.make_store()
    try:
        left_clean, tmp = await _was_left_clean(access, store), _tmp_names(store)
        volume = await open_volume(access.config, store, access.keys, access.clock, access.random)
        return Looking(volume, store, live=False, left_clean=left_clean, tmp=tmp)
    except BaseException:
        access.close_store(store)
        raise


async def shut(access: Access, looking: Looking) -> bool:
    """Leave the volume, cleanly if it was opened for changes; whether that worked."""
    try:
        return await looking.volume.close()
    finally:
        access.close_store(looking.store)


@contextmanager
def locked_context(access: Access) -> Iterator[FsContext]:
    """A volume under its lock, of which nothing is opened: no epoch begins. Raises `VolumeBusy`, OSError."""
    store = access.make_store()
    ctx = FsContext(access.config, store, access.keys, access.clock, access.random)
    try:
        try:
            store.lock()
        except BlockingIOError:
            raise VolumeBusy("the volume is mounted or being changed by another process") from None
        yield ctx
    finally:
        ctx.close()
        access.close_store(store)


async def _was_left_clean(access: Access, store: Store) -> bool:
    return (await read_state(store, access.keys, access.config.volume_id)).clean


def _tmp_names(store: Store) -> list[bytes]:
    fd = store.open(store.root(), b"tmp", os.O_RDONLY | os.O_DIRECTORY)
    try:
        return store.listdir(fd)
    finally:
        store.close(fd)


async def _open_live(access: Access, store: Store) -> Volume:
    ctx = FsContext(access.config, store, access.keys, access.clock, access.random, read_only=True)
    try:
        ctx.state = await read_state(store, access.keys, access.config.volume_id)
        for first in range(256):
            ctx.sidecar_dir(bytes([first]))
    except BaseException:
        ctx.close()
        raise
    return Volume(ctx)


def open_for_reading(store: Store, dir_fd: int, name: bytes) -> int:
    """A descriptor of a regular file, also of one whose owner may not read it (its mode is put back at once).

    Never waits for a fifo's writer. Raises OSError.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK
    try:
        return store.open(dir_fd, name, flags)
    except PermissionError:
        with wider(store, dir_fd, name, stat.S_IRUSR) as fd:
            return store.open(fd, b"", flags)
