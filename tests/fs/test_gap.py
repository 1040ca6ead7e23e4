"""A damaged head in the middle of a sidecar costs what the lost frame alone knew, and never yields an older state."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from cryptfs.errors import Damaged
from cryptfs.format.log import FOOT_BYTES, HEADER_BYTES, Head
from cryptfs.fs.sealed_log import parse
from cryptfs.store.local import LocalStore
from tests.fs.tree import Tree, damage_of

BLOCK = 4096
BLOCKS = 8


def blocks_of(seed: int, count: int = 1) -> bytes:
    return random.Random(seed).randbytes(count * BLOCK)


class Lab:
    """One file whose sidecar has a frame for each of several writes, left clean."""

    def __init__(self, root: Path, tree: Tree) -> None:
        self.root = root
        self.tree = tree
        self.content = b""
        self.sidecar = root

    @classmethod
    async def make(cls, root: Path, store: LocalStore) -> Lab:
        lab = cls(root, await Tree.make(store))
        await lab.tree.write(b"file", blocks_of(0, BLOCKS))
        lab.content = blocks_of(0, BLOCKS)
        name = (await lab.tree.inode(b"file")).log_id.hex()
        lab.sidecar = root / "sidecars" / name[:2] / name
        for block in (1, 3, 5):
            await lab.put(block, blocks_of(block))
        return lab

    async def put(self, block: int, data: bytes, *, sync: bool = True) -> None:
        """A write with a frame of its own."""
        file = await self.tree.open(b"file")
        await file.write(block * BLOCK, data)
        if sync:
            await file.journal.fsync()
        await self.tree.close(b"file")
        at = block * BLOCK
        self.content = self.content[:at].ljust(at, b"\0") + data + self.content[at + len(data) :]

    async def cut(self, size: int) -> None:
        file = await self.tree.open(b"file")
        await file.truncate(size)
        await file.journal.fsync()
        await self.tree.close(b"file")
        self.content = self.content[:size].ljust(size, b"\0")

    async def again(self) -> None:
        await self.tree.unmount()
        await self.tree.mount()

    async def crash(self) -> None:
        """As kill -9 leaves it, mounted anew."""
        self.tree.kill()
        await self.tree.mount()

    def frames(self) -> list[tuple[Head, int, int]]:
        """(head, start, end) of each, while none is damaged."""
        replayed = parse(self.sidecar.read_bytes())
        assert not replayed.tail
        return list(zip(replayed.heads, [HEADER_BYTES, *replayed.ends], replayed.ends, strict=False))

    def damage(self, start: int) -> None:
        """The head of the frame that starts there."""
        raw = bytearray(self.sidecar.read_bytes())
        raw[start + 40] ^= 1
        self.sidecar.write_bytes(raw)

    async def damaged_blocks(self) -> set[int]:
        """Those that give EIO; the others must be as they were written."""
        file = await self.tree.open(b"file")
        bad = set()
        try:
            await file.journal.load()
            for block in range(-(-len(self.content) // BLOCK)):
                try:
                    got = await file.read(block * BLOCK, BLOCK)
                except Damaged:
                    bad.add(block)
                    continue
                assert got == self.content[block * BLOCK :][:BLOCK], f"block {block}"
            assert file.size == len(self.content)
        finally:
            await self.tree.close(b"file")
        return bad


def unknown_behind(frames: list[tuple[Head, int, int]]) -> set[int]:
    """Blocks that none of these frames states, of those the file had by the first. (Each names one range here.)"""
    stated = {block for head, _, _ in frames for block in range(head.first, head.end)}
    return set(range(-(-frames[0][0].size // BLOCK))) - stated


@pytest.fixture
async def lab(local: LocalStore, tmp_path: Path) -> Lab:
    return await Lab.make(tmp_path, local)


@pytest.mark.parametrize("which", [0, 1, 2])
async def test_it_costs_what_no_later_frame_states(lab: Lab, which: int) -> None:
    await lab.tree.unmount()
    frames = lab.frames()
    behind = next(i for i, (head, _, _) in enumerate(frames) if head.first >= 2 * which)
    lab.damage(frames[behind][1])
    lost = unknown_behind(frames[behind + 1 :])
    assert len(lost) == (5, 7, 8)[which]
    await lab.tree.mount()
    assert await lab.damaged_blocks() == lost
    # What is written anew is there again, the rest stays lost, and the log goes on.
    healed = min(lost)
    await lab.put(healed, blocks_of(100))
    await lab.again()
    assert await lab.damaged_blocks() == lost - {healed}
    for block in lost:
        await lab.put(block, blocks_of(200 + block))
    await lab.again()
    assert await lab.damaged_blocks() == set()
    await lab.tree.finish()


async def test_it_can_be_cut_to_nothing_and_grown_and_is_whole_again(lab: Lab) -> None:
    await lab.tree.unmount()
    lab.damage(lab.frames()[1][1])
    await lab.tree.mount()
    assert await lab.damaged_blocks()
    await lab.cut(0)
    await lab.cut(3 * BLOCK + 7)
    assert await lab.damaged_blocks() == set()
    await lab.again()
    assert await lab.damaged_blocks() == set()
    await lab.tree.finish()


async def test_a_cut_before_the_gap_is_not_undone(lab: Lab) -> None:
    """What the lost frame cut away does not come back as content, nor as zeros that nobody wrote."""
    await lab.cut(2 * BLOCK + 5)
    lost = lab.frames()[-1]
    await lab.cut(6 * BLOCK)
    await lab.put(6, blocks_of(60))
    await lab.tree.unmount()
    lab.damage(lost[1])
    await lab.tree.mount()
    assert await lab.damaged_blocks() == set(range(6))
    await lab.tree.finish()


async def test_two_gaps(lab: Lab) -> None:
    await lab.tree.unmount()
    frames = lab.frames()
    touching = [i for i, (head, _, _) in enumerate(frames) if head.end]
    lab.damage(frames[touching[0]][1])
    lab.damage(frames[touching[2]][1])
    await lab.tree.mount()
    assert await lab.damaged_blocks() == unknown_behind(frames[touching[2] + 1 :])
    await lab.tree.finish()


async def test_the_last_head_costs_the_file(lab: Lab) -> None:
    await lab.tree.unmount()
    lab.damage(lab.frames()[-1][1])
    await lab.tree.mount()
    assert await damage_of(lab.damaged_blocks()) == "frame"
    await lab.tree.finish()


async def test_anything_after_the_last_frame_costs_the_file(lab: Lab) -> None:
    await lab.tree.unmount()
    lab.damage(lab.frames()[1][1])
    lab.sidecar.write_bytes(lab.sidecar.read_bytes() + b"CFF1")
    await lab.tree.mount()
    assert await damage_of(lab.damaged_blocks()) == "frame"
    await lab.tree.finish()


@pytest.mark.parametrize("older", [0, 1, -2])
async def test_an_older_frame_behind_a_gap_is_not_taken_up(lab: Lab, older: int) -> None:
    await lab.tree.unmount()
    frames, raw = lab.frames(), lab.sidecar.read_bytes()
    _, start, end = frames[older]
    lab.sidecar.write_bytes(raw + b"gap" + raw[start:end])
    await lab.tree.mount()
    assert await damage_of(lab.damaged_blocks()) == "frame"
    await lab.tree.finish()


async def test_frames_left_out_are_a_gap(lab: Lab) -> None:
    await lab.tree.unmount()
    frames, raw = lab.frames(), lab.sidecar.read_bytes()
    lab.sidecar.write_bytes(raw[: frames[1][1]] + raw[frames[1][2] :])
    await lab.tree.mount()
    assert await lab.damaged_blocks() == unknown_behind(frames[2:])
    await lab.tree.finish()


async def test_what_was_acknowledged_behind_a_gap_survives_a_crash(lab: Lab) -> None:
    await lab.tree.unmount()
    frames = lab.frames()
    lab.damage(frames[1][1])
    lost = unknown_behind(frames[2:])
    await lab.tree.mount()
    first, second = sorted(lost)[:2]
    await lab.put(first, blocks_of(100))
    await lab.crash()
    assert await lab.damaged_blocks() == lost - {first}
    await lab.put(second, blocks_of(101))
    await lab.crash()
    await lab.crash()
    assert await lab.damaged_blocks() == lost - {first, second}
    await lab.tree.finish()


async def test_a_torn_frame_behind_a_gap_is_dropped(lab: Lab) -> None:
    await lab.tree.unmount()
    frames = lab.frames()
    lab.damage(frames[1][1])
    await lab.tree.mount()
    before, healed = lab.content, min(unknown_behind(frames[2:]))
    await lab.put(healed, blocks_of(100))
    acknowledged, size = lab.content, lab.sidecar.stat().st_size
    file = await lab.tree.open(b"file")
    await file.write(0, blocks_of(102))
    await file.journal.commit()
    lab.tree.kill()
    raw = lab.sidecar.read_bytes()
    assert len(raw) > size
    lab.sidecar.write_bytes(raw[: size + (len(raw) - size) // 2])
    lab.content = acknowledged
    await lab.tree.mount()
    assert await lab.damaged_blocks() == unknown_behind(frames[2:]) - {healed}
    assert before != acknowledged
    await lab.tree.finish()


async def test_a_later_crash_does_not_excuse_it(lab: Lab) -> None:
    """The frames are of an epoch that ended cleanly, but nobody synced them by themselves: none may be given up."""
    await lab.again()
    for block in (8, 9, 10):
        await lab.put(block, blocks_of(block), sync=False)
    await lab.again()
    frames = lab.frames()
    await lab.crash()  # of an epoch in which the file was not touched
    lab.tree.kill()
    lab.damage(next(start for head, start, _ in frames if head.first == 9))
    await lab.tree.mount()
    assert await lab.damaged_blocks() == set(range(10))
    await lab.tree.finish()


async def test_nor_in_a_directory(lab: Lab) -> None:
    """What a directory's lost frame named is not silently left out: all of it is damaged."""
    await lab.tree.mkdir(b"d")
    await lab.again()
    for name in (b"d/a", b"d/b", b"d/c"):
        await lab.tree.mkdir(name)
    await lab.again()
    inode = await lab.tree.inode(b"d")
    path = lab.root / "tree" / os.fsdecode(inode.place()[1]) / ".dir"
    await lab.crash()
    lab.tree.kill()
    raw = bytearray(path.read_bytes())
    raw[parse(bytes(raw)).ends[-3] + 40] ^= 1
    path.write_bytes(raw)
    await lab.tree.mount()
    assert await damage_of(lab.tree.names(b"d")) == "dir-log"
    await lab.tree.finish()


@pytest.mark.parametrize("seed", range(12))
async def test_whatever_happened_before(lab: Lab, seed: int) -> None:
    """A random history, some heads damaged, then more of it: what is served is what was written."""
    rng = random.Random(seed)
    for round_ in range(3):
        for step in range(rng.randrange(2, 7)):
            if rng.random() < 0.25 and not round_:
                await lab.cut(rng.randrange(1, 10 * BLOCK))
            elif rng.random() < 0.2:
                await lab.again()
            else:
                await lab.put(rng.randrange(BLOCKS), blocks_of(1000 * round_ + step))
        await lab.tree.unmount()
        if round_ == 0:
            frames = lab.frames()
            for _, start, _ in rng.sample(frames[:-1], min(len(frames) - 1, rng.choice((1, 1, 2)))):
                lab.damage(start)
            if rng.random() < 0.3:
                raw = lab.sidecar.read_bytes()
                at = rng.choice(frames[:-1])[1]
                lab.sidecar.write_bytes(raw[:at] + bytes(100 + FOOT_BYTES) + raw[at + 100 + FOOT_BYTES :])
        await lab.tree.mount()
        if rng.random() < 0.5:
            await lab.crash()
        await lab.damaged_blocks()
    await lab.tree.finish()
