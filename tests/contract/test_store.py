"""Both stores do what Linux does: every test runs on the kernel and on the model."""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest

from cryptfs.ports import RENAME_EXCHANGE, RENAME_NOREPLACE, Store
from cryptfs.store import local
from cryptfs.store.local import LocalStore
from cryptfs.store.memory import MemoryStore
from tests.stores import no_umask, store

__all__ = ["no_umask", "store"]

CREATE = os.O_RDWR | os.O_CREAT | os.O_EXCL


def make_file(store: Store, name: bytes, content: bytes = b"", dir_fd: int | None = None) -> None:
    fd = store.open(store.root() if dir_fd is None else dir_fd, name, CREATE)
    assert store.pwrite(fd, content, 0) == len(content)
    store.close(fd)


def content_of(store: Store, name: bytes, dir_fd: int | None = None) -> bytes:
    fd = store.open(store.root() if dir_fd is None else dir_fd, name, os.O_RDONLY)
    try:
        return store.pread(fd, 1 << 20, 0)
    finally:
        store.close(fd)


def errno_of(call: Callable[[], object]) -> int | None:
    with pytest.raises(OSError, match="Errno") as caught:
        call()
    return caught.value.errno


def open_dir(store: Store, name: bytes, dir_fd: int | None = None) -> int:
    return store.open(store.root() if dir_fd is None else dir_fd, name, os.O_RDONLY | os.O_DIRECTORY)


def test_written_bytes_read_back_and_holes_read_as_zeros(store: Store) -> None:
    fd = store.open(store.root(), b"f", CREATE)
    assert store.pwrite(fd, b"abc", 1000) == 3
    assert store.pwritev(fd, [b"de", bytearray(b"f"), memoryview(b"g")], 2000) == 4
    assert store.pwrite(fd, b"X", 1001) == 1
    expected = bytes(1000) + b"aXc" + bytes(997) + b"defg"
    assert store.pread(fd, 5000, 0) == expected
    assert store.pread(fd, 10, 2004) == b""
    assert store.fstat(fd).st_size == 2004
    buffers = [bytearray(1001), bytearray(2), bytearray(3000)]
    assert store.preadv(fd, buffers, 0) == 2004
    assert b"".join(buffers)[:2004] == expected
    store.close(fd)
    assert errno_of(lambda: store.pread(fd, 1, 0)) == errno.EBADF


def test_bytes_cut_off_read_as_zeros_when_the_file_grows_again(store: Store) -> None:
    fd = store.open(store.root(), b"f", CREATE)
    store.pwrite(fd, b"a" * 1500, 0)
    store.ftruncate(fd, 700)
    store.ftruncate(fd, 1200)
    assert store.pread(fd, 5000, 0) == b"a" * 700 + bytes(500)
    assert errno_of(lambda: store.ftruncate(fd, -1)) == errno.EINVAL
    store.close(fd)


def test_a_sparse_file_costs_what_is_in_it(store: Store) -> None:
    fd = store.open(store.root(), b"f", CREATE)
    store.pwrite(fd, b"end", 1 << 40)
    assert store.fstat(fd).st_size == (1 << 40) + 3
    assert store.fstat(fd).st_blocks < 1000
    assert store.pread(fd, 10, (1 << 40) - 2) == b"\0\0end"
    store.close(fd)


def test_open_obeys_its_flags(store: Store) -> None:
    root = store.root()
    make_file(store, b"f", b"content")
    store.mkdir(root, b"d")
    store.symlink(b"f", root, b"l")
    store.mknod(root, b"p", stat.S_IFIFO | 0o600, 0)
    assert errno_of(lambda: store.open(root, b"f", CREATE)) == errno.EEXIST
    assert errno_of(lambda: store.open(root, b"none", os.O_RDONLY)) == errno.ENOENT
    assert errno_of(lambda: store.open(root, b"l", os.O_RDONLY)) == errno.ELOOP
    assert errno_of(lambda: store.open(root, b"f", os.O_RDONLY | os.O_DIRECTORY)) == errno.ENOTDIR
    assert errno_of(lambda: store.open(root, b"d", os.O_RDWR)) == errno.EISDIR
    assert errno_of(lambda: store.open(root, b"n" * 256, os.O_RDONLY)) == errno.ENAMETOOLONG
    fd = store.open(root, b"f", os.O_RDONLY)
    assert errno_of(lambda: store.pwrite(fd, b"x", 0)) == errno.EBADF
    assert errno_of(lambda: open_dir(store, b"x", fd)) == errno.ENOTDIR
    store.close(fd)
    fd = store.open(root, b"f", os.O_WRONLY)
    assert errno_of(lambda: store.pread(fd, 1, 0)) == errno.EBADF
    store.close(fd)
    store.close(store.open(root, b"f", os.O_RDWR | os.O_CREAT))
    assert content_of(store, b"f") == b"content"
    store.close(store.open(root, b"f", os.O_RDWR | os.O_TRUNC))
    assert content_of(store, b"f") == b""
    for name in (b"f", b"d", b"l", b"p"):
        fd = store.open(root, name, os.O_PATH)
        assert store.fstat(fd) == store.lstat(root, name)
        store.close(fd)


def test_a_directory_lists_whole_twice_and_in_two_threads(store: Store) -> None:
    store.mkdir(store.root(), b"d")
    fd = open_dir(store, b"d")
    names = {b"n%d" % i for i in range(500)} | {b"\xff\n\x80"}
    for name in names:
        store.symlink(b"t", fd, name)
    seen: list[list[bytes]] = []
    threads = [threading.Thread(target=lambda: seen.append(store.listdir(fd))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for listing in [*seen, store.listdir(fd), store.listdir(fd)]:
        assert len(listing) == len(names)
        assert set(listing) == names
    store.close(fd)


def test_names_are_made_and_removed(store: Store) -> None:
    root = store.root()
    make_file(store, b"f")
    store.mkdir(root, b"d", 0o750)
    assert stat.S_IMODE(store.lstat(root, b"d").st_mode) == 0o750
    fd = open_dir(store, b"d")
    make_file(store, b"inner", b"", fd)
    assert errno_of(lambda: store.mkdir(root, b"f")) == errno.EEXIST
    assert errno_of(lambda: store.rmdir(root, b"d")) == errno.ENOTEMPTY
    assert errno_of(lambda: store.rmdir(root, b"f")) == errno.ENOTDIR
    assert errno_of(lambda: store.unlink(root, b"d")) == errno.EISDIR
    assert errno_of(lambda: store.unlink(root, b"none")) == errno.ENOENT
    store.unlink(fd, b"inner")
    store.rmdir(root, b"d")
    assert errno_of(lambda: make_file(store, b"late", b"", fd)) == errno.ENOENT
    assert store.fstat(fd).st_nlink == 0
    store.close(fd)
    store.unlink(root, b"f")
    assert store.listdir(root) == []


def test_an_unlinked_file_lives_while_it_is_open(store: Store) -> None:
    make_file(store, b"f", b"content")
    fd = store.open(store.root(), b"f", os.O_RDWR)
    store.unlink(store.root(), b"f")
    assert store.fstat(fd).st_nlink == 0
    store.pwrite(fd, b"C", 0)
    assert store.pread(fd, 10, 0) == b"Content"
    store.close(fd)


def test_rename_moves_and_replaces(store: Store) -> None:
    root = store.root()
    store.mkdir(root, b"d")
    fd = open_dir(store, b"d")
    make_file(store, b"a", b"a")
    make_file(store, b"b", b"b", fd)
    ino = store.lstat(root, b"a").st_ino
    assert errno_of(lambda: store.rename(root, b"a", fd, b"b", RENAME_NOREPLACE)) == errno.EEXIST
    store.rename(root, b"a", fd, b"b")
    assert store.lstat(fd, b"b").st_ino == ino
    assert store.listdir(root) == [b"d"]
    assert content_of(store, b"b", fd) == b"a"
    store.rename(fd, b"b", fd, b"c", RENAME_NOREPLACE)
    assert store.listdir(fd) == [b"c"]
    assert errno_of(lambda: store.rename(root, b"none", fd, b"c")) == errno.ENOENT
    store.close(fd)


def test_exchange_swaps_a_full_directory_and_a_file(store: Store) -> None:
    root = store.root()
    store.mkdir(root, b"d")
    store.mkdir(root, b"e")
    d, e = open_dir(store, b"d"), open_dir(store, b"e")
    store.mkdir(d, b"full")
    full = open_dir(store, b"full", d)
    make_file(store, b"x", b"x", full)
    make_file(store, b"f", b"f", e)
    store.rename(d, b"full", e, b"f", RENAME_EXCHANGE)
    assert content_of(store, b"full", d) == b"f"
    assert stat.S_ISDIR(store.lstat(e, b"f").st_mode)
    assert errno_of(lambda: store.rename(d, b"full", e, b"none", RENAME_EXCHANGE)) == errno.ENOENT
    assert errno_of(lambda: store.rename(root, b"e", full, b"x", RENAME_EXCHANGE)) == errno.EINVAL
    for fd in (d, e, full):
        store.close(fd)


def test_rename_refuses_what_would_break_the_tree(store: Store) -> None:
    root = store.root()
    make_file(store, b"f")
    store.mkdir(root, b"d")
    store.mkdir(root, b"empty")
    fd = open_dir(store, b"d")
    store.mkdir(fd, b"sub")
    sub = open_dir(store, b"sub", fd)
    assert errno_of(lambda: store.rename(root, b"f", root, b"d")) == errno.EISDIR
    assert errno_of(lambda: store.rename(root, b"d", root, b"f")) == errno.ENOTDIR
    assert errno_of(lambda: store.rename(root, b"empty", root, b"d")) == errno.ENOTEMPTY
    assert errno_of(lambda: store.rename(root, b"d", sub, b"d")) == errno.EINVAL
    store.rename(root, b"d", root, b"empty")
    assert sorted(store.listdir(root)) == [b"empty", b"f"]
    store.rename(root, b"f", root, b"f")
    store.link(root, b"f", root, b"g")
    store.rename(root, b"f", root, b"g")
    assert sorted(store.listdir(root)) == [b"empty", b"f", b"g"], "renaming one hard link over another does nothing"
    for each in (fd, sub):
        store.close(each)


def test_hard_links_share_one_inode(store: Store) -> None:
    root = store.root()
    make_file(store, b"f", b"one")
    store.mkdir(root, b"d")
    store.symlink(b"f", root, b"l")
    store.link(root, b"f", root, b"g")
    store.link(root, b"l", root, b"m")
    assert store.readlink(root, b"m") == b"f"
    assert store.lstat(root, b"f").st_nlink == 2
    assert store.lstat(root, b"f").st_ino == store.lstat(root, b"g").st_ino
    assert errno_of(lambda: store.link(root, b"d", root, b"e")) == errno.EPERM
    assert errno_of(lambda: store.link(root, b"f", root, b"g")) == errno.EEXIST
    store.unlink(root, b"f")
    assert store.lstat(root, b"g").st_nlink == 1
    assert content_of(store, b"g") == b"one"


def test_symlinks_are_never_followed(store: Store) -> None:
    root = store.root()
    make_file(store, b"f", b"content")
    store.symlink(b"f", root, b"l")
    before = store.lstat(root, b"f")
    assert store.readlink(root, b"l") == b"f"
    assert stat.S_ISLNK(store.lstat(root, b"l").st_mode)
    assert store.lstat(root, b"l").st_size == 1
    assert errno_of(lambda: store.chmod(root, b"l", 0o777)) == errno.EOPNOTSUPP
    store.utimens(root, b"l", 1, 2)
    store.chown(root, b"l", -1, -1)
    assert (store.lstat(root, b"l").st_atime_ns, store.lstat(root, b"l").st_mtime_ns) == (1, 2)
    after = store.lstat(root, b"f")
    assert (after.st_mode, after.st_mtime_ns) == (before.st_mode, before.st_mtime_ns)
    assert errno_of(lambda: store.readlink(root, b"f")) == errno.EINVAL
    assert errno_of(lambda: store.symlink(b"x", root, b"l")) == errno.EEXIST
    assert errno_of(lambda: store.symlink(b"", root, b"n")) == errno.ENOENT


def test_attributes_by_name_and_by_descriptor(store: Store) -> None:
    root = store.root()
    make_file(store, b"f")
    store.chmod(root, b"f", 0o4751)
    assert stat.S_IMODE(store.lstat(root, b"f").st_mode) == 0o4751
    fd = store.open(root, b"f", os.O_RDWR)
    store.fchmod(fd, 0o640)
    store.futimens(fd, 1_234_567_890_123_456_789, 987_654_321)
    seen = store.fstat(fd)
    assert stat.S_IMODE(seen.st_mode) == 0o640
    assert (seen.st_atime_ns, seen.st_mtime_ns) == (1_234_567_890_123_456_789, 987_654_321)
    store.chown(root, b"f", os.getuid(), -1)
    assert store.fstat(fd).st_uid == os.getuid()
    store.close(fd)
    store.chmod(root, b".", 0o711)
    assert stat.S_IMODE(store.fstat(root).st_mode) == 0o711
    assert errno_of(lambda: store.chmod(root, b"none", 0o600)) == errno.ENOENT


def test_kernels_without_fchmodat2_follow_no_symlink_either(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store._has_fchmodat2 = False
    make_file(store, b"f")
    store.symlink(b"f", store.root(), b"l")
    store.chmod(store.root(), b"f", 0o604)
    assert stat.S_IMODE(store.lstat(store.root(), b"f").st_mode) == 0o604
    assert errno_of(lambda: store.chmod(store.root(), b"l", 0o777)) == errno.EOPNOTSUPP
    assert errno_of(lambda: local._chmod_pinned(store.root(), b"none", 0o600)) == errno.ENOENT
    store.close_store()


def test_special_files(store: Store) -> None:
    root = store.root()
    store.mknod(root, b"p", stat.S_IFIFO | 0o640, 0)
    assert stat.S_IFMT(store.lstat(root, b"p").st_mode) == stat.S_IFIFO
    assert stat.S_IMODE(store.lstat(root, b"p").st_mode) == 0o640
    assert errno_of(lambda: store.mknod(root, b"p", stat.S_IFIFO | 0o640, 0)) == errno.EEXIST
    store.mknod(root, b"s", stat.S_IFSOCK | 0o600, 0)
    assert stat.S_ISSOCK(store.lstat(root, b"s").st_mode)


def test_link_counts_follow_the_tree(store: Store) -> None:
    root = store.root()
    store.mkdir(root, b"a")
    store.mkdir(root, b"b")
    a, b = open_dir(store, b"a"), open_dir(store, b"b")
    flat = store.fstat(a).st_nlink
    store.mkdir(a, b"c")
    one = store.fstat(a).st_nlink
    store.rename(a, b"c", b, b"c")
    assert (store.fstat(a).st_nlink, store.fstat(b).st_nlink) == (flat, one)
    store.rmdir(b, b"c")
    assert store.fstat(b).st_nlink == flat
    for fd in (a, b):
        store.close(fd)


def test_syncs_and_statvfs_answer(store: Store) -> None:
    root = store.root()
    fd = store.open(root, b"f", CREATE)
    store.pwrite(fd, b"x", 0)
    store.fdatasync(fd)
    store.fsync(fd)
    store.fsync(root)
    store.syncfs(root)
    assert store.fstatvfs(root).f_namemax == 255
    assert store.fstatvfs(fd).f_blocks >= store.fstatvfs(fd).f_bavail > 0
    store.close(fd)
    for call in (store.fsync, store.fdatasync, store.syncfs, store.fstat, store.fstatvfs, store.close):
        assert errno_of(lambda call=call: call(fd)) == errno.EBADF  # type: ignore[misc]


def test_the_lock_excludes_a_second_store_and_ends_with_the_first(store: LocalStore | MemoryStore) -> None:
    def second() -> LocalStore | MemoryStore:
        if isinstance(store, MemoryStore):
            return MemoryStore(store.disk)
        return LocalStore(Path(os.readlink(f"/proc/self/fd/{store.root()}")))

    store.lock()
    other = second()
    with pytest.raises(BlockingIOError):
        other.lock()
    store.close_store()
    store.close_store()
    other.lock()
    other.close_store()


def test_a_cipher_directory_must_be_a_directory(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        LocalStore(tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        LocalStore(tmp_path / "file")


def test_both_are_stores(tmp_path: Path) -> None:
    made: list[Store] = [LocalStore(tmp_path), MemoryStore()]
    names = {name for name in vars(Store) if not name.startswith("_")}
    for each in made:
        assert names <= set(dir(each))
        cast("LocalStore | MemoryStore", each).close_store()
