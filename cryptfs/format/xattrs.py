"""An xattr set before it is sealed: one msgpack map, name -> value, for all of a file's (FORMAT.md §8)."""

from __future__ import annotations

from collections.abc import Mapping

import msgpack

from cryptfs.errors import Damaged
from cryptfs.format.packing import check_canonical, pack

NAME_MAX_BYTES = 255
VALUE_MAX_BYTES = 65536
SET_MAX_BYTES = 1 << 20


def encode_xattrs(values: Mapping[bytes, bytes]) -> bytes:
    """The map, names in ascending order."""
    return pack(dict(sorted(values.items())))


def decode_xattrs(data: bytes) -> dict[bytes, bytes]:
    """Raises `Damaged("payload")` for anything `encode_xattrs` would not write."""
    size = len(data)
    try:
        values = msgpack.unpackb(
            data, raw=False, strict_map_key=True, max_str_len=0, max_bin_len=size, max_array_len=0, max_map_len=size,
            max_ext_len=0,
        )  # fmt: skip
    except Exception as error:  # noqa: BLE001 - msgpack raises a handful of unrelated types for "malformed"
        raise Damaged("payload", type(error).__name__) from None
    if not isinstance(values, dict):
        raise Damaged("payload", "xattrs are no map")
    for name, value in values.items():
        if not isinstance(name, bytes) or not isinstance(value, bytes) or not 0 < len(name) <= NAME_MAX_BYTES:
            raise Damaged("payload", "an xattr's name or value")
        if b"\0" in name or len(value) > VALUE_MAX_BYTES:
            raise Damaged("payload", "an xattr's name or value")
    check_canonical(encode_xattrs(values), data)
    return values
