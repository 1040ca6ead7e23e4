"""Extended attributes and ACLs through the layers, without a kernel: where they are kept, and that they stay."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cryptfs.format.xattrs import VALUE_MAX_BYTES
from cryptfs.fs import acl
from cryptfs.fs.attributes import Changes
from cryptfs.store.local import LocalStore
from cryptfs.testing.freshness import FakeRecord
from tests.fs.tree import Tree, damage_of, errno_of

FOO, SECURITY, TRUSTED = b"user.foo", b"security.selinux", b"trusted.t"


@pytest.fixture
async def tree(tmp_path: Path) -> AsyncIterator[Tree]:
    store = LocalStore(tmp_path)
    yield await Tree.make(store)
    store.close_store()


async def give(tree: Tree, path: bytes, name: bytes, value: bytes) -> None:
    await tree.volume.xattrs.set(await tree.inode(path), name, value)


async def value_of(tree: Tree, path: bytes, name: bytes) -> bytes | str:
    try:
        return await tree.volume.xattrs.get(await tree.inode(path), name)
    except OSError as error:
        return errno.errorcode[error.errno or 0]


async def names_of(tree: Tree, path: bytes) -> list[bytes]:
    return await tree.volume.xattrs.names(await tree.inode(path), trusted=True)


async def one_of_each(tree: Tree) -> list[bytes]:
    await tree.write(b"file", b"content")
    await tree.write(b"empty", b"")
    await tree.mkdir(b"dir")
    await tree.symlink(b"target", b"symlink")
    await tree.mknod(b"fifo", stat.S_IFIFO | 0o600)
    return [b"file", b"empty", b"dir", b"symlink", b"fifo", b""]


async def test_every_kind_keeps_them_through_remounts(tree: Tree) -> None:
    paths = await one_of_each(tree)
    for path in paths:
        assert await value_of(tree, path, TRUSTED) == "ENODATA"
        await give(tree, path, TRUSTED, b"1 " + path)
        await give(tree, path, SECURITY, b"")
        await give(tree, path, TRUSTED, b"2 " + path)
    for _ in range(2):
        await tree.remount()
        for path in paths:
            assert await value_of(tree, path, TRUSTED) == b"2 " + path
            assert await names_of(tree, path) == [SECURITY, TRUSTED]
    assert await tree.read(b"file") == b"content"
    assert await tree.readlink(b"symlink") == b"target"
    for path in paths:
        await tree.volume.xattrs.remove(await tree.inode(path), TRUSTED)
        await tree.volume.xattrs.remove(await tree.inode(path), SECURITY)
    await tree.remount()
    for path in paths:
        assert await names_of(tree, path) == []
    await tree.finish()


async def test_nothing_of_them_can_be_read_on_the_disk(tree: Tree, tmp_path: Path) -> None:
    for path in await one_of_each(tree):
        await give(tree, path, b"trusted.clear-name", b"clear-value")
    await tree.finish()
    everything = b"".join(file.read_bytes() for file in files_below(tmp_path))
    assert len(everything) > 1000
    assert b"clear-" not in everything


async def test_an_open_file_a_renamed_and_a_linked_one_share_them(tree: Tree) -> None:
    file = await tree.create(b"a")
    await give(tree, b"a", FOO, b"new")
    await file.write(0, b"data")
    await tree.link(b"a", b"b")
    await tree.rename(b"a", b"c")
    assert await value_of(tree, b"b", FOO) == b"new"
    await give(tree, b"b", FOO, b"newer")
    await tree.remount()
    assert await value_of(tree, b"c", FOO) == b"newer"
    assert await tree.read(b"c") == b"data"
    await tree.finish()


async def test_compaction_keeps_them(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = await one_of_each(tree)
    big = os.urandom(3000)
    for path in paths:
        for n in range(60):
            await give(tree, path, TRUSTED, b"%d " % n + big)
    await tree.volume.files.settle()
    await tree.remount()
    for path in paths:
        assert await value_of(tree, path, TRUSTED) == b"59 " + big
    root = await tree.inode(b"")
    await (await tree.volume.inodes.dir(root)).compact()
    file = await tree.open(b"file")
    await file.read(0, 1)
    await file.journal.fsync()
    await file.journal.compact()
    assert file.journal.log is not None
    assert file.journal.log.end < 100_000
    await tree.remount()
    for path in paths:
        assert await value_of(tree, path, TRUSTED) == b"59 " + big
    assert await tree.readlink(b"symlink") == b"target"
    await tree.finish()


async def test_ctime_moves_and_mtime_does_not(tree: Tree) -> None:
    for path in await one_of_each(tree):
        before = (await tree.stat(path)).st
        await give(tree, path, TRUSTED, b"x")
        after = (await tree.stat(path)).st
        assert after.st_mtime_ns == before.st_mtime_ns
        assert after.st_ctime_ns > before.st_ctime_ns
    await tree.finish()


async def test_limits_and_namespaces(tree: Tree) -> None:
    await tree.write(b"f", b"")
    xattrs, inode = tree.volume.xattrs, await tree.inode(b"f")
    for name, value, wanted in (
        (b"nonsense", b"", "ENOTSUP"), (b"system.other", b"", "ENOTSUP"), (b"user.", b"", "EINVAL"),
        (b"user." + b"n" * 251, b"", "ERANGE"), (FOO, bytes(VALUE_MAX_BYTES + 1), "E2BIG"),
        (acl.ACCESS, b"\2\0\0\0x", "EINVAL"), (acl.ACCESS, b"\3\0\0\0", "ENOTSUP"),
    ):  # fmt: skip
        assert await errno_of(xattrs.set(inode, name, value)) == wanted, name
    assert await names_of(tree, b"f") == []
    for n in range(15):
        await xattrs.set(inode, b"user.%d" % n, bytes(VALUE_MAX_BYTES))
    assert await errno_of(xattrs.set(inode, b"user.more", bytes(VALUE_MAX_BYTES))) == "ENOSPC"
    assert len(await names_of(tree, b"f")) == 15
    await tree.write(b"g", b"")
    other = await tree.inode(b"g")
    # 318 names of 205 bytes are a list of 65,508.
    await xattrs.edit(other, lambda values: values.update({b"user.%0200d" % n: b"" for n in range(318)}))
    assert await errno_of(xattrs.set(other, b"user.%0200d" % 318, b"")) == "ENOSPC"
    assert len(await names_of(tree, b"g")) == 318
    await tree.finish()


async def test_a_read_only_mount_shows_them_and_changes_none(tree: Tree) -> None:
    paths = await one_of_each(tree)
    for path in paths:
        await give(tree, path, TRUSTED, b"x")
    await tree.remount(read_only=True)
    for path in paths:
        assert await value_of(tree, path, TRUSTED) == b"x"
        assert await errno_of(give(tree, path, TRUSTED, b"y")) == "EROFS"
    await tree.finish()


def files_below(top: Path) -> list[Path]:
    return [path for path in top.rglob("*") if path.is_file()]


# damage ----------------------------------------------------------------------------------------------------------


async def sidecar_of(tree: Tree, root: Path, path: bytes) -> Path:
    name = (await tree.inode(path)).log_id.hex()
    return root / "sidecars" / name[:2] / name


@pytest.mark.parametrize("path", [b"file", b"symlink", b"fifo"])
async def test_a_flipped_bit_or_an_older_set_is_damage_of_that_object_alone(
    tree: Tree, tmp_path: Path, path: bytes
) -> None:
    tree.sample.freshness = FakeRecord()
    await tree.remount()
    await one_of_each(tree)
    for each in (b"file", b"empty", b"symlink", b"fifo"):
        await give(tree, each, TRUSTED, b"old")
    await tree.unmount()
    await tree.mount()
    sidecar = await sidecar_of(tree, tmp_path, path)
    old = sidecar.read_bytes()
    await give(tree, path, TRUSTED, b"new")
    await tree.unmount()
    good = sidecar.read_bytes()
    sidecar.write_bytes(good[:-30] + bytes([good[-30] ^ 1]) + good[-29:])
    await tree.mount()
    assert await damage_of(value_of(tree, path, TRUSTED)) == "frame"
    assert await value_of(tree, b"empty", TRUSTED) == b"old"
    if path == b"file":
        assert await tree.read(path) == b"content"
        assert await damage_of(give(tree, path, TRUSTED, b"other")) == "frame"
    await tree.unmount()
    sidecar.write_bytes(old)
    await tree.mount()
    assert await damage_of(value_of(tree, path, TRUSTED)) == "rolled-back"
    await tree.unmount()
    sidecar.unlink()
    await tree.mount()
    assert await damage_of(value_of(tree, path, TRUSTED)) in {"missing-sidecar", "rolled-back"}
    await tree.unmount()
    sidecar.write_bytes(good)
    await tree.mount()
    assert await value_of(tree, path, TRUSTED) == b"new"
    await tree.finish()


# ACLs ------------------------------------------------------------------------------------------------------------

JOE, STAFF = 1234, 50


def an_acl(*entries: tuple[int, int, int]) -> bytes:
    return acl.Acl(entries).encode()


NONE = 0xFFFFFFFF
EXTENDED = an_acl((acl.USER_OBJ, 7, NONE), (acl.USER, 6, JOE), (acl.GROUP_OBJ, 5, NONE), (acl.MASK, 6, NONE),
                  (acl.OTHER, 0, NONE))  # fmt: skip
MINIMAL = an_acl((acl.USER_OBJ, 6, NONE), (acl.GROUP_OBJ, 4, NONE), (acl.OTHER, 0, NONE))


async def mode_of(tree: Tree, path: bytes) -> int:
    return stat.S_IMODE((await tree.stat(path)).st.st_mode)


async def test_mode_and_acl_are_two_views_of_one_thing(tree: Tree) -> None:
    await tree.write(b"f", b"")
    await give(tree, b"f", acl.ACCESS, EXTENDED)
    assert await mode_of(tree, b"f") == 0o760
    await tree.setattr(b"f", Changes(mode=0o644))
    shown = await value_of(tree, b"f", acl.ACCESS)
    assert shown == an_acl((acl.USER_OBJ, 6, NONE), (acl.USER, 6, JOE), (acl.GROUP_OBJ, 5, NONE), (acl.MASK, 4, NONE),
                           (acl.OTHER, 4, NONE))  # fmt: skip
    await give(tree, b"f", acl.ACCESS, MINIMAL)
    assert await mode_of(tree, b"f") == 0o640
    assert await names_of(tree, b"f") == []
    await tree.finish()


async def test_default_acls_are_inherited(tree: Tree) -> None:
    await tree.mkdir(b"d")
    await give(tree, b"d", acl.DEFAULT, EXTENDED)
    await tree.create(b"d/file", 0o664)
    await tree.mkdir(b"d/sub", 0o700)
    await tree.mknod(b"d/fifo", stat.S_IFIFO | 0o660)
    await tree.symlink(b"t", b"d/link")
    await tree.remount()
    for path, mode, mask in ((b"d/file", 0o660, 6), (b"d/sub", 0o700, 0), (b"d/fifo", 0o660, 6)):
        assert await mode_of(tree, path) == mode
        parsed = acl.parse(bytes(await value_of(tree, path, acl.ACCESS)))  # type: ignore[arg-type]
        assert parsed is not None
        assert parsed.permissions(acl.MASK) == mask
        assert (acl.USER, 6, JOE) in parsed.entries
    assert await value_of(tree, b"d/sub", acl.DEFAULT) == EXTENDED
    assert await value_of(tree, b"d/file", acl.DEFAULT) == "ENODATA"
    assert await names_of(tree, b"d/link") == []
    await give(tree, b"d", acl.DEFAULT, MINIMAL)
    await tree.create(b"d/plain", 0o666)
    assert await mode_of(tree, b"d/plain") == 0o640
    assert await names_of(tree, b"d/plain") == []
    await tree.finish()


@pytest.mark.parametrize("wrong", [
    an_acl((acl.USER_OBJ, 7, NONE), (acl.USER, 7, JOE), (acl.GROUP_OBJ, 7, NONE), (acl.OTHER, 7, NONE)),
    an_acl((acl.GROUP_OBJ, 7, NONE), (acl.USER_OBJ, 7, NONE), (acl.OTHER, 7, NONE)),
    an_acl((acl.USER_OBJ, 8, NONE), (acl.GROUP_OBJ, 7, NONE), (acl.OTHER, 7, NONE)),
    an_acl((acl.USER_OBJ, 7, NONE), (acl.OTHER, 7, NONE)),
    an_acl((acl.USER_OBJ, 7, NONE), (acl.GROUP_OBJ, 7, NONE), (acl.OTHER, 7, NONE), (64, 7, NONE)),
])  # fmt: skip
async def test_what_is_no_acl_is_refused(wrong: bytes) -> None:
    with pytest.raises(OSError, match="Invalid argument"):
        acl.parse(wrong)
