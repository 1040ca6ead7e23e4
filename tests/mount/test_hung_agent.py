"""An agent that hangs: any program of its user can stop it (SIGSTOP), and no key must outlive it for that."""

from __future__ import annotations

import errno
import json
import mmap
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from cryptfs.cli.mounts import wait_until
from cryptfs.keys.link import TICK_MIN_S
from tests.mount.box import Box
from tests.mount.syscalls import drop_pages, refused

pytestmark = pytest.mark.mount

CONTENT = bytes(range(256)) * 256
NOTICED_S = 4 * TICK_MIN_S
"""What docs/KEYS.md promises for a short max age."""
SLACK_S = 3.0
"""For the busy machine that tests run on."""


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def took_s(fd: int) -> float:
    """How long a read takes that is refused."""
    began = time.monotonic()
    with refused(errno.ENOKEY):
        os.pread(fd, 5, 0)
    return time.monotonic() - began


def is_refused(fd: int) -> bool:
    try:
        os.pread(fd, 5, 0)
    except OSError as error:
        return error.errno == errno.ENOKEY
    return False


def test_an_agent_that_hangs_is_noticed_by_an_idle_mount_and_holds_nobody_up_after_it(box: Box) -> None:
    box.mount()
    (box.clear / "file").write_bytes(CONTENT)
    box.remount("--read-only", "--max-age", "1")
    [agent] = box.agent_pids()
    fd = os.open(box.clear / "file", os.O_RDONLY)
    try:
        assert os.pread(fd, 5, 0) == CONTENT[:5]
        with stopped(agent):
            began = time.monotonic()
            assert wait_until(lambda: is_refused(fd), NOTICED_S + 1 + SLACK_S), "cached content stays readable"
            assert time.monotonic() - began > TICK_MIN_S * 2, "one that is only slow is not given up so soon"
            waits = sorted(took_s(fd) for _ in range(20))
            assert waits[-1] < 2 + SLACK_S, "a refused request waits for the agent"
            assert waits[-2] < 1, "and so does each that comes after it"
            began = time.monotonic()
            said = box.run("lock", box.clear, code=16).stderr
            assert time.monotonic() - began < 20 + SLACK_S
            assert f"kill -CONT {agent}" in said
            assert f"kill -9 {agent}" in said
            assert "agent run" not in said
        box.unlock()
        assert os.pread(fd, 5, 0) == CONTENT[:5], "the mount works again"
    finally:
        os.close(fd)
    [volume] = json.loads(box.run("status", "--json").stdout)
    assert volume["state"] == "unlocked"


def test_where_a_request_waits_for_an_agent_that_hangs_content_goes_as_soon_as_it_is_given_up(box: Box) -> None:
    box.mount("--max-age", "1")
    for name in ("cached", "cold"):
        (box.clear / name).write_bytes(CONTENT)
        drop_pages(box.clear / name)
    [agent] = box.agent_pids()
    fd, cold = (
        os.open(box.clear / name, os.O_RDONLY | flags) for name, flags in (("cached", 0), ("cold", os.O_DIRECT))
    )
    refusals: list[float] = []

    def ask() -> None:
        with mmap.mmap(-1, mmap.PAGESIZE) as page, refused(errno.ENOKEY):
            os.preadv(cold, [page], 0)
        refusals.append(time.monotonic())

    try:
        assert os.pread(fd, 5, 0) == CONTENT[:5]
        time.sleep(2.5)  # no key is left, nor the root directory's
        with stopped(agent):
            asking = threading.Thread(target=ask)
            asking.start()
            assert wait_until(lambda: is_refused(fd), NOTICED_S + SLACK_S)
            ended = time.monotonic()
            asking.join(10)
            assert refusals, "the request waits for ever"
            assert ended - refusals[0] < SLACK_S
            assert box.logged("the volume is locked, after")
            [took] = [
                line.split("after ")[1].split(" s")[0] for line in box.log().splitlines() if "locked, after" in line
            ]
            assert float(took) < SLACK_S, "locking waited for the agent"
    finally:
        os.close(fd)
        os.close(cold)


def test_an_agent_that_comes_back_in_time_was_never_away(box: Box) -> None:
    box.mount("--max-age", "1")
    (box.clear / "file").write_bytes(CONTENT)
    [agent] = box.agent_pids()
    with stopped(agent):
        time.sleep(TICK_MIN_S * 1.5)
    time.sleep(TICK_MIN_S * 1.5)
    drop_pages(box.clear / "file")
    assert (box.clear / "file").read_bytes() == CONTENT
    assert "gone" not in box.log()
