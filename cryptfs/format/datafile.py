"""The 64 bytes before a data file's first block (FORMAT.md §7)."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from cryptfs.errors import Damaged

HEADER_BYTES = 64
SIGNED_BYTES = 32

_MAGIC = b"CFDATA1\0"
_SIGNED = struct.Struct(">8s16sQ")


@dataclass(frozen=True, slots=True)
class DataHeader:
    """`born`: the generation of the file's creation. `mac` (32 bytes) is made and checked by `crypto.mac`."""

    file_id: bytes
    born: int
    mac: bytes = b""

    def signed(self) -> bytes:
        """The 32 bytes under the MAC."""
        return _SIGNED.pack(_MAGIC, self.file_id, self.born)


def decode_data_header(data: bytes) -> DataHeader:
    """From 64 bytes; raises `Damaged("data-header")`."""
    if len(data) != HEADER_BYTES:
        raise Damaged("data-header", f"{len(data)} bytes")
    magic, file_id, born = _SIGNED.unpack_from(data)
    if magic != _MAGIC:
        raise Damaged("data-header", "magic")
    return DataHeader(file_id, born, data[SIGNED_BYTES:])
