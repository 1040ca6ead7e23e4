"""What costs space and nothing else, what a crash leaves, and what is only said."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from cryptfs.errors import VolumeBusy, VolumeDamaged
from cryptfs.ops.check_report import Severity, Tally, What
from cryptfs.testing.volumes import abandon
from tests.check.lab import BLOCK, OWN, Lab, flip, summary


async def test_a_sound_volume_is_clean_and_stays_as_it_is(lab: Lab) -> None:
    before = {path: path.lstat().st_mtime_ns for path in lab.root.rglob("*")}
    for deep in (False, True):
        report = await lab.check(deep=deep)
        assert (report.result, report.findings) == ("clean", [])
        assert (report.mounted, report.left_clean) == (False, True)
        assert report.tally.files == 7
        assert (report.tally.directories, report.tally.symlinks, report.tally.others) == (3, 1, 1)
        sizes = {value for value in lab.content.values() if isinstance(value, bytes)}
        assert report.tally.done_bytes == sum(map(len, sizes))
    assert {path: path.lstat().st_mtime_ns for path in lab.root.rglob("*")} == before
    repaired = await lab.repair(deep=True)
    assert (repaired.result, repaired.findings, repaired.quarantine) == ("clean", [], b"")
    assert await lab.read() == lab.content


async def test_leftovers_are_no_damage_and_repair_removes_them(lab: Lab) -> None:
    places = await lab.places()
    orphan = lab.sidecar(bytes(range(16)))
    twin = lab.sidecar(bytes(range(1, 17)), ".twin")
    unfinished = lab.sidecar(places[b"/small"][1], ".new")
    log = lab.tree / ".dir.new"
    (lab.root / "tmp" / "dir").mkdir()
    (lab.root / "tmp" / "dir" / "x").write_bytes(b"x")
    rewrites = lab.root / "volume.new", lab.root / "state.new"
    for path in (orphan, twin, unfinished, log, *rewrites):
        path.write_bytes(b"x")
    report = await lab.check()
    assert report.result == "clean"
    assert {f.what.value for f in report.leftovers} == {"orphan", "unfinished"}
    assert len(report.leftovers) == 7
    repaired = await lab.repair()
    assert repaired.result == "repaired"
    assert all(f.action for f in repaired.findings)
    for path in (orphan, twin, unfinished, log, *rewrites, lab.root / "tmp" / "dir"):
        assert not path.exists()
    assert not (lab.root / "damaged").exists()
    assert (await lab.repair()).findings == []


async def test_orphans_of_a_damaged_volume_are_kept_aside(lab: Lab) -> None:
    places = await lab.places()
    orphan = lab.sidecar(bytes(range(16)))
    orphan.write_bytes(b"perhaps the keys of a file that a backup still has")
    places[b"/small"][0].unlink()
    assert (await lab.repair()).result == "repaired"
    assert not orphan.exists()
    kept = {path.name for path in (lab.root / "damaged").iterdir()}
    assert kept == {f"{bytes(range(16)).hex()}.sidecar", f"{places[b'/small'][1].hex()}.sidecar"}


async def test_orphans_stay_while_part_of_the_tree_cannot_be_seen(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    from cryptfs.ops import check

    orphan = lab.sidecar(bytes(range(16)))
    orphan.write_bytes(b"x")
    unseen = property(lambda _check: False, lambda _check, _value: None)
    monkeypatch.setattr(check.Check, "complete", unseen, raising=False)
    report = await lab.repair()
    assert [f.what.value for f in report.leftovers] == ["orphan"]
    assert orphan.exists()


async def test_what_is_foreign_is_said_and_left_alone(lab: Lab) -> None:
    foreign = [lab.root / "README", lab.root / "sidecars" / "zz", lab.root / "sidecars" / "00" / "note"]
    for path in foreign:
        path.write_bytes(b"mine")
    assert summary((await lab.check()).findings) == {
        ("foreign", "README", "foreign not a part of the volume"),
        ("foreign", "sidecars/zz", "foreign not one of its 256 directories"),
        ("foreign", "sidecars/00/note", "foreign not a name of a sidecar here"),
    }
    report = await lab.repair()
    assert report.result == "clean"
    assert {f.severity for f in report.findings} == {Severity.NOTICE}
    assert all(path.read_bytes() == b"mine" for path in foreign)


async def test_a_link_from_outside_is_noticed(lab: Lab, tmp_path: Path) -> None:
    os.link((await lab.places())[b"/small"][0], tmp_path / "backup")
    [finding] = (await lab.check()).findings
    assert (finding.severity, finding.what.value, finding.path) == (Severity.NOTICE, "links", b"/small")
    assert finding.detail == "2 links, 1 names"


async def test_salvage_says_exactly_what_is_lost(lab: Lab) -> None:
    places = await lab.places()
    path = places[b"/docs/a"][0]
    flip(path, 64 + 5)
    flip(path, -1)
    report = await lab.repair(deep=True)
    [finding] = report.findings
    assert finding.path == b"/docs/a"
    assert finding.blocks == [(0, 1), (3, 1)]
    assert finding.lost_bytes == [(0, BLOCK), (3 * BLOCK, 17)]
    assert finding.moved_to == report.quarantine + b"/docs/a"
    after, original = await lab.read(), lab.content[b"/docs/a"]
    assert isinstance(original, bytes)
    assert after[finding.moved_to] == bytes(BLOCK) + original[BLOCK : 3 * BLOCK] + bytes(17)
    assert b"/docs/a" not in after
    kept = {entry.name.split(".")[1] for entry in (lab.root / "damaged").iterdir()}
    assert kept == {"data", "sidecar", "twin"}


async def test_frames_after_a_damaged_one_are_used(lab: Lab) -> None:
    """The overwritten block's frame is the second one: with the first one's head gone, it alone tells its blocks."""
    places = await lab.places()
    flip(lab.sidecar(places[b"/docs/a"][1]), 160 + 60)
    report = await lab.repair()
    finding, xattrs = report.findings
    assert xattrs.what is What.XATTRS
    original = lab.content[b"/docs/a"]
    assert isinstance(original, bytes)
    content = (await lab.read())[finding.moved_to]
    assert isinstance(content, bytes)
    assert content[BLOCK : 2 * BLOCK] == original[BLOCK : 2 * BLOCK]
    assert "older version" in finding.action


async def test_a_header_is_no_reason_to_lose_a_place(lab: Lab) -> None:
    places = await lab.places()
    flip(places[b"/docs/b"][0], 35)
    report = await lab.repair()
    assert [f.action for f in report.findings] == ["every block of it is intact; written anew"]
    assert report.quarantine == b""
    assert not (lab.root / "damaged").exists()
    after = await lab.places()
    assert after[b"/docs/b"][0].stat().st_ino == after[b"/docs/deep/also-b"][0].stat().st_ino
    assert after[b"/docs/b"][0].stat().st_mtime_ns > 0


async def test_a_killed_volume_is_settled_first(lab: Lab) -> None:
    store = lab.store()
    volume = await lab.sample.open(store)
    attr, file = await volume.names.create(volume.root, b"new", 0o600, OWN)
    attr.inode.lookups += 1
    await file.write(0, b"acknowledged")
    await file.journal.fsync()
    await volume.files.sync_dirs(volume.root)
    await file.write(3 * BLOCK, b"not acknowledged")
    abandon(volume)
    store.close_store()
    report = await lab.check(deep=True)
    assert (report.result, report.left_clean) == ("clean", False)
    assert not report.damage
    repaired = await lab.repair(deep=True)
    assert not repaired.damage
    again = await lab.repair(deep=True)
    assert (again.result, again.left_clean, again.findings) == ("clean", True, [])
    content = (await lab.read())[b"/new"]
    assert isinstance(content, bytes)
    assert content.startswith(b"acknowledged")


async def test_repair_needs_the_volume_for_itself(lab: Lab) -> None:
    store = lab.store()
    volume = await lab.sample.open(store)
    try:
        with pytest.raises(VolumeBusy):
            await lab.repair()
        report = await lab.check(deep=True)
        assert (report.result, report.mounted) == ("clean", True)
    finally:
        await volume.close()
        store.close_store()


async def test_without_state_nothing_can_be_said(lab: Lab) -> None:
    """Until a repair has made it anew (`test_lost_state`)."""
    (lab.root / "state").unlink()
    with pytest.raises(VolumeDamaged):
        await lab.check()


async def test_a_file_being_written_is_not_damaged(lab: Lab) -> None:
    """Open in the mount, longer on disk than its sidecar says, blocks without records: busy, or settled and good."""
    store = lab.store()
    volume = await lab.sample.open(store)
    attr, file = await volume.names.create(volume.root, b"growing", 0o600, OWN)
    attr.inode.lookups += 1
    try:
        await file.write(0, random.Random(1).randbytes(5 * BLOCK))
        report = await lab.check(deep=True)
        assert (report.result, report.busy, report.findings) == ("clean", [b"/growing"], [])

        from cryptfs.ops.check import check_volume

        asked: list[bytes] = []

        async def settle(path: bytes) -> None:
            asked.append(path)
            await file.journal.fsync()

        report = await check_volume(lab.access, deep=True, settle=settle)
        assert (report.result, report.busy, asked) == ("clean", [], [b"/growing"])
        assert report.tally.files == 8
    finally:
        await volume.files.release(attr.inode)
        await volume.close()
        store.close_store()


async def test_damage_in_a_live_volume_is_damage(lab: Lab) -> None:
    from cryptfs.ops.check import check_volume

    places = await lab.places()
    flip(places[b"/docs/b"][0], 70)
    os.utime(places[b"/docs/b"][0], (0, 0))
    lab.sidecar(places[b"/docs/deep/c"][1]).unlink()
    (lab.tree / "stray").write_bytes(b"x")
    places[b"/link"][0].unlink()
    store = lab.store()
    volume = await lab.sample.open(store)

    async def settle(path: bytes) -> None:
        """The daemon was asked, and there was nothing to write."""

    try:
        report = await check_volume(lab.access, deep=True, settle=settle)
    finally:
        await volume.close()
        store.close_store()
    assert {(f.what.value, f.path) for f in report.damage} == {
        ("blocks", b"/docs/b"), ("file", b"/docs/deep/c"), ("stray", b"/stray"), ("missing", b"/link"),
    }  # fmt: skip
    assert report.busy == []


def test_a_tally_starts_again() -> None:
    tally = Tally("one", files=5, done_bytes=7, measured=True)
    tally.restart("two")
    assert tally == Tally("two")
