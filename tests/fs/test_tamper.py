"""Changes to the cipher directory of a volume that was left cleanly: the object concerned is damaged, nothing else is.

On the kernel's filesystem, with the files a stranger would touch.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from cryptfs.errors import Damaged, VolumeDamaged
from cryptfs.format.datafile import HEADER_BYTES
from cryptfs.fs.epoch import read_state
from cryptfs.store.local import LocalStore
from cryptfs.testing.volumes import SampleVolume
from tests.fs.tree import Tree, damage_of

BLOCK = 4096
CONTENT = {
    b"victim": b"V" * (5 * BLOCK + 100), b"other": b"O" * (5 * BLOCK + 100), b"small": b"S" * 10, b"empty": b"",
    b"d1/inner": b"I" * BLOCK, b"d2/inner": b"J" * BLOCK,
}  # fmt: skip
TARGET = b"where the link leads"


class Cipher:
    """The cipher directory of a volume with a few files, and which file on disk belongs to which."""

    def __init__(self, root: Path, tree: Tree) -> None:
        self.root = root
        self.tree = tree
        self.data: dict[bytes, Path] = {}
        self.ids: dict[bytes, bytes] = {}

    @classmethod
    async def make(cls, root: Path, store: LocalStore) -> Cipher:
        tree = await Tree.make(store)
        for name in (b"d1", b"d2", b"d3"):
            await tree.mkdir(name)
        for path, content in CONTENT.items():
            await tree.write(path, content)
        await tree.symlink(TARGET, b"link")
        # Some blocks of the victim have their home in the twin.
        file = await tree.open(b"victim")
        await file.journal.fsync()
        await file.write(BLOCK, b"V" * 2 * BLOCK)
        cipher = cls(root, tree)
        for path in [*CONTENT, b"link", b"d1", b"d2", b"d3"]:
            inode = await tree.inode(path)
            cipher.ids[path] = inode.log_id
            # An inode's way to its name in tree/.
            parts: list[str] = []
            while inode.path is not None:
                inode, below = inode.place()
                parts.insert(0, os.fsdecode(below))
            cipher.data[path] = root.joinpath("tree", *parts)
        await tree.unmount()
        return cipher

    def sidecar(self, path: bytes) -> Path:
        name = self.ids[path].hex()
        return self.root / "sidecars" / name[:2] / name

    def twin(self, path: bytes) -> Path:
        return self.sidecar(path).with_suffix(".twin")

    def log(self, path: bytes) -> Path:
        return self.data[path] / ".dir" if path else self.root / "tree/.dir"

    async def mount(self) -> None:
        await self.tree.mount()

    async def others_are_fine(self, *but: bytes) -> None:
        """Everything reads as it was written, except what is damaged; then the volume is left cleanly."""
        for path, content in CONTENT.items():
            if not any(path == b or path.startswith(b + b"/") for b in but):
                assert await self.tree.read(path) == content, path
        if b"link" not in but:
            assert await self.tree.readlink(b"link") == TARGET
        await self.tree.finish()


@pytest.fixture
async def cipher(tmp_path: Path) -> AsyncIterator[Cipher]:
    store = LocalStore(tmp_path)
    yield await Cipher.make(tmp_path, store)
    store.close_store()


def flip(path: Path, *offsets: int) -> None:
    """Change one bit at each place; a negative offset counts from the end."""
    raw = bytearray(path.read_bytes())
    for at in offsets:
        raw[at] ^= 0x10
    with path.open("r+b") as file:
        file.write(raw)


def swap(a: Path, b: Path) -> None:
    spare = a.with_name("spare")
    a.rename(spare)
    b.rename(a)
    spare.rename(b)


async def damage_of_reading(tree: Tree, path: bytes) -> str:
    return await damage_of(tree.read(path))


# data files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [0, 3, 5])
async def test_a_flipped_bit_costs_its_block_and_no_other(cipher: Cipher, block: int) -> None:
    flip(cipher.data[b"victim"], HEADER_BYTES + block * BLOCK + 7)
    await cipher.mount()
    assert await damage_of_reading(cipher.tree, b"victim") == "tag"
    file = await cipher.tree.open(b"victim")
    for other in range(6):
        if other == block:
            assert await damage_of(file.read(other * BLOCK, 1)) == "tag"
        else:
            part = CONTENT[b"victim"][other * BLOCK : (other + 1) * BLOCK]
            assert bytes(await file.read(other * BLOCK, BLOCK)) == part
    # What is damaged can be written anew, whole.
    await file.write(block * BLOCK, b"V" * min(BLOCK, len(CONTENT[b"victim"]) - block * BLOCK))
    await cipher.tree.remount()
    await cipher.others_are_fine()


async def test_a_flipped_bit_in_the_twin_costs_its_block(cipher: Cipher) -> None:
    flip(cipher.twin(b"victim"), BLOCK + 9)
    await cipher.mount()
    assert await damage_of_reading(cipher.tree, b"victim") == "tag"
    file = await cipher.tree.open(b"victim")
    assert await damage_of(file.read(BLOCK, 1)) == "tag"
    assert bytes(await file.read(2 * BLOCK, 3 * BLOCK + 100)) == CONTENT[b"victim"][2 * BLOCK :]
    await cipher.others_are_fine(b"victim")


async def test_a_block_put_in_anothers_place_is_refused(cipher: Cipher) -> None:
    raw = cipher.data[b"victim"].read_bytes()
    a, b = HEADER_BYTES + 3 * BLOCK, HEADER_BYTES + 4 * BLOCK
    cipher.data[b"victim"].write_bytes(raw[:a] + raw[b : b + BLOCK] + raw[a : a + BLOCK] + raw[b + BLOCK :])
    await cipher.mount()
    assert await damage_of_reading(cipher.tree, b"victim") == "tag"
    await cipher.others_are_fine(b"victim")


async def test_zeroed_blocks_are_no_holes(cipher: Cipher) -> None:
    with cipher.data[b"victim"].open("r+b") as file:
        file.seek(HEADER_BYTES)
        file.write(bytes(BLOCK))
    await cipher.mount()
    assert await damage_of_reading(cipher.tree, b"victim") == "tag"
    await cipher.others_are_fine(b"victim")


@pytest.mark.parametrize("keep", [0, 1, 63, HEADER_BYTES, HEADER_BYTES + 1, HEADER_BYTES + BLOCK, -1])
async def test_a_data_file_that_was_cut_is_damaged(cipher: Cipher, keep: int) -> None:
    path = cipher.data[b"victim"]
    os.truncate(path, keep if keep >= 0 else path.stat().st_size + keep)
    await cipher.mount()
    assert await damage_of_reading(cipher.tree, b"victim") in {"data-header", "size"}
    await cipher.others_are_fine(b"victim")


@pytest.mark.parametrize("more", [1, BLOCK])
async def test_a_data_file_that_was_lengthened_is_damaged(cipher: Cipher, more: int) -> None:
    for victim in (b"victim", b"empty"):
        with cipher.data[victim].open("ab") as file:
            file.write(bytes(more))
    await cipher.mount()
    for victim in (b"victim", b"empty"):
        assert await damage_of_reading(cipher.tree, victim) == "size"
    await cipher.others_are_fine(b"victim", b"empty")


@pytest.mark.parametrize("at", [0, 8, 23])
async def test_a_data_file_with_another_header_is_damaged(cipher: Cipher, at: int) -> None:
    flip(cipher.data[b"victim"], at)
    await cipher.mount()
    assert await damage_of_reading(cipher.tree, b"victim") in {"data-header", "id-mismatch"}
    await cipher.others_are_fine(b"victim")


async def test_two_data_files_that_changed_places_are_damaged(cipher: Cipher) -> None:
    swap(cipher.data[b"victim"], cipher.data[b"other"])
    await cipher.mount()
    for path in (b"victim", b"other"):
        assert await damage_of_reading(cipher.tree, path) == "id-mismatch"
    await cipher.others_are_fine(b"victim", b"other")


async def test_a_file_moved_to_another_directory_is_seen_there_no_more_than_here(cipher: Cipher) -> None:
    cipher.data[b"d1/inner"].rename(cipher.data[b"d3"] / cipher.data[b"d1/inner"].name)
    await cipher.mount()
    assert await damage_of(cipher.tree.lookup(b"d1/inner")) == "missing"
    assert await cipher.tree.names(b"d3") == []
    await cipher.others_are_fine(b"d1/inner")


async def test_the_content_of_a_file_that_was_replaced_is_not_served(cipher: Cipher) -> None:
    """An older copy of the data file, put back. (One of both files is for the agent's memory to find.)"""
    old_data = cipher.data[b"victim"].read_bytes()
    await cipher.mount()
    await cipher.tree.write(b"victim", b"n" * len(CONTENT[b"victim"]))
    await cipher.tree.unmount()
    assert cipher.data[b"victim"].read_bytes() != old_data
    cipher.data[b"victim"].write_bytes(old_data)
    await cipher.mount()
    assert await damage_of_reading(cipher.tree, b"victim") == "tag"
    await cipher.others_are_fine(b"victim")


@pytest.mark.parametrize("other", ["directory", "fifo", "symlink"])
async def test_a_file_that_became_something_else_is_damaged(cipher: Cipher, other: str) -> None:
    path = cipher.data[b"victim"]
    path.unlink()
    if other == "directory":
        path.mkdir()
    elif other == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to(cipher.data[b"other"])
    await cipher.mount()
    assert await damage_of(cipher.tree.lookup(b"victim")) == "exchanged"
    assert b"victim" in await cipher.tree.names()
    await cipher.others_are_fine(b"victim")


# sidecars --------------------------------------------------------------------------------------------------------


async def test_a_missing_sidecar_is_damage(cipher: Cipher) -> None:
    for path in (b"victim", b"link", b"empty"):
        cipher.sidecar(path).unlink()
    await cipher.mount()
    assert await damage_of_reading(cipher.tree, b"victim") == "missing-sidecar"
    assert await damage_of_reading(cipher.tree, b"empty") == "missing-sidecar"
    assert await damage_of(cipher.tree.readlink(b"link")) == "missing-sidecar"
    await cipher.others_are_fine(b"victim", b"link", b"empty")


async def test_a_missing_twin_costs_its_blocks(cipher: Cipher) -> None:
    cipher.twin(b"victim").unlink()
    await cipher.mount()
    with pytest.raises(Damaged):
        await cipher.tree.read(b"victim")
    await cipher.others_are_fine(b"victim")


async def test_two_sidecars_that_changed_places_are_damage(cipher: Cipher) -> None:
    swap(cipher.sidecar(b"victim"), cipher.sidecar(b"other"))
    await cipher.mount()
    for path in (b"victim", b"other"):
        assert await damage_of_reading(cipher.tree, path) == "id-mismatch"
    await cipher.others_are_fine(b"victim", b"other")


async def test_every_byte_of_a_small_files_sidecar_counts(cipher: Cipher) -> None:
    """All but the feet, which are hints."""
    path = cipher.sidecar(b"small")
    good = path.read_bytes()
    await cipher.mount()
    for at in range(0, len(good) - 8, 5):
        flip(path, at)
        # Where the damage shows is where it is: at the latest when the block is read.
        with pytest.raises(Damaged):
            await cipher.tree.read(b"small")
        path.write_bytes(good)
    assert await cipher.tree.read(b"small") == CONTENT[b"small"]
    await cipher.others_are_fine()


@pytest.mark.parametrize("keep", [0, 1, 159, 160, 200, 311, 330, -9])
async def test_a_sidecar_that_was_cut_is_damage(cipher: Cipher, keep: int) -> None:
    path = cipher.sidecar(b"small")
    os.truncate(path, keep if keep >= 0 else path.stat().st_size + keep)
    await cipher.mount()
    with pytest.raises(Damaged):
        await cipher.tree.read(b"small")
    await cipher.others_are_fine(b"small")


async def test_bytes_after_the_last_frame_are_damage(cipher: Cipher) -> None:
    with cipher.sidecar(b"victim").open("ab") as file:
        file.write(b"\0")
    await cipher.mount()
    assert await damage_of_reading(cipher.tree, b"victim") == "frame"
    await cipher.others_are_fine(b"victim")


async def test_a_sidecar_of_an_enormous_apparent_size_is_refused_quickly(cipher: Cipher) -> None:
    os.truncate(cipher.sidecar(b"victim"), 1 << 40)
    await cipher.mount()
    with pytest.raises((Damaged, OSError)):
        await cipher.tree.read(b"victim")
    await cipher.others_are_fine(b"victim")


async def test_damage_to_one_frame_of_many_costs_its_blocks(cipher: Cipher) -> None:
    await cipher.mount()
    file = await cipher.tree.open(b"other")
    await file.write(2 * BLOCK, b"o" * BLOCK)
    await cipher.tree.close(b"other")
    before = cipher.sidecar(b"other").stat().st_size
    file = await cipher.tree.open(b"other")
    await file.write(3 * BLOCK, b"p" * BLOCK)
    await cipher.tree.unmount()
    flip(cipher.sidecar(b"other"), before - 20)  # in the payload of the frame that named block 2
    await cipher.mount()
    file = await cipher.tree.open(b"other")
    assert await damage_of(file.read(2 * BLOCK, 1)) == "frame"
    assert bytes(await file.read(3 * BLOCK, BLOCK)) == b"p" * BLOCK
    assert bytes(await file.read(0, 2 * BLOCK)) == CONTENT[b"other"][: 2 * BLOCK]
    # And it can be written anew, and the file go on.
    await file.write(2 * BLOCK, b"q" * BLOCK)
    await file.write(0, b"first")
    await cipher.tree.remount()
    old = CONTENT[b"other"]
    expected = b"first" + old[5 : 2 * BLOCK] + b"q" * BLOCK + b"p" * BLOCK + old[4 * BLOCK :]
    assert await cipher.tree.read(b"other") == expected
    await cipher.others_are_fine(b"other")


async def test_what_is_written_after_a_cut_of_the_last_frame_is_not_lost(cipher: Cipher) -> None:
    await cipher.mount()
    file = await cipher.tree.open(b"other")
    await file.write(2 * BLOCK, b"o" * BLOCK)
    await cipher.tree.unmount()
    path = cipher.sidecar(b"other")
    os.truncate(path, path.stat().st_size - 30)
    await cipher.mount()
    file = await cipher.tree.open(b"other")
    try:
        await file.write(4 * BLOCK, b"p" * BLOCK)
    except Damaged:
        # Refused altogether is fine; served and then lost is not.
        pass
    else:
        await cipher.tree.remount()
        file = await cipher.tree.open(b"other")
        assert bytes(await file.read(4 * BLOCK, BLOCK)) == b"p" * BLOCK
    await cipher.others_are_fine(b"other")


# directories -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 12, 16, 40, 80, 160, 170, 250, 300, 330, 400, -20])
async def test_a_flipped_bit_in_a_directorys_log_costs_the_directory(cipher: Cipher, at: int) -> None:
    flip(cipher.log(b"d1"), at)
    await cipher.mount()
    with pytest.raises(Damaged):
        await cipher.tree.names(b"d1")
    with pytest.raises(Damaged):
        await cipher.tree.read(b"d1/inner")
    with pytest.raises(Damaged):
        await cipher.tree.create(b"d1/new")
    assert b"d1" in await cipher.tree.names()
    await cipher.others_are_fine(b"d1")


@pytest.mark.parametrize("keep", [None, 0, 100, 160, 300, 312, 330, -20])
async def test_a_directorys_log_that_is_cut_or_missing_is_damage(cipher: Cipher, keep: int | None) -> None:
    if keep is None:
        cipher.log(b"d1").unlink()
    else:
        os.truncate(cipher.log(b"d1"), keep if keep >= 0 else cipher.log(b"d1").stat().st_size + keep)
    await cipher.mount()
    with pytest.raises(Damaged):
        await cipher.tree.names(b"d1")
    await cipher.others_are_fine(b"d1")


async def test_the_log_of_another_directory_is_refused(cipher: Cipher) -> None:
    shutil.copyfile(cipher.log(b"d2"), cipher.log(b"d1"))
    await cipher.mount()
    assert await damage_of(cipher.tree.names(b"d1")) == "id-mismatch"
    await cipher.others_are_fine(b"d1")


async def test_two_directories_that_changed_places_are_damage(cipher: Cipher) -> None:
    swap(cipher.data[b"d1"], cipher.data[b"d2"])
    await cipher.mount()
    for path in (b"d1", b"d2"):
        assert await damage_of(cipher.tree.names(path)) == "id-mismatch"
    await cipher.others_are_fine(b"d1", b"d2")


async def test_two_names_that_were_exchanged_are_damage(cipher: Cipher) -> None:
    swap(cipher.data[b"small"], cipher.data[b"link"])
    await cipher.mount()
    for path in (b"small", b"link"):
        assert await damage_of(cipher.tree.lookup(path)) == "exchanged"
    await cipher.others_are_fine(b"small", b"link")


async def test_an_entry_that_was_removed_is_missed_and_one_that_was_added_is_not_shown(cipher: Cipher) -> None:
    shutil.copyfile(cipher.data[b"other"], cipher.root / "tree" / "AAAAAAAAAAAAAAAAAAAAAAAAAAA")
    (cipher.root / "tree/plain name").write_text("hello")
    cipher.data[b"small"].unlink()
    await cipher.mount()
    assert await cipher.tree.names() == sorted([b"victim", b"other", b"small", b"empty", b"link", b"d1", b"d2", b"d3"])
    assert await damage_of(cipher.tree.lookup(b"small")) == "missing"
    await cipher.others_are_fine(b"small")


async def test_a_removed_file_that_is_brought_back_stays_removed(cipher: Cipher) -> None:
    kept = {path: path.read_bytes() for path in (cipher.data[b"small"], cipher.sidecar(b"small"))}
    await cipher.mount()
    await cipher.tree.unlink(b"small")
    await cipher.tree.unmount()
    for path, raw in kept.items():
        path.write_bytes(raw)
    await cipher.mount()
    assert not await cipher.tree.exists(b"small")
    assert b"small" not in await cipher.tree.names()
    await cipher.others_are_fine(b"small")


async def test_an_old_incarnation_does_not_fit_a_new_file_of_the_same_name(cipher: Cipher) -> None:
    kept = {path: path.read_bytes() for path in (cipher.data[b"small"], cipher.sidecar(b"small"))}
    await cipher.mount()
    await cipher.tree.unlink(b"small")
    await cipher.tree.write(b"small", b"the new one")
    await cipher.tree.unmount()
    for path, raw in kept.items():
        path.write_bytes(raw)
    await cipher.mount()
    assert await damage_of_reading(cipher.tree, b"small") == "id-mismatch"
    await cipher.others_are_fine(b"small")


async def test_a_symlink_with_another_text_is_damage(cipher: Cipher) -> None:
    cipher.data[b"link"].unlink()
    cipher.data[b"link"].symlink_to("/etc/passwd")
    await cipher.mount()
    assert await damage_of(cipher.tree.lookup(b"link")) == "symlink"
    await cipher.others_are_fine(b"link")


# the volume ------------------------------------------------------------------------------------------------------


def zero(path: Path, first: int, count: int) -> None:
    with path.open("r+b") as file:
        file.seek(first)
        file.write(bytes(count))


SPOILERS: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "empty": lambda state: state.write_bytes(b""),
    "zeroed": lambda state: zero(state, 0, 1024),
    "too long": lambda state: state.write_bytes(state.read_bytes() + b"\0"),
    "slots exchanged": lambda state: state.write_bytes(state.read_bytes()[512:] + state.read_bytes()[:512]),
    "both flipped": lambda state: flip(state, 17, 512 + 17),
    "both MACs flipped": lambda state: flip(state, 511, 1023),
}


@pytest.mark.parametrize("spoil", SPOILERS)
async def test_a_volume_without_an_authentic_state_does_not_open(cipher: Cipher, spoil: str) -> None:
    good = (cipher.root / "state").read_bytes()
    SPOILERS[spoil](cipher.root / "state")
    with pytest.raises(VolumeDamaged):
        await cipher.mount()
    (cipher.root / "state").write_bytes(good)
    await cipher.mount()
    await cipher.others_are_fine()


@pytest.mark.parametrize("slot", [0, 1])
async def test_one_slot_of_the_state_is_enough(cipher: Cipher, slot: int) -> None:
    zero(cipher.root / "state", 512 * slot, 512)
    await cipher.mount()
    await cipher.others_are_fine()


async def test_the_state_of_another_volume_is_refused(cipher: Cipher, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("other")
    store = LocalStore(elsewhere)
    other = await Tree.make(store)
    await other.finish()
    store.close_store()
    sample = cipher.tree.sample
    assert (await read_state(cipher.tree.store, sample.keys(), sample.volume_id)).clean
    shutil.copyfile(elsewhere / "state", cipher.root / "state")
    # The same seed makes the same secrets: only the id that is asked for differs.
    with pytest.raises(VolumeDamaged):
        await read_state(cipher.tree.store, sample.keys(), bytes(16))
    with pytest.raises(VolumeDamaged):
        await read_state(cipher.tree.store, SampleVolume(seed=2).keys(), sample.volume_id)
