"""Log headers and frame heads: exact bytes, one encoding, everything else refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cryptfs.errors import Damaged
from cryptfs.format.log import (
    DELTA,
    HEAD_BYTES,
    HEADER_BYTES,
    INDEX,
    KIND_AUDIT,
    KIND_DIR,
    KIND_FILE,
    PAYLOAD_MAX_BYTES,
    SIGNED_BYTES,
    SNAPSHOT,
    Head,
    LogHeader,
    decode_head,
    decode_header,
    encode_foot,
)

u64 = st.integers(0, 2**64 - 1)
u32 = st.integers(1, 2**32 - 1)
names = st.binary(min_size=72, max_size=72).filter(any)
headers = st.one_of(
    st.builds(LogHeader, st.sampled_from((KIND_FILE, KIND_AUDIT)), u32, st.binary(min_size=16, max_size=16),
              st.binary(min_size=40, max_size=40)),
    st.builds(LogHeader, st.just(KIND_DIR), u32, st.binary(min_size=16, max_size=16),
              st.binary(min_size=40, max_size=40), names),
)  # fmt: skip
digests = st.binary(min_size=32, max_size=32)
spans = st.tuples(u64, u64).map(sorted)


@st.composite
def heads(draw: st.DrawFn) -> Head:
    first, end = draw(spans)
    return Head(
        draw(st.sampled_from((DELTA, SNAPSHOT, INDEX))), draw(u64), draw(u64), draw(u64), first, end,
        draw(st.integers(0, PAYLOAD_MAX_BYTES)), draw(digests), draw(digests), draw(digests),
    )  # fmt: skip


HEADER = LogHeader(KIND_DIR, 7, b"i" * 16, b"w" * 40, b"n" * 72)
HEAD = Head(DELTA, 5, 4, 100, 1, 3, 10, b"d" * 32, b"p" * 32, b"m" * 32)


def refused(data: bytes, reason: str) -> None:
    with pytest.raises(Damaged) as caught:
        (decode_header if reason == "log-header" else decode_head)(data)
    assert caught.value.reason == reason


@given(headers)
def test_a_header_comes_back(header: LogHeader) -> None:
    assert len(header.encode()) == HEADER_BYTES
    assert decode_header(header.encode()) == header


def test_a_header_is_the_formats_160_bytes() -> None:
    expected = b"CFSLOG1\0\2\0\0\0\0\0\0\7" + b"i" * 16 + b"w" * 40 + b"n" * 72 + bytes(16)
    assert HEADER.encode() == expected


@pytest.mark.parametrize("at", [*range(12), *range(144, 160)])
def test_no_byte_of_a_header_is_free(at: int) -> None:
    data = bytearray(HEADER.encode())
    data[at] ^= 0x40
    refused(bytes(data), "log-header")


@pytest.mark.parametrize("kind", [KIND_FILE, KIND_AUDIT])
def test_only_directories_have_a_names_key(kind: int) -> None:
    refused(LogHeader(kind, 1, b"i" * 16, b"w" * 40, b"n" * 72).encode(), "log-header")
    refused(LogHeader(KIND_DIR, 1, b"i" * 16, b"w" * 40).encode(), "log-header")


def test_key_version_0_is_none() -> None:
    refused(LogHeader(KIND_FILE, 0, b"i" * 16, b"w" * 40).encode(), "log-header")


@given(st.binary(max_size=200))
def test_rubbish_is_no_header(data: bytes) -> None:
    refused(data, "log-header")


@pytest.mark.parametrize("length", [0, 1, HEADER_BYTES - 1, HEADER_BYTES + 1])
def test_a_header_has_one_length(length: int) -> None:
    refused(HEADER.encode().ljust(length, b"\0")[:length], "log-header")


@given(heads())
def test_a_head_comes_back(head: Head) -> None:
    data = head.signed() + head.mac
    assert len(head.signed()) == SIGNED_BYTES
    assert decode_head(data) == head
    assert head.frame_bytes == HEAD_BYTES + head.payload_len + 8


def test_a_head_is_the_formats_152_bytes() -> None:
    numbers = b"".join(n.to_bytes(8, "big") for n in (5, 4, 100, 1, 3))
    expected = b"CFF1\1\0\0\0" + numbers + b"\0\0\0\x0a" + bytes(4) + b"d" * 32 + b"p" * 32 + b"m" * 32
    assert HEAD.signed() + HEAD.mac == expected
    assert encode_foot(HEAD.frame_bytes) == b"\0\0\0\xaaCFE1"


@pytest.mark.parametrize("at", [*range(8), *range(52, 56)])
def test_no_fixed_byte_of_a_head_is_free(at: int) -> None:
    data = bytearray(HEAD.signed() + HEAD.mac)
    data[at] ^= 0x40
    refused(bytes(data), "frame-head")


def test_impossible_heads_are_refused() -> None:
    too_long = Head(DELTA, 5, 4, 100, 1, 3, PAYLOAD_MAX_BYTES + 1, b"d" * 32, b"p" * 32, b"m" * 32)
    backwards = Head(DELTA, 5, 4, 100, 3, 1, 10, b"d" * 32, b"p" * 32, b"m" * 32)
    for head in (too_long, backwards):
        refused(head.signed() + head.mac, "frame-head")


@given(st.binary(max_size=200))
def test_rubbish_is_no_head(data: bytes) -> None:
    refused(data, "frame-head")


@pytest.mark.parametrize("length", [0, 1, HEAD_BYTES - 1, HEAD_BYTES + 1])
def test_a_head_has_one_length(length: int) -> None:
    refused((HEAD.signed() + HEAD.mac).ljust(length, b"\0")[:length], "frame-head")
