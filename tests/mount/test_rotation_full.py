"""A disk that is full when a mounted volume's keys are replaced, or becomes so meanwhile: said, nothing lost."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

import pytest

from tests.mount.box import Box
from tests.mount.rotating import data_files, look, populate, somebody_there, status, wait_for
from tests.mount.syscalls import refused
from tests.mount.test_backing import small, write_synced

__all__ = ["small"]

pytestmark = [pytest.mark.mount, pytest.mark.slow]

STORE_FAILED = 19


def fill_up(path: Path) -> None:
    """A file that takes all the room there is, to the last page."""
    with path.open("ab", buffering=0) as out, suppress(OSError):
        while True:
            out.write(bytes(4096))


def test_a_disk_that_is_full_from_the_beginning_changes_nothing(small: Box) -> None:
    populate(small.clear)
    os.sync()
    before, filler = (small.vault / "volume").read_bytes(), small.vault / "filler"
    fill_up(filler)
    ended = small.run("rotate", small.vault, "--kek", code=STORE_FAILED)
    assert "No space left" in ended.stderr
    assert (small.vault / "volume").read_bytes() == before
    assert not (small.vault / "volume.new").exists()
    assert (status(small)["kek_version"], status(small)["older_versions"]) == (1, [])
    look(small.clear)
    filler.unlink()
    small.run("rotate", small.vault, "--kek", "--destroy-old")
    assert (status(small)["kek_version"], status(small)["older_versions"]) == (2, [])
    look(small.clear)


def test_a_disk_that_becomes_full_stops_it_until_there_is_room(small: Box) -> None:
    box, filler = small, small.vault / "filler"
    populate(box.clear)
    os.sync()
    before = data_files(box.vault)
    with somebody_there(box.clear):
        box.run("rotate", box.vault, "--kek", "--background")
        wait_for(box, "running")
        fill_up(filler)
        stopped = wait_for(box, "stopped")
    assert "No space left" in str(stopped["message"])
    assert (stopped["kek_version"], stopped["older_versions"]) == (2, [1])
    look(box.clear)
    with refused(errno.ENOSPC):
        write_synced(box.clear / "more", bytes(100_000))
    (box.clear / "more").unlink(missing_ok=True)
    # Nothing is destroyed while something needs the old key; asking again says the same.
    for words in (("--kek",), ("--destroy-old",)):
        ended = box.run("rotate", box.vault, *words, code=STORE_FAILED)
        assert "No space left" in ended.stderr
        assert status(box)["older_versions"] == [1]
    assert not list((box.vault / "sidecars").rglob("*.new"))
    look(box.clear)
    filler.unlink()
    box.run("rotate", box.vault, "--destroy-old")
    assert (status(box)["kek_version"], status(box)["older_versions"]) == (2, [])
    assert data_files(box.vault) == before
    box.remount()
    look(box.clear)
    box.umount()
    box.run("check", box.vault, "--deep")
