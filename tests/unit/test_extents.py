"""The extent map against a dict of blocks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cryptfs.blocks.extents import DURABLE, FRESH, HOME_DATA, HOME_TWIN, LOGGED, Extent, ExtentMap
from cryptfs.types import WRAPPED_BYTES

BLOCK_SIZE = 4096
BLOCKS = 24


def wrapped_for(version: int, block: int) -> bytes:
    return b"%08d%08d" % (version, block) + b"w" * (WRAPPED_BYTES - 16)


def tag_for(version: int, block: int) -> bytes:
    return b"%08d%08d" % (version, block)


def make(
    first: int, end: int, version: int, last_len: int = BLOCK_SIZE, home: int = HOME_DATA, stage: int = FRESH
) -> Extent:
    blocks = range(first, end)
    wrapped = b"".join(wrapped_for(version, block) for block in blocks)
    tags = b"".join(tag_for(version, block) for block in blocks)
    return Extent(first, end, version, last_len, home, 1, wrapped, tags, stage, generation=version)


Model = dict[int, tuple[int, int, int, int]]
"""Block -> (version, length, home, stage)."""


def seen(blocks: ExtentMap) -> Model:
    out: Model = {}
    for extent in blocks:
        for block in range(extent.first, extent.end):
            assert block not in out, "extents overlap"
            length = extent.last_len if block == extent.end - 1 else BLOCK_SIZE
            out[block] = (extent.version, length, extent.home, extent.stage)
            assert extent.wrapped_of(block) == wrapped_for(extent.version, block)
            assert extent.tag_of(block) == tag_for(extent.version, block)
    return out


def check(blocks: ExtentMap, model: Model) -> None:
    assert seen(blocks) == model
    firsts = [extent.first for extent in blocks]
    assert firsts == sorted(firsts)
    assert len(blocks) == len(firsts)
    assert all(extent.first < extent.end and extent.alive for extent in blocks)
    for block in range(BLOCKS + 2):
        extent = blocks.find(block)
        assert (extent is not None) == (block in model)
        assert extent is None or extent.first <= block < extent.end
    fresh = {block for extent in blocks.fresh() for block in range(extent.first, extent.end)}
    assert fresh == {block for block, (_, _, _, stage) in model.items() if stage == FRESH}
    unsettled = {block for extent in blocks.unsettled() for block in range(extent.first, extent.end)}
    assert unsettled == {block for block, (_, _, _, stage) in model.items() if stage != DURABLE}


spans = st.tuples(st.integers(0, BLOCKS - 1), st.integers(1, 8)).map(lambda s: (s[0], min(BLOCKS, s[0] + s[1])))
writes = st.tuples(
    st.just("write"), spans, st.integers(1, BLOCK_SIZE), st.sampled_from((HOME_DATA, HOME_TWIN)),
    st.sampled_from((FRESH, LOGGED, DURABLE)),
)  # fmt: skip
removals = st.tuples(st.just("remove"), spans)
steps = st.lists(st.one_of(writes, writes, removals, st.just(("settle",)), st.just(("log",))), max_size=30)


def removed_as_model(removed: list[Extent]) -> Model:
    gone = ExtentMap(BLOCK_SIZE)
    for extent in removed:
        gone.insert(extent)
    return seen(gone)


@given(steps)
def test_a_map_of_extents_is_a_dict_of_blocks(todo: list[tuple[object, ...]]) -> None:
    blocks, model = ExtentMap(BLOCK_SIZE), Model()
    for version, step in enumerate(todo, start=1):
        match step:
            case ("write", (int(first), int(end)), int(last_len), int(home), int(stage)):
                blocks.remove(first, end)
                blocks.insert(make(first, end, version, last_len, home, stage))
                for block in range(first, end):
                    model[block] = (version, last_len if block == end - 1 else BLOCK_SIZE, home, stage)
            case ("remove", (int(first), int(end))):
                expected = {block: model.pop(block) for block in range(first, end) if block in model}
                assert removed_as_model(blocks.remove(first, end)) == expected
            case ("settle",):
                blocks.settle()
                model = {block: (v, n, h, DURABLE) for block, (v, n, h, _) in model.items()}
            case _:
                for extent in blocks.fresh():
                    extent.stage = LOGGED
                model = {b: (v, n, h, LOGGED if s == FRESH else s) for b, (v, n, h, s) in model.items()}
        check(blocks, model)


@given(spans, spans)
def test_overlapping_gives_whole_extents_that_touch_the_range(written: tuple[int, int], asked: tuple[int, int]) -> None:
    blocks = ExtentMap(BLOCK_SIZE)
    blocks.insert(make(*written, version=1))
    hit = blocks.overlapping(*asked)
    touches = max(written[0], asked[0]) < min(written[1], asked[1])
    assert [(e.first, e.end) for e in hit] == ([written] if touches else [])


@given(spans, st.data())
def test_the_record_of_a_piece_is_that_of_its_blocks(written: tuple[int, int], data: st.DataObject) -> None:
    first, end = written
    whole = make(first, end, version=7, last_len=100)
    a = data.draw(st.integers(first, end - 1))
    b = data.draw(st.integers(a + 1, end))
    piece = whole.piece(a, b, BLOCK_SIZE)
    again = piece.piece(a, b, BLOCK_SIZE)
    for part in (piece, again):
        run = part.run()
        assert (run.first, run.count, run.version) == (a, b - a, 7)
        assert run.last_len == (100 if b == end else BLOCK_SIZE)
        assert run.wrapped == b"".join(wrapped_for(7, block) for block in range(a, b))
        assert run.tags == b"".join(tag_for(7, block) for block in range(a, b))


def test_what_was_cut_out_of_the_map_is_neither_fresh_nor_settled_with_it() -> None:
    blocks = ExtentMap(BLOCK_SIZE)
    old = make(0, 4, version=1)
    blocks.insert(old)
    removed = blocks.remove(1, 3)
    assert [(e.first, e.end) for e in removed] == [(1, 3)]
    assert not old.alive
    blocks.settle()
    assert [e.stage for e in blocks] == [DURABLE, DURABLE]
    assert removed[0].stage == FRESH


def test_a_short_last_block_stays_short_only_at_the_end() -> None:
    blocks = ExtentMap(BLOCK_SIZE)
    blocks.insert(make(0, 4, version=1, last_len=5))
    blocks.remove(1, 2)
    assert [(e.first, e.end, e.last_len) for e in blocks] == [(0, 1, BLOCK_SIZE), (2, 4, 5)]


@pytest.mark.parametrize("span", [(0, 0), (5, 5)])
def test_removing_nothing_changes_nothing(span: tuple[int, int]) -> None:
    blocks = ExtentMap(BLOCK_SIZE)
    blocks.insert(make(0, 10, version=1))
    assert blocks.remove(*span) == []
    assert len(blocks) == 1
