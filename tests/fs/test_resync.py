"""A sync that failed is not believed the next time either, until everything was written again."""

from __future__ import annotations

import errno

import pytest

from cryptfs.fs.making import Owner
from cryptfs.store.memory import MemoryStore
from cryptfs.testing.volumes import abandon, open_test_volume

OWNER = Owner(0, 0)
CONTENT = bytes(range(256)) * 64


@pytest.mark.parametrize("call", ["fdatasync", "fsync"])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
async def test_a_failed_fsync_is_reported_and_then_made_good(call: str, code: int) -> None:
    store = MemoryStore()
    volume, sample = await open_test_volume(store)
    attr, file = await volume.names.create(volume.root, b"file", 0o644, OWNER)
    await file.write(0, CONTENT)
    store.fail(call, 1, code)
    with pytest.raises(OSError, match="Errno") as caught:
        await file.journal.fsync()
    assert caught.value.errno == code
    await file.journal.fsync()
    await volume.files.release(attr.inode)
    abandon(volume)

    after = await sample.open(store.killed())
    found = await after.names.lookup(after.root, b"file")
    again = await after.files.open(found.inode)
    assert await again.read(0, len(CONTENT) + 1) == CONTENT
    await after.files.release(found.inode)
    assert await after.close()


async def test_what_does_not_read_back_stays_an_error() -> None:
    store = MemoryStore()
    volume, _ = await open_test_volume(store)
    attr, file = await volume.names.create(volume.root, b"file", 0o644, OWNER)
    await file.write(0, CONTENT)
    store.fail("fdatasync", 1, errno.EIO)
    with pytest.raises(OSError, match="Errno"):
        await file.journal.fsync(data_only=True)
    # The kernel dropped the page it could not write.
    store.pwrite(file.state.data_fd, bytes(16), file.state.home_offset(0, 1))
    for _ in range(3):
        with pytest.raises(OSError, match="Errno") as caught:
            await file.journal.fsync()
        assert caught.value.errno == errno.EIO
    await volume.files.release(attr.inode)
    abandon(volume)
