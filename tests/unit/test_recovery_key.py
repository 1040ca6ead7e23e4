"""Recovery keys as text: what their checks promise, by counter-example hunting and by going through all of it."""

from __future__ import annotations

import contextlib
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cryptfs.format import recovery_key
from cryptfs.format.recovery_key import GROUP_CHARS, GROUPS, KEY_BYTES, TEXT_CHARS, BadRecoveryKey, from_text, to_text

ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
KEYS = st.binary(min_size=KEY_BYTES, max_size=KEY_BYTES)
POSITIONS = st.integers(0, GROUPS * GROUP_CHARS - 1)


def plain(key: bytes) -> str:
    return to_text(key).replace("-", "")


@given(KEYS)
def test_what_is_written_is_read(key: bytes) -> None:
    text = to_text(key)
    assert len(text) == TEXT_CHARS
    assert [len(group) for group in text.split("-")] == [GROUP_CHARS] * GROUPS
    assert set(text) <= {*ALPHABET, "-"}
    assert from_text(text) == key


@given(KEYS, st.sampled_from(["", " ", "-", "\n", " - ", "–", "\t", "."]), st.booleans())
def test_case_separators_and_lookalikes_do_not_matter(key: bytes, separator: str, lower: bool) -> None:
    text = separator.join(to_text(key).split("-"))
    for look in ("OIL", "OLI", "oil"):
        typed = text.replace("0", look[0]).replace("1", look[1])
        assert from_text(typed.lower() if lower else typed) == key


@given(KEYS, POSITIONS, st.sampled_from(ALPHABET))
def test_any_single_wrong_character_is_found_and_its_group_named(key: bytes, at: int, wrong: str) -> None:
    text = plain(key)
    if text[at] == wrong:
        return
    with pytest.raises(BadRecoveryKey, match=rf"^group {at // GROUP_CHARS + 1} of 10 is not right"):
        from_text(text[:at] + wrong + text[at + 1 :])


@given(KEYS, POSITIONS, POSITIONS)
def test_any_two_characters_exchanged_are_found_and_their_groups_named(key: bytes, a: int, b: int) -> None:
    text = list(plain(key))
    if text[a] == text[b]:
        return
    text[a], text[b] = text[b], text[a]
    groups = sorted({a // GROUP_CHARS + 1, b // GROUP_CHARS + 1})
    with pytest.raises(BadRecoveryKey, match=" and ".join(map(str, groups)) + " of 10"):
        from_text("".join(text))


@given(KEYS, POSITIONS)
def test_a_missing_character_is_found_and_with_separators_its_group_named(key: bytes, at: int) -> None:
    text = plain(key)
    with pytest.raises(BadRecoveryKey, match="1 missing"):
        from_text(text[:at] + text[at + 1 :])
    number = at // GROUP_CHARS
    groups = to_text(key).split("-")
    groups[number] = groups[number][: at % GROUP_CHARS] + groups[number][at % GROUP_CHARS + 1 :]
    with pytest.raises(BadRecoveryKey, match=f"^group {number + 1} of 10 is not 5 characters long"):
        from_text("-".join(groups))


@given(KEYS, POSITIONS, st.sampled_from(ALPHABET))
def test_a_character_too_many_is_found(key: bytes, at: int, more: str) -> None:
    text = plain(key)
    with pytest.raises(BadRecoveryKey, match="1 too many"):
        from_text(text[:at] + more + text[at:])


@given(KEYS, st.integers(0, GROUPS - 1), st.integers(0, GROUPS - 1))
def test_groups_exchanged_repeated_or_left_out_are_found(key: bytes, a: int, b: int) -> None:
    groups = to_text(key).split("-")
    with pytest.raises(BadRecoveryKey, match="there are 9 groups"):
        from_text("-".join(groups[:a] + groups[a + 1 :]))
    if a == b:
        return
    with pytest.raises(BadRecoveryKey, match=f"^group {b + 1} of 10"):
        from_text("-".join([*groups[:b], groups[a], *groups[b + 1 :]]))
    exchanged = list(groups)
    exchanged[a], exchanged[b] = exchanged[b], exchanged[a]
    with pytest.raises(BadRecoveryKey, match=r"groups \d+ and \d+ of 10"):
        from_text("-".join(exchanged))


def test_in_one_group_every_single_error_and_every_exchange_is_found() -> None:
    """Through all: linear in GF(32), so the errors alone decide, not what they are added to."""
    weights = recovery_key._WEIGHTS
    assert all(recovery_key._times(error, weight) for error in range(1, 32) for weight in weights)
    for a, b in itertools.combinations(range(GROUP_CHARS), 2):
        for error in range(1, 32):
            assert recovery_key._times(error, weights[a]) != recovery_key._times(error, weights[b])


def test_multiplication_is_that_of_a_field() -> None:
    times = recovery_key._times
    for a in range(1, 32):
        assert sorted(times(a, b) for b in range(32)) == list(range(32))
        assert times(a, 1) == times(1, a) == a
    assert all(
        times(a, b ^ c) == times(a, b) ^ times(a, c) for a, b, c in itertools.product(range(32), range(32), range(32))
    )


@given(st.text(max_size=300))
def test_no_text_breaks_it(text: str) -> None:
    with contextlib.suppress(BadRecoveryKey):
        assert from_text(to_text(from_text(text))) == from_text(text)


@given(KEYS, POSITIONS)
def test_messages_quote_nothing_of_the_key(key: bytes, at: int) -> None:
    text = plain(key)
    with pytest.raises(BadRecoveryKey) as caught:
        from_text(text[:at] + "U" + text[at + 1 :])
    assert f"group {at // GROUP_CHARS + 1} has a character" in str(caught.value)
    assert not any(group in str(caught.value) for group in to_text(key).split("-"))


def test_known_answers() -> None:
    """The text form is for paper: it must never change."""
    assert to_text(bytes(KEY_BYTES)) == "00001-00002-00003-00004-00005-00006-00007-00008-00009-0000A"
    assert to_text(bytes(range(KEY_BYTES))) == KNOWN
    assert from_text(KNOWN) == bytes(range(KEY_BYTES))


KNOWN = "000G4-40R4F-0M30Y-E209X-185GE-R38EY-1W81B-24GK1-2GAHJ-C5RR3"


def test_keys_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match="25 bytes"):
        to_text(bytes(24))
