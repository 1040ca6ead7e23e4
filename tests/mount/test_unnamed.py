"""Files that lost their last name while somebody has an O_PATH descriptor of them, or is about to open them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mount.box import Box

pytestmark = pytest.mark.mount

CONTENT = bytes(range(256)) * 300

REPLACER = """
import os, select, sys
os.chdir(sys.argv[1])
while not select.select([0], [], [], 0)[0]:
    with open("new", "wb") as out:
        out.write(b"x" * 100)
    os.rename("new", "file")
"""


@pytest.mark.parametrize("replaced", [False, True], ids=["unlinked", "replaced"])
def test_what_an_o_path_descriptor_holds_can_be_opened_and_changed(here: Path, *, replaced: bool) -> None:
    (here / "file").write_bytes(CONTENT)
    fd = os.open(here / "file", os.O_PATH)
    try:
        if replaced:
            (here / "other").write_bytes(b"other")
            (here / "other").rename(here / "file")
        else:
            (here / "file").unlink()
        again = Path(f"/proc/self/fd/{fd}")
        assert os.fstat(fd).st_nlink == 0
        assert again.read_bytes() == CONTENT
        with again.open("r+b") as out:
            out.write(b"changed")
        assert again.read_bytes() == b"changed" + CONTENT[7:]
        again.chmod(0o600)
        os.truncate(again, 9)
        os.utime(again, ns=(1, 2))
        os.setxattr(again, "user.a", b"1")
        st = os.fstat(fd)
        assert (st.st_mode & 0o777, st.st_size, st.st_mtime_ns) == (0o600, 9, 2)
        assert os.getxattr(again, "user.a") == b"1"
    finally:
        os.close(fd)


def test_an_open_fifo_without_a_name_has_attributes(here: Path) -> None:
    os.mkfifo(here / "fifo", 0o644)
    fd = os.open(here / "fifo", os.O_RDWR)
    try:
        (here / "fifo").unlink()
        os.fchmod(fd, 0o600)
        os.utime(fd, ns=(1, 2))
        st = os.fstat(fd)
        assert (st.st_mode & 0o777, st.st_nlink, st.st_mtime_ns) == (0o600, 0, 2)
    finally:
        os.close(fd)


def test_opening_a_file_that_is_replaced_all_the_time(here: Path) -> None:
    (here / "file").write_bytes(b"x" * 100)
    replacer = subprocess.Popen([sys.executable, "-S", "-c", REPLACER, str(here)], stdin=subprocess.PIPE)
    with replacer:
        for _ in range(4000):
            assert len((here / "file").read_bytes()) == 100
        assert replacer.stdin is not None
        replacer.stdin.close()
        assert replacer.wait(30) == 0


def test_many_files_removed_while_held_cost_one_descriptor_each_and_no_longer(root: None, mounted: Box) -> None:
    def held() -> int:
        return len(os.listdir(f"/proc/{mounted.daemon_pid}/fd"))

    for number in range(300):
        (mounted.clear / f"{number}").write_bytes(b"content")
    Path("/proc/sys/vm/drop_caches").write_text("2", "ascii")
    before = held()
    fds = [os.open(mounted.clear / f"{number}", os.O_PATH) for number in range(300)]
    for number in range(300):
        (mounted.clear / f"{number}").unlink()
    assert 290 <= held() - before <= 310
    for fd in fds:
        os.close(fd)
    os.listdir(mounted.clear)
    assert held() - before <= 10
