"""What the disk model lets a crash do, and what not."""

from __future__ import annotations

import errno
import os
import random

import pytest

from cryptfs.store.disk_model import Order
from cryptfs.store.memory import MemoryStore

CREATE = os.O_RDWR | os.O_CREAT | os.O_EXCL
LIMIT = 400


def survivors(store: MemoryStore, limit: int = LIMIT) -> list[MemoryStore]:
    return list(store.crash_states(random.Random(7), limit))


def content_of(store: MemoryStore, name: bytes, dir_fd: int | None = None) -> bytes | None:
    """None: there is no such file."""
    try:
        fd = store.open(store.root() if dir_fd is None else dir_fd, name, os.O_RDONLY)
    except FileNotFoundError:
        return None
    return store.pread(fd, 1 << 20, 0)


def contents(store: MemoryStore, name: bytes = b"f", limit: int = LIMIT) -> set[bytes | None]:
    return {content_of(survivor, name) for survivor in survivors(store, limit)}


def names(store: MemoryStore, dir_name: bytes = b".") -> frozenset[bytes] | None:
    try:
        return frozenset(store.listdir(store.open(store.root(), dir_name, os.O_RDONLY | os.O_DIRECTORY)))
    except FileNotFoundError:
        return None


def store_with_durable_file(content: bytes, order: Order = Order.DIRECTORY) -> tuple[MemoryStore, int]:
    store = MemoryStore(order=order)
    fd = store.open(store.root(), b"f", CREATE)
    store.pwrite(fd, content, 0)
    store.syncfs(fd)
    assert contents(store) == {content}
    return store, fd


def test_an_unsynced_write_is_torn_at_sectors() -> None:
    store, fd = store_with_durable_file(b"a" * 1024)
    store.pwrite(fd, b"b" * 1024, 0)
    assert contents(store) == {x * 512 + y * 512 for x in (b"a", b"b") for y in (b"a", b"b")}
    store.fdatasync(fd)
    assert contents(store) == {b"b" * 1024}


def test_any_version_of_a_sector_may_survive_but_no_mixture() -> None:
    store, fd = store_with_durable_file(b"aaaa")
    store.pwrite(fd, b"b", 0)
    store.pwrite(fd, b"c", 3)
    assert contents(store) == {b"aaaa", b"baaa", b"baac"}


def test_size_and_data_are_independent() -> None:
    store, fd = store_with_durable_file(b"")
    store.pwrite(fd, b"x" * 3, 0)
    assert contents(store) == {b"", b"xxx", bytes(3)}


def test_a_cut_may_be_lost_or_survive_alone() -> None:
    store, fd = store_with_durable_file(b"aaaa")
    store.ftruncate(fd, 1)
    store.ftruncate(fd, 4)
    assert contents(store) == {b"aaaa", b"a", b"a\0\0\0"}


def test_syncing_a_file_does_not_sync_its_name() -> None:
    store = MemoryStore()
    fd = store.open(store.root(), b"f", CREATE)
    store.pwrite(fd, b"x", 0)
    store.fsync(fd)
    assert contents(store) == {None, b"x"}
    store.fsync(store.root())
    assert contents(store) == {b"x"}


def test_a_name_may_survive_without_the_data() -> None:
    store = MemoryStore()
    fd = store.open(store.root(), b"f", CREATE)
    store.pwrite(fd, b"x", 0)
    store.fsync(store.root())
    assert contents(store) == {b"", b"x", b"\0"}


@pytest.mark.parametrize("order", Order)
def test_rename_between_directories_is_atomic(order: Order) -> None:
    store, _ = store_with_durable_file(b"x", order)
    root = store.root()
    for name in (b"d", b"e"):
        store.mkdir(root, name)
    store.syncfs(root)
    d = store.open(root, b"d", os.O_RDONLY | os.O_DIRECTORY)
    store.rename(root, b"f", d, b"f")
    where = {(b"f" in (names(s) or ()), b"f" in (names(s, b"d") or ())) for s in survivors(store)}
    assert where == {(True, False), (False, True)}
    store.fsync(root)
    assert {names(s, b"d") for s in survivors(store)} == {frozenset({b"f"})}, "syncing one side syncs the rename"


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        (Order.JOURNAL, {"", "a", "ab", "abc"}),
        (Order.DIRECTORY, {"", "a", "b", "ab", "ac", "abc"}),
        (Order.ANY, {"", "a", "b", "c", "ab", "ac", "bc", "abc"}),
    ],
)
def test_what_survives_together_is_the_order(order: Order, expected: set[str]) -> None:
    store = MemoryStore(order=order)
    root = store.root()
    store.mkdir(root, b"d")
    store.mkdir(root, b"e")
    store.syncfs(root)
    d, e = (store.open(root, name, os.O_RDONLY | os.O_DIRECTORY) for name in (b"d", b"e"))
    store.symlink(b"-", d, b"a")
    store.symlink(b"-", e, b"b")
    store.symlink(b"-", d, b"c")
    seen = set()
    for survivor in survivors(store):
        both = (names(survivor, b"d") or frozenset()) | (names(survivor, b"e") or frozenset())
        seen.add(b"".join(sorted(both)).decode())
    assert seen == expected


def test_a_sync_of_a_later_change_takes_the_earlier_ones_of_its_order_along() -> None:
    for order, lost in ((Order.JOURNAL, False), (Order.DIRECTORY, True)):
        store = MemoryStore(order=order)
        root = store.root()
        store.mkdir(root, b"d")
        store.syncfs(root)
        d = store.open(root, b"d", os.O_RDONLY | os.O_DIRECTORY)
        store.symlink(b"-", d, b"a")
        store.symlink(b"-", root, b"b")
        store.fsync(root)
        assert any(names(s, b"d") == frozenset() for s in survivors(store)) is lost
        assert all(b"b" in (names(s) or ()) for s in survivors(store))


def test_a_deleted_file_may_come_back_with_its_content() -> None:
    store, fd = store_with_durable_file(b"x")
    store.unlink(store.root(), b"f")
    store.close(fd)
    assert contents(store) == {b"x", None}
    assert contents(store.killed()) == {b"x", None}
    store.fsync(store.root())
    assert contents(store) == {None}


def test_a_kill_keeps_the_page_cache_and_makes_nothing_durable() -> None:
    store, fd = store_with_durable_file(b"a")
    store.pwrite(fd, b"b", 0)
    after = store.killed()
    assert content_of(after, b"f") == b"b"
    assert after.open_descriptors() == 1, "only the one this test opened"
    assert contents(after) == {b"a", b"b"}
    after.syncfs(after.root())
    assert contents(after) == {b"b"}
    assert contents(store) == {b"a", b"b"}, "the copy is independent"


def test_a_failed_sync_leaves_its_data_in_doubt_for_ever() -> None:
    store, fd = store_with_durable_file(b"a")
    store.pwrite(fd, b"b", 0)
    store.fail("fdatasync", 1, errno.EIO)
    with pytest.raises(OSError, match="Errno 5"):
        store.fdatasync(fd)
    store.fdatasync(fd)
    assert contents(store) == {b"a", b"b"}
    store.pwrite(fd, b"c", 600)
    store.fdatasync(fd)
    tails = {bytes(599) + b"c"}
    assert contents(store) == {head + tail for head in (b"a", b"b") for tail in tails}


def test_faults_happen_at_their_call_and_once() -> None:
    store, fd = store_with_durable_file(b"a")
    store.fail("pwrite", 2, errno.ENOSPC)
    store.fail("rename", 1, errno.EROFS)
    assert store.pwrite(fd, b"b", 0) == 1
    with pytest.raises(OSError, match="Errno 28"):
        store.pwrite(fd, b"c", 0)
    assert store.pread(fd, 9, 0) == b"b"
    with pytest.raises(OSError, match="Errno 30"):
        store.rename(store.root(), b"f", store.root(), b"g")
    assert names(store) == frozenset({b"f"})
    assert store.pwrite(fd, b"d", 0) == 1
    store.shorten(2, 3)
    assert store.pwrite(fd, b"12345", 0) == 5
    assert store.pwritev(fd, [b"ab", b"cde"], 0) == 3
    assert store.pread(fd, 9, 0) == b"abc45"
    with pytest.raises(ValueError, match="fsnyc"):
        store.fail("fsnyc", 1, errno.EIO)


def test_a_hook_sees_every_call_and_may_end_it() -> None:
    class PowerCut(BaseException):
        pass

    store = MemoryStore()
    seen: list[str] = []

    def cut_at_the_third(name: str) -> None:
        seen.append(name)
        if len(seen) == 3:
            raise PowerCut

    store.before_call = cut_at_the_third
    fd = store.open(store.root(), b"f", CREATE)
    store.pwrite(fd, b"x", 0)
    with pytest.raises(PowerCut):
        store.fdatasync(fd)
    assert seen == ["open", "pwrite", "fdatasync"]
    assert contents(store) == {None, b"", b"\0", b"x"}, "the sync did not happen"


def test_a_cold_store_has_nothing_in_memory() -> None:
    store, fd = store_with_durable_file(b"abc")
    store.cold = True
    with pytest.raises(BlockingIOError):
        store.preadv(fd, [bytearray(3)], 0, os.RWF_NOWAIT)
    assert store.preadv(fd, [bytearray(3)], 0) == 3


def test_a_sample_is_bounded_distinct_and_has_the_extremes() -> None:
    store, fd = store_with_durable_file(b"")
    store.pwrite(fd, b"x" * 512 * 40, 0)
    states = survivors(store, 50)
    assert len(states) == 50
    seen = [content_of(s, b"f") for s in states]
    assert seen[0] == b""
    assert b"x" * 512 * 40 in seen
    assert len(set(seen)) > 20


def test_attributes_survive_as_synced_or_as_they_are() -> None:
    store, fd = store_with_durable_file(b"x")
    store.fchmod(fd, 0o640)
    assert {s.lstat(s.root(), b"f").st_mode & 0o777 for s in survivors(store)} == {0o600, 0o640}
    store.fsync(fd)
    assert {s.lstat(s.root(), b"f").st_mode & 0o777 for s in survivors(store)} == {0o640}


def test_link_counts_after_a_crash_are_those_of_the_surviving_tree() -> None:
    store, fd = store_with_durable_file(b"x")
    store.link(store.root(), b"f", store.root(), b"g")
    store.mkdir(store.root(), b"d")
    for survivor in survivors(store):
        root_links = survivor.fstat(survivor.root()).st_nlink
        listed = names(survivor)
        assert listed is not None
        assert root_links == 2 + (b"d" in listed)
        assert survivor.lstat(survivor.root(), b"f").st_nlink == len(listed & {b"f", b"g"})
    store.close(fd)
