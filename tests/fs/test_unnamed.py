"""What has lost its last name and is still known to the kernel: by an O_PATH descriptor, or on its way into open(2)."""

from __future__ import annotations

import os
import stat

import pytest

from cryptfs.fs.attributes import Changes
from cryptfs.fs.inodes import Inode
from cryptfs.types import Kind
from tests.fs.tree import Tree

CONTENT = b"some content " * 1000


def sidecars(tree: Tree) -> set[bytes]:
    """The ids that have one."""
    store, found = tree.store, set[bytes]()
    top = store.open(store.root(), b"sidecars", os.O_RDONLY | os.O_DIRECTORY)
    for name in store.listdir(top):
        fd = store.open(top, name, os.O_RDONLY | os.O_DIRECTORY)
        found |= {bytes.fromhex(each[:32].decode()) for each in store.listdir(fd)}
        store.close(fd)
    store.close(top)
    return found


async def read(tree: Tree, inode: Inode) -> bytes:
    file = await tree.volume.files.open(inode)
    try:
        return bytes(await file.read(0, 1 << 20))
    finally:
        await tree.volume.files.release(inode)


async def lose_name(tree: Tree, name: bytes, how: str) -> Inode:
    """The inode, which has no name afterwards."""
    inode = await tree.inode(name)
    if how == "unlink":
        await tree.unlink(name)
    else:
        await tree.write(b"new", b"other")
        await tree.rename(b"new", name)
    assert inode.path is None
    return inode


@pytest.mark.parametrize("how", ["unlink", "replace"])
async def test_a_file_is_opened_and_changed_until_the_kernel_forgets_it(tree: Tree, how: str) -> None:
    files, reaper = tree.volume.files, tree.volume.reaper
    await tree.write(b"file", CONTENT, sync=True)
    inode = await lose_name(tree, b"file", how)
    await reaper.flush()
    assert await read(tree, inode) == CONTENT
    file = await files.open(inode, writing=True)
    await file.write(0, b"ANOTHER")
    await files.release(inode)
    # No frame says so, and none has to: it stays in memory.
    assert await read(tree, inode) == b"ANOTHER" + CONTENT[7:]
    await tree.volume.xattrs.set(inode, b"user.a", b"1")
    attr = await files.setattr(inode, Changes(mode=0o600, size=100, mtime_ns=5))
    assert (attr.size, stat.S_IMODE(attr.st.st_mode), attr.mtime_ns, attr.st.st_nlink) == (100, 0o600, 5, 0)
    assert await tree.volume.xattrs.get(inode, b"user.a") == b"1"
    assert await read(tree, inode) == b"ANOTHER" + CONTENT[7:100]
    await reaper.flush()
    assert inode.log_id in sidecars(tree)
    tree.forget_all()
    await reaper.flush()
    assert inode.log_id not in sidecars(tree)
    assert tree.volume.inodes.find(inode.ino) is None


@pytest.mark.parametrize("kind", [Kind.FIFO, Kind.SOCKET, Kind.CHAR, Kind.SYMLINK])
async def test_what_is_no_file_is_changed_without_a_name(tree: Tree, kind: Kind) -> None:
    files = tree.volume.files
    if kind == Kind.SYMLINK:
        await tree.symlink(b"target", b"thing")
    else:
        mode = {Kind.FIFO: stat.S_IFIFO, Kind.SOCKET: stat.S_IFSOCK, Kind.CHAR: stat.S_IFCHR}[kind]
        await tree.mknod(b"thing", mode | 0o644, os.makedev(1, 3))
    inode = await lose_name(tree, b"thing", "unlink")
    await tree.volume.reaper.flush()
    want = Changes(mode=None if kind == Kind.SYMLINK else 0o600, uid=5, gid=6, atime_ns=7, mtime_ns=8)
    attr = await files.setattr(inode, want)
    assert (attr.st.st_uid, attr.st.st_gid, attr.st.st_atime_ns, attr.st.st_mtime_ns) == (5, 6, 7, 8)
    assert attr.st.st_nlink == 0
    if kind == Kind.SYMLINK:
        assert attr.size == len(b"target")
        assert await files.readlink(inode) == b"target"
    else:
        assert stat.S_IMODE(attr.st.st_mode) == 0o600
    await tree.volume.xattrs.set(inode, b"trusted.a", b"1")
    assert await tree.volume.xattrs.names(inode, trusted=True) == [b"trusted.a"]
    assert inode.log_id in sidecars(tree)
    tree.forget_all()
    await tree.volume.reaper.flush()
    assert inode.log_id not in sidecars(tree)


async def test_a_removed_directory_has_attributes_of_its_own(tree: Tree) -> None:
    inode = await tree.mkdir(b"dir")
    await tree.rmdir(b"dir")
    await tree.volume.reaper.flush()
    await tree.volume.xattrs.set(inode, b"user.a", b"1")
    assert await tree.volume.xattrs.get(inode, b"user.a") == b"1"
    await tree.volume.xattrs.remove(inode, b"user.a")
    assert await tree.volume.xattrs.names(inode, trusted=False) == []
    assert stat.S_IMODE((await tree.volume.files.setattr(inode, Changes(mode=0o711))).st.st_mode) == 0o711


async def test_what_is_held_without_a_name_at_the_end_leaves_nothing(tree: Tree) -> None:
    await tree.write(b"file", CONTENT, sync=True)
    await tree.symlink(b"target", b"link")
    held = [await lose_name(tree, name, "unlink") for name in (b"file", b"link")]
    await tree.remount()
    assert not {inode.log_id for inode in held} & sidecars(tree)


async def test_a_crash_leaves_what_was_held_to_no_name(tree: Tree) -> None:
    """As it leaves what was open: the sidecar is an orphan, and nothing else is touched."""
    await tree.write(b"file", CONTENT, sync=True)
    await tree.write(b"stays", CONTENT, sync=True)
    inode = await lose_name(tree, b"file", "unlink")
    assert await read(tree, inode) == CONTENT
    tree.kill()
    await tree.mount()
    assert await tree.names() == [b"stays"]
    assert await tree.read(b"stays") == CONTENT
