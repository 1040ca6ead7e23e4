"""A volume's policy changed under a mount, the mount's own options, the limit of unwraps, and what `status` says."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from cryptfs.cli.mounts import wait_until
from tests.mount.box import Box
from tests.mount.syscalls import drop_pages
from tests.mount.test_envelope import fails_with_enokey, opened

pytestmark = pytest.mark.mount

BLOCK = 16384
CONTENT = os.urandom(BLOCK * 8)


def read_uncached(fd: int) -> bytes:
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    return os.pread(fd, len(CONTENT), 0)


def status(box: Box) -> dict[str, Any]:
    [volume] = json.loads(box.run("status", "--json").stdout)
    assert isinstance(volume, dict)
    return volume


def cache(box: Box) -> dict[str, int]:
    counters = status(box)["cache"]
    assert isinstance(counters, dict)
    return counters


def test_a_policy_that_changes_counts_at_once(mounted: Box) -> None:
    box, file = mounted, mounted.clear / "file"
    file.write_bytes(CONTENT)
    drop_pages(file)
    with opened(file) as fd:
        before = cache(box)
        assert before["entries"] > 0
        read_uncached(fd)
        after = cache(box)
        assert after["hits"] > before["hits"]
        assert (after["misses"], after["round_trips"]) == (before["misses"], before["round_trips"])

        box.run("policy", box.vault, "--no-cache")
        assert status(box)["policy"]["caching"] is False
        assert cache(box)["entries"] == 0
        before = cache(box)
        for _ in range(3):
            read_uncached(fd)
        after = cache(box)
        assert after["entries"] == 0
        assert after["round_trips"] >= before["round_trips"] + 3
        assert after["misses"] >= before["misses"] + 3

        box.run("policy", box.vault, "--cache", "--max-age", "1s")
        before = cache(box)
        read_uncached(fd)
        assert wait_until(lambda: cache(box)["expiries"] > before["expiries"], 20)
        assert wait_until(lambda: cache(box)["entries"] == 0, 20)

        box.run("policy", box.vault, "--max-age", "default")
        read_uncached(fd)
        kept = cache(box)["entries"]
        time.sleep(2.5)
        assert cache(box)["entries"] == kept > 0
    assert file.read_bytes() == CONTENT
    box.remount()
    assert status(box)["policy"]["max_age_s"] == 60


def test_the_policy_is_the_volumes_at_the_next_mount_too(box: Box) -> None:
    box.run("policy", box.vault, "--max-uses", "3", "--max-entries", "2048")
    box.mount()
    volume = status(box)
    assert (volume["policy"]["max_uses"], volume["policy"]["max_entries"], volume["overridden"]) == (3, 2048, [])
    shown = box.run("status").stdout
    assert f"{volume['volume_id'][:8]}: " in shown
    assert " keys in the cache; " in shown
    assert "by the mount's options" not in shown


def test_options_of_the_mount_go_before_it_and_status_says_so(box: Box) -> None:
    box.mount("--max-age", "0.5", "--cache")
    ended = box.run("policy", box.vault, "--max-age", "20s", "--no-cache", "--max-uses", "5")
    assert "say otherwise for max age" in ended.stderr
    assert "say otherwise for cache" in ended.stderr
    assert "max uses" not in ended.stderr
    volume = status(box)
    assert volume["overridden"] == ["caching", "max_age_s"]
    policy = volume["policy"]
    assert (policy["caching"], policy["max_age_s"], policy["max_uses"]) == (True, 0.5, 5)
    assert "cache on, max age 0.5 s by the mount's options" in box.run("status").stdout
    box.remount()
    policy = status(box)["policy"]
    assert (policy["caching"], policy["max_age_s"], policy["max_uses"]) == (False, 20, 5)


def test_over_the_limit_of_unwraps_reads_take_their_time_and_do_not_fail(mounted: Box) -> None:
    box, file = mounted, mounted.clear / "file"
    content = os.urandom(BLOCK * 192)
    file.write_bytes(content)
    box.run("policy", box.vault, "--unwraps-per-s", "32")
    box.remount()
    started = time.monotonic()
    # Out of order: of a file that is read from end to end, half the keys may come with one request.
    order = list(range(192))
    random.Random(1).shuffle(order)
    with file.open("rb", buffering=0) as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        for block in order:
            there = os.pread(opened.fileno(), BLOCK, block * BLOCK)
            assert there == content[block * BLOCK : (block + 1) * BLOCK]
    took = time.monotonic() - started
    keys = cache(box)["unwraps"]
    assert keys >= 192
    # A second's worth is free, and a request is served before it is paid for: at most 64 blocks a request here.
    assert took >= (keys - 32 - 64) / 32
    told = box.run("audit", "show", box.vault, "--ids", "--verb", "limit", "--json").stdout.splitlines()
    # Once per burst; on a busy machine a second's worth may run in between two requests.
    assert 1 <= len(told) <= 2
    assert all(json.loads(line)["detail"] == {"unwraps-per-s": 32} for line in told)
    (box.clear / "new").write_bytes(b"keys that are made are not limited")


def test_lock_does_not_wait_for_reads_that_wait_for_their_turn(mounted: Box) -> None:
    box, file = mounted, mounted.clear / "file"
    file.write_bytes(CONTENT)
    box.run("policy", box.vault, "--unwraps-per-s", "1", "--no-cache")
    drop_pages(file)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            for _ in range(100):
                with opened(file) as fd:
                    read_uncached(fd)
        except OSError:
            code = 0
        finally:
            os._exit(code)
    try:
        time.sleep(1)
        started = time.monotonic()
        box.run("lock", box.vault)
        assert time.monotonic() - started < 9, "it did not come to the deadline"
    finally:
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, "its read was refused"
    assert status(box)["state"] == "locked"


def test_a_daemon_that_hangs_has_no_report(mounted: Box) -> None:
    box = mounted
    os.kill(box.daemon_pid, signal.SIGSTOP)
    try:
        volume = status(box)
    finally:
        os.kill(box.daemon_pid, signal.SIGCONT)
    assert volume["cache"] is None
    assert volume["state"] == "unlocked"
    assert wait_until(lambda: status(box)["cache"] is not None, 10)


def test_without_the_agent_keys_live_as_long_as_the_policy_of_that_moment_says(mounted: Box) -> None:
    box, file = mounted, mounted.clear / "file"
    file.write_bytes(CONTENT)
    box.run("policy", box.vault, "--max-age", "2s")
    with opened(file) as fd:
        assert read_uncached(fd) == CONTENT
        box.kill_agent()
        started = time.monotonic()

        assert wait_until(lambda: fails_with_enokey(lambda: read_uncached(fd)), 30)
        assert time.monotonic() - started < 20, "the default would be 60 s"
        box.unlock()
        assert read_uncached(fd) == CONTENT
    assert status(box)["policy"]["max_age_s"] == 2


def test_a_domain_has_a_policy_of_its_own(mounted: Box) -> None:
    box, domain = mounted, mounted.clear / "domain"
    secret = {"CRYPTFS_PASSPHRASE": "another horse, another staple 8"}
    box.run("domain", "create", "--kdf-cost", "low", domain, env=secret)
    (domain / "file").write_bytes(CONTENT)
    box.run("policy", domain, "--no-cache", "--max-uses", "3")
    box.run("policy", box.clear, "--max-uses", "5")
    volumes = json.loads(box.run("status", "--json").stdout)
    found = {Path(each["cipher_dir"]).parent.name == "domains": each for each in volumes}
    assert len(found) == len(volumes) == 2
    assert (found[True]["policy"]["caching"], found[True]["policy"]["max_uses"]) == (False, 3)
    assert (found[False]["policy"]["caching"], found[False]["policy"]["max_uses"]) == (True, 5)
    assert found[True]["cache"]["entries"] == 0
    assert found[False]["cache"]["entries"] > 0
    assert (domain / "file").read_bytes() == CONTENT
