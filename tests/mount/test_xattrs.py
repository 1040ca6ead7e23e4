"""Extended attributes, capabilities and POSIX ACLs through the kernel, beside the same on the directory below."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.box import Box
from tests.mount.syscalls import refused

pytestmark = [pytest.mark.mount, pytest.mark.usefixtures("fuse")]

JOE, ANN = 12001, 12002


def needs(*programs: str) -> None:
    for program in programs:
        if shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin") is None:
            pytest.skip(f"needs {program}")


def said(*command: str | Path, cwd: Path | None = None, uid: int | None = None) -> str:
    """What a command wrote, both streams, and its exit code."""
    words = [str(word) for word in command]
    if uid is not None:
        words = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", *words]
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}
    ended = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=60)
    return f"{ended.stdout}{ended.stderr}{ended.returncode}"


@pytest.fixture
def open_box(box: Box, root: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    """Mounted for every user, with a way to it that every user may go."""
    ways = [path for path in box.clear.parents if path != Path("/")]
    before = [(path, path.stat().st_mode & 0o7777) for path in ways]
    for path, mode in before:
        if not mode & 1:
            path.chmod(mode | 1)
    box.mount("-o", "allow_other")
    box.clear.chmod(0o755)
    yield box
    for path, mode in before:
        path.chmod(mode)


@pytest.fixture
def beside(tmp_path: Path) -> Path:
    """A directory on the file system below, or a skip if that has no ACLs."""
    path = tmp_path / "beside"
    path.mkdir()
    try:
        os.setxattr(path, "user.x", b"x")
        os.removexattr(path, "user.x")
    except OSError as error:
        pytest.skip(f"the file system below has no xattrs: {error.strerror}")
    return path


# xattrs ----------------------------------------------------------------------------------------------------------


def test_flags_sizes_and_errors(here: Path) -> None:
    file = here / "f"
    file.write_bytes(b"content")
    os.setxattr(file, "user.a", b"1", os.XATTR_CREATE)
    with refused(errno.EEXIST):
        os.setxattr(file, "user.a", b"2", os.XATTR_CREATE)
    with refused(errno.ENODATA):
        os.setxattr(file, "user.b", b"2", os.XATTR_REPLACE)
    os.setxattr(file, "user.a", b"2", os.XATTR_REPLACE)
    os.setxattr(file, "user.empty", b"")
    assert os.getxattr(file, "user.a") == b"2"
    assert os.getxattr(file, "user.empty") == b""
    assert sorted(os.listxattr(file)) == ["user.a", "user.empty"]
    for call in (lambda: os.getxattr(file, "user.c"), lambda: os.removexattr(file, "user.c")):
        with refused(errno.ENODATA):
            call()
    with refused(errno.EOPNOTSUPP):
        os.setxattr(file, "nonsense.a", b"")
    with refused(errno.ERANGE):
        os.setxattr(file, "user." + "n" * 251, b"")
    with refused(errno.E2BIG):
        os.setxattr(file, "user.big", bytes(65537))
    os.setxattr(file, "user." + "n" * 250, bytes(65536))
    assert os.getxattr(file, "user." + "n" * 250) == bytes(65536)
    os.symlink("f", here / "link")
    os.mkfifo(here / "fifo")
    for path in (here / "link", here / "fifo"):
        with refused(errno.EPERM):
            os.setxattr(path, "user.a", b"", follow_symlinks=False)
    fd = os.open(file, os.O_RDWR)
    file.unlink()
    os.setxattr(fd, "user.a", b"still")
    assert os.getxattr(fd, "user.a") == b"still"
    os.close(fd)


@pytest.mark.usefixtures("root")
def test_they_survive_a_remount_on_everything(mounted: Box) -> None:
    top = mounted.clear
    (top / "file").write_bytes(b"content")
    (top / "empty").touch()
    (top / "dir").mkdir()
    os.symlink("file", top / "symlink")
    os.mkfifo(top / "fifo")
    os.mknod(top / "null", 0o20600, os.makedev(1, 3))
    os.link(top / "file", top / "dir" / "hard")
    names = ("file", "empty", "dir", "symlink", "fifo", "null", "")
    for name in names:
        os.setxattr(top / name, "trusted.t", name.encode(), follow_symlinks=False)
    os.setxattr(top / "file", "user.u", b"u")
    mounted.remount()
    for name in names:
        assert os.getxattr(top / name, "trusted.t", follow_symlinks=False) == name.encode()
    assert os.getxattr(top / "dir" / "hard", "user.u") == b"u"
    assert (top / "file").read_bytes() == b"content"
    out = mounted.root / "out"
    mounted.umount()
    mounted.run("check", "--deep", mounted.vault)
    mounted.run("export", mounted.vault, "/", out)
    for name in names:
        assert os.getxattr(out / name, "trusted.t", follow_symlinks=False) == name.encode(), name


@pytest.mark.usefixtures("root")
def test_capabilities_survive_a_remount_and_not_a_write(mounted: Box, beside: Path) -> None:
    needs("setcap", "getcap")
    outcomes = []
    for top in (mounted.clear, beside):
        said_here = []
        for name in ("kept", "written", "given", "cut", "opened"):
            (top / name).write_bytes(b"#!/bin/true\n")
            said_here.append(said("setcap", "cap_net_raw+ep", name, cwd=top))
        if top == mounted.clear:
            mounted.remount()
        with (top / "written").open("r+b") as stream:
            stream.write(b"x")
        os.chown(top / "given", JOE, JOE)
        os.truncate(top / "cut", 3)
        (top / "opened").open("wb").close()
        said_here += [said("getcap", name, cwd=top) for name in ("kept", "written", "given", "cut", "opened")]
        outcomes.append(said_here)
    assert outcomes[0] == outcomes[1]
    assert "cap_net_raw" in outcomes[0][5]
    assert "cap_net_raw" not in "".join(outcomes[0][6:])


# ACLs ------------------------------------------------------------------------------------------------------------

SEQUENCE = """
mkdir d; chmod 770 d; setfacl -m u:12001:rwx d; getfacl -n d; stat -c %a d
touch f; chmod 640 f; setfacl -m u:12001:r,g:12002:rw f; getfacl -n f; stat -c %a f; getfattr -m- -d -e hex f
chmod 600 f; getfacl -n f; chmod 666 f; getfacl -n f; setfacl -x u:12001 f; getfacl -n f
setfacl -b f; getfacl -n f; stat -c %a f; getfattr -m- -d f
setfacl -d -m u:12001:rwx,g::rx d; getfacl -n d
umask 0; touch d/new; getfacl -n d/new; mkdir d/sub; getfacl -n d/sub; mkfifo d/fifo; getfacl -n d/fifo
ln -s x d/link; umask 077; mkdir d/deep; cd d; umask 0; touch sub/below; getfacl -n sub/below; cd ..
setfacl -k d; getfacl -n d; touch d/plain; getfacl -n d/plain; setfacl -d -m u:12001:rwx f
mv d/new moved; getfacl -n moved; ln moved linked; setfacl -m u:12002:- linked; getfacl -n moved
mkdir s; chgrp 12002 s; chmod 2775 s; setfacl -m u:12001:rwx s; stat -c %a s; setfacl -m m::r s; stat -c %a s
cp -a moved copied; getfacl -n copied; setfacl -m u:12001:rwx fifo none
"""


@pytest.mark.usefixtures("root")
def test_a_sequence_of_setfacl_ends_as_below(mounted: Box, beside: Path) -> None:
    needs("setfacl", "getfacl", "getfattr")
    (mounted.clear / "t").mkdir()
    (beside / "t").mkdir()
    here, there = (said("sh", "-c", f"umask 022; {SEQUENCE}", cwd=top / "t") for top in (mounted.clear, beside))
    assert here == there
    assert "user:12001:rwx" in here
    shown = said("getfacl", "-nR", ".", cwd=mounted.clear / "t")
    mounted.remount()
    assert said("getfacl", "-nR", ".", cwd=mounted.clear / "t") == shown


def test_the_kernel_enforces_them(open_box: Box, beside: Path) -> None:
    needs("setfacl", "setpriv")
    outcomes = []
    for path in beside.parents:
        with contextlib.suppress(OSError):
            if path != Path("/") and not path.stat().st_mode & 1:
                path.chmod(path.stat().st_mode | 1)
    beside.chmod(0o755)
    for top in (open_box.clear, beside):
        outcome = [said("sh", "-c", "echo secret >f; chmod 600 f; setfacl -m u:12001:r f; "
                        "mkdir d; chmod 700 d; setfacl -m u:12001:rwx d; mkdir s; chgrp 12002 s; chmod 2775 s; "
                        "chown 12001 s; chown 12001:12002 s; chmod 2775 s", cwd=top)]  # fmt: skip
        outcome += [said("cat", "f", cwd=top, uid=uid) for uid in (JOE, ANN)]
        outcome += [said("sh", "-c", "echo x >>f", cwd=top, uid=JOE)]
        outcome += [said("sh", "-c", "touch d/x && ls d", cwd=top, uid=uid) for uid in (JOE, ANN)]
        outcome += [said("setfacl", "-m", "u:12002:r", "f", cwd=top, uid=JOE)]
        # Its owner is not in its group: setting an ACL takes the setgid bit.
        outcome += [said("sh", "-c", "setfacl -m u:12002:rwx s; stat -c %a s", cwd=top, uid=JOE)]
        outcome += [said("sh", "-c", "chmod 0 f; setfacl -m m::rwx f", cwd=top), said("cat", "f", cwd=top, uid=JOE)]
        outcome += [said("setfacl", "-b", "f", cwd=top), said("cat", "f", cwd=top, uid=JOE)]
        outcome += [said("getfattr", "-m-", "f", cwd=top, uid=JOE)]
        outcome += [said("sh", "-c", "setfattr -n trusted.t -v x f; setfattr -n user.u -v x s", cwd=top)]
        outcome += [said("getfattr", "-m-", "-d", "s", cwd=top, uid=uid) for uid in (JOE, ANN)]
        outcome += [said("setfattr", "-n", "user.u", "-v", "y", "s", cwd=top, uid=ANN)]
        outcomes.append(outcome)
    assert outcomes[0] == outcomes[1]


@pytest.mark.usefixtures("root")
def test_rsync_there_and_back_finds_no_difference(mounted: Box, beside: Path) -> None:
    needs("rsync", "setfacl", "setcap")
    made = said("sh", "-c", "mkdir a a/b; echo 1 >a/f; ln a/f a/b/hard; ln -s f a/link; mkfifo a/fifo; "
                "setfattr -n user.u -v 1 a/f; setfattr -n user.d -v 2 a/b; setfacl -m u:12001:rw a/f; "
                "setfacl -d -m u:12001:rx a/b; setfacl -m u:12001:rw a/fifo; cp /bin/true a/prog; "
                "setcap cap_net_raw+ep a/prog; setfattr -h -n trusted.l -v 3 a/link", cwd=beside)  # fmt: skip
    assert made == "0"
    assert said("rsync", "-aHAX", f"{beside}/a/", f"{mounted.clear}/a/") == "0"
    mounted.remount()
    assert said("rsync", "-aHAXnci", "--delete", f"{beside}/a/", f"{mounted.clear}/a/") == "0"
    assert said("rsync", "-aHAX", f"{mounted.clear}/a/", f"{beside}/back/") == "0"
    assert said("rsync", "-aHAXnci", "--delete", f"{beside}/a/", f"{beside}/back/") == "0"
    assert "cap_net_raw" in said("getcap", "prog", cwd=beside / "back")
