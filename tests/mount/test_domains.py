"""Domains in a real mount: borders, attributes, moving and removing them, what cannot become one."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from cryptfs.cli.mounts import wait_until
from cryptfs.types import DOMAIN_XATTR
from tests.mount.box import Box, boxed
from tests.mount.domains import CONTENT, cipher_dir, create, domains, unlock
from tests.mount.syscalls import RENAME_EXCHANGE, getdents, refused, renameat2, reread
from tests.mount.test_users import as_user

pytestmark = pytest.mark.mount


def test_a_domain_is_a_directory_like_any_other(mounted: Box, pay: Path) -> None:
    (pay / "file").write_bytes(CONTENT)
    (pay / "sub" / "deep").mkdir(parents=True)
    (pay / "sub" / "link").symlink_to("../file")
    os.link(pay / "file", pay / "sub" / "again")
    os.rename(pay / "sub", pay / "moved")
    assert sorted(os.listdir(pay)) == ["file", "moved"]
    assert reread(pay / "moved" / "link") == CONTENT
    assert (pay / "file").stat().st_nlink == 2
    assert pay.stat().st_dev == mounted.clear.stat().st_dev
    inode = pay.stat().st_ino
    dots = {entry.name: entry.ino for entry in getdents(pay)}
    assert (dots["."], dots[".."]) == (inode, mounted.clear.stat().st_ino)
    by_name = {entry.name: entry.inode() for entry in os.scandir(mounted.clear)}
    assert by_name["pay"] == inode
    assert os.stat(pay / "moved" / "..").st_ino == inode
    assert dict(names_and_kinds(pay)) == {"file": False, "moved": True}
    assert os.statvfs(pay).f_blocks == os.statvfs(mounted.clear).f_blocks
    mounted.remount()
    assert pay.stat().st_ino == inode, "its number is the same, locked or not"
    unlock(mounted, pay)
    assert reread(pay / "moved" / "again") == CONTENT
    assert pay.stat().st_ino == inode


def names_and_kinds(path: Path) -> list[tuple[str, bool]]:
    with os.scandir(path) as entries:
        return [(entry.name, entry.is_dir()) for entry in entries]


def test_nothing_crosses_the_border_but_copies(mounted: Box, pay: Path) -> None:
    plain, inner = mounted.clear / "plain", pay / "inner"
    inner.write_bytes(CONTENT[:5000])
    (pay / "dir").mkdir()
    calls: tuple[Callable[[], object], ...] = (
        lambda: os.rename(inner, mounted.clear / "inner"),
        lambda: os.rename(plain, pay / "plain"),
        lambda: os.rename(pay / "dir", mounted.clear / "dir"),
        lambda: os.link(plain, pay / "plain"),
        lambda: os.link(inner, mounted.clear / "inner"),
        lambda: renameat2(inner, plain, RENAME_EXCHANGE),
    )
    for call in calls:
        with refused(errno.EXDEV):
            call()
    subprocess.run(["mv", inner, mounted.clear], check=True)
    subprocess.run(["mv", plain, pay / "dir"], check=True)
    assert not inner.exists()
    assert reread(mounted.clear / "inner") == CONTENT[:5000]
    assert reread(pay / "dir" / "plain") == CONTENT
    create(mounted, mounted.clear / "other")
    with refused(errno.EXDEV):
        os.rename(pay / "dir", mounted.clear / "other" / "dir")


def test_its_attributes_are_those_of_its_root_and_are_seen_when_it_is_locked(mounted: Box) -> None:
    pay = mounted.clear / "pay"
    pay.mkdir(mode=0o750)
    os.setxattr(pay, "user.colour", b"green")
    subprocess.run(["setfacl", "-d", "-m", "u:65534:rwx", pay], check=True)
    create(mounted, pay)
    assert stat.S_IMODE(pay.stat().st_mode) == 0o750
    assert os.getxattr(pay, "user.colour") == b"green"
    (pay / "inner").touch()
    assert b"65534" in subprocess.run(["getfacl", "-n", pay / "inner"], capture_output=True, check=True).stdout
    os.utime(pay, ns=(10**18, 2 * 10**18))
    pay.chmod(0o2775)
    os.setxattr(pay, "user.size", b"9")
    before = pay.stat()
    mounted.run("lock", pay)
    assert pay.stat() == before
    with refused(errno.EOPNOTSUPP):
        os.getxattr(pay, "user.size")
    with refused(errno.ENOKEY):
        os.setxattr(pay, "user.size", b"10")
    with refused(errno.ENOKEY):
        pay.chmod(0o700)
    mounted.remount()
    again = pay.stat()
    assert (again.st_mode, again.st_mtime_ns) == (before.st_mode, 2 * 10**18)
    unlock(mounted, pay)
    assert os.getxattr(pay, "user.size") == b"9"
    assert "domain" not in str(os.listxattr(pay))
    assert len(os.getxattr(pay, DOMAIN_XATTR)) == 32


def test_moving_and_removing_it(mounted: Box, pay: Path) -> None:
    elsewhere = mounted.clear / "dir" / "salaries"
    elsewhere.parent.mkdir()
    (pay / "inner").write_bytes(CONTENT)
    fd = os.open(pay / "inner", os.O_RDONLY)
    os.rename(pay, elsewhere)
    os.rename(elsewhere.parent, mounted.clear / "moved")
    elsewhere = mounted.clear / "moved" / "salaries"
    assert os.pread(fd, 10, 0) == CONTENT[:10]
    os.close(fd)
    assert [row["path"] for row in domains(mounted)] == ["/moved/salaries"]
    (mounted.clear / "empty").mkdir()
    with refused(errno.EBUSY):
        os.rename(mounted.clear / "empty", elsewhere)
    with refused(errno.ENOTEMPTY):
        os.rmdir(elsewhere)
    with refused(errno.ENOTEMPTY):
        os.rmdir(elsewhere.parent)
    mounted.remount()
    with refused(errno.ENOKEY):
        os.rmdir(elsewhere)
    unlock(mounted, elsewhere)
    (elsewhere / "inner").unlink()
    here = os.open(elsewhere, os.O_RDONLY)
    os.rmdir(elsewhere)
    with refused(errno.ENOENT):
        os.open("new", os.O_CREAT | os.O_WRONLY, dir_fd=here)
    assert os.listdir(here) == []
    os.close(here)
    assert not elsewhere.exists()
    assert wait_until(lambda: not os.listdir(mounted.vault / "domains"), 10)
    elsewhere.mkdir()
    (elsewhere / "file").write_bytes(b"of the volume itself")
    assert domains(mounted) == []
    mounted.umount()
    assert "clean: 4 directories" in mounted.run("check", "--deep", mounted.vault).stdout


def test_a_removed_domain_stays_for_who_has_a_file_of_it_open(mounted: Box, pay: Path) -> None:
    (pay / "inner").write_bytes(CONTENT)
    fd = os.open(pay / "inner", os.O_RDWR)
    (pay / "inner").unlink()
    os.rmdir(pay)
    os.pwrite(fd, b"still", 0)
    os.fsync(fd)
    assert os.pread(fd, 10, 0) == b"still" + CONTENT[5:10]
    os.close(fd)
    mounted.umount()
    assert os.listdir(mounted.vault / "domains") == []


def test_what_cannot_become_a_domain(mounted: Box, pay: Path) -> None:
    clear = mounted.clear
    (clear / "full").mkdir()
    (clear / "full" / "file").touch()
    before = sorted(os.listdir(mounted.vault / "domains"))
    assert "not empty" in create(mounted, clear / "full", code=2)
    assert "no directory" in create(mounted, clear / "plain", code=2)
    assert "domain already" in create(mounted, pay, code=2)
    assert "do not nest" in create(mounted, pay / "inner", code=2)
    assert "no directory in a mounted volume" in create(mounted, clear, code=2)
    assert "no directory in a mounted volume" in create(mounted, mounted.root / "beside", code=2)
    assert "No such file" in create(mounted, clear / "absent" / "pay", code=2)
    own = cipher_dir(mounted).name.encode()
    (clear / "new").mkdir()
    for value, code in [(b"no id", errno.EINVAL), (os.urandom(16).hex().encode(), errno.ENOENT), (own, errno.EEXIST)]:
        with refused(code):
            os.setxattr(clear / "new", DOMAIN_XATTR, value)
    with refused(errno.EINVAL):
        os.setxattr(pay, DOMAIN_XATTR, b"x")
    assert sorted(os.listdir(mounted.vault / "domains")) == before
    assert not (pay / "inner").exists()
    mounted.run("lock", mounted.clear)
    create(mounted, clear / "later", code=17)
    mounted.unlock()
    assert not (clear / "later").exists()
    mounted.remount("--read-only")
    assert "read-only" in create(mounted, clear / "later", code=2)
    with refused(errno.EROFS):
        os.setxattr(clear / "new", DOMAIN_XATTR, b"0" * 32)


@pytest.mark.usefixtures("root")
def test_only_the_volumes_user_makes_domains(template: Path, short_tmp: Path) -> None:
    with boxed(short_tmp, template) as box:
        box.mount("-o", "allow_other")
        box.clear.chmod(0o777)
        create(box, box.clear / "pay")
        assert as_user(box.clear, lambda: os.mkdir("own")) == 0
        name = os.urandom(16).hex()
        shutil.copytree(cipher_dir(box), box.vault / "domains" / f"{name}.aside")
        assert as_user(box.clear, lambda: os.setxattr("own", DOMAIN_XATTR, name.encode())) == errno.EPERM
        (box.clear / "pay").chmod(0o700)
        assert as_user(box.clear, lambda: os.listdir("pay")) == errno.EACCES
        box.remount("-o", "allow_other")
        unlock(box, box.clear / "pay")
        assert as_user(box.clear, lambda: os.listdir("pay")) == errno.EACCES, "as its place says before it is opened"
