"""The Secret type: usable, wipeable, and never printed, copied or pickled."""

from __future__ import annotations

import copy
import gc
import pickle
import traceback

import pytest

from cryptfs.crypto.secret import Secret

CONTENT = b"correct horse battery staple"


def test_view_shows_the_bytes_and_cannot_write_them() -> None:
    secret = Secret.of(CONTENT)
    assert secret.view() == CONTENT
    assert len(secret) == len(CONTENT)
    assert secret.view().readonly


def test_it_owns_the_buffer_it_is_given() -> None:
    buffer = bytearray(CONTENT)
    secret = Secret(buffer)
    secret.wipe()
    assert buffer == bytes(len(CONTENT))


def test_wipe_reaches_a_view_handed_out_before_and_refuses_new_ones() -> None:
    secret = Secret.of(CONTENT)
    view = secret.view()
    secret.wipe()
    secret.wipe()
    assert view == bytes(len(CONTENT))
    assert secret.wiped
    with pytest.raises(ValueError, match="wiped"):
        secret.view()


def test_leaving_the_block_wipes_also_by_an_exception() -> None:
    buffer = bytearray(CONTENT)
    with pytest.raises(KeyError), Secret(buffer):
        raise KeyError
    assert buffer == bytes(len(CONTENT))


def test_collection_wipes() -> None:
    buffer = bytearray(CONTENT)
    secret = Secret(buffer)
    del secret
    gc.collect()
    assert buffer == bytes(len(CONTENT))


def test_no_text_of_it_holds_the_content() -> None:
    secret = Secret.of(CONTENT)
    texts = [repr(secret), str(secret), f"{secret}", f"{secret!r:>80}"[:200], repr([secret]), repr({"a": secret})]
    try:
        raise ValueError(secret)
    except ValueError:
        texts.append(traceback.format_exc())
    assert all("horse" not in text and CONTENT.hex() not in text for text in texts)
    assert "28 bytes" in repr(secret)


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, pickle.dumps])
def test_it_is_neither_copied_nor_pickled(way: object) -> None:
    assert callable(way)
    with pytest.raises(TypeError, match="neither copied nor pickled"):
        way(Secret.of(CONTENT))


def test_equals_compares_content_and_the_operator_identity() -> None:
    one, two, other = Secret.of(CONTENT), Secret.of(CONTENT), Secret.of(CONTENT[::-1])
    assert one.equals(two)
    assert not one.equals(other)
    assert one == one  # noqa: PLR0124 - identity is what is tested
    assert one != two
    with pytest.raises(TypeError, match="unhashable"):
        hash(one)


def test_a_refused_argument_leaves_nothing_to_wipe() -> None:
    with pytest.raises(TypeError):
        Secret()  # type: ignore[call-arg]
