"""Wrapping: RFC vectors, our own info strings pinned, and properties of the batches."""

from __future__ import annotations

import hashlib
import hmac

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cryptfs.crypto import wrap
from cryptfs.types import Purpose

VOLUME_ID = bytes(range(16))
LOG_ID = bytes(range(16, 32))
KEK = bytes(range(32))

keys_32 = st.binary(min_size=32, max_size=32)
ids = st.binary(min_size=16, max_size=16)
versions = st.integers(1, 2**32 - 1)
purposes = st.sampled_from([purpose for purpose in Purpose if purpose is not Purpose.VOLUME_MAC])


def test_rfc_3394_section_4_6_vector() -> None:
    """256 bits of key data with a 256-bit KEK."""
    kek = bytes.fromhex("000102030405060708090A0B0C0D0E0F101112131415161718191A1B1C1D1E1F")
    key = bytes.fromhex("00112233445566778899AABBCCDDEEFF000102030405060708090A0B0C0D0E0F")
    wrapped = bytes.fromhex("28C9F404C4B810F4CBCCB35CFB87F8263F5786E2D80ED326CBC7F0E71A99F43BFB988B9B7A02DD21")
    assert wrap.wrap_keys(kek, [key]) == wrapped
    assert wrap.unwrap_keys(kek, wrapped, 40) == key


def test_rfc_5869_test_case_1_expand(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first 32 bytes of OKM for the RFC's PRK and info: that this really is HKDF-Expand-SHA256."""
    prk = bytes.fromhex("077709362c2e32df0ddc3f0dc47bba6390b6c73bb50f9c3122ec844ad7c2b3e5")
    monkeypatch.setattr(wrap, "info", lambda *_: bytes.fromhex("f0f1f2f3f4f5f6f7f8f9"))
    okm = wrap.wrapping_key(prk, Purpose.BLOCK, VOLUME_ID, LOG_ID, 1)
    assert okm.hex() == "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf"


@pytest.mark.parametrize("purpose", list(Purpose))
def test_info_is_the_documents(purpose: Purpose) -> None:
    expected = b"cryptfs/1/" + purpose.value.encode() + b"\0" + VOLUME_ID + LOG_ID + b"\x00\x00\x01\x02"
    assert wrap.info(purpose, VOLUME_ID, LOG_ID, 258) == expected


def test_pinned_vector() -> None:
    """Computed by hand from RFC 5869: T(1) = HMAC(PRK, info || 0x01). A change here changes the format."""
    info = b"cryptfs/1/block\0" + VOLUME_ID + LOG_ID + b"\0\0\0\1"
    wrapper = wrap.wrapping_key(KEK, Purpose.BLOCK, VOLUME_ID, LOG_ID, 1)
    assert wrapper == hmac.digest(KEK, info + b"\1", hashlib.sha256)
    assert wrapper.hex() == "fefab0f721f17094089a506e033c3c47e672bad36d532d49229060a8393e43c5"
    assert (
        wrap.wrap_keys(wrapper, [KEK]).hex()
        == "b12e517c537c6dadab4ed1baf54daef1128e290a7e7ca5b575404bbbbcf042b63809a6f1a289ccd5"
    )


def test_pinned_volume_mac() -> None:
    mac = wrap.volume_mac(KEK, VOLUME_ID, 1, b"the file")
    key = hmac.digest(KEK, b"cryptfs/1/volume-mac\0" + VOLUME_ID + bytes(16) + b"\0\0\0\1\1", hashlib.sha256)
    assert mac == hmac.digest(key, b"the file", hashlib.sha256)
    assert wrap.volume_mac_matches(KEK, VOLUME_ID, 1, b"the file", mac)
    assert not wrap.volume_mac_matches(KEK, VOLUME_ID, 1, b"the File", mac)
    assert not wrap.volume_mac_matches(KEK, VOLUME_ID, 2, b"the file", mac)
    assert not wrap.volume_mac_matches(KEK, VOLUME_ID, 1, b"the file", mac[:-1])


@pytest.mark.parametrize(("volume_id", "log_id"), [(b"short", LOG_ID), (VOLUME_ID, LOG_ID + b"x")])
def test_ids_of_another_length_are_refused(volume_id: bytes, log_id: bytes) -> None:
    # Otherwise two different (volume id, log id) pairs could have one info.
    with pytest.raises(ValueError, match="16 bytes"):
        wrap.info(Purpose.BLOCK, volume_id, log_id, 1)


@given(purposes, ids, ids, versions, st.data())
def test_batches_round_trip(
    purpose: Purpose, volume_id: bytes, log_id: bytes, version: int, data: st.DataObject
) -> None:
    size = wrap.key_bytes(purpose)
    keys = data.draw(st.lists(st.binary(min_size=size, max_size=size), max_size=6))
    wrapper = wrap.wrapping_key(KEK, purpose, volume_id, log_id, version)
    joined = wrap.wrap_keys(wrapper, keys)
    assert len(joined) == len(keys) * wrap.wrapped_bytes(purpose)
    assert wrap.unwrap_keys(wrapper, joined, wrap.wrapped_bytes(purpose)) == b"".join(keys)


@given(st.lists(keys_32, min_size=1, max_size=4), st.data())
def test_any_changed_bit_voids_the_batch(keys: list[bytes], data: st.DataObject) -> None:
    joined = bytearray(wrap.wrap_keys(KEK, keys))
    joined[data.draw(st.integers(0, len(joined) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert wrap.unwrap_keys(KEK, bytes(joined), 40) is None


@given(st.lists(st.tuples(purposes, ids, ids, versions), min_size=2, max_size=2, unique=True), keys_32)
def test_a_wrap_opens_in_its_own_place_only(places: list[tuple[Purpose, bytes, bytes, int]], key: bytes) -> None:
    here, there = (wrap.wrapping_key(KEK, *place) for place in places)
    assert wrap.unwrap_keys(there, wrap.wrap_keys(here, [key]), 40) is None


@pytest.mark.parametrize("length", [1, 39, 41, 79])
def test_part_of_a_wrap_is_an_error_of_the_caller(length: int) -> None:
    with pytest.raises(ValueError, match="whole number"):
        wrap.unwrap_keys(KEK, bytes(length), 40)
