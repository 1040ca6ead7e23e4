"""A volume whose `state` file is lost or damaged: refused, and made anew by a repair."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cryptfs.errors import RolledBack, VolumeBusy, VolumeDamaged
from cryptfs.format.state import SLOT_BYTES
from cryptfs.fs.epoch import read_state
from cryptfs.ops.check_report import What
from cryptfs.testing.freshness import FakeRecord
from cryptfs.testing.volumes import abandon
from tests.check.lab import Lab, flip


@pytest.fixture
def seen(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> FakeRecord:
    """What this machine has seen of the volume."""
    record = FakeRecord()
    monkeypatch.setattr(lab.sample, "freshness", record)
    return record


def gone(path: Path) -> None:
    path.unlink()


def zeroed(path: Path) -> None:
    path.write_bytes(bytes(2 * SLOT_BYTES))


def both_slots(path: Path) -> None:
    flip(path, 30)
    flip(path, SLOT_BYTES + 500)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def too_long(path: Path) -> None:
    path.write_bytes(path.read_bytes() * 2)


def a_link(path: Path) -> None:
    path.rename(path.parents[1] / "elsewhere")
    path.symlink_to("../elsewhere")


@pytest.mark.parametrize("lose", [gone, zeroed, both_slots, empty, too_long, a_link])
async def test_it_is_made_anew(lab: Lab, seen: FakeRecord, lose: Callable[[Path], None]) -> None:
    store = lab.store()
    volume = await lab.sample.open(store)
    assert await volume.close()  # which writes nothing: the last mount that did was the first
    before = await read_state(store, lab.sample.keys(), lab.sample.volume_id)
    store.close_store()
    assert (await lab.check()).result == "clean"
    assert seen.state_sequence == before.sequence
    lose(lab.root / "state")
    with pytest.raises(VolumeDamaged, match="`state`"):
        await lab.check()
    report = await lab.repair(deep=True)
    assert [(f.what, f.path) for f in report.findings if f.what is What.STATE] == [(What.STATE, b"state")]
    assert (report.result, report.left_clean, [f.what for f in report.damage]) == ("repaired", False, [])
    store = lab.store()
    after = await read_state(store, lab.sample.keys(), lab.sample.volume_id)
    store.close_store()
    assert after.clean
    assert after.epoch > before.epoch == 2
    assert after.sequence > before.sequence
    assert after.unclean == ((1, 2),)
    again = await lab.repair(deep=True)
    assert (again.result, again.findings) == ("clean", [])
    assert await lab.read() == lab.content


async def test_nothing_older_than_the_last_mount_that_wrote_is_excused(lab: Lab) -> None:
    store = lab.store()
    volume = await lab.sample.open(store)
    attr = await volume.names.lookup(volume.root, b"small")
    attr.inode.lookups += 1
    file = await volume.files.open(attr.inode, writing=True)
    await file.write(0, b"later")
    await volume.files.release(attr.inode)
    assert await volume.close()
    store.close_store()
    places = await lab.places()
    flip(places[b"/docs/b"][0], 64 + 5)
    (lab.root / "state").unlink()
    report = await lab.repair()
    assert What.STATE in {f.what for f in report.findings}
    read = await lab.read()
    assert isinstance(read[b"/docs/b"], Exception), "it was written a mount before"
    small = lab.content[b"/small"]
    assert isinstance(small, bytes)
    assert read[b"/small"] == b"later" + small[5:]


async def test_a_crash_and_then_no_state_is_settled_like_the_crash(lab: Lab) -> None:
    store = lab.store()
    volume = await lab.sample.open(store)
    docs = (await volume.names.lookup(volume.root, b"docs")).inode
    docs.lookups += 1
    await lab.write_file(volume, docs, b"acknowledged", b"/docs/acknowledged", b"x" * 10_000)
    attr = await volume.names.lookup(docs, b"acknowledged")
    attr.inode.lookups += 1
    file = await volume.files.open(attr.inode, writing=True)
    await file.write(4096, b"not synced")
    abandon(volume)
    store.close_store()
    (lab.root / "state").unlink()
    report = await lab.repair(deep=True)
    assert report.damage == []
    assert await lab.read() == lab.content


async def test_an_older_state_put_back_afterwards_is_refused(lab: Lab, seen: FakeRecord, tmp_path: Path) -> None:
    assert (await lab.check()).result == "clean"
    shutil.copyfile(lab.root / "state", tmp_path / "state")
    (lab.root / "state").unlink()
    await lab.repair()
    shutil.copyfile(tmp_path / "state", lab.root / "state")
    assert seen.state_sequence > 1 << 20
    with pytest.raises(RolledBack):
        await lab.repair()


async def test_what_was_seen_newer_stays_damage(lab: Lab, seen: FakeRecord, tmp_path: Path) -> None:
    """A lost `state` is no way to have an older file accepted."""
    path, file_id = (await lab.places())[b"/docs/a"]
    old = tmp_path / "old"
    old.mkdir()
    kept = [path, lab.sidecar(file_id), lab.sidecar(file_id, ".twin")]
    for number, each in enumerate(kept):
        shutil.copy2(each, old / str(number))
    store = lab.store()
    volume = await lab.sample.open(store)
    docs = (await volume.names.lookup(volume.root, b"docs")).inode
    docs.lookups += 1
    await lab.overwrite(volume, docs, b"a", b"n" * 4096)
    assert await volume.close()
    store.close_store()
    for number, each in enumerate(kept):
        shutil.copy2(old / str(number), each)
    (lab.root / "state").unlink()
    report = await lab.repair()
    assert (b"docs/a", "rolled-back") in {(f.path.lstrip(b"/"), f.reason) for f in report.findings}


async def test_a_mounted_volume_is_left_alone(lab: Lab) -> None:
    store = lab.store()
    volume = await lab.sample.open(store)
    (lab.root / "state").unlink()
    with pytest.raises(VolumeBusy):
        await lab.repair()
    assert not (lab.root / "state").exists()
    # The daemon that has it leaves it whole.
    assert await volume.close()
    store.close_store()
    assert os.stat(lab.root / "state").st_size in (SLOT_BYTES, 2 * SLOT_BYTES)
    assert (await lab.check()).result == "clean"


async def test_a_volume_without_any_log_stays_refused(lab: Lab) -> None:
    (lab.root / "state").unlink()
    for log in [*lab.root.rglob(".dir"), *(p for p in (lab.root / "sidecars").rglob("*") if p.is_file())]:
        log.unlink()
    with pytest.raises(VolumeDamaged, match="no log to learn from"):
        await lab.repair()
    assert not (lab.root / "state").exists()
