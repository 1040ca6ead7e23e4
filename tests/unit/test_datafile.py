"""The data file's header."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cryptfs.errors import Damaged
from cryptfs.format.datafile import HEADER_BYTES, SIGNED_BYTES, DataHeader, decode_data_header

headers = st.builds(
    DataHeader, st.binary(min_size=16, max_size=16), st.integers(0, 2**64 - 1), st.binary(min_size=32, max_size=32)
)


@given(headers)
def test_a_header_comes_back(header: DataHeader) -> None:
    assert decode_data_header(header.signed() + header.mac) == header


def test_a_header_is_the_formats_64_bytes() -> None:
    header = DataHeader(b"f" * 16, 0x0100, b"m" * 32)
    assert header.signed() + header.mac == b"CFDATA1\0" + b"f" * 16 + bytes(6) + b"\1\0" + b"m" * 32
    assert (len(header.signed()), HEADER_BYTES) == (SIGNED_BYTES, 64)


@given(st.binary(max_size=80))
def test_rubbish_is_refused(data: bytes) -> None:
    with pytest.raises(Damaged) as caught:
        decode_data_header(data)
    assert caught.value.reason == "data-header"


@pytest.mark.parametrize("length", [0, 1, 63, 65])
def test_a_header_has_one_length(length: int) -> None:
    data = (DataHeader(b"f" * 16, 1).signed() + bytes(64))[:length]
    with pytest.raises(Damaged) as caught:
        decode_data_header(data)
    assert caught.value.reason == "data-header"


@pytest.mark.parametrize("at", range(8))
def test_no_byte_of_the_magic_is_free(at: int) -> None:
    data = bytearray(DataHeader(b"f" * 16, 1, bytes(32)).signed() + bytes(32))
    data[at] ^= 1
    with pytest.raises(Damaged):
        decode_data_header(bytes(data))
