"""Laying out a new volume around the `volume` file that the agent made.

`volume` is written last, and renamed into place: a directory in which `init` was interrupted is no volume.
"""

from __future__ import annotations

import os
from pathlib import Path

from cryptfs.errors import StoreFailed
from cryptfs.format.state import SLOT_BYTES, State
from cryptfs.format.volume import parse_volume
from cryptfs.fs.context import FsContext, VolumeConfig, write_all
from cryptfs.fs.directory import DirNode
from cryptfs.fs.epoch import STATE, sign_states, write_slot
from cryptfs.fs.newborn import kit_for
from cryptfs.ports import Clock, DekProvider, Random, Store


def config_of(volume_file: bytes) -> VolumeConfig:
    """What the filesystem needs of a `volume` file, which the agent authenticates.

    Raises `VolumeDamaged`, `UnsupportedFormat`.
    """
    volume = parse_volume(volume_file)
    return VolumeConfig(
        volume.volume_id,
        volume.block_size,
        volume.root_dir_id,
        volume.volume_key.kek_version,
        volume.volume_key.wrapped,
    )


async def create_volume(
    cipher_dir: Path, volume_file: bytes, store: Store, keys: DekProvider, clock: Clock, random: Random
) -> None:
    """Fill the empty directory behind `store` with an empty volume; everything is durable when this returns.

    Raises `StoreFailed`, key errors; what was made so far is the caller's to remove.
    """
    config = config_of(volume_file)
    ctx = FsContext(config, store, keys, clock, random)
    # Epoch 0 is the making of the volume; the first mount is epoch 1.
    ctx.state = State(sequence=1, epoch=0, clean=True)
    root = store.root()
    try:
        for name in (b"tree", b"sidecars", b"tmp"):
            store.mkdir(root, name)
        for first in range(256):
            store.mkdir(ctx.dir_fd(b"sidecars"), b"%02x" % first)
        kit = await kit_for(ctx, config.root_dir_id)
        tree = store.open(root, b"tree", os.O_RDONLY | os.O_DIRECTORY)
        DirNode.create(ctx, tree, kit).close()
        states = State(sequence=0, epoch=0, clean=True), ctx.state
        for state, slot in zip(states, await sign_states(keys, config.volume_id, *states), strict=True):
            write_slot(store, state, slot)
        assert store.lstat(root, STATE).st_size == 2 * SLOT_BYTES
        fd = store.open(root, b"volume.new", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            write_all(store, fd, volume_file, 0)
            store.fsync(fd)
        finally:
            store.close(fd)
        await ctx.in_thread(store.syncfs, root)
        store.rename(root, b"volume.new", root, b"volume")
        store.fsync(root)
    except OSError as error:
        raise StoreFailed(f"{cipher_dir}: {error.strerror}") from error
    finally:
        ctx.close()
