"""msgpack as the format uses it: maps with known `str` keys, `bin` for bytes, bounded, one error type."""

from __future__ import annotations

from typing import Any

import msgpack

from cryptfs.errors import Damaged


def pack(value: object) -> bytes:
    """The canonical encoding of `value` (FORMAT.md, preamble)."""
    data = msgpack.packb(value, use_bin_type=True)
    assert isinstance(data, bytes)
    return data


def unpack_map(data: bytes | memoryview, allowed: frozenset[str]) -> dict[str, Any]:
    """A msgpack map whose keys are all in `allowed`. Raises `Damaged("payload")` for anything else."""
    size = len(data)
    try:
        value = msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=True,
            max_str_len=16,
            max_bin_len=size,
            max_array_len=size,
            max_map_len=size,
            max_ext_len=0,
        )
    except Exception as error:  # noqa: BLE001 - msgpack raises a handful of unrelated types for "malformed"
        raise Damaged("payload", type(error).__name__) from None
    if not isinstance(value, dict) or not allowed.issuperset(value):
        raise Damaged("payload", "not a map of known keys")
    return value


def check_canonical(again: bytes, data: bytes | memoryview) -> None:
    """Raises `Damaged("payload")` unless what was decoded from `data` encodes to it `again`.

    Finds what unpacking forgives: keys given twice or in another order, lengths and integers not in shortest form.
    """
    if again != data:
        raise Damaged("payload", "not in the canonical encoding")


def want_bytes(value: object, size: int | None = None) -> bytes:
    """`value` as bytes, of exactly `size` bytes if given."""
    if not isinstance(value, bytes) or (size is not None and len(value) != size):
        raise Damaged("payload", "bytes of the right length expected")
    return value


def want_int(value: object, low: int = 0, high: int = 2**64 - 1) -> int:
    """`value` as an integer in low … high."""
    if type(value) is not int or not low <= value <= high:
        raise Damaged("payload", "integer out of range")
    return value


def want_list(value: object, length: int | None = None) -> list[Any]:
    """`value` as a list, of exactly `length` items if given."""
    if not isinstance(value, list) or (length is not None and len(value) != length):
        raise Damaged("payload", "array of the right length expected")
    return value
