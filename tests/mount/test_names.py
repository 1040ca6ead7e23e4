"""Names: making, finding, listing, renaming, linking, removing."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.mount.box import Box
from tests.mount.syscalls import (
    RENAME_EXCHANGE,
    RENAME_NOREPLACE,
    RENAME_WHITEOUT,
    getdents,
    refused,
    renameat2,
    reread,
)

pytestmark = pytest.mark.mount

NAMES = [
    b"plain",
    b".dir",  # the name our own log has below
    b".hidden",
    b"...",
    b"~tilde",
    b" ",
    b"\n",
    b"two\nlines\t",
    b"-rf",
    b"*?[\\",
    "Grüße 你好 🔑".encode(),
    b"\xff\xfe not UTF-8 \x80",
    b"\xc0\xaf\xed\xa0\x80",
    bytes(range(1, 47)) + bytes(range(48, 256)),  # every byte a name may have
    b"a" * 174,
    b"b" * 175,  # the longest whose sealed form fits a name
    b"c" * 176,
    b"d" * 255,
    b"\xff" * 255,
]


def listed(path: Path) -> Counter[bytes]:
    return Counter(os.listdir(os.fsencode(path)))


# names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_a_name_of_any_bytes(here: Path, name: bytes) -> None:
    path = os.path.join(os.fsencode(here), name)
    with open(path, "xb") as out:
        out.write(b"of " + name)
    assert listed(here) == {name: 1}
    with open(path, "rb") as inp:
        assert inp.read() == b"of " + name
    os.rename(path, path[:-1] + b"?")
    assert listed(here) == {name[:-1] + b"?": 1}
    os.rename(path[:-1] + b"?", path)
    os.unlink(path)
    os.mkdir(path)
    os.symlink(name, os.path.join(path, name))
    assert os.readlink(os.path.join(path, name)) == name
    with refused(errno.EEXIST):
        os.mkdir(path)
    os.unlink(os.path.join(path, name))
    os.rmdir(path)
    assert listed(here) == {}
    with refused(errno.ENOENT):
        os.stat(path)


def test_all_of_them_beside_each_other(here: Path) -> None:
    for number, name in enumerate(NAMES):
        with open(os.path.join(os.fsencode(here), name), "xb") as out:
            out.write(b"%d" % number)
    assert listed(here) == dict.fromkeys(NAMES, 1)
    for number, name in enumerate(NAMES):
        with open(os.path.join(os.fsencode(here), name), "rb") as inp:
            assert inp.read() == b"%d" % number


def test_names_that_are_too_long(here: Path) -> None:
    name = os.path.join(os.fsencode(here), b"x" * 256)
    for call in (os.mkdir, os.stat, os.unlink, os.rmdir, lambda n: os.close(os.open(n, os.O_CREAT | os.O_WRONLY))):
        with refused(errno.ENAMETOOLONG):
            call(name)
    (here / "file").touch()
    for link in (os.rename, os.link, os.symlink):
        with refused(errno.ENAMETOOLONG):
            link(os.fsencode(here / "file"), name)
    assert listed(here) == {b"file": 1}


def test_names_that_differ_in_little_are_different(here: Path) -> None:
    names = [b"name", b"Name", b"name ", b"name.", "e\u0301".encode(), "\u00e9".encode(), b"d" * 254, b"d" * 255]
    for name in names:
        with open(os.path.join(os.fsencode(here), name), "xb") as out:
            out.write(name)
    assert listed(here) == dict.fromkeys(names, 1)
    for name in names:
        with open(os.path.join(os.fsencode(here), name), "rb") as inp:
            assert inp.read() == name


def test_a_name_asked_for_in_vain_and_then_made(here: Path) -> None:
    for kind in ("file", "dir", "link", "moved", "linked"):
        assert not os.path.lexists(here / kind)
    (here / "file").touch()
    (here / "dir").mkdir()
    (here / "link").symlink_to("x")
    (here / "other").touch()
    (here / "other").rename(here / "moved")
    (here / "linked").hardlink_to(here / "moved")
    for kind in ("file", "dir", "link", "moved", "linked"):
        assert os.path.lexists(here / kind)


# directories ---------------------------------------------------------------------------------------------------


def test_directories(here: Path) -> None:
    (here / "dir").mkdir()
    with refused(errno.EEXIST):
        (here / "dir").mkdir()
    (here / "dir" / "file").touch()
    with refused(errno.ENOTEMPTY):
        (here / "dir").rmdir()
    with refused(errno.EISDIR, errno.EPERM):
        (here / "dir").unlink()
    with refused(errno.ENOTDIR):
        (here / "dir" / "file").rmdir()
    with refused(errno.ENOTDIR):
        (here / "dir" / "file" / "below").mkdir()
    (here / "dir" / "file").unlink()
    (here / "dir").rmdir()
    with refused(errno.ENOENT):
        (here / "dir").rmdir()
    with refused(errno.ENOENT):
        (here / "dir" / "below").mkdir()


def test_the_number_of_links_of_a_directory(here: Path) -> None:
    for name in ("a", "b", "c"):
        (here / name).mkdir()
    (here / "file").touch()
    assert here.stat().st_nlink == 5
    (here / "a").rmdir()
    (here / "b").rename(here / "c" / "b")
    assert here.stat().st_nlink == 3
    assert (here / "c").stat().st_nlink == 3


def test_a_directory_removed_while_it_is_somebodys_own(here: Path) -> None:
    (here / "dir").mkdir()
    fd = os.open(here / "dir", os.O_RDONLY | os.O_DIRECTORY)
    try:
        (here / "dir").rmdir()
        assert os.listdir(fd) == []
        with refused(errno.ENOENT):
            os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=fd)
        with refused(errno.ENOENT):
            os.mkdir("dir", dir_fd=fd)
        (here / "dir").mkdir()
        (here / "dir" / "other").touch()
        assert os.listdir(fd) == []
    finally:
        os.close(fd)


def test_a_deep_tree(here: Path) -> None:
    depth, fds = 150, []
    try:
        fds.append(os.open(here, os.O_RDONLY | os.O_DIRECTORY))
        for level in range(depth):
            os.mkdir(f"level {level}", dir_fd=fds[-1])
            fds.append(os.open(f"level {level}", os.O_RDONLY | os.O_DIRECTORY, dir_fd=fds[-1]))
        os.close(os.open("bottom", os.O_CREAT | os.O_WRONLY, 0o600, dir_fd=fds[-1]))
        here_again = fds[-1]
        for level in range(depth - 1, -1, -1):
            here_again = os.open("..", os.O_RDONLY | os.O_DIRECTORY, dir_fd=here_again)
            fds.append(here_again)
            assert os.listdir(here_again) == [f"level {level}"]
        assert os.path.samestat(os.fstat(here_again), here.stat())
    finally:
        for fd in fds:
            os.close(fd)
    shutil.rmtree(here / "level 0")
    assert listed(here) == {}


DEEP = """
import os, sys
os.chdir(sys.argv[1])
for _ in range(600):
    os.mkdir("level")
    os.chdir("level")
open("file", "w").close()
open("/proc/sys/vm/drop_caches", "w").write("2")
os.mkdir("last")
print(os.listdir("."))
"""


def test_a_tree_deeper_than_calls_can_nest(root: None, here: Path) -> None:
    ended = subprocess.run([sys.executable, "-c", DEEP, here], capture_output=True, text=True, check=False)
    assert (sorted(ended.stdout.split("'")[1::2]), ended.stderr) == (["file", "last"], "")
    Path("/proc/sys/vm/drop_caches").write_text("2", "ascii")
    found = subprocess.run(["find", here, "-type", "f", "-printf", "%d"], capture_output=True, text=True, check=False)
    assert (found.stdout, found.stderr) == ("601", "")
    Path("/proc/sys/vm/drop_caches").write_text("2", "ascii")
    subprocess.run(["rm", "-r", here / "level"], check=True)
    assert listed(here) == {}


def test_more_directories_than_are_kept_open(here: Path) -> None:
    for number in range(400):
        (here / str(number)).mkdir()
        (here / str(number) / "file").write_bytes(b"%d" % number)
    for number in range(400):
        assert os.listdir(here / str(number)) == ["file"]
        assert (here / str(number) / "file").read_bytes() == b"%d" % number


# listing -------------------------------------------------------------------------------------------------------


def test_listing_while_entries_come_and_go(here: Path) -> None:
    stable = {f"stable {number}" for number in range(300)}
    for name in stable:
        (here / name).touch()
    for number in range(200):
        (here / f"going {number}").touch()
    seen: Counter[str] = Counter()
    with os.scandir(here) as listing:
        for number, entry in enumerate(listing):
            seen[entry.name] += 1
            if number < 200:
                (here / f"going {number}").unlink()
                (here / f"coming {number}").touch()
    assert {name for name in seen if name.startswith("stable")} == stable
    assert set(seen.values()) == {1}
    assert set(os.listdir(here)) == stable | {f"coming {number}" for number in range(200)}


CHURNER = """
import os, select, sys
os.chdir(sys.argv[1])
number = 0
while not select.select([0], [], [], 0)[0]:
    name = "churn %d" % (number % 40)
    open(name, "w").close()
    os.rename(name, name + " renamed")
    os.unlink(name + " renamed")
    number += 1
"""


def test_listing_while_another_process_makes_renames_and_removes(here: Path) -> None:
    stable = {f"stable {number}" for number in range(500)}
    for name in stable:
        (here / name).touch()
    churner = subprocess.Popen([sys.executable, "-S", "-c", CHURNER, str(here)], stdin=subprocess.PIPE)
    with churner:
        for _ in range(25):
            names = Counter(os.listdir(here))
            assert stable <= set(names)
            assert {names[name] for name in stable} == {1}
        assert churner.stdin is not None
        churner.stdin.close()
        assert churner.wait(30) == 0
    assert set(os.listdir(here)) == stable


def test_listing_while_names_are_given_to_other_files(here: Path) -> None:
    names = {f"name {number:04}" for number in range(1500)}
    (here / "d").mkdir()
    for name in names:
        (here / "d" / name).touch()
    seen: Counter[str] = Counter()
    with os.scandir(here / "d") as listing:
        for _ in range(5):
            seen[next(listing).name] += 1
        left = sorted(names - set(seen))
        for name in left[::3]:
            (here / "new").touch()
            (here / "new").rename(here / "d" / name)
        for a, b in zip(left[1:300:3], left[2:300:3], strict=True):
            renameat2(here / "d" / a, here / "d" / b, RENAME_EXCHANGE)
        seen.update(entry.name for entry in listing)
    assert set(seen) == names
    assert set(seen.values()) == {1}


def test_a_new_descriptor_goes_on_where_another_one_was(here: Path) -> None:
    for number in range(300):
        (here / f"file {number}").touch()
    whole = getdents(here)
    assert len(whole) == 302
    for at in (0, 1, 2, 150, 301):
        assert getdents(here, whole[at].position) == whole[at + 1 :]


def test_both_dots_have_the_numbers_of_what_they_are(shared: Box, here: Path) -> None:
    (here / "a" / "b").mkdir(parents=True)
    for path in (here / "a" / "b", here / "a", here):
        numbers = {entry.name: entry.ino for entry in getdents(path)}
        assert numbers["."] == path.stat().st_ino
        assert numbers[".."] == path.parent.stat().st_ino
    numbers = {entry.name: entry.ino for entry in getdents(shared.clear)}
    assert numbers["."] == numbers[".."] == shared.clear.stat().st_ino


def test_rewinding_a_listing_shows_what_is_new(here: Path) -> None:
    (here / "old").touch()
    fd = os.open(here, os.O_RDONLY | os.O_DIRECTORY)
    try:
        assert os.listdir(fd) == ["old"]
        (here / "new").touch()
        os.lseek(fd, 0, os.SEEK_SET)
        assert sorted(os.listdir(fd)) == ["new", "old"]
    finally:
        os.close(fd)


# renaming ------------------------------------------------------------------------------------------------------


def test_renaming_a_file(here: Path) -> None:
    (here / "dir").mkdir()
    (here / "a").write_bytes(b"a")
    ino = (here / "a").stat().st_ino
    for new in ("b", "dir/c", "dir/" + "long" * 60, "a"):
        old = next(path for path in here.rglob("*") if path.is_file())
        old.rename(here / new)
        assert not old.exists()
        assert (here / new).stat().st_ino == ino
        assert reread(here / new) == b"a"
    with refused(errno.ENOENT):
        os.rename(here / "missing", here / "b")
    with refused(errno.ENOENT):
        os.rename(here / "a", here / "missing" / "b")


def test_renaming_over_another_file(here: Path) -> None:
    (here / "new").write_bytes(b"new")
    (here / "old").write_bytes(b"old")
    with (here / "old").open("rb") as opened:
        (here / "new").rename(here / "old")
        assert listed(here) == {b"old": 1}
        assert reread(here / "old") == b"new"
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert opened.read() == b"old"
        assert os.fstat(opened.fileno()).st_nlink == 0


def test_renaming_an_open_file(here: Path) -> None:
    (here / "dir").mkdir()
    with (here / "a").open("w+b", buffering=0) as opened:
        opened.write(b"before")
        (here / "a").rename(here / "dir" / "b")
        opened.write(b" after")
        os.fsync(opened.fileno())
    assert reread(here / "dir" / "b") == b"before after"


def test_renaming_onto_a_name_of_the_same_file_does_nothing(here: Path) -> None:
    (here / "a").touch()
    (here / "b").hardlink_to(here / "a")
    (here / "a").rename(here / "b")
    assert listed(here) == {b"a": 1, b"b": 1}
    (here / "a").rename(here / "a")
    assert listed(here) == {b"a": 1, b"b": 1}


def test_renaming_directories(here: Path) -> None:
    for name in ("from/inside", "to", "full/inside"):
        (here / name).mkdir(parents=True)
    (here / "from" / "file").write_bytes(b"text")
    (here / "file").touch()
    with refused(errno.ENOTEMPTY, errno.EEXIST):
        os.rename(here / "from", here / "full")
    with refused(errno.ENOTDIR):
        os.rename(here / "from", here / "file")
    with refused(errno.EISDIR):
        os.rename(here / "file", here / "to")
    with refused(errno.EINVAL):
        os.rename(here / "from", here / "from" / "inside" / "deeper")
    (here / "from").rename(here / "to")  # over an empty directory
    assert listed(here) == {b"to": 1, b"full": 1, b"file": 1}
    assert listed(here / "to") == {b"inside": 1, b"file": 1}
    (here / "to").rename(here / "full" / "inside")
    assert reread(here / "full" / "inside" / "file") == b"text"
    assert (here / "full" / "inside" / "..").stat().st_ino == (here / "full").stat().st_ino
    shutil.rmtree(here / "full")


def test_rename_noreplace(here: Path) -> None:
    (here / "a").write_bytes(b"a")
    (here / "b").write_bytes(b"b")
    with refused(errno.EEXIST):
        renameat2(here / "a", here / "b", RENAME_NOREPLACE)
    renameat2(here / "a", here / "c", RENAME_NOREPLACE)
    assert listed(here) == {b"b": 1, b"c": 1}
    assert reread(here / "c") == b"a"


@pytest.mark.parametrize("across", [False, True])
def test_rename_exchange(here: Path, across: bool) -> None:
    other = here / "other" if across else here
    other.mkdir(exist_ok=True)
    (here / "file").write_bytes(b"text")
    (other / "dir").mkdir()
    (other / "dir" / "inside").write_bytes(b"inside")
    before = (here / "file").stat().st_ino, (other / "dir").stat().st_ino
    renameat2(here / "file", other / "dir", RENAME_EXCHANGE)
    assert ((other / "dir").stat().st_ino, (here / "file").stat().st_ino) == before
    assert reread(other / "dir") == b"text"
    assert reread(here / "file" / "inside") == b"inside"
    with refused(errno.ENOENT):
        renameat2(here / "file", here / "missing", RENAME_EXCHANGE)
    renameat2(here / "file", other / "dir", RENAME_EXCHANGE)
    assert reread(here / "file") == b"text"


def test_exchanging_two_files_with_long_names(here: Path) -> None:
    one, two = here / ("1" * 255), here / ("2" * 200)
    one.write_bytes(b"one")
    two.write_bytes(b"two")
    renameat2(one, two, RENAME_EXCHANGE)
    assert (reread(one), reread(two)) == (b"two", b"one")


def test_renames_we_do_not_know_are_refused(here: Path) -> None:
    (here / "a").write_bytes(b"a")
    with refused(errno.EINVAL):
        renameat2(here / "a", here / "b", RENAME_WHITEOUT)
    with refused(errno.EINVAL):
        renameat2(here / "a", here / "b", RENAME_NOREPLACE | RENAME_EXCHANGE)
    assert listed(here) == {b"a": 1}


# links ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"text"])
def test_hard_links(here: Path, content: bytes) -> None:
    (here / "dir").mkdir()
    (here / "a").write_bytes(content)
    (here / "b").hardlink_to(here / "a")
    (here / "dir" / ("c" * 255)).hardlink_to(here / "b")
    stats = [path.stat() for path in (here / "a", here / "b", here / "dir" / ("c" * 255))]
    assert {(stat.st_ino, stat.st_nlink) for stat in stats} == {(stats[0].st_ino, 3)}
    (here / "b").write_bytes(content + b" changed")
    assert reread(here / "a") == content + b" changed"
    (here / "a").unlink()
    assert (here / "b").stat().st_nlink == 2
    assert reread(here / "dir" / ("c" * 255)) == content + b" changed"
    (here / "b").unlink()
    assert reread(here / "dir" / ("c" * 255)) == content + b" changed"
    with refused(errno.EPERM):
        (here / "e").hardlink_to(here / "dir")
    with refused(errno.EEXIST):
        (here / "dir").hardlink_to(here / "dir" / ("c" * 255))


def test_a_hard_link_of_an_open_file(here: Path) -> None:
    with (here / "a").open("w+b", buffering=0) as opened:
        opened.write(b"one")
        (here / "b").hardlink_to(here / "a")
        (here / "a").unlink()
        opened.write(b" two")
        assert os.fstat(opened.fileno()).st_nlink == 1
    assert reread(here / "b") == b"one two"


@pytest.mark.parametrize("length", [1, 24, 255, 1000, 4095])
def test_symlinks(here: Path, length: int) -> None:
    target = (b"/t\xff\n" * 1024)[:length]
    link = os.path.join(os.fsencode(here), b"link")
    os.symlink(target, link)
    assert os.readlink(link) == target
    assert os.lstat(link).st_size == length
    os.link(link, link + b" again", follow_symlinks=False)
    os.rename(link, link + b" moved")
    for name in (link + b" again", link + b" moved"):
        assert os.readlink(name) == target
        assert os.lstat(name).st_nlink == 2


def test_symlinks_lead_somewhere(here: Path) -> None:
    (here / "dir").mkdir()
    (here / "dir" / "file").write_bytes(b"text")
    (here / "a").symlink_to("dir")
    (here / "b").symlink_to(here / "a" / "file")
    assert (here / "b").read_bytes() == b"text"
    (here / "b").write_bytes(b"changed")
    assert reread(here / "dir" / "file") == b"changed"
    (here / "loop").symlink_to("loop")
    with refused(errno.ELOOP):
        (here / "loop").read_bytes()
    (here / "dangling").symlink_to("missing")
    with refused(errno.ENOENT):
        (here / "dangling").read_bytes()
    with refused(errno.ENAMETOOLONG):
        os.symlink("x" * 4096, here / "too long")
    with refused(errno.EEXIST):
        os.symlink("x", here / "a")
    assert not os.path.lexists(here / "too long")
