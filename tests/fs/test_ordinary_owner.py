"""A daemon of an ordinary user: groups that it is not in."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import trio

from cryptfs.fs.making import Owner
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
