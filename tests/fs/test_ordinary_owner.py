"""A daemon of an ordinary user: groups that it is not in, files that their own owner may not open."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import trio

from cryptfs.errors import Damaged
from cryptfs.fs.making import Owner
from cryptfs.ports import RENAME_EXCHANGE
from cryptfs.store.owner import OwnersStore
from cryptfs.testing.volumes import SampleVolume
from tests.contract.test_owner_store import GROUP, UID, as_owner

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")

FOREIGN = 12345


def test_what_a_process_with_another_group_makes(tmp_path: Path) -> None:
    def check(store: OwnersStore) -> None:
        trio.run(_make_all, store)

    as_owner(tmp_path, check)


async def _make_all(store: OwnersStore) -> None:
    sample = SampleVolume()
    await sample.create(store)
    volume = await sample.open(store)
    names, root = volume.names, volume.root
    made: dict[bytes, tuple[int, int, int]] = {}
    for what, gid in ((b"foreign", FOREIGN), (b"ours", GROUP)):
        owner = Owner(UID, gid)
        attr, _ = await names.create(root, b"file " + what, 0o6755, owner)
        await volume.files.release(attr.inode)
        await names.mkdir(root, b"dir " + what, 0o755, owner)
        await names.symlink(root, b"link " + what, b"target", owner)
        await names.mknod(root, b"fifo " + what, stat.S_IFIFO | 0o2640, 0, owner)
        for kind in (b"file ", b"dir ", b"link ", b"fifo "):
            st = (await names.lookup(root, kind + what)).st
            made[kind + what] = (st.st_uid, st.st_gid, stat.S_IMODE(st.st_mode))
    assert await volume.close()
    assert made == {
        b"file foreign": (UID, UID, 0o4755),
        b"dir foreign": (UID, UID, 0o755),
        b"link foreign": (UID, UID, 0o777),
        b"fifo foreign": (UID, UID, 0o640),
        b"file ours": (UID, GROUP, 0o6755),
        b"dir ours": (UID, GROUP, 0o755),
        b"link ours": (UID, GROUP, 0o777),
        b"fifo ours": (UID, GROUP, 0o2640),
    }


def test_a_file_put_under_the_name_of_one_that_is_opened_keeps_its_mode(tmp_path: Path) -> None:
    """Somebody who may write in the directory exchanges the two while the daemon opens what its owner may not."""

    def check(store: OwnersStore) -> None:
        trio.run(_open_exchanged, store)

    as_owner(tmp_path, check)


async def _open_exchanged(store: OwnersStore) -> None:
    sample = SampleVolume()
    await sample.create(store)
    volume = await sample.open(store)
    below: list[bytes] = []
    for name, mode in ((b"one", 0o070), (b"other", 0o004)):
        attr, file = await volume.names.create(volume.root, name, mode, Owner(UID, UID))
        await file.write(0, name)
        attr.inode.lookups += 1
        await volume.files.release(attr.inode)
        below.append(attr.inode.place()[1])
    tree = (await volume.inodes.dir(volume.root)).fd

    def modes() -> list[int]:
        return [stat.S_IMODE(store.lstat(tree, name).st_mode) for name in below]

    inode = (await volume.names.lookup(volume.root, b"one")).inode
    chmod, given = store.chmod, list[int]()

    def exchanging(dir_fd: int, name: bytes, mode: int) -> None:
        chmod(dir_fd, name, mode)
        given.append(mode)
        exchange()

    def exchange() -> None:
        store.rename(tree, below[0], tree, below[1], RENAME_EXCHANGE)

    store.chmod = exchanging  # type: ignore[method-assign]
    try:
        file = await volume.files.open(inode)
    finally:
        store.chmod = chmod  # type: ignore[method-assign]
    assert given == [0o670, 0o070]
    # Twice, so each is where it was.
    assert modes() == [0o070, 0o004]
    assert bytes(await file.read(0, 10)) == b"one"
    await volume.files.release(inode)
    # What lies there before anything is changed is looked at, too.
    exchange()
    with pytest.raises(Damaged):
        await volume.files.open(inode)
    assert modes() == [0o004, 0o070]
    exchange()
    assert await volume.close()
