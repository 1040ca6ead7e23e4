"""What `stat` shows, who may do what, and what is neither file nor directory."""

from __future__ import annotations

import errno
import os
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mount.box import Box
from tests.mount.syscalls import drop_pages, refused

pytestmark = pytest.mark.mount

NOBODY = 65534


def modes(path: Path) -> str:
    return oct(stat.S_IMODE(path.lstat().st_mode))


@pytest.mark.parametrize("mode", [0o000, 0o400, 0o644, 0o711, 0o1777, 0o2750, 0o4755, 0o7777])
def test_modes(here: Path, mode: int) -> None:
    (here / "file").touch()
    (here / "dir").mkdir()
    for path in (here / "file", here / "dir"):
        path.chmod(mode)
        assert modes(path) == oct(mode)
    (here / "dir").chmod(0o700)


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
def test_the_umask_is_the_programs(here: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        os.close(os.open(here / "file", os.O_CREAT | os.O_WRONLY, 0o666))
        os.mkdir(here / "dir", 0o777)
        os.mkfifo(here / "fifo", 0o666)
    finally:
        os.umask(before)
    assert modes(here / "file") == modes(here / "fifo") == oct(0o666 & ~mask)
    assert modes(here / "dir") == oct(0o777 & ~mask)


def test_owners(root: None, here: Path) -> None:
    (here / "file").touch()
    (here / "dir").mkdir()
    (here / "link").symlink_to("file")
    for path in (here / "file", here / "dir", here / "link"):
        os.chown(path, 1234, 4321, follow_symlinks=False)
        assert (path.lstat().st_uid, path.lstat().st_gid) == (1234, 4321)
        os.chown(path, -1, 1, follow_symlinks=False)
        assert (path.lstat().st_uid, path.lstat().st_gid) == (1234, 1)


def test_a_setgid_directory_passes_its_group_on(root: None, here: Path) -> None:
    (here / "dir").mkdir()
    os.chown(here / "dir", -1, 4321)
    (here / "dir").chmod(0o2775)
    (here / "dir" / "file").touch()
    (here / "dir" / "dir").mkdir()
    (here / "dir" / "link").symlink_to("x")
    assert [path.lstat().st_gid for path in (here / "dir").iterdir()] == [4321] * 3
    assert (here / "dir" / "dir").stat().st_mode & stat.S_ISGID


def as_nobody(where: Path, call: Callable[[], object]) -> None:
    """`call` in a process of another user that stands in `where`. Raises the OSError it raises."""
    pid = os.fork()
    if pid == 0:
        code = 255
        try:
            os.chdir(where)  # first: the directories above are closed to others
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            call()
            code = 0
        except OSError as error:
            code = error.errno or 255
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code:
        raise OSError(code, os.strerror(code))


def overwrite(path: str) -> None:
    with open(path, "r+b", buffering=0) as out:
        out.write(b"edited")


def test_other_users_see_nothing(root: None, mounted: Box) -> None:
    file = mounted.clear / "file"
    file.write_bytes(b"mine")
    for path in (mounted.root, mounted.clear, file):
        path.chmod(0o777)
    for call in (
        lambda: os.stat("clear"),
        lambda: os.listdir("clear"),
        lambda: os.open("clear/file", os.O_RDONLY),
        lambda: os.listdir("vault"),
    ):
        with refused(errno.EACCES):
            as_nobody(mounted.root, call)
    with refused(errno.EACCES):
        as_nobody(mounted.clear, lambda: os.stat("file"))


def test_permissions_hold_with_allow_other(root: None, box: Box) -> None:
    box.mount("-o", "allow_other")
    box.clear.chmod(0o755)
    for name, mode in (("open", 0o644), ("shut", 0o600), ("free", 0o666)):
        (box.clear / name).write_bytes(b"written")
        (box.clear / name).chmod(mode)
    (box.clear / "theirs").mkdir()
    (box.clear / "theirs").chmod(0o1777)
    as_nobody(box.clear, lambda: os.read(os.open("open", os.O_RDONLY), 10))
    as_nobody(box.clear, lambda: overwrite("free"))
    as_nobody(box.clear, lambda: os.close(os.open("theirs/file", os.O_CREAT | os.O_WRONLY, 0o600)))
    for call in (
        lambda: os.open("shut", os.O_RDONLY),
        lambda: os.open("open", os.O_RDWR),
        lambda: os.mkdir("new"),
        lambda: os.unlink("open"),
        lambda: os.rename("open", "theirs/open"),
    ):
        with refused(errno.EACCES):
            as_nobody(box.clear, call)
    with refused(errno.EPERM):
        as_nobody(box.clear, lambda: os.chmod("open", 0o700))
    assert (box.clear / "free").read_bytes() == b"editedn"
    made = (box.clear / "theirs" / "file").stat()
    assert (made.st_uid, made.st_gid) == (NOBODY, NOBODY)


def test_a_write_by_another_takes_setuid_away(root: None, box: Box) -> None:
    box.mount("-o", "allow_other")
    box.clear.chmod(0o755)
    file = box.clear / "file"
    file.write_bytes(b"program")
    file.chmod(0o6777)
    as_nobody(box.clear, lambda: overwrite("file"))
    drop_pages(file)
    assert modes(file) == "0o777"


def test_a_file_its_owner_may_not_read(here: Path) -> None:
    file = here / "file"
    with file.open("wb") as out:
        out.write(b"secret")
        os.fchmod(out.fileno(), 0)
    drop_pages(file) if os.geteuid() == 0 else file.chmod(0o400)
    file.chmod(0o400)
    assert file.read_bytes() == b"secret"
    file.chmod(0)
    (here / "moved").hardlink_to(file)
    file.unlink()
    assert modes(here / "moved") == "0o0"


@pytest.mark.parametrize("mtime_ns", [0, 1, 999_999_999, 1_234_567_890_123_456_789, 4_294_967_296_000_000_001, -5])
def test_times_to_the_nanosecond(here: Path, mtime_ns: int) -> None:
    (here / "file").write_bytes(b"text")
    (here / "dir").mkdir()
    (here / "link").symlink_to("x")
    os.mkfifo(here / "fifo")
    for path in here.iterdir():
        os.utime(path, ns=(123_456_789_012_345_678, mtime_ns), follow_symlinks=False)
        assert path.lstat().st_mtime_ns == mtime_ns
        assert path.lstat().st_atime_ns == 123_456_789_012_345_678


def test_a_file_time_set_while_it_is_open_stays(here: Path) -> None:
    file = here / "file"
    with file.open("wb", buffering=0) as out:
        out.write(b"text")
        os.utime(out.fileno(), ns=(1, 2_000_000_003))
    drop_pages(file)
    assert file.stat().st_mtime_ns == 2_000_000_003


def test_times_move_with_what_happens(here: Path) -> None:
    def went_on(path: Path, change: Callable[[], object]) -> bool:
        os.utime(path, ns=(0, 0))
        start_ns = time.time_ns()
        change()
        # The kernel's clock for files ticks coarsely: 10 ms at most.
        return path.stat().st_mtime_ns > start_ns - 20_000_000

    file, directory = here / "file", here / "dir"
    file.write_bytes(b"text")
    directory.mkdir()
    assert went_on(file, lambda: file.write_bytes(b"more"))
    assert went_on(file, lambda: os.truncate(file, 1))
    assert not went_on(file, lambda: file.chmod(0o600))
    assert not went_on(file, file.read_bytes)
    for change in (
        (directory / "a").touch,
        lambda: (directory / "a").rename(directory / "b"),
        lambda: (directory / "c").hardlink_to(directory / "b"),
        lambda: (directory / "d").symlink_to("x"),
        (directory / "e").mkdir,
        (directory / "c").unlink,
        (directory / "e").rmdir,
    ):
        assert went_on(directory, change)
    assert not went_on(directory, lambda: (directory / "b").write_bytes(b"in it"))
    ctime_ns = file.stat().st_ctime_ns
    time.sleep(0.02)
    file.chmod(0o640)
    assert file.stat().st_ctime_ns > ctime_ns


def test_fifos(here: Path) -> None:
    os.mkfifo(here / "fifo")
    assert stat.S_ISFIFO((here / "fifo").stat().st_mode)
    with subprocess.Popen(["cat", here / "fifo"], stdout=subprocess.PIPE) as cat:
        (here / "fifo").write_bytes(b"through the fifo")
        assert cat.communicate(timeout=20)[0] == b"through the fifo"


def test_sockets(here: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind(str(here / "socket"))
        assert stat.S_ISSOCK((here / "socket").stat().st_mode)
        server.listen()
        (here / "socket").rename(here / "moved")
        client.connect(str(here / "moved"))
        accepted, _ = server.accept()
        with accepted:
            client.sendall(b"through the socket")
            assert accepted.recv(100) == b"through the socket"


def test_device_nodes(root: None, here: Path) -> None:
    for name, kind, device in (("char", stat.S_IFCHR, (1, 3)), ("block", stat.S_IFBLK, (259, 70000))):
        os.mknod(here / name, kind | 0o640, os.makedev(*device))
        os.rename(here / name, here / (name + " moved"))
        os.link(here / (name + " moved"), here / (name + " again"))
        for path in here.glob(name + "*"):
            found = path.stat()
            assert stat.S_IFMT(found.st_mode) == kind
            assert (os.major(found.st_rdev), os.minor(found.st_rdev)) == device
            assert found.st_nlink == 2


def test_mknod_makes_regular_files_too(here: Path) -> None:
    os.mknod(here / "file", stat.S_IFREG | 0o640)
    assert modes(here / "file") == "0o640"
    (here / "file").write_bytes(b"text")
    drop_pages(here / "file")
    assert (here / "file").read_bytes() == b"text"


def test_statfs(shared: Box, here: Path) -> None:
    ours, below = os.statvfs(here), os.statvfs(shared.vault)
    assert (ours.f_blocks, ours.f_frsize, ours.f_files) == (below.f_blocks, below.f_frsize, below.f_files)
    assert abs(ours.f_bavail - below.f_bavail) < below.f_blocks / 10
    assert ours.f_namemax == 255
    df = subprocess.run(["df", "--output=source,fstype", here], check=True, capture_output=True, text=True).stdout
    assert df.splitlines()[1].split() == [str(shared.vault), "fuse.cryptfs"]


def test_disk_use_of_a_file_with_holes_is_small(here: Path) -> None:
    with (here / "file").open("wb") as out:
        out.seek(1 << 30)
        out.write(b"end")
    drop_pages(here / "file")
    assert (here / "file").stat().st_blocks * 512 < 1 << 20


def test_a_program_runs_from_the_mount(here: Path) -> None:
    program = here / "program"
    program.write_text(f"#!{sys.executable} -S\nprint('ran')\n")
    with refused(errno.EACCES):
        subprocess.run([program], check=False)
    program.chmod(0o755)
    assert subprocess.run([program], check=True, capture_output=True).stdout == b"ran\n"
