"""Bytes that are almost right: edits of the bytes, and edits of the msgpack value behind them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import msgpack

EDGES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, (1 << 40) - 1, (1 << 63) - 1, (1 << 64) - 1)
HUGE = (
    b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff",
    b"\x91" * 600, b"\x81\xa1e" * 300, b"\xc9\x00\x00\x10\x00\x01", b"\xca\x00\x00\x00\x00", b"\xc1",
)  # fmt: skip
"""msgpack that claims much, nests deep, or is of a type that the format does not have."""


def mutated(data: bytes, samples: Sequence[bytes], msgpack_at: int | None, rng: random.Random) -> bytes:
    """One to four edits of `data`."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if msgpack_at is not None and rng.random() < 0.4:
            data = _edit_value(data, msgpack_at, rng)
        else:
            data = rng.choice(_EDITS)(data, samples, rng)
    return data[: 1 << 16]


def _flip(data: bytes, _: Sequence[bytes], rng: random.Random) -> bytes:
    if not data:
        return b"\0"
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def _byte(data: bytes, _: Sequence[bytes], rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + bytes([rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))]) + data[at + 1 :]


def _number(data: bytes, _: Sequence[bytes], rng: random.Random) -> bytes:
    width = rng.choice((1, 2, 4, 8))
    at = rng.randrange(len(data) + 1)
    return data[:at] + (rng.choice(EDGES) & (1 << 8 * width) - 1).to_bytes(width, "big") + data[at + width :]


def _cut(data: bytes, _: Sequence[bytes], rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _remove(data: bytes, _: Sequence[bytes], rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + data[at + rng.choice((1, 2, 4, 16, 152)) :]


def _insert(data: bytes, _: Sequence[bytes], rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.choice((rng.randbytes(rng.randrange(1, 20)), bytes(160), *HUGE)) + data[at:]


def _repeat(data: bytes, _: Sequence[bytes], rng: random.Random) -> bytes:
    a, b = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    return data[:b] + data[a:b] * rng.choice((1, 2, 8)) + data[b:]


def _splice(data: bytes, samples: Sequence[bytes], rng: random.Random) -> bytes:
    other = rng.choice(samples)
    return data[: rng.randrange(len(data) + 1)] + other[rng.randrange(len(other) + 1) :]


_EDITS: Sequence[Callable[[bytes, Sequence[bytes], random.Random], bytes]] = (
    _flip, _byte, _number, _cut, _remove, _insert, _repeat, _splice,
)  # fmt: skip


def _edit_value(data: bytes, start: int, rng: random.Random) -> bytes:
    """Change the msgpack value that begins at `start`; a length before it is put right most of the time."""
    try:
        unpacker = msgpack.Unpacker(raw=False, strict_map_key=False)
        unpacker.feed(data[start:])
        value = unpacker.unpack()
        end = start + unpacker.tell()
    except Exception:  # noqa: BLE001 - there is none any more
        return data
    packed: bytes = msgpack.packb(_changed(value, rng, 0), use_bin_type=rng.random() < 0.9)
    before = data[:start]
    if start >= 4 and rng.random() < 0.9:
        before = before[:-4] + len(packed).to_bytes(4, "big")
    return before + packed + data[end:]


def _changed(value: object, rng: random.Random, depth: int) -> object:
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        out = dict(value)
        how = rng.random()
        if how < 0.1:
            del out[key]
        elif how < 0.2:
            out[rng.choice(("z", 7, b"e", "e", "r", ""))] = value[key]
        else:
            out[key] = _changed(value[key], rng, depth + 1)
        return out
    if isinstance(value, list) and value and rng.random() < 0.85:
        at = rng.randrange(len(value))
        how = rng.random()
        if how < 0.1:
            return value[:at] + value[at + 1 :]
        if how < 0.2:
            return value[:at] + [value[at]] * rng.choice((2, 3, 50)) + value[at + 1 :]
        return [*value[:at], _changed(value[at], rng, depth + 1), *value[at + 1 :]]
    if isinstance(value, bytes) and rng.random() < 0.7:
        return rng.choice((value[:-1], value + b"\0", value * 2, b"", value[::-1], value + value[:16]))
    if isinstance(value, int) and not isinstance(value, bool) and rng.random() < 0.7:
        return rng.choice((min(value + 1, EDGES[-1]), max(0, value - 1), -1, *EDGES))
    return rng.choice((None, True, 0, 1.5, b"", "", "x" * 40, [], {}, [[]], {"e": []}, rng.choice(EDGES)))
