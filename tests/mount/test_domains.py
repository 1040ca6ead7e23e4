"""Domains in a real mount: borders, locking one of them, removal, crashes, what a tampered one does."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import mmap
import os
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cryptfs.cli.mounts import wait_until
from cryptfs.types import DOMAIN_XATTR
from tests.mount.box import PASSPHRASE, Box, boxed
from tests.mount.syscalls import RENAME_EXCHANGE, refused, renameat2, reread
from tests.mount.test_users import as_user

pytestmark = pytest.mark.mount

SECRET = "another horse, another staple 8"
CONTENT = bytes(range(256)) * 1024
"""256 KiB."""


def create(box: Box, path: Path, *options: str, code: int = 0) -> str:
    """`domain create`; what it said on stderr."""
    env = {"CRYPTFS_PASSPHRASE": SECRET}
    return box.run("domain", "create", "--kdf-cost", "low", *options, path, env=env, code=code).stderr


def unlock(box: Box, path: Path, *, code: int = 0) -> None:
    box.run("unlock", path, env={"CRYPTFS_PASSPHRASE": SECRET}, code=code)


def domains(box: Box) -> list[dict[str, Any]]:
    out: list[dict[str, Any]] = json.loads(box.run("domain", "list", "--json", box.vault).stdout)
    return out


def states(box: Box) -> dict[str, str]:
    """By cipher directory's name."""
    return {Path(v["cipher_dir"]).name: v["state"] for v in json.loads(box.run("status", "--json").stdout)}


def cipher_dir(box: Box) -> Path:
    """Of the one domain."""
    [path] = (box.vault / "domains").iterdir()
    return path


@pytest.fixture
def pay(mounted: Box) -> Path:
    """A domain, unlocked, beside a file of the volume."""
    (mounted.clear / "plain").write_bytes(CONTENT)
    create(mounted, mounted.clear / "pay")
    return mounted.clear / "pay"


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


def test_lock_of_one_leaves_the_rest_and_listing_it(mounted: Box, pay: Path) -> None:
    inner, plain = pay / "inner", mounted.clear / "plain"
    inner.write_bytes(CONTENT)
    create(mounted, mounted.clear / "other")
    (mounted.clear / "other" / "file").write_bytes(CONTENT)
    pay.chmod(0o710)
    fd, outside = os.open(inner, os.O_RDWR), os.open(plain, os.O_RDWR)
    try:
        assert os.pread(fd, 4096, 0) == CONTENT[:4096]
        mounted.run("lock", pay)
        for call in (
            lambda: os.pread(fd, 4096, 0),
            lambda: os.listdir(pay),
            inner.stat,
            inner.read_bytes,
            (pay / "new").touch,
            (pay / "new").mkdir,
            lambda: os.rmdir(pay),
            lambda: os.pwrite(fd, b"x", 3),
        ):
            with refused(errno.ENOKEY):
                call()
        shown = subprocess.run(["ls", "-l", mounted.clear], capture_output=True, text=True, check=True)
        assert shown.stderr == ""
        assert "drwx--x---" in shown.stdout
        assert "pay" in os.listdir(mounted.clear)
        assert stat.S_IMODE(pay.stat().st_mode) == 0o710
        os.pwrite(outside, b"outside", 0)
        os.fsync(outside)
        assert plain.read_bytes()[:9] == b"outside" + CONTENT[7:9]
        assert (mounted.clear / "other" / "file").read_bytes() == CONTENT
        unlock(mounted, pay, code=0)
        assert os.pread(fd, 4096, 4096) == CONTENT[4096:8192]
        os.pwrite(fd, b"inside", 0)
        os.fsync(fd)
        assert reread(inner) == b"inside" + CONTENT[6:]
    finally:
        os.close(fd)
        os.close(outside)


def test_lock_drops_its_pages_out_of_the_kernel_and_nobody_elses(mounted: Box, pay: Path) -> None:
    inner, plain = pay / "inner", mounted.clear / "plain"
    inner.write_bytes(CONTENT)
    opened = [os.open(path, os.O_RDONLY) for path in (inner, plain)]
    maps = [mmap.mmap(fd, 0, access=mmap.ACCESS_COPY) for fd in opened]
    try:
        assert all(view[:] == CONTENT for view in maps)
        assert all(resident(view) == len(CONTENT) // mmap.PAGESIZE for view in maps)
        mounted.run("lock", pay)
        with refused(errno.ENOKEY):
            os.pread(opened[0], 10, 0)
        assert resident(maps[1]) == len(CONTENT) // mmap.PAGESIZE
        assert resident(maps[0]) == 0
    finally:
        for view in maps:
            view.close()
        for fd in opened:
            os.close(fd)


def resident(view: mmap.mmap) -> int:
    """Pages of a mapped file in the page cache (mincore(2))."""
    pages = (ctypes.c_ubyte * -(-len(view) // mmap.PAGESIZE))()
    start = (ctypes.c_char * len(view)).from_buffer(view)
    assert ctypes.CDLL(None).mincore(start, ctypes.c_size_t(len(view)), pages) == 0
    return sum(page & 1 for page in pages)


def test_lock_of_the_volume_locks_its_domains(mounted: Box, pay: Path) -> None:
    (pay / "inner").write_bytes(CONTENT)
    fd = os.open(pay / "inner", os.O_RDONLY)
    try:
        mounted.run("lock", mounted.clear)
        assert set(states(mounted).values()) == {"locked"}
        with refused(errno.ENOKEY):
            os.pread(fd, 10, 0)
        mounted.unlock()
        assert os.listdir(mounted.clear)
        with refused(errno.ENOKEY):
            os.listdir(pay)
        unlock(mounted, pay)
        assert os.pread(fd, 10, 0) == CONTENT[:10]
    finally:
        os.close(fd)
    mounted.umount()
    assert states(mounted) == {}, "an unmounted volume's domains are locked"


def test_a_domain_that_was_never_entered_is_locked_with_its_volume(mounted: Box, pay: Path) -> None:
    mounted.remount()
    unlock(mounted, pay)
    assert states(mounted)[cipher_dir(mounted).name] == "unlocked"
    mounted.umount()
    assert states(mounted) == {}
    assert pay.parent == mounted.clear


def test_keep_unlocked_keeps_the_domains_too(mounted: Box, pay: Path) -> None:
    (pay / "inner").write_bytes(CONTENT)
    mounted.run("umount", "--keep-unlocked", mounted.clear)
    assert set(states(mounted).values()) == {"unlocked"}
    mounted.mount()
    assert (pay / "inner").read_bytes() == CONTENT


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


def test_a_wrong_passphrase_opens_nothing(mounted: Box, pay: Path) -> None:
    (pay / "inner").write_bytes(CONTENT)
    mounted.run("lock", pay)
    mounted.run("unlock", pay, code=13)
    with refused(errno.ENOKEY):
        (pay / "inner").read_bytes()
    unlock(mounted, pay)
    assert (pay / "inner").read_bytes() == CONTENT
    assert SECRET not in mounted.log()


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


# crashes ---------------------------------------------------------------------------------------------------------


def test_a_killed_daemon_loses_nothing_that_was_synced_in_a_domain(mounted: Box, pay: Path) -> None:
    inner = pay / "inner"
    inner.write_bytes(CONTENT)
    fd = os.open(inner, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
    mounted.kill_daemon()
    mounted.mount()
    unlock(mounted, pay)
    assert reread(inner) == CONTENT
    (pay / "after").write_bytes(b"after")
    mounted.umount()
    unlock(mounted, cipher_dir(mounted))
    said = mounted.run("check", "--deep", mounted.vault).stdout
    assert "domain /pay: clean" in said, said


def test_a_killed_agent_leaves_domains_as_it_leaves_the_volume(box: Box) -> None:
    box.mount("--max-age", "2")
    pay = box.clear / "pay"
    create(box, pay)
    inner = pay / "inner"
    inner.write_bytes(CONTENT)
    with inner.open("rb") as stream:
        box.kill_agent()

        def is_locked() -> bool:
            try:
                os.pread(stream.fileno(), 10, 0)
            except OSError as error:
                return error.errno == errno.ENOKEY
            return False

        assert wait_until(is_locked, 15)
        box.unlock()
        assert os.listdir(box.clear) == ["pay"]
        assert is_locked()
        unlock(box, pay)
        assert os.pread(stream.fileno(), 10, 0) == CONTENT[:10]


def test_creation_that_a_crash_cut_after_the_place_named_it_is_whole(mounted: Box, pay: Path) -> None:
    (pay / "inner").write_bytes(CONTENT)
    mounted.umount()
    usual = cipher_dir(mounted)
    usual.rename(usual.with_name(usual.name + ".aside"))
    mounted.mount()
    assert len(domains(mounted)) == 1
    unlock(mounted, pay)
    assert (pay / "inner").read_bytes() == CONTENT
    assert usual.is_dir()


def test_creation_that_a_crash_cut_before_that_leaves_an_empty_directory(mounted: Box, pay: Path) -> None:
    """What lies aside and no place names is removed by a repair, unless there is anything in it."""
    (pay / "inner").write_bytes(CONTENT)
    create(mounted, mounted.clear / "empty")
    mounted.umount()
    for path in (mounted.vault / "domains").iterdir():
        copy = path.with_name(os.urandom(16).hex() + ".aside")
        shutil.copytree(path, copy, symlinks=True)
    (mounted.vault / "domains" / (os.urandom(16).hex() + ".aside")).mkdir()
    (mounted.vault / "domains" / "stranger").mkdir()
    report = json.loads(mounted.run("check", "--repair", "--json", mounted.vault, code=24).stdout)
    found = sorted((f["severity"], f["what"], f["action"]) for f in report["findings"])
    assert found == [
        ("leftover", "unfinished", "removed"),
        ("leftover", "unfinished", "removed"),
        ("notice", "domain", None),
        ("notice", "foreign", None),
    ]
    assert len(os.listdir(mounted.vault / "domains")) == 4
    assert sorted(row["path"] for row in domains(mounted) if row["path"]) == ["/empty", "/pay"]


def begun(vault: Path) -> tuple[int, ...]:
    """How far the making of domains is, by what lies in `domains/`: parts of those aside, and how many are not."""
    parts = whole = 0
    with contextlib.suppress(FileNotFoundError):
        for path in (vault / "domains").iterdir():
            if path.suffix:
                parts += 1 + sum(
                    (path / name).exists() for name in ("tree", "sidecars/ff", "tree/.dir", "state", "volume")
                )
            else:
                whole += 1
    return parts, whole


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["daemon", "command"])
def test_a_kill_at_any_moment_of_creation_leaves_no_domain_or_a_whole_one(box: Box, victim: str) -> None:
    box.mount()
    words = [sys.executable, "-m", "cryptfs", "domain", "create", "--kdf-cost", "low"]
    env = {**box.environment, "CRYPTFS_PASSPHRASE": SECRET}
    outcomes: list[bool] = []
    # So many steps seen in `domains/`, and so long after the last of them.
    moments = [(1, 0.0), (4, 0.0), (6, 0.0), (6, 0.004), (6, 0.02), (6, 0.1)]
    for at, (steps, delay_s) in enumerate(moments):
        path = box.clear / f"pay{at}"
        path.mkdir()
        before = begun(box.vault)
        with subprocess.Popen(
            [*words, path], env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as command:
            while command.poll() is None:
                now = begun(box.vault)
                if now[1] > before[1] or now[0] - before[0] >= steps:
                    break
            time.sleep(delay_s)
            if victim == "command":
                command.kill()
            else:
                box.kill_daemon()
                box.run("umount", box.clear)
            command.wait(30)
        if victim == "daemon":
            box.mount()
        row = next((row for row in domains(box) if row["path"] == f"/{path.name}"), None)
        outcomes.append(row is not None)
        if row is not None:
            unlock(box, path)
            assert os.listdir(path) == []
        (path / "file").write_bytes(CONTENT)
        assert reread(path / "file") == CONTENT
    assert set(outcomes) == {False, True} or victim == "daemon"
    box.umount()
    report = json.loads(box.run("check", "--repair", "--json", box.vault, code=None).stdout)
    assert {f["action"] for f in report["findings"] if f["severity"] == "leftover"} <= {"removed"}
    assert not [f for f in report["findings"] if f["severity"] == "damage"]
    assert len(os.listdir(box.vault / "domains")) == sum(outcomes)
    box.mount()
    for at, is_domain in enumerate(outcomes):
        if is_domain:
            unlock(box, box.clear / f"pay{at}")
        assert (box.clear / f"pay{at}" / "file").read_bytes() == CONTENT


# tampering -------------------------------------------------------------------------------------------------------


def test_a_domain_that_is_gone_or_exchanged_is_damage(mounted: Box, pay: Path) -> None:
    other = mounted.clear / "other"
    create(mounted, other)
    (pay / "inner").write_bytes(CONTENT)
    ids = {row["path"]: row["volume_id"] for row in domains(mounted)}
    mounted.umount()
    own, others = (mounted.vault / "domains" / ids[path] for path in ("/pay", "/other"))
    aside = mounted.root / "aside"
    own.rename(aside)
    others.rename(own)
    mounted.mount()
    unlock(mounted, own)
    for path in (pay, other):
        since = len(mounted.log())
        with refused(errno.EIO):
            os.listdir(path)
        assert mounted.logged(f"inode {path.stat().st_ino}:", "domain", since=since)
        assert path.name in os.listdir(mounted.clear)
    unlock(mounted, pay, code=11)
    mounted.umount()
    report = json.loads(mounted.run("check", "--json", mounted.vault, code=21).stdout)
    assert {f["path"]: f["what"] for f in report["findings"]} == {"/other": "domain", "/pay": "domain"}
    own.rename(others)
    aside.rename(own)
    mounted.mount()
    unlock(mounted, pay)
    assert (pay / "inner").read_bytes() == CONTENT


def test_an_older_copy_of_a_domain_is_refused(mounted: Box, pay: Path) -> None:
    (pay / "inner").write_bytes(b"old")
    mounted.umount()
    copy = mounted.root / "copy"
    shutil.copytree(cipher_dir(mounted), copy, symlinks=True)
    mounted.mount()
    unlock(mounted, pay)
    (pay / "inner").write_bytes(b"new")
    mounted.umount()
    name = cipher_dir(mounted)
    shutil.rmtree(name)
    copy.rename(name)
    mounted.mount()
    unlock(mounted, pay)
    with refused(errno.EIO):
        os.listdir(pay)
    assert mounted.logged("older")
    assert (mounted.clear / "plain").read_bytes() == CONTENT


def test_the_place_of_a_domain_that_is_lost_can_be_removed(mounted: Box, pay: Path) -> None:
    mounted.umount()
    shutil.rmtree(cipher_dir(mounted))
    mounted.mount()
    with refused(errno.EIO):
        os.listdir(pay)
    os.rmdir(pay)
    assert os.listdir(mounted.clear) == ["plain"]
    mounted.umount()
    mounted.run("check", mounted.vault)


def test_a_domain_can_be_mounted_by_itself_and_has_none_in_it(mounted: Box, pay: Path) -> None:
    (pay / "inner").write_bytes(CONTENT)
    mounted.umount()
    alone = mounted.root / "alone"
    alone.mkdir()
    mounted.run("mount", cipher_dir(mounted), alone, env={"CRYPTFS_PASSPHRASE": SECRET})
    try:
        assert (alone / "inner").read_bytes() == CONTENT
        assert "do not nest" in create(mounted, alone / "pay", code=2)
        mounted.mount()
        with refused(errno.EBUSY):
            os.listdir(pay)
    finally:
        mounted.run("umount", alone)
    unlock(mounted, pay)
    assert (pay / "inner").read_bytes() == CONTENT


# what other verbs make of them -----------------------------------------------------------------------------------


def test_check_and_export_go_into_unlocked_domains_and_name_the_others(mounted: Box, pay: Path) -> None:
    (pay / "sub").mkdir()
    (pay / "sub" / "inner").write_bytes(CONTENT)
    create(mounted, mounted.clear / "dark")
    (mounted.clear / "dark" / "inner").write_bytes(CONTENT)
    for path in (pay / "sub" / "inner", mounted.clear / "plain"):
        reread(path)
    mounted.run("lock", mounted.clear / "dark")
    report = json.loads(mounted.run("check", "--deep", "--json", mounted.vault).stdout)
    assert {row["path"]: row["report"] and row["report"]["files"] for row in report["domains"]} == {
        "/pay": 1,
        "/dark": None,
    }
    out = mounted.root / "out"
    said = mounted.run("export", mounted.vault, "/", out, code=17).stderr
    assert "/dark" in said
    assert (out / "pay" / "sub" / "inner").read_bytes() == CONTENT
    assert (out / "plain").read_bytes() == CONTENT
    assert os.listdir(out / "dark") == []
    mounted.run("export", mounted.vault, "/pay/sub/inner", mounted.root / "one")
    assert (mounted.root / "one").read_bytes() == CONTENT
    mounted.run("export", mounted.vault, "/dark/inner", mounted.root / "two", code=17)
    mounted.run("export", pay, "/sub", mounted.root / "three")
    assert (mounted.root / "three" / "inner").read_bytes() == CONTENT
    assert json.loads(mounted.run("info", "--json", pay).stdout)["volume_id"] == mounted_id(pay)
    mounted.run("audit", "verify", pay)
    sizes = [
        int(subprocess.run(["du", "-s", p], capture_output=True, check=True).stdout.split()[0])
        for p in (pay, out / "pay")
    ]
    assert sizes[0] >= 256
    assert sizes[1] >= 256


def mounted_id(path: Path) -> str:
    return os.getxattr(path, DOMAIN_XATTR).decode()


def test_a_copy_of_the_cipher_directory_has_its_domains(mounted: Box, short_tmp: Path) -> None:
    """On another machine, too, unless it needs a shred secret that this one keeps."""
    pay, kept = mounted.clear / "pay", mounted.clear / "kept"
    create(mounted, pay, "--no-shred-secret")
    create(mounted, kept)
    (mounted.clear / "plain").write_bytes(CONTENT)
    (pay / "inner").write_bytes(CONTENT)
    mounted.umount()
    with boxed(short_tmp, mounted.vault) as copy:
        copy.mount()
        unlock(copy, copy.clear / "pay")
        assert (copy.clear / "pay" / "inner").read_bytes() == CONTENT
        assert (copy.clear / "plain").read_bytes() == CONTENT
        ids = {row["path"]: row["volume_id"] for row in domains(copy)}
        said = copy.run("unlock", copy.vault / "domains" / ids["/kept"], env={"CRYPTFS_PASSPHRASE": SECRET}, code=None)
        assert said.returncode
        assert "shred secret" in said.stderr


def test_what_a_shredded_domain_leaves_can_go(mounted: Box, pay: Path) -> None:
    (pay / "inner").write_bytes(CONTENT)
    where = cipher_dir(mounted)
    mounted.run("shred", "--yes", pay)
    mounted.remount()
    with refused(errno.EIO):
        os.listdir(pay)
    with refused(errno.EIO):
        os.rmdir(pay)
    shutil.rmtree(where)
    os.rmdir(pay)
    assert os.listdir(mounted.clear) == ["plain"]


def test_other_secrets_than_a_passphrase(mounted: Box) -> None:
    pay, keyfile = mounted.clear / "pay", mounted.root / "key"

    def run(*words: str | Path) -> None:
        """Without a passphrase in the environment."""
        subprocess.run([sys.executable, "-m", "cryptfs", *words], env=mounted.environment, check=True)

    run("domain", "create", "--new-keyfile", keyfile, pay)
    (pay / "inner").write_bytes(CONTENT)
    mounted.run("lock", pay)
    run("unlock", "--keyfile", keyfile, pay)
    assert (pay / "inner").read_bytes() == CONTENT
    protectors = json.loads(mounted.run("protector", "list", "--json", pay).stdout)
    assert [protector["kind"] for protector in protectors] == ["keyfile"]
    info = json.loads(mounted.run("info", "--json", mounted.vault).stdout)
    assert (info["features"], len(info["domains"])) == (["domains"], 1)
    mounted.run("policy", pay, "--max-age", "30s")
    assert (pay / "inner").read_bytes() == CONTENT


def test_a_reader_written_from_the_format_alone_names_domains(mounted: Box) -> None:
    pay = mounted.clear / "pay"
    create(mounted, pay, "--no-shred-secret")
    (mounted.clear / "plain").write_bytes(CONTENT)
    (pay / "inner").write_bytes(CONTENT)
    mounted.umount()
    script = Path(__file__).parents[2] / "scripts" / "reference_decrypt.py"
    for vault, secret, out, names in (
        (mounted.vault, PASSPHRASE, "all", ["pay", "plain"]),
        (cipher_dir(mounted), SECRET, "own", ["inner"]),
    ):
        passfile = mounted.root / f"{out}.pass"
        passfile.write_text(secret)
        words: list[str | Path] = [sys.executable, script, vault, mounted.root / out, "--passfile", passfile]
        ended = subprocess.run(words, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stderr
        assert ("left out: /pay (domain " in ended.stderr) == (out == "all")
        assert sorted(os.listdir(mounted.root / out)) == names


def test_rotation_of_a_domain_and_of_its_volume_do_not_meet(mounted: Box, pay: Path) -> None:
    (pay / "inner").write_bytes(CONTENT)
    mounted.run("rotate", "--kek", "--destroy-old", pay, env={"CRYPTFS_PASSPHRASE": SECRET})
    versions = [json.loads(mounted.run("info", "--json", path).stdout)["kek_version"] for path in (pay, mounted.vault)]
    assert versions == [2, 1]
    mounted.run("rotate", "--kek", "--destroy-old", mounted.vault)
    versions = [json.loads(mounted.run("info", "--json", path).stdout)["kek_version"] for path in (pay, mounted.vault)]
    assert versions == [2, 2]
    assert reread(pay / "inner") == CONTENT
    mounted.remount()
    unlock(mounted, pay)
    assert reread(pay / "inner") == CONTENT
    assert reread(mounted.clear / "plain") == CONTENT
    said = mounted.run("check", "--deep", mounted.vault).stdout
    assert "domain /pay: clean" in said, said
