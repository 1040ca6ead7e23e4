"""What the tree does, call by call, on the kernel's filesystem and on the disk model."""

from __future__ import annotations

import os
import stat

import pytest

from cryptfs.fs.attributes import Changes
from cryptfs.fs.making import Owner
from cryptfs.ports import RENAME_EXCHANGE, RENAME_NOREPLACE
from cryptfs.types import Kind
from tests.fs.tree import OWNER, Tree, errno_of

CONTENT = b"some content " * 1000


# creating --------------------------------------------------------------------------------------------------------


async def test_a_new_file_is_there_at_once_and_after_a_remount(tree: Tree) -> None:
    await tree.write(b"file", CONTENT)
    assert await tree.names() == [b"file"]
    assert await tree.read(b"file") == CONTENT
    await tree.remount()
    assert await tree.names() == [b"file"]
    assert await tree.read(b"file") == CONTENT
    attr = await tree.stat(b"file")
    assert (attr.size, attr.st.st_nlink, attr.inode.kind) == (len(CONTENT), 1, Kind.FILE)


async def test_a_name_that_is_taken_is_refused(tree: Tree) -> None:
    await tree.write(b"file", CONTENT)
    await tree.mkdir(b"dir")
    for name in (b"file", b"dir"):
        assert await errno_of(tree.create(name)) == "EEXIST"
        assert await errno_of(tree.mkdir(name)) == "EEXIST"
        assert await errno_of(tree.symlink(b"x", name)) == "EEXIST"
        assert await errno_of(tree.mknod(name, stat.S_IFIFO | 0o600)) == "EEXIST"
        assert await errno_of(tree.link(b"file", name)) == "EEXIST"
    assert await tree.names() == [b"dir", b"file"]
    assert await tree.read(b"file") == CONTENT


async def test_what_is_not_there_is_not_found(tree: Tree) -> None:
    assert await errno_of(tree.lookup(b"nothing")) == "ENOENT"
    assert await errno_of(tree.unlink(b"nothing")) == "ENOENT"
    assert await errno_of(tree.volume.names.rmdir(tree.volume.root, b"nothing")) == "ENOENT"
    assert await errno_of(tree.volume.names.rename(tree.volume.root, b"nothing", tree.volume.root, b"x")) == "ENOENT"


@pytest.mark.parametrize(
    "name",
    [b"n" * 175, b"n" * 176, b"n" * 255, b"\xff\xfe", b"new\nline", b".hidden", b".dir", b" ", b"~", b"\x01" * 255,
     "é".encode(), bytes(range(1, 256)).replace(b"/", b"")],
    ids=lambda name: f"{len(name)}:{name[:6]!r}",
)  # fmt: skip
async def test_any_name_of_up_to_255_bytes_is_kept_as_it_is(tree: Tree, name: bytes) -> None:
    await tree.write(name, CONTENT)
    await tree.mkdir(b"d")
    await tree.link(name, b"d/" + name)
    await tree.remount()
    assert await tree.names() == sorted([name, b"d"])
    assert await tree.read(name) == CONTENT
    await tree.rename(name, b"d/other")
    await tree.rename(b"d/other", name)
    await tree.unlink(b"d/" + name)
    assert await tree.read(name) == CONTENT
    await tree.unlink(name)
    await tree.rmdir(b"d")
    assert await tree.names() == []


async def test_longer_names_are_refused(tree: Tree) -> None:
    name = b"n" * 256
    await tree.write(b"file", CONTENT)
    assert await errno_of(tree.lookup(name)) == "ENAMETOOLONG"
    assert await errno_of(tree.create(name)) == "ENAMETOOLONG"
    assert await errno_of(tree.mkdir(name)) == "ENAMETOOLONG"
    assert await errno_of(tree.symlink(b"x", name)) == "ENAMETOOLONG"
    assert await errno_of(tree.mknod(name, stat.S_IFIFO)) == "ENAMETOOLONG"
    assert await errno_of(tree.link(b"file", name)) == "ENAMETOOLONG"
    assert await errno_of(tree.volume.names.rename(tree.volume.root, b"file", tree.volume.root, name)) == "ENAMETOOLONG"


async def test_no_name_or_content_is_on_disk_in_clear(tree: Tree) -> None:
    await tree.mkdir(b"secret-dir")
    await tree.write(b"secret-dir/secret-file", b"secret-content" * 500)
    await tree.symlink(b"secret-target", b"secret-link")
    await tree.unmount()
    store = tree.store
    seen = 0

    def search(dir_fd: int) -> None:
        nonlocal seen
        for name in store.listdir(dir_fd):
            assert b"secret" not in name
            st = store.lstat(dir_fd, name)
            if stat.S_ISLNK(st.st_mode):
                assert b"secret" not in store.readlink(dir_fd, name)
                continue
            fd = store.open(dir_fd, name, os.O_RDONLY)
            if stat.S_ISDIR(st.st_mode):
                search(fd)
            else:
                seen += 1
                assert b"secret" not in store.pread(fd, 1 << 20, 0)
            store.close(fd)

    search(store.root())
    assert seen >= 6
    await tree.mount()


# special files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [b"t", b"../up/../and/away", b"\xff\n", b"t" * 4095])
async def test_a_symlink_keeps_its_target(tree: Tree, target: bytes) -> None:
    await tree.symlink(target, b"link")
    for _ in range(2):
        attr = await tree.stat(b"link")
        assert (attr.inode.kind, attr.size) == (Kind.SYMLINK, len(target))
        assert await tree.readlink(b"link") == target
        await tree.remount()
    await tree.link(b"link", b"other")
    await tree.unlink(b"link")
    await tree.remount()
    assert await tree.readlink(b"other") == target


async def test_impossible_targets_are_refused(tree: Tree) -> None:
    assert await errno_of(tree.symlink(b"", b"link")) == "ENOENT"
    assert await errno_of(tree.symlink(b"t" * 4096, b"link")) == "ENAMETOOLONG"
    assert await tree.names() == []


@pytest.mark.parametrize(
    ("mode", "kind"),
    [(stat.S_IFIFO, Kind.FIFO), (stat.S_IFSOCK, Kind.SOCKET), (stat.S_IFREG, Kind.FILE), (0, Kind.FILE)],
)
async def test_special_files_are_made(tree: Tree, mode: int, kind: Kind) -> None:
    inode = await tree.mknod(b"special", mode | 0o640)
    assert inode.kind == kind
    await tree.remount()
    attr = await tree.stat(b"special")
    assert (attr.inode.kind, stat.S_IMODE(attr.st.st_mode), attr.size) == (kind, 0o640, 0)


@pytest.mark.skipif(os.geteuid() != 0, reason="device nodes take root")
@pytest.mark.parametrize(("mode", "kind"), [(stat.S_IFCHR, Kind.CHAR), (stat.S_IFBLK, Kind.BLOCK)])
async def test_device_nodes_keep_their_number(tree: Tree, mode: int, kind: Kind) -> None:
    rdev = os.makedev(1, 3)
    await tree.mknod(b"device", mode | 0o600, rdev)
    await tree.link(b"device", b"again")
    await tree.remount()
    for name in (b"device", b"again"):
        attr = await tree.stat(name)
        assert (attr.inode.kind, attr.st.st_rdev) == (kind, rdev)
    await tree.rename(b"again", b"moved")
    assert (await tree.stat(b"moved")).st.st_rdev == rdev


# removing --------------------------------------------------------------------------------------------------------


async def test_a_removed_file_can_be_used_while_it_is_open(tree: Tree) -> None:
    file = await tree.create(b"file")
    inode = tree.open_files[0]
    await file.write(0, CONTENT)
    await tree.unlink(b"file")
    assert await tree.names() == []
    assert await errno_of(tree.lookup(b"file")) == "ENOENT"
    await file.write(len(CONTENT), b"more")
    await file.journal.fsync()
    assert bytes(await file.read(0, 1 << 20)) == CONTENT + b"more"
    attr = await tree.volume.files.attr(inode)
    assert (attr.size, attr.st.st_nlink) == (len(CONTENT) + 4, 0)
    # Its name is free at once.
    await tree.write(b"file", b"another")
    await tree.release(inode)
    assert (await tree.volume.files.attr(inode)).st.st_nlink == 0
    assert await tree.read(b"file") == b"another"
    await tree.remount()
    assert await tree.read(b"file") == b"another"


async def test_the_sidecars_of_removed_files_are_gone_after_a_clean_unmount(tree: Tree) -> None:
    for name in (b"a", b"b", b"c"):
        await tree.write(name, CONTENT, sync=True)
        await tree.write(name, CONTENT, sync=True)
    await tree.symlink(b"target", b"link")
    await tree.mkdir(b"d")
    await tree.unlink(b"a")
    await tree.unlink(b"link")
    await tree.rmdir(b"d")
    await tree.rename(b"b", b"c")
    await tree.unmount()
    store = tree.store
    found: list[bytes] = []
    top = store.open(store.root(), b"sidecars", os.O_RDONLY | os.O_DIRECTORY)
    for name in store.listdir(top):
        fd = store.open(top, name, os.O_RDONLY | os.O_DIRECTORY)
        found += store.listdir(fd)
        store.close(fd)
    store.close(top)
    tmp = store.open(store.root(), b"tmp", os.O_RDONLY | os.O_DIRECTORY)
    assert store.listdir(tmp) == []
    store.close(tmp)
    assert len({name[:32] for name in found}) == 1
    await tree.mount()
    assert await tree.read(b"c") == CONTENT


async def test_directories_and_files_are_removed_by_their_own_call(tree: Tree) -> None:
    await tree.mkdir(b"dir")
    await tree.write(b"file", b"")
    assert await errno_of(tree.unlink(b"dir")) == "EISDIR"
    assert await errno_of(tree.rmdir(b"file")) == "ENOTDIR"
    await tree.write(b"dir/inside", b"")
    assert await errno_of(tree.rmdir(b"dir")) == "ENOTEMPTY"
    await tree.unlink(b"dir/inside")
    await tree.rmdir(b"dir")
    assert await tree.names() == [b"file"]


async def test_nothing_is_made_in_a_removed_directory(tree: Tree) -> None:
    inode = await tree.mkdir(b"dir")
    await tree.write(b"file", b"")
    await tree.rmdir(b"dir")
    names = tree.volume.names
    assert await errno_of(names.mkdir(inode, b"x", 0o700, Owner(0, 0))) == "ENOENT"
    assert await errno_of(names.create(inode, b"x", 0o600, Owner(0, 0))) == "ENOENT"
    assert await errno_of(names.rename(tree.volume.root, b"file", inode, b"x")) == "ENOENT"
    assert await names.listing(inode) == []
    assert (await tree.volume.files.attr(inode)).st.st_nlink == 0


@pytest.mark.parametrize("mode", [0o000, 0o555])
async def test_a_directory_nobody_may_write_can_be_removed_and_moved(tree: Tree, mode: int) -> None:
    await tree.mkdir(b"dir", mode)
    assert stat.S_IMODE((await tree.stat(b"dir")).st.st_mode) == mode
    await tree.rename(b"dir", b"moved")
    await tree.rmdir(b"moved")
    assert await tree.names() == []


# renaming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("into", [b"", b"dir/"])
@pytest.mark.parametrize("flags", [0, RENAME_NOREPLACE])
async def test_a_file_is_renamed(tree: Tree, into: bytes, flags: int) -> None:
    await tree.mkdir(b"dir")
    await tree.write(b"old", CONTENT)
    ino = (await tree.stat(b"old")).inode.ino
    await tree.rename(b"old", into + b"new", flags)
    for _ in range(2):
        assert not await tree.exists(b"old")
        assert await tree.read(into + b"new") == CONTENT
        assert (await tree.stat(into + b"new")).inode.ino == ino
        await tree.remount()


async def test_an_open_file_moves_along(tree: Tree) -> None:
    await tree.mkdir(b"dir")
    file = await tree.create(b"old")
    await file.write(0, CONTENT)
    await tree.rename(b"old", b"dir/new")
    await file.write(0, b"SOME")
    await file.journal.fsync()
    assert await tree.read(b"dir/new") == b"SOME" + CONTENT[4:]


async def test_a_file_replaces_a_file(tree: Tree) -> None:
    await tree.write(b"old", CONTENT)
    await tree.write(b"new", b"replaced")
    victim = await tree.open(b"new")
    await tree.rename(b"old", b"new")
    assert await tree.names() == [b"new"]
    assert await tree.read(b"new") == CONTENT
    assert bytes(await victim.read(0, 100)) == b"replaced"
    await tree.remount()
    assert await tree.read(b"new") == CONTENT


async def test_two_names_of_one_file_are_left_alone(tree: Tree) -> None:
    await tree.write(b"a", CONTENT)
    await tree.link(b"a", b"b")
    await tree.rename(b"a", b"b")
    await tree.rename(b"a", b"a")
    assert await tree.names() == [b"a", b"b"]
    assert (await tree.stat(b"a")).st.st_nlink == 2


async def test_a_directory_is_renamed_with_what_is_in_it(tree: Tree) -> None:
    await tree.mkdir(b"old")
    await tree.mkdir(b"old/sub")
    await tree.write(b"old/sub/file", CONTENT)
    await tree.mkdir(b"other")
    await tree.rename(b"old", b"other/new")
    assert await tree.read(b"other/new/sub/file") == CONTENT
    await tree.remount()
    assert await tree.names() == [b"other"]
    assert await tree.read(b"other/new/sub/file") == CONTENT


@pytest.mark.parametrize("same_parent", [True, False])
async def test_a_directory_replaces_an_empty_one_and_no_other(tree: Tree, same_parent: bool) -> None:
    new = b"new" if same_parent else b"up/new"
    await tree.mkdir(b"up")
    await tree.mkdir(b"old")
    await tree.write(b"old/file", CONTENT)
    await tree.mkdir(new)
    await tree.write(new + b"/in the way", b"")
    assert await errno_of(tree.rename(b"old", new)) == "ENOTEMPTY"
    assert await tree.names(b"old") == [b"file"]
    await tree.unlink(new + b"/in the way")
    await tree.rename(b"old", new)
    for _ in range(2):
        assert await tree.names() == ([b"new", b"up"] if same_parent else [b"up"])
        assert await tree.read(new + b"/file") == CONTENT
        await tree.remount()


async def test_kinds_are_not_replaced_by_others(tree: Tree) -> None:
    await tree.mkdir(b"dir")
    await tree.write(b"file", CONTENT)
    assert await errno_of(tree.rename(b"file", b"dir")) == "EISDIR"
    assert await errno_of(tree.rename(b"dir", b"file")) == "ENOTDIR"
    assert await tree.names() == [b"dir", b"file"]
    await tree.remount()
    assert await tree.names() == [b"dir", b"file"]


async def test_a_directory_does_not_move_into_itself(tree: Tree) -> None:
    await tree.mkdir(b"dir")
    await tree.mkdir(b"dir/sub")
    for new in (b"dir/self", b"dir/sub/self"):
        assert await errno_of(tree.rename(b"dir", new)) == "EINVAL"
    await tree.remount()
    assert await tree.names() == [b"dir"]
    assert await tree.names(b"dir") == [b"sub"]
    assert await tree.names(b"dir/sub") == []


async def test_noreplace_replaces_nothing(tree: Tree) -> None:
    await tree.write(b"a", b"a")
    await tree.write(b"b", b"b")
    assert await errno_of(tree.rename(b"a", b"b", RENAME_NOREPLACE)) == "EEXIST"
    assert (await tree.read(b"a"), await tree.read(b"b")) == (b"a", b"b")


@pytest.mark.parametrize("b", [b"b", b"dir/b"])
@pytest.mark.parametrize("kind", ["file", "directory", "symlink"])
async def test_exchange_swaps_whatever_is_there(tree: Tree, b: bytes, kind: str) -> None:
    await tree.mkdir(b"dir")
    await tree.write(b"a", CONTENT)
    if kind == "file":
        await tree.write(b, b"the other")
    elif kind == "directory":
        await tree.mkdir(b)
        await tree.write(b + b"/inside", b"the other")
    else:
        await tree.symlink(b"the other", b)
    await tree.rename(b"a", b, RENAME_EXCHANGE)
    for _ in range(2):
        assert await tree.read(b) == CONTENT
        if kind == "symlink":
            assert await tree.readlink(b"a") == b"the other"
        else:
            assert await tree.read(b"a" if kind == "file" else b"a/inside") == b"the other"
        await tree.remount()


async def test_exchange_takes_two(tree: Tree) -> None:
    await tree.write(b"a", b"a")
    assert await errno_of(tree.rename(b"a", b"b", RENAME_EXCHANGE)) == "ENOENT"
    assert await errno_of(tree.rename(b"a", b"b", RENAME_EXCHANGE | RENAME_NOREPLACE)) == "EINVAL"
    assert await errno_of(tree.rename(b"a", b"b", 4)) == "EINVAL"
    assert await tree.names() == [b"a"]


# hard links ------------------------------------------------------------------------------------------------------


async def test_a_file_has_as_many_names_as_it_is_given(tree: Tree) -> None:
    await tree.mkdir(b"dir")
    await tree.write(b"a", CONTENT)
    attr = await tree.link(b"a", b"dir/b")
    assert attr.st.st_nlink == 2
    await tree.link(b"dir/b", b"c")
    assert len({(await tree.stat(name)).inode.ino for name in (b"a", b"dir/b", b"c")}) == 1
    await tree.write(b"c", b"changed")
    await tree.remount()
    assert {await tree.read(name) for name in (b"a", b"dir/b", b"c")} == {b"changed"}
    await tree.unlink(b"a")
    await tree.unlink(b"c")
    await tree.remount()
    assert await tree.read(b"dir/b") == b"changed"
    assert (await tree.stat(b"dir/b")).st.st_nlink == 1


async def test_an_open_empty_file_can_be_linked(tree: Tree) -> None:
    file = await tree.create(b"a")
    await tree.link(b"a", b"b")
    await tree.unlink(b"a")
    await file.write(0, CONTENT)
    await tree.remount()
    assert await tree.read(b"b") == CONTENT


async def test_directories_have_one_name(tree: Tree) -> None:
    await tree.mkdir(b"dir")
    assert await errno_of(tree.link(b"dir", b"b")) == "EPERM"


# attributes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["file", "open file", "directory", "fifo"])
async def test_modes_and_times_are_kept(tree: Tree, kind: str) -> None:
    if kind == "directory":
        await tree.mkdir(b"x")
    elif kind == "fifo":
        await tree.mknod(b"x", stat.S_IFIFO | 0o600)
    else:
        await tree.write(b"x", CONTENT)
    if kind == "open file":
        await tree.open(b"x")
    attr = await tree.setattr(b"x", Changes(mode=0o4751, atime_ns=1_000_000_001, mtime_ns=2_000_000_003))
    for _ in range(2):
        assert stat.S_IMODE(attr.st.st_mode) == 0o4751
        assert (attr.st.st_atime_ns, attr.st.st_mtime_ns) == (1_000_000_001, 2_000_000_003)
        await tree.remount()
        attr = await tree.stat(b"x")
    attr = await tree.setattr(b"x", Changes(mtime_ns=7))
    assert (attr.st.st_atime_ns, attr.st.st_mtime_ns) == (1_000_000_001, 7)


async def test_reading_sealing_and_settling_leave_a_files_times_alone(tree: Tree) -> None:
    file = await tree.create(b"x")
    await file.write(0, CONTENT)
    await file.journal.fsync()
    await file.truncate(100)
    await tree.setattr(b"x", Changes(atime_ns=5, mtime_ns=6))
    await tree.close(b"x")
    await tree.volume.files.settle()
    assert (await tree.stat(b"x")).st.st_mtime_ns == 6
    await tree.remount()
    await tree.read(b"x")
    assert (await tree.stat(b"x")).st.st_mtime_ns == 6


async def test_a_size_is_set_on_regular_files_only(tree: Tree) -> None:
    await tree.write(b"file", CONTENT)
    await tree.mkdir(b"dir")
    await tree.mknod(b"fifo", stat.S_IFIFO | 0o600)
    assert (await tree.setattr(b"file", Changes(size=10))).size == 10
    assert await tree.read(b"file") == CONTENT[:10]
    assert (await tree.setattr(b"file", Changes(size=20))).size == 20
    assert await tree.read(b"file") == CONTENT[:10] + bytes(10)
    assert await errno_of(tree.setattr(b"dir", Changes(size=0))) == "EISDIR"
    assert await errno_of(tree.setattr(b"fifo", Changes(size=0))) == "EINVAL"
    assert await errno_of(tree.setattr(b"file", Changes(size=1 << 63))) == "EFBIG"


@pytest.mark.skipif(os.geteuid() != 0, reason="giving files away takes root")
async def test_owners_are_kept_and_groups_inherited(tree: Tree) -> None:
    names = tree.volume.names
    attr = await names.mkdir(tree.volume.root, b"dir", 0o2770, Owner(1234, 5678))
    tree.take(attr)
    assert (attr.st.st_uid, attr.st.st_gid) == (1234, 5678)
    made, _ = await names.create(attr.inode, b"file", 0o600, Owner(4321, 9))
    tree.open_files.append(tree.take(made))
    assert (made.st.st_uid, made.st.st_gid) == (4321, 5678)
    sub = await names.mkdir(attr.inode, b"sub", 0o700, Owner(4321, 9))
    tree.take(sub)
    assert (sub.st.st_gid, stat.S_IMODE(sub.st.st_mode)) == (5678, 0o2700)
    attr = await tree.setattr(b"dir/file", Changes(uid=7))
    assert (attr.st.st_uid, attr.st.st_gid) == (7, 5678)
    await tree.remount()
    attr = await tree.stat(b"dir/file")
    assert (attr.st.st_uid, attr.st.st_gid) == (7, 5678)


# read-only and other refusals ------------------------------------------------------------------------------------


async def test_a_read_only_mount_changes_nothing(tree: Tree) -> None:
    await tree.mkdir(b"dir")
    await tree.write(b"dir/file", CONTENT)
    await tree.symlink(b"target", b"link")
    await tree.remount(read_only=True)
    assert await tree.read(b"dir/file") == CONTENT
    assert await tree.readlink(b"link") == b"target"
    assert await errno_of(tree.create(b"x")) == "EROFS"
    assert await errno_of(tree.mkdir(b"x")) == "EROFS"
    assert await errno_of(tree.unlink(b"link")) == "EROFS"
    assert await errno_of(tree.rmdir(b"dir")) == "EROFS"
    assert await errno_of(tree.rename(b"link", b"x")) == "EROFS"
    assert await errno_of(tree.link(b"link", b"x")) == "EROFS"
    assert await errno_of(tree.open(b"dir/file")) == "EROFS"
    assert await errno_of(tree.setattr(b"dir/file", Changes(size=0))) == "EROFS"
    assert sorted(await tree.names()) == [b"dir", b"link"]
    await tree.remount()
    assert await tree.read(b"dir/file") == CONTENT


@pytest.mark.slow
async def test_a_directory_of_many_entries(local_tree: Tree) -> None:
    tree, count = local_tree, 100_000
    parent = await tree.mkdir(b"dir")
    names, inodes = tree.volume.names, tree.volume.inodes
    for i in range(count):
        attr = await names.mknod(parent, b"fifo %d" % i, stat.S_IFIFO | 0o600, 0, OWNER)
        attr.inode.lookups += 1
        inodes.forget(attr.inode.ino, 1)
    assert len(inodes) == 2
    await tree.volume.files.settle()
    await tree.remount()
    listed = await tree.volume.names.listing(await tree.inode(b"dir"))
    assert len(listed) == count
    assert await tree.exists(b"dir/fifo 99999")
    await tree.unlink(b"dir/fifo 99999")
    assert not await tree.exists(b"dir/fifo 99999")
    assert await errno_of(tree.mknod(b"dir/fifo 0", stat.S_IFIFO)) == "EEXIST"
    assert await errno_of(tree.rmdir(b"dir")) == "ENOTEMPTY"
