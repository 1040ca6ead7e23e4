"""The `state` file's slots."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cryptfs.errors import VolumeDamaged
from cryptfs.format.state import RANGES_MAX, SIGNED_BYTES, SLOT_BYTES, Slot, State, decode_slot
from cryptfs.types import EPOCH_MAX

MAC = b"m" * 32
WRAPPED = b"w" * 40


def slot_of(state: State, kek_version: int = 7) -> Slot:
    return Slot(state, kek_version, WRAPPED, MAC)


def encoded(slot: Slot) -> bytes:
    return slot.signed() + slot.mac


@st.composite
def ranges(draw: st.DrawFn) -> tuple[tuple[int, int], ...]:
    steps = draw(st.lists(st.tuples(st.integers(2, 50), st.integers(0, 5)), max_size=RANGES_MAX))
    out: list[tuple[int, int]] = []
    at = 0
    for gap, length in steps:
        first = at + gap
        at = first + length
        out.append((first, at))
    return tuple(out)


states = st.builds(State, st.integers(0, 2**64 - 1), st.integers(0, EPOCH_MAX), st.booleans(), ranges())


@given(states)
def test_a_slot_comes_back(state: State) -> None:
    data = encoded(slot_of(state))
    assert len(data) == SLOT_BYTES
    assert decode_slot(data) == slot_of(state)


def test_a_slot_is_the_formats_bytes() -> None:
    state = State(2, 3, True, ((1, 1),))
    expected = b"CFSTATE1" + bytes(7) + b"\2" + b"\0\0\0\3" + b"\1\1\0\0" + b"\0\0\0\1\0\0\0\1"
    assert slot_of(state).signed() == expected.ljust(424, b"\0") + b"\0\0\0\7" + WRAPPED + bytes(12)


@pytest.mark.parametrize("at", [*range(8), 20, 21, 22, 23, *range(32, 424, 37), *range(468, SIGNED_BYTES)])
def test_no_byte_is_free(at: int) -> None:
    data = bytearray(encoded(slot_of(State(2, 3, True, ((1, 1),)))))
    data[at] ^= 0x44
    assert decode_slot(bytes(data)) is None


@given(st.binary(max_size=600))
def test_rubbish_is_no_slot(data: bytes) -> None:
    assert decode_slot(data) is None


@pytest.mark.parametrize(
    "bad",
    [
        State(1, EPOCH_MAX + 1, False),
        State(1, 9, False, ((3, 2),)),
        State(1, 9, False, ((1, 2), (3, 4))),
        State(1, 9, False, ((5, 6), (1, 2))),
        State(1, 200, False, tuple((i * 2, i * 2) for i in range(RANGES_MAX + 1))),
    ],
    ids=["epoch", "backwards", "touching", "descending", "too many"],
)
def test_what_no_writer_writes_is_no_slot(bad: State) -> None:
    assert decode_slot(slot_of(bad).signed()[:SIGNED_BYTES] + MAC) is None


def test_a_key_is_under_some_kek() -> None:
    assert decode_slot(encoded(slot_of(State(2, 3, True), kek_version=0))) is None


def test_slots_take_turns() -> None:
    state = State(7, 1, True)
    opened = state.next_epoch()
    closed = opened.ended()
    assert [s.slot for s in (state, opened, closed)] == [1, 0, 1]
    assert (opened.epoch, opened.clean, closed.epoch, closed.clean) == (2, False, 2, True)


def test_an_epoch_that_did_not_end_cleanly_is_remembered() -> None:
    state = State(0, 4, False)
    after = state.next_epoch()
    assert after.unclean == ((4, 4),)
    assert after.next_epoch().unclean == ((4, 5),)
    assert after.ended().next_epoch().next_epoch().unclean == ((4, 4), (6, 6))


@given(st.lists(st.booleans(), max_size=300))
def test_unclean_epochs_are_never_forgotten_whatever_is_merged(clean: list[bool]) -> None:
    state = State(0, 0, True)
    unclean: set[int] = set()
    for ends_cleanly in clean:
        state = state.next_epoch()
        assert not state.is_unclean(state.epoch)
        if ends_cleanly:
            state = state.ended()
        else:
            unclean.add(state.epoch)
    state = state.next_epoch()
    assert all(state.is_unclean(epoch) for epoch in unclean)
    if len(unclean) <= RANGES_MAX:
        assert not any(state.is_unclean(epoch) for epoch in set(range(state.epoch)) - unclean)
    assert decode_slot(encoded(slot_of(state))) == slot_of(state)


def test_over_the_limit_the_nearest_two_ranges_become_one() -> None:
    state = State(0, 0, True)
    for _ in range(RANGES_MAX + 3):
        state = state.next_epoch().next_epoch().ended()  # every other epoch ends uncleanly
    assert len(state.unclean) == RANGES_MAX
    assert decode_slot(encoded(slot_of(state))) is not None


def test_epochs_run_out_with_an_error() -> None:
    with pytest.raises(VolumeDamaged):
        State(0, EPOCH_MAX, True).next_epoch()
