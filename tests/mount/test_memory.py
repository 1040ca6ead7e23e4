"""No key is left in anybody's memory after `lock`: daemon, agent and guardian are searched as root can search them."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from tests.mount.box import PASSPHRASE, Box
from tests.mount.memory import found_in, secrets_of
from tests.mount.syscalls import drop_pages
from tests.mount.test_guardian import guardians_of

pytestmark = pytest.mark.mount

CONTENT = b"what is in the file " * 2000
IN_THE_DAEMON = {"block key", "log-file key", "log-dir key", "names key", "attr key", "volume key", "state key"}


def use(clear: Path) -> None:
    """Something of everything: reads, writes, new files, names, links, attributes."""
    (clear / "dir").mkdir(exist_ok=True)
    for number in range(3):
        path = clear / "dir" / f"file {number}"
        path.write_bytes(CONTENT)
        drop_pages(path)
        with path.open("r+b") as file:
            assert file.read() == CONTENT
            file.seek(5)
            file.write(b"new")
            file.flush()
            os.fsync(file.fileno())
        os.setxattr(path, "user.x", b"value")
        assert os.getxattr(path, "user.x") == b"value"
        link = clear / "dir" / f"link {number}"
        link.unlink(missing_ok=True)
        link.symlink_to("target")
        assert os.readlink(link) == "target"
    assert len(os.listdir(clear / "dir")) == 6


def test_after_lock_no_key_is_in_memory(root: None, mounted: Box) -> None:
    use(mounted.clear)
    mounted.remount()
    use(mounted.clear)
    # As they are before: some of these keys are gone from the log, but not from who had them.
    before = secrets_of(mounted.vault, PASSPHRASE.encode(), mounted.root / "scratch")
    daemon, [agent] = mounted.daemon_pid, mounted.agent_pids()
    assert set(found_in(daemon, before)) == IN_THE_DAEMON, "the search would find nothing anywhere"
    hardening = json.loads(mounted.run("agent", "status", "--json").stdout)["hardening"]
    assert hardening["freed_memory"] == "on"
    if hardening["memfd_secret"] == "on":
        assert found_in(agent, before) == {}, "not even while it is unlocked"
    mounted.run("lock", mounted.clear)
    secrets = before | secrets_of(mounted.vault, PASSPHRASE.encode(), mounted.root / "scratch")
    assert {"KEK", "root key", "passphrase", "wrapping key"} | IN_THE_DAEMON <= set(secrets.values())
    for pid in (daemon, agent, *guardians_of(daemon)):
        assert found_in(pid, secrets) == {}


def test_keys_that_are_too_old_are_in_memory_no_more(root: None, box: Box) -> None:
    """Also without a lock: a key is in the daemon for the max age, and not in some corner of it for longer."""
    box.mount("--max-age", "1")
    use(box.clear)
    for name in os.listdir(box.clear / "dir"):
        if name.startswith("file"):
            drop_pages(box.clear / "dir" / name)
    secrets = secrets_of(box.vault, PASSPHRASE.encode(), box.root / "scratch")
    time.sleep(3)
    assert found_in(box.daemon_pid, secrets) == {}
