"""`.dir` payloads: what `encode` writes comes back, and only that is accepted."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cryptfs.errors import Damaged
from cryptfs.format.dirlog import SEALED_NAME_MAX, SEALED_NAME_MIN, DirPayload, Entry, decode_dir
from cryptfs.format.sidecar import Sealed
from cryptfs.types import Kind

sealed_names = st.binary(min_size=SEALED_NAME_MIN, max_size=SEALED_NAME_MAX)
entries = st.builds(
    Entry, sealed_names, st.sampled_from(Kind), st.binary(min_size=16, max_size=16), st.integers(0, 2**64 - 1)
)
wrapped_keys = st.binary(min_size=40, max_size=40)
sealeds = st.builds(Sealed, st.integers(0, 2**64 - 1), st.integers(1, 2**32 - 1), wrapped_keys, st.binary(max_size=9))


@st.composite
def payloads(draw: st.DrawFn) -> DirPayload:
    xattrs = draw(st.none() | sealeds)
    gone = xattrs is None and draw(st.booleans())
    domain = draw(st.just(b"") | st.binary(min_size=16, max_size=16))
    return DirPayload(
        tuple(draw(st.lists(entries, max_size=4))),
        tuple(draw(st.lists(sealed_names, max_size=4))),
        xattrs,
        gone,
        domain,
    )


@given(payloads())
def test_a_payload_comes_back(payload: DirPayload) -> None:
    assert decode_dir(payload.encode()) == payload
    assert decode_dir(memoryview(payload.encode())) == payload


def test_a_payload_is_the_formats_bytes() -> None:
    entry = Entry(b"s" * 17, Kind.CHAR, b"i" * 16, 259)
    expected = b"\x82\xa1e\x91\x94\xc4\x11" + b"s" * 17 + b"\x06\xc4\x10" + b"i" * 16 + b"\xcd\1\3"
    expected += b"\xa1d\x91\xc4\x11" + b"g" * 17
    assert DirPayload((entry,), (b"g" * 17,)).encode() == expected
    assert DirPayload().encode() == b"\x80"
    assert DirPayload(domain=b"v" * 16).encode() == b"\x81\xa1v\xc4\x10" + b"v" * 16


@pytest.mark.parametrize("domain", [b"", b"v" * 15, b"v" * 17, "v" * 16, None, 7])
def test_a_domain_is_an_id(domain: object) -> None:
    refused(packed({"v": domain}))


def refused(data: bytes) -> None:
    with pytest.raises(Damaged) as caught:
        decode_dir(data)
    assert caught.value.reason == "payload"


def packed(value: object) -> bytes:
    data = msgpack.packb(value, use_bin_type=True)
    assert isinstance(data, bytes)
    return data


GOOD: list[Any] = [b"s" * 17, 1, b"i" * 16, 0]


def entry_with(at: int, value: object) -> list[Any]:
    return [*GOOD[:at], value, *GOOD[at + 1 :]]


def test_the_entry_the_next_test_spoils_is_good() -> None:
    assert decode_dir(packed({"e": [GOOD]})).entries == (Entry(b"s" * 17, Kind.FILE, b"i" * 16),)


@pytest.mark.parametrize(
    "entry",
    [
        entry_with(0, b"s" * 16), entry_with(0, b"s" * 272), entry_with(0, "s" * 17), entry_with(0, None),
        entry_with(1, 0), entry_with(1, 8), entry_with(1, True), entry_with(1, b"\1"), entry_with(2, b"i" * 15),
        entry_with(2, b"i" * 17), entry_with(2, "i" * 16), entry_with(3, -1), entry_with(3, 1.0), entry_with(3, None),
        GOOD[:3], [*GOOD, 0], None, b"", {},
    ],
)  # fmt: skip
def test_a_bad_entry_is_refused(entry: object) -> None:
    refused(packed({"e": [entry]}))


@pytest.mark.parametrize(
    "value",
    [
        {"e": None}, {"e": {}}, {"d": [5]}, {"d": [b"short"]}, {"d": [b"l" * 272]}, {"d": b""}, {"x": 1}, {"x": []},
        {"r": []}, {b"e": []}, {1: 1}, [], None, 1, "e", b"e",
    ],
)  # fmt: skip
def test_what_is_no_payload_is_refused(value: object) -> None:
    refused(packed(value))


@given(st.binary(max_size=100))
def test_rubbish_is_refused_or_is_what_encode_writes(data: bytes) -> None:
    try:
        again = decode_dir(data).encode()
    except Damaged:
        refused(data)
    else:
        assert again == data


@pytest.mark.parametrize(
    "other",
    [
        DirPayload((Entry(b"s" * 17, Kind.FILE, b"i" * 16),)).encode() + b"\0",
        b"\x81\xa1e\x90",
        b"\xde\0\0",
        b"\x82\xa1d\x91\xc4\x11" + b"g" * 17 + b"\xa1e\x91\x94\xc4\x11" + b"s" * 17 + b"\1\xc4\x10" + b"i" * 16 + b"\0",
        b"\x81\xa1d\x91\xc5\0\x11" + b"g" * 17,
        b"\x82\xa1d\x91\xc4\x11" + b"g" * 17 + b"\xa1d\x91\xc4\x11" + b"h" * 17,
    ],
    ids=["trailing byte", "empty list", "long map", "other order", "long bytes", "key twice"],
)
def test_there_is_one_spelling(other: bytes) -> None:
    refused(other)


@given(payloads(), st.data())
def test_a_cut_payload_is_refused(payload: DirPayload, data: st.DataObject) -> None:
    whole = payload.encode()
    refused(whole[: data.draw(st.integers(0, len(whole) - 1))])
