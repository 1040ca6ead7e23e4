"""Every kind of damage: it is named, a repair puts right what can be, a second one finds nothing, nothing gets lost."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from cryptfs.ops.check_report import Severity
from tests.check.lab import BLOCK, Damage, Lab, flip, summary, swap

Places = dict[bytes, tuple[Path, bytes]]


def block_flipped(lab: Lab, at: Places) -> None:
    flip(at[b"/docs/b"][0], 64 + 2 * BLOCK + 5)


def twin_flipped(lab: Lab, at: Places) -> None:
    flip(lab.sidecar(at[b"/docs/a"][1], ".twin"), BLOCK + 9)


def twin_gone(lab: Lab, at: Places) -> None:
    lab.sidecar(at[b"/docs/a"][1], ".twin").unlink()


def twin_cut(lab: Lab, at: Places) -> None:
    os.truncate(lab.sidecar(at[b"/docs/a"][1], ".twin"), BLOCK + 100)


def header_flipped(lab: Lab, at: Places) -> None:
    flip(at[b"/docs/a"][0], 40)


def header_zeroed(lab: Lab, at: Places) -> None:
    raw = bytearray(at[b"/docs/a"][0].read_bytes())
    raw[:64] = bytes(64)
    at[b"/docs/a"][0].write_bytes(raw)


def extended(lab: Lab, at: Places) -> None:
    with at[b"/docs/a"][0].open("ab") as file:
        file.write(b"more")


def cut_short(lab: Lab, at: Places) -> None:
    os.truncate(at[b"/docs/b"][0], 64 + 3 * BLOCK)


def cut_to_nothing(lab: Lab, at: Places) -> None:
    os.truncate(at[b"/docs/deep/c"][0], 0)


def sidecar_gone(lab: Lab, at: Places) -> None:
    lab.sidecar(at[b"/docs/deep/c"][1]).unlink()


def sidecar_header_flipped(lab: Lab, at: Places) -> None:
    flip(lab.sidecar(at[b"/docs/deep/c"][1]), 40)


def sidecar_payload_flipped(lab: Lab, at: Places) -> None:
    flip(lab.sidecar(at[b"/small"][1]), 160 + 152 + 30)


def sidecar_head_flipped(lab: Lab, at: Places) -> None:
    flip(lab.sidecar(at[b"/docs/a"][1]), 160 + 60)


def sidecar_cut(lab: Lab, at: Places) -> None:
    path = lab.sidecar(at[b"/docs/a"][1])
    os.truncate(path, path.stat().st_size - 20)


def sidecar_with_a_tail(lab: Lab, at: Places) -> None:
    with lab.sidecar(at[b"/docs/a"][1]).open("ab") as file:
        file.write(bytes(200))


def sidecars_exchanged(lab: Lab, at: Places) -> None:
    swap(lab.sidecar(at[b"/docs/a"][1]), lab.sidecar(at[b"/docs/b"][1]))


def sidecar_replaced_by_another(lab: Lab, at: Places) -> None:
    shutil.copyfile(lab.sidecar(at[b"/docs/b"][1]), lab.sidecar(at[b"/docs/a"][1]))


def entry_gone(lab: Lab, at: Places) -> None:
    at[b"/docs/deep/c"][0].unlink()


def entry_with_twin_gone(lab: Lab, at: Places) -> None:
    at[b"/docs/a"][0].unlink()


def one_name_gone(lab: Lab, at: Places) -> None:
    at[b"/docs/deep/also-b"][0].unlink()


def symlink_gone(lab: Lab, at: Places) -> None:
    at[b"/link"][0].unlink()


def symlink_replaced(lab: Lab, at: Places) -> None:
    at[b"/link"][0].unlink()
    at[b"/link"][0].symlink_to("/etc/passwd")


def symlink_sidecar_gone(lab: Lab, at: Places) -> None:
    lab.sidecar(at[b"/link"][1]).unlink()


def pipe_gone(lab: Lab, at: Places) -> None:
    at[b"/pipe"][0].unlink()


def directory_gone(lab: Lab, at: Places) -> None:
    shutil.rmtree(at[b"/docs/deep"][0])


def file_became_directory(lab: Lab, at: Places) -> None:
    at[b"/small"][0].unlink()
    at[b"/small"][0].mkdir()


def names_exchanged(lab: Lab, at: Places) -> None:
    swap(at[b"/docs/a"][0], at[b"/docs/b"][0])


def moved_to_another_directory(lab: Lab, at: Places) -> None:
    at[b"/docs/a"][0].rename(lab.tree / "x")


def directories_exchanged(lab: Lab, at: Places) -> None:
    # `docs/deep` and `small`: one becomes a directory where a file was, and the other way round.
    swap(at[b"/docs/deep"][0], at[b"/small"][0])


def directory_moved(lab: Lab, at: Places) -> None:
    at[b"/docs/deep"][0].rename(lab.tree / "elsewhere")


def deleted_file_back(lab: Lab, at: Places) -> None:
    shutil.copy2(at[b"/docs/b"][0], lab.tree / "again")


def foreign_file(lab: Lab, at: Places) -> None:
    (lab.tree / "notes.txt").write_text("written into the wrong directory")


def foreign_tree(lab: Lab, at: Places) -> None:
    (lab.tree / "dir" / "below").mkdir(parents=True)
    (lab.tree / "dir" / "below" / "file").write_bytes(b"x" * 5000)
    (lab.tree / "dir" / "to").symlink_to("below")


def hard_link_became_a_copy(lab: Lab, at: Places) -> None:
    path = at[b"/docs/deep/also-b"][0]
    raw = path.read_bytes()
    path.unlink()
    path.write_bytes(raw)


def hard_link_became_an_older_copy(lab: Lab, at: Places) -> None:
    hard_link_became_a_copy(lab, at)
    flip(at[b"/docs/deep/also-b"][0], 100)


def dir_log_gone(lab: Lab, at: Places) -> None:
    (at[b"/docs"][0] / ".dir").unlink()


def dir_log_flipped(lab: Lab, at: Places) -> None:
    flip(at[b"/docs"][0] / ".dir", 160 + 152 + 60)


def dir_log_cut(lab: Lab, at: Places) -> None:
    path = at[b"/docs"][0] / ".dir"
    os.truncate(path, path.stat().st_size - 30)


def dir_log_of_another(lab: Lab, at: Places) -> None:
    shutil.copyfile(at[b"/docs/deep"][0] / ".dir", at[b"/docs"][0] / ".dir")


def dir_logs_exchanged(lab: Lab, at: Places) -> None:
    swap(at[b"/docs/deep"][0] / ".dir", at[b"/docs"][0] / ".dir")


def root_log_flipped(lab: Lab, at: Places) -> None:
    flip(lab.tree / ".dir", 160 + 152 + 60)


def root_log_gone(lab: Lab, at: Places) -> None:
    (lab.tree / ".dir").unlink()


SEEN: list[tuple[Damage, str, set[str]]] = [
    (block_flipped, "blocks", set()),
    (twin_flipped, "blocks", set()),
    (twin_gone, "blocks", set()),
    (twin_cut, "blocks", set()),
    (header_flipped, "file", {"/docs/a"}),
    (header_zeroed, "file", {"/docs/a"}),
    (extended, "file", {"/docs/a"}),
    (cut_short, "file", set()),
    (cut_to_nothing, "file", set()),
    (sidecar_gone, "file", set()),
    (sidecar_header_flipped, "file", set()),
    (sidecar_payload_flipped, "blocks", set()),
    (sidecar_head_flipped, "blocks", set()),
    (sidecar_cut, "file", set()),
    (sidecar_with_a_tail, "file", set()),
    (sidecars_exchanged, "file", {"/docs/a", "/docs/b", "/docs/deep/also-b"}),
    (sidecar_replaced_by_another, "file", set()),
    (entry_gone, "missing", set()),
    (entry_with_twin_gone, "missing", set()),
    (one_name_gone, "missing", {"/docs/deep/also-b", "/docs/b"}),
    (symlink_gone, "missing", {"/link"}),
    (symlink_replaced, "exchanged", {"/link"}),
    (symlink_sidecar_gone, "symlink", set()),
    (pipe_gone, "missing", set()),
    (directory_gone, "missing", set()),
    (file_became_directory, "exchanged", set()),
    (names_exchanged, "exchanged", {"/docs/a", "/docs/b", "/docs/deep/also-b"}),
    (moved_to_another_directory, "stray", {"/docs/a"}),
    (directories_exchanged, "exchanged", {"/docs/deep", "/docs/deep/c", "/small"}),
    (directory_moved, "stray", {"/docs/deep", "/docs/deep/c"}),
    (deleted_file_back, "stray", set()),
    (foreign_file, "stray", set()),
    (foreign_tree, "stray", set()),
    (hard_link_became_a_copy, "duplicate", {"/docs/deep/also-b", "/docs/b"}),
    (hard_link_became_an_older_copy, "duplicate", set()),
    (dir_log_gone, "directory", set()),
    (dir_log_flipped, "directory", set()),
    (dir_log_cut, "directory", set()),
    (dir_log_of_another, "exchanged", set()),
    (dir_logs_exchanged, "exchanged", set()),
    (root_log_flipped, "directory", set()),
    (root_log_gone, "directory", set()),
]


@pytest.mark.parametrize(("damage", "what", "whole"), SEEN, ids=lambda value: getattr(value, "__name__", ""))
async def test_damage(damage: Damage, what: str, whole: set[str], lab: Lab) -> None:
    damage(lab, await lab.places())
    before = await lab.read()
    found = await lab.check(deep=True)
    assert found.result == "damaged"
    assert what in {finding.what.value for finding in found.damage}, summary(found.findings)

    repaired = await lab.repair(deep=True)
    assert repaired.result == "repaired", summary(repaired.damage)
    again = await lab.check(deep=True)
    assert again.result == "clean", summary(again.findings)
    assert not [f for f in again.findings if f.severity is not Severity.NOTICE], summary(again.findings)
    second = await lab.repair(deep=True)
    assert second.result == "clean", summary(second.findings)

    after = await lab.read()
    assert not [path for path, value in after.items() if isinstance(value, Exception)], after
    for shown in whole:
        assert after[os.fsencode(shown)] == lab.content[os.fsencode(shown)], shown
    contents = [value for value in after.values() if value]
    for path, value in before.items():
        # In its place or in the quarantine, what could be read can be read.
        assert isinstance(value, Exception) or after.get(path, ...) == value or value in contents, path
    for path, original in lab.content.items():
        # And what is in its place is what was written, never something else.
        if path in after:
            assert after[path] == original or path.startswith(b"/cryptfs-quarantine"), path
