"""Mounts that root runs for several users: who enters, whom things belong to, what --force-owner shows."""

from __future__ import annotations

import errno
import os
import stat
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cryptfs.cli.daemon_process import MountOptions, check
from cryptfs.errors import UsageError
from tests.mount.box import Box, boxed
from tests.mount.syscalls import refused

pytestmark = [pytest.mark.mount, pytest.mark.usefixtures("root")]

ANN, BEN, CLUB = 65534, 65533, 65532


def as_user(path: Path, call: Callable[[], object], uid: int = ANN, groups: tuple[int, ...] = ()) -> int:
    """`call`'s errno (0: none) in a child that is `uid` from head to foot and stands in `path`."""
    pid = os.fork()
    if pid == 0:
        code = 255
        try:
            here = os.open(path, os.O_PATH)
            os.setgroups(groups)
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            os.fchdir(here)
            call()
            code = 0
        except OSError as error:
            code = error.errno or 254
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def make_all() -> None:
    os.close(os.open("file", os.O_CREAT | os.O_WRONLY, 0o644))
    os.mkdir("dir")
    os.mkfifo("fifo")
    os.symlink("file", "symlink")
    os.mknod("socket", stat.S_IFSOCK | 0o600)
    os.link("file", "link")


@pytest.fixture(scope="module")
def everybodys(template: Path, short_root: Path) -> Iterator[Box]:
    """Mounted for everybody."""
    with boxed(short_root, template) as box:
        box.mount("-o", "allow_other")
        box.clear.chmod(0o1777)
        yield box


def test_nobody_else_enters_by_default(mounted: Box) -> None:
    mounted.clear.chmod(0o777)
    (mounted.clear / "file").write_text("root's")
    (mounted.clear / "file").chmod(0o666)
    assert as_user(mounted.clear, lambda: os.listdir(".")) == errno.EACCES
    assert as_user(mounted.clear, lambda: os.stat("file")) == errno.EACCES
    assert as_user(mounted.clear, lambda: os.open("file", os.O_RDONLY)) == errno.EACCES
    assert as_user(mounted.root, lambda: os.statvfs("clear")) == errno.EACCES


def test_what_a_user_makes_is_the_users(box: Box) -> None:
    box.mount("-o", "allow_other")
    users: list[tuple[int, tuple[int, ...]]] = [(ANN, ()), (BEN, (CLUB,)), (4_000_000_000, ()), (1, (0,))]
    for uid, groups in users:
        path = box.clear / str(uid)
        path.mkdir()
        path.chmod(0o1777)
        assert as_user(path, make_all, uid, groups) == 0
    box.remount("-o", "allow_other")
    for uid, _ in users:
        path = box.clear / str(uid)
        for name in ("file", "dir", "fifo", "symlink", "socket", "link"):
            st = (path / name).lstat()
            assert (st.st_uid, st.st_gid) == (uid, uid), name
        assert as_user(path, lambda: os.open("file", os.O_WRONLY), uid) == 0
        assert as_user(path, lambda: os.open("file", os.O_WRONLY), 3) == errno.EACCES
        assert as_user(path, lambda: os.unlink("file"), 3) == errno.EPERM
        assert as_user(path, lambda: os.unlink("file"), uid) == 0


def test_supplementary_groups_count(everybodys: Box) -> None:
    path = everybodys.clear / "clubs"
    path.write_text("for the club")
    os.chown(path, 0, CLUB)
    path.chmod(0o660)

    def write() -> None:
        os.write(os.open("clubs", os.O_WRONLY), b"x")

    assert as_user(everybodys.clear, write) == errno.EACCES
    assert as_user(everybodys.clear, write, groups=(CLUB,)) == 0
    assert as_user(everybodys.clear, write, groups=(*range(1000, 1040), CLUB)) == 0
    os.chown(path, ANN, ANN)
    assert as_user(everybodys.clear, lambda: os.chown("clubs", -1, CLUB)) == errno.EPERM
    assert as_user(everybodys.clear, lambda: os.chown("clubs", -1, CLUB), groups=(CLUB,)) == 0
    assert path.stat().st_gid == CLUB


@pytest.mark.parametrize("asked", [False, True])
def test_set_id_programs_and_devices_only_if_asked_for(box: Box, asked: bool) -> None:
    box.mount("-o", "allow_other,suid,dev" if asked else "allow_other")
    box.clear.chmod(0o755)
    program, null = box.clear / "id", box.clear / "null"
    program.write_bytes(Path("/usr/bin/id").read_bytes())
    program.chmod(0o4755)
    os.mknod(null, stat.S_IFCHR | 0o666, os.makedev(1, 3))

    def run() -> None:
        said = subprocess.run(["./id", "-u"], capture_output=True, check=True).stdout
        assert said == (b"0\n" if asked else b"65534\n"), said

    assert as_user(box.clear, run) == 0
    if asked:
        null.write_bytes(b"gone")
    else:
        with refused(errno.EACCES):
            null.write_bytes(b"gone")


def test_a_file_that_is_cut_loses_its_set_id_bits(everybodys: Box) -> None:
    path = everybodys.clear / "program"
    for mode, after in ((0o6777, 0o777), (0o1777, 0o1777)):
        path.write_text("text")
        path.chmod(mode)
        assert as_user(everybodys.clear, lambda: os.open("program", os.O_RDONLY | os.O_TRUNC)) == 0
        assert stat.S_IMODE(path.stat().st_mode) == after
    path.chmod(0o6777)
    path.write_text("root may")
    path.chmod(0o6777)
    os.close(os.open(path, os.O_WRONLY | os.O_TRUNC))
    assert stat.S_IMODE(path.stat().st_mode) == 0o6777


IN_A_PID_NAMESPACE = """
import ctypes, os, runpy, sys
assert not ctypes.CDLL(None).unshare(0x20000000)
pid = os.fork()
if pid:
    os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
sys.argv = sys.argv[2:]
runpy.run_module("cryptfs.daemon", run_name="__main__", alter_sys=True)
"""


def test_a_caller_that_the_daemon_cannot_see_is_in_no_group(box: Box) -> None:
    """The daemon is in a PID namespace of its own: there the callers' number is 0."""
    box.unlock()
    with box.daemon(box.agent_socket, "-o", "allow_other", python=("-c", IN_A_PID_NAMESPACE)):
        box.clear.chmod(0o777)
        path = box.clear / "file"
        path.write_text("content")
        path.chmod(0o2666)
        assert as_user(box.clear, lambda: os.close(os.open("file", os.O_WRONLY | os.O_TRUNC)), groups=(CLUB,)) == 0
        assert (path.read_text(), stat.S_IMODE(path.stat().st_mode)) == ("", 0o666)
        path.chmod(0o2666)
        os.chown(path, ANN, CLUB)

        def set_acl() -> None:
            acl = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", tag, 6, 0xFFFFFFFF) for tag in (1, 4, 32))
            os.setxattr("file", "system.posix_acl_access", acl)

        path.chmod(0o2666)
        assert as_user(box.clear, set_acl, groups=(CLUB,)) == 0
        assert stat.S_IMODE(path.stat().st_mode) == 0o666


def test_everything_is_the_forced_owners(box: Box) -> None:
    box.mount("-o", "allow_other")
    (box.clear / "roots").write_text("root's")
    box.remount("-o", "allow_other", "--force-owner", f"{ANN}:{BEN}")
    roots = box.clear / "roots"
    for path in (box.clear, roots):
        assert (path.stat().st_uid, path.stat().st_gid) == (ANN, BEN)
    assert as_user(box.clear, make_all) == 0
    assert as_user(box.clear, lambda: os.open("roots", os.O_WRONLY | os.O_TRUNC)) == 0
    assert as_user(box.clear, lambda: os.chmod("roots", 0o600)) == 0
    assert as_user(box.clear, lambda: os.listdir("."), BEN) == errno.EACCES
    os.chown(roots, ANN, BEN)
    with refused(errno.EPERM):
        os.chown(roots, 0, -1)
    with refused(errno.EPERM):
        os.chown(roots, -1, 0)
    assert {entry.stat(follow_symlinks=False).st_uid for entry in os.scandir(box.clear)} == {ANN}
    box.remount()
    assert (roots.stat().st_uid, (box.clear / "dir").stat().st_uid) == (0, 0)
    assert stat.S_IMODE(roots.stat().st_mode) == 0o600


@pytest.mark.parametrize("owner", ["", "1", "1:", "a:b", "-1:0", "1:2:3", "4294967295:0", "\u0663:1"])
def test_owners_that_make_no_sense(owner: str) -> None:
    with pytest.raises(UsageError, match="UID:GID"):
        check(MountOptions(force_owner=owner))
