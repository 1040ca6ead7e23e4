"""The store of an ordinary user: what a directory's mode keeps its owner from, and what writing takes from a file."""

from __future__ import annotations

import errno
import os
import stat
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

from cryptfs.store.local import LocalStore
from cryptfs.store.owner import OwnersStore, local_store

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")

UID, GROUP = 65534, 65533
CREATE = os.O_RDWR | os.O_CREAT | os.O_EXCL


def as_owner(directory: Path, check: Callable[[OwnersStore], None]) -> None:
    """Run `check` in a child that owns `directory`, in a store of it; its failure is the test's."""
    os.chown(directory, UID, UID)
    here = os.open(directory, os.O_PATH)
    out, into = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([GROUP])
            os.setresgid(UID, UID, UID)
            os.setresuid(UID, UID, UID)
            os.umask(0)
            os.fchdir(here)
            store = local_store(Path())
            assert isinstance(store, OwnersStore)
            check(store)
            os._exit(0)
        except BaseException:  # noqa: BLE001 - told to the parent, whatever it is
            os.write(into, traceback.format_exc().encode()[-4000:])
        finally:
            os._exit(1)
    os.close(into)
    os.close(here)
    with open(out, "rb") as said:
        text = said.read().decode()
    assert os.waitpid(pid, 0)[1] == 0, text


def mode_of(store: LocalStore, name: bytes) -> int:
    return stat.S_IMODE(os.stat(name, dir_fd=store.root(), follow_symlinks=False).st_mode)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A cipher directory whose `d` has something of everything in it."""
    d = tmp_path / "d"
    (d / "sub").mkdir(parents=True)
    (d / "file").write_bytes(b"content")
    (d / "link").symlink_to("nowhere")
    for path in (tmp_path, d, *d.iterdir()):
        os.chown(path, UID, UID, follow_symlinks=False)
    return tmp_path


def test_root_needs_none_of_this(tmp_path: Path) -> None:
    store = local_store(tmp_path)
    assert type(store) is LocalStore
    store.close_store()


@pytest.mark.parametrize("mode", [0o000, 0o311, 0o400, 0o600, 0o100, 0o555, 0o2055, 0o1070])
@pytest.mark.parametrize("held", [True, False])
def test_every_call_works_and_leaves_the_mode_alone(mode: int, held: bool, tree: Path) -> None:
    def check(store: OwnersStore) -> None:
        root, flags = store.root(), os.O_RDONLY | os.O_DIRECTORY
        if held:
            d = store.open(root, b"d", flags)
            store.fchmod(d, mode)
        else:
            store.chmod(root, b"d", mode)
            d = store.open(root, b"d", flags)
        calls: list[Callable[[], object]] = [
            lambda: store.listdir(d),
            lambda: store.lstat(d, b"file"),
            lambda: store.readlink(d, b"link"),
            lambda: store.close(store.open(d, b"file", os.O_RDWR)),
            lambda: store.close(store.open(d, b"new", CREATE)),
            lambda: store.close(store.open(d, b"sub", flags)),
            lambda: store.mkdir(d, b"dir"),
            lambda: store.rmdir(d, b"dir"),
            lambda: store.symlink(b"x", d, b"symlink"),
            lambda: store.mknod(d, b"fifo", stat.S_IFIFO | 0o600, 0),
            lambda: store.link(d, b"file", d, b"other"),
            lambda: store.rename(d, b"other", d, b"renamed"),
            lambda: store.rename(d, b"renamed", root, b"out"),
            lambda: store.chmod(d, b"file", 0o640),
            lambda: store.chown(d, b"file", -1, GROUP),
            lambda: store.utimens(d, b"file", 5, 7),
            lambda: store.unlink(d, b"fifo"),
        ]
        for number, call in enumerate(calls):
            try:
                call()
            except OSError as error:
                raise AssertionError(f"call {number}: {error}") from error
            assert mode_of(store, b"d") == mode, number
        assert store.lstat(d, b"file").st_mtime_ns == 7
        assert sorted(store.listdir(d)) == [b"file", b"link", b"new", b"sub", b"symlink"]
        assert stat.S_IMODE(store.fstat(d).st_mode) == mode

    as_owner(tree, check)


def test_what_fails_for_another_reason_says_so(tree: Path) -> None:
    (tree / "roots").mkdir(mode=0o700)
    (tree / "d" / "closed").write_bytes(b"x")
    (tree / "d" / "closed").chmod(0)

    def check(store: OwnersStore) -> None:
        def code(call: Callable[[], object]) -> int | None:
            try:
                call()
            except OSError as error:
                return error.errno
            return 0

        d = store.open(store.root(), b"d", os.O_RDONLY | os.O_DIRECTORY)
        store.fchmod(d, 0)
        assert code(lambda: store.lstat(d, b"none")) == errno.ENOENT
        assert code(lambda: store.mkdir(d, b"sub")) == errno.EEXIST
        assert code(lambda: store.open(d, b"closed", os.O_RDONLY)) == errno.EACCES
        assert code(lambda: store.open(store.root(), b"roots", os.O_RDONLY | os.O_DIRECTORY)) == errno.EACCES
        assert code(lambda: store.chown(d, b"file", 0, 0)) == errno.EPERM
        # The cipher directory itself is made read-only on purpose, if at all.
        store.fchmod(store.root(), 0o500)
        assert code(lambda: store.mkdir(store.root(), b"x")) == errno.EACCES
        assert mode_of(store, b"d") == 0
        assert mode_of(store, b".") == 0o500

    as_owner(tree, check)


def test_a_set_group_id_bit_that_could_not_be_put_back_is_left_alone(tree: Path) -> None:
    os.chown(tree / "d", UID, 12345)
    (tree / "d").chmod(0o2000)

    def check(store: OwnersStore) -> None:
        with pytest.raises(PermissionError):
            store.open(store.root(), b"d", os.O_RDONLY | os.O_DIRECTORY)
        assert mode_of(store, b"d") == 0o2000

    as_owner(tree, check)


@pytest.mark.parametrize("mode", [0o6755, 0o4755, 0o2755, 0o2644, 0o755])
def test_set_id_bits_outlive_what_is_written(mode: int, tmp_path: Path) -> None:
    def check(store: OwnersStore) -> None:
        fd = store.open(store.root(), b"f", CREATE, mode)
        store.pwrite(fd, b"header", 0)
        assert mode_of(store, b"f") == mode
        store.pwritev(fd, [b"a", b"b"], 6)
        assert mode_of(store, b"f") == mode
        store.ftruncate(fd, 3)
        assert mode_of(store, b"f") == mode
        assert store.pread(fd, 10, 0) == b"hea"

    as_owner(tmp_path, check)


def test_threads_see_no_mode_but_the_programs(tree: Path) -> None:
    """One works in a closed directory; another changes its mode and asks for it all the while."""

    def check(store: OwnersStore) -> None:
        root = store.root()
        d = store.open(root, b"d", os.O_RDONLY | os.O_DIRECTORY)
        store.fchmod(d, 0o050)
        over = threading.Event()

        def work() -> None:
            while not over.is_set():
                store.lstat(d, b"file")
                store.listdir(d)

        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        try:
            for number in range(1500):
                mode = (0o050, 0o005, 0o055)[number % 3]
                if number % 2:
                    store.fchmod(d, mode)
                else:
                    store.chmod(root, b"d", mode)
                for st in (store.fstat(d), store.lstat(root, b"d")):
                    assert stat.S_IMODE(st.st_mode) == mode, number
        finally:
            over.set()
            for thread in threads:
                thread.join()
        assert stat.S_IMODE(store.fstat(d).st_mode) == 0o055

    as_owner(tree, check)
