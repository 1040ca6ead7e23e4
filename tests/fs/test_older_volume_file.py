"""An older `volume` file put back, on a machine that never saw the volume: the root directory's log knows better."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cryptfs.errors import RolledBack
from cryptfs.names import DIR_LOG
from cryptfs.store.memory import MemoryStore
from cryptfs.testing.volumes import open_test_volume

KEK_VERSION_AT = 12


async def test_a_root_directory_under_a_later_kek_is_not_opened_with_an_older_volume_file() -> None:
    store = MemoryStore()
    volume, sample = await open_test_volume(store)
    assert await volume.close()
    tree = store.open(store.root(), b"tree", 0)
    fd = store.open(tree, DIR_LOG, 2)
    version = int.from_bytes(store.pread(fd, 4, KEK_VERSION_AT), "big")
    assert version == sample.config.volume_key_kek == 1
    store.pwrite(fd, (version + 1).to_bytes(4, "big"), KEK_VERSION_AT)
    for read_only in (False, True):
        with pytest.raises(RolledBack, match="later key version"):
            await sample.open(store, read_only=read_only)
    sample.config = replace(sample.config, volume_key_kek=version)
    store.pwrite(fd, version.to_bytes(4, "big"), KEK_VERSION_AT)
    store.close(fd)
    store.close(tree)
    again = await sample.open(store)
    assert await again.close()
