"""`check --accept` without a mount: what the owner did on purpose is right again, and nothing else is."""

from __future__ import annotations

from pathlib import Path

import pytest

from cryptfs.errors import Damaged, RolledBack, UsageError
from cryptfs.format.state import State
from cryptfs.fs.epoch import read_state
from cryptfs.ops.accept import Outcome, accept_paths, accept_volume, rebased
from cryptfs.ops.offline import Access
from cryptfs.ports import Store
from cryptfs.store.local import LocalStore
from cryptfs.testing.freshness import FakeRecord
from cryptfs.types import DELETED
from tests.fs.test_freshness import NEW, Copy, Seen, seen  # noqa: F401 - a fixture
from tests.fs.test_tamper import CONTENT
from tests.fs.tree import damage_of


@pytest.fixture
async def vault(seen: Seen) -> Seen:  # noqa: F811
    return seen


def access_to(vault: Seen) -> Access:
    def close(store: Store) -> None:
        assert isinstance(store, LocalStore)
        store.close_store()

    # The tree's own store holds the volume's lock for as long as it is open.
    assert isinstance(vault.tree.store, LocalStore)
    vault.tree.store.close_store()
    sample = vault.tree.sample
    return Access(
        sample.config, lambda: LocalStore(vault.root), close, sample.keys(), sample.clock, sample.random
    )  # fmt: skip


async def accept(vault: Seen, *paths: bytes) -> Outcome:
    try:
        return await accept_paths(access_to(vault), list(paths))
    finally:
        vault.tree.store = LocalStore(vault.root)


def said(outcome: Outcome) -> set[tuple[bytes, str]]:
    return {(change.path, change.what) for change in outcome.accepted}


async def finish(vault: Seen, *but: bytes) -> None:
    await vault.others_are_fine(*but)
    assert isinstance(vault.tree.store, LocalStore)
    vault.tree.store.close_store()


async def test_an_older_file(vault: Seen, tmp_path: Path) -> None:
    old = Copy(vault.files_of(b"victim"), tmp_path / "old")
    await vault.rewrite(b"victim")
    old.put_back()
    outcome = await accept(vault, b"/victim")
    assert said(outcome) == {(b"/victim", "older")}
    assert outcome.refused == []
    await vault.mount()
    assert await vault.tree.read(b"victim") == CONTENT[b"victim"]
    # It is on the record: what was newer may come back, what is older may not.
    await vault.tree.write(b"victim", NEW)
    await vault.tree.unmount()
    old.put_back()
    await vault.mount()
    assert await damage_of(vault.tree.read(b"victim")) == "rolled-back"
    await finish(vault, b"victim")


async def test_nothing_to_accept(vault: Seen) -> None:
    before = dict(vault.record.floors)
    outcome = await accept(vault, b"/victim", b"/d1")
    assert outcome == Outcome()
    assert {log_id: vault.record.floors[log_id] for log_id in before} == before
    with pytest.raises(UsageError, match="no /missing"):
        await accept(vault, b"/missing")
    await vault.mount()
    await finish(vault)


async def test_damage_is_never_accepted(vault: Seen, tmp_path: Path) -> None:
    old = Copy(vault.files_of(b"victim"), tmp_path / "old")
    await vault.rewrite(b"victim")
    old.put_back()
    raw = bytearray(vault.sidecar(b"victim").read_bytes())
    raw[200] ^= 1
    vault.sidecar(b"victim").write_bytes(raw)
    outcome = await accept(vault, b"/victim")
    assert outcome.accepted == []
    assert [change.path for change in outcome.refused] == [b"/victim"]
    await vault.mount()
    assert await damage_of(vault.tree.read(b"victim")) == "rolled-back"
    await finish(vault, b"victim")


async def test_a_file_removed_below(vault: Seen) -> None:
    for path in vault.files_of(b"small"):
        path.unlink(missing_ok=True)
    outcome = await accept(vault, b"/small")
    assert said(outcome) == {(b"/small", "removed")}
    await vault.mount()
    assert b"small" not in await vault.tree.names()
    await finish(vault, b"small")


async def test_a_deleted_file_put_back(vault: Seen, tmp_path: Path) -> None:
    old = Copy(vault.files_of(b"victim"), tmp_path / "old")
    await vault.mount()
    await vault.tree.unlink(b"victim")
    await vault.tree.unmount()
    assert vault.record.floor(vault.ids[b"victim"]) == DELETED
    old.put_back()
    outcome = await accept(vault, b"/victim")
    assert said(outcome) == {(b"/victim", "added"), (b"/victim", "deleted")}
    await vault.mount()
    await finish(vault)


async def test_an_older_directory_with_all_below(vault: Seen, tmp_path: Path) -> None:
    await vault.mount()
    await vault.tree.write(b"d1/gone", b"1")
    log_id = (await vault.tree.inode(b"d1/gone")).log_id
    vault.tree.forget_all()
    await vault.tree.unmount()
    sidecar = vault.root / "sidecars" / log_id.hex()[:2] / log_id.hex()
    old = Copy([*vault.files_of(b"d1"), vault.sidecar(b"d1/inner"), sidecar], tmp_path / "old")
    await vault.mount()
    await vault.tree.unlink(b"d1/gone")
    await vault.tree.write(b"d1/inner", NEW)
    await vault.tree.unmount()
    old.put_back()
    with pytest.raises(Damaged, match="rolled-back: /d1; accept that first"):
        await accept(vault, b"/d1/inner")
    outcome = await accept(vault, b"/d1")
    assert said(outcome) == {(b"/d1", "older"), (b"/d1/inner", "older"), (b"/d1/gone", "deleted")}
    await vault.mount()
    assert await vault.tree.read(b"d1/gone") == b"1"
    await finish(vault)


async def test_the_whole_volume(vault: Seen, tmp_path: Path) -> None:
    old = Copy([vault.root / name for name in ("state", "volume", "tree", "sidecars", "tmp")], tmp_path / "old")
    await vault.rewrite(b"victim")
    await vault.rewrite(b"small")
    newer = Copy([vault.root / name for name in ("state", "tree", "sidecars")], tmp_path / "newer")
    seen_before = vault.record.state_sequence
    old.put_back()
    with pytest.raises(RolledBack):
        await vault.mount()
    access = access_to(vault)

    async def tell(state_sequence: int) -> tuple[int, int]:
        before = vault.record
        vault.record = FakeRecord()
        vault.record.state_sequence = state_sequence
        return before.state_sequence, max(before.floors.values()) >> 40

    state = await accept_volume(access, tell)
    assert state.sequence > seen_before
    vault.tree.store = LocalStore(vault.root)
    assert await read_state(vault.tree.store, vault.tree.sample.keys(), vault.tree.sample.volume_id) == state
    await vault.mount()
    assert vault.tree.volume.ctx.state is not None
    assert vault.tree.volume.ctx.state.epoch == state.epoch + 1
    await vault.others_are_fine()
    # The history that was given up is not newer than what was accepted.
    newer.put_back()
    vault.tree.store.close_store()
    vault.tree.store = LocalStore(vault.root)
    with pytest.raises(RolledBack):
        await vault.mount()
    vault.tree.store.close_store()


@pytest.mark.parametrize("sequence", [0, 7, 8, 9])
@pytest.mark.parametrize("clean", [True, False])
def test_a_rebased_state_goes_on_after_all_that_was_seen(sequence: int, clean: bool) -> None:
    before = State(sequence=7, epoch=3, clean=clean, unclean=((1, 1),))
    after = rebased(before, sequence, epoch=9)
    assert after.sequence > max(7, sequence)
    assert after.slot != before.slot, "the slot that counts is not overwritten"
    assert (after.epoch, after.clean) == (9, True)
    assert after.is_unclean(1)
    assert after.is_unclean(3) is not clean
