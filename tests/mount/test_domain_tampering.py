"""Domains whose cipher directories somebody moved, exchanged or took away."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from tests.mount.box import Box
from tests.mount.domains import CONTENT, SECRET, cipher_dir, create, domains, unlock
from tests.mount.syscalls import refused

pytestmark = pytest.mark.mount


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
