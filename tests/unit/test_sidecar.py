"""Sidecar payloads: what `encode` writes comes back, and only that is accepted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cryptfs.errors import Damaged
from cryptfs.format.sidecar import BLOCKS_MAX, Run, Sealed, SidecarPayload, decode_sidecar
from cryptfs.types import TAG_BYTES, WRAPPED_BYTES

BLOCK_SIZE = 4096

u64 = st.integers(0, 2**64 - 1)
kek_versions = st.integers(1, 2**32 - 1)


@st.composite
def runs(draw: st.DrawFn) -> Run:
    count = draw(st.integers(1, 4))
    return Run(
        draw(st.integers(0, BLOCKS_MAX)), draw(st.integers(1, 2**64 - 1)), draw(st.integers(1, BLOCK_SIZE)),
        draw(st.integers(0, 1)), draw(kek_versions), draw(st.binary(min_size=1, max_size=1)) * (count * WRAPPED_BYTES),
        draw(st.binary(min_size=1, max_size=1)) * (count * TAG_BYTES),
    )  # fmt: skip


sealeds = st.builds(Sealed, u64, kek_versions, st.binary(min_size=40, max_size=40), st.binary(max_size=60))
holes = st.tuples(st.integers(0, BLOCKS_MAX), st.integers(1, BLOCKS_MAX))


@st.composite
def payloads(draw: st.DrawFn) -> SidecarPayload:
    xattrs = draw(st.none() | sealeds)
    return SidecarPayload(
        tuple(draw(st.lists(runs(), max_size=4))), tuple(draw(st.lists(holes, max_size=4))), xattrs,
        xattrs is None and draw(st.booleans()), draw(st.none() | sealeds),
    )  # fmt: skip


@given(payloads())
def test_a_payload_comes_back(payload: SidecarPayload) -> None:
    data = payload.encode()
    assert decode_sidecar(data, BLOCK_SIZE) == payload
    assert decode_sidecar(memoryview(data), BLOCK_SIZE) == payload


@given(payloads())
def test_the_head_names_every_block_the_payload_touches(payload: SidecarPayload) -> None:
    first, end = payload.extent()
    spans = [(r.first, r.first + r.count) for r in payload.runs] + [(f, f + c) for f, c in payload.holes]
    assert all(first <= a < b <= end for a, b in spans)
    assert (first, end) == (0, 0) if not spans else first < end


def test_a_payload_is_the_formats_bytes() -> None:
    run = Run(0, 9, 13, 0, 1, b"w" * 40, b"t" * 16)
    expected = b"\x81\xa1r\x91\x97\x00\x09\x0d\x00\x01\xc4\x28" + b"w" * 40 + b"\xc4\x10" + b"t" * 16
    assert SidecarPayload((run,)).encode() == expected
    assert SidecarPayload().encode() == b"\x80"
    assert SidecarPayload(xattrs_gone=True).encode() == b"\x81\xa1x\xc0"


def refused(data: bytes) -> None:
    with pytest.raises(Damaged) as caught:
        decode_sidecar(data, BLOCK_SIZE)
    assert caught.value.reason == "payload"


def packed(value: object) -> bytes:
    data = msgpack.packb(value, use_bin_type=True)
    assert isinstance(data, bytes)
    return data


GOOD_RUN: list[Any] = [0, 9, 13, 0, 1, b"w" * 80, b"t" * 32]


def run_with(at: int, value: object) -> list[Any]:
    return [*GOOD_RUN[:at], value, *GOOD_RUN[at + 1 :]]


def test_the_run_the_next_test_spoils_is_good() -> None:
    assert decode_sidecar(packed({"r": [GOOD_RUN]}), BLOCK_SIZE).runs[0].count == 2


@pytest.mark.parametrize(
    "run",
    [
        run_with(0, -1), run_with(0, BLOCKS_MAX + 1), run_with(0, "0"), run_with(0, 1.5), run_with(0, True),
        run_with(1, 0), run_with(2, 0), run_with(2, BLOCK_SIZE + 1), run_with(3, 2), run_with(3, -1), run_with(4, 0),
        run_with(4, 2**32), run_with(5, b""), run_with(5, b"w" * 79), run_with(5, b"w" * 120), run_with(5, "w" * 10),
        run_with(6, b""), run_with(6, b"t" * 31), run_with(6, None), GOOD_RUN[:6], [*GOOD_RUN, 0], None, 5, {},
    ],
)  # fmt: skip
def test_a_bad_run_is_refused(run: object) -> None:
    refused(packed({"r": [run]}))


@pytest.mark.parametrize(
    "value",
    [
        {"r": 5}, {"r": {}}, {"r": b""}, {"h": [[0]]}, {"h": [[0, 0]]}, {"h": [[-1, 1]]}, {"h": [[0, 1, 2]]},
        {"h": [5]}, {"h": [[0, BLOCKS_MAX + 1]]}, {"t": None}, {"t": []}, {"t": [0, 0, b"w" * 40, b""]},
        {"t": [0, 1, b"w", b""]}, {"x": 5}, {"x": [0, 1, b"w" * 40]}, {"x": [0, 1, b"w" * 40, "text"]},
        {"y": []}, {"r": [], "e": []}, {b"r": []}, {0: []}, [], None, 5, "text", b"bytes",
    ],
)  # fmt: skip
def test_what_is_no_payload_is_refused(value: object) -> None:
    refused(packed(value))


@given(st.binary(max_size=100))
def test_rubbish_is_refused_or_is_what_encode_writes(data: bytes) -> None:
    try:
        again = decode_sidecar(data, BLOCK_SIZE).encode()
    except Damaged:
        refused(data)
    else:
        assert again == data


SPELLINGS: list[tuple[str, Callable[[bytes], bytes]]] = [
    ("trailing byte", lambda data: data + b"\0"),
    ("second value", lambda data: data + b"\x80"),
    ("key twice", lambda data: b"\x82" + data[1:] + data[1:]),
    ("long map", lambda data: b"\xde\0\1" + data[1:]),
    ("long integer", lambda data: data.replace(b"\x97\x00\x09", b"\x97\x00\xcc\x09")),
    ("long bytes", lambda data: data.replace(b"\xc4\x28", b"\xc5\x00\x28")),
    ("long array", lambda data: data.replace(b"\xa1r\x91", b"\xa1r\xdc\0\1")),
    ("empty list", lambda data: b"\x82" + data[1:] + b"\xa1h\x90"),
    ("other order", lambda data: b"\x82\xa1x\xc0" + data[1:]),
]


@pytest.mark.parametrize(("name", "respell"), SPELLINGS, ids=[name for name, _ in SPELLINGS])
def test_there_is_one_spelling(name: str, respell: Callable[[bytes], bytes]) -> None:
    data = SidecarPayload((Run(0, 9, 13, 0, 1, b"w" * 40, b"t" * 16),)).encode()
    other = respell(data)
    assert other != data
    refused(other)


@given(payloads(), st.data())
def test_a_cut_payload_is_refused(payload: SidecarPayload, data: st.DataObject) -> None:
    whole = payload.encode()
    refused(whole[: data.draw(st.integers(0, len(whole) - 1))])
