"""Sealed names, and their names in `tree/`."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cryptfs.crypto.siv import NameCipher
from cryptfs.errors import Damaged
from cryptfs.names import is_long, sealed_from_tree, tree_name

KEY, DIR_ID = bytes(range(64)), b"D" * 16
ALPHABET = (string.ascii_letters + string.digits + "-_~").encode()

names = st.binary(min_size=1, max_size=255)


@given(names)
def test_a_name_comes_back_from_the_tree_or_from_the_log(name: bytes) -> None:
    cipher = NameCipher(KEY, DIR_ID)
    sealed = cipher.seal(name)
    assert len(sealed) == len(name) + 16
    assert cipher.open(sealed) == name
    below = tree_name(sealed)
    assert len(below) <= 255
    assert set(below) <= set(ALPHABET)
    assert sealed_from_tree(below) == (None if is_long(sealed) else sealed)
    assert is_long(sealed) == (len(name) > 175) == below.startswith(b"~")


@given(st.sets(names, min_size=2, max_size=6))
def test_different_names_stay_different(some: set[bytes]) -> None:
    cipher = NameCipher(KEY, DIR_ID)
    assert len({tree_name(cipher.seal(name)) for name in some}) == len(some)


@pytest.mark.parametrize("length", [175, 176, 255])
def test_the_longest_short_name_has_175_bytes(length: int) -> None:
    sealed = NameCipher(KEY, DIR_ID).seal(b"n" * length)
    assert len(tree_name(sealed)) == (255 if length == 175 else 44)


@given(st.binary(min_size=1, max_size=255))
def test_what_is_no_name_of_ours_is_no_sealed_name(name: bytes) -> None:
    sealed = sealed_from_tree(name)
    assert sealed is None or tree_name(sealed) == name


@pytest.mark.parametrize(
    "name", [b".dir", b".dir.new", b"~abc", b"a", b"AA==", b"A+/A", b"AB", b"AA\n", b"\xff\xff", b"AA A"]
)
def test_names_with_another_spelling_are_not_ours(name: bytes) -> None:
    assert sealed_from_tree(name) is None


@pytest.mark.parametrize("change", ["key", "directory", "bit", "cut", "longer", "tiny"])
def test_a_sealed_name_is_bound_to_its_directory(change: str) -> None:
    sealed = NameCipher(KEY, DIR_ID).seal(b"secret")
    key = bytes(64) if change == "key" else KEY
    dir_id = b"E" * 16 if change == "directory" else DIR_ID
    changed = {
        "bit": bytes([sealed[0] ^ 1]) + sealed[1:], "cut": sealed[:-1], "longer": sealed + b"\0", "tiny": b"x",
    }.get(change, sealed)  # fmt: skip
    with pytest.raises(Damaged) as caught:
        NameCipher(key, dir_id).open(changed)
    assert caught.value.reason == "name"
