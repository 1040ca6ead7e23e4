"""A `.dir` frame's payload: which sealed name is what (FORMAT.md §6)."""

from __future__ import annotations

from dataclasses import dataclass

from cryptfs.errors import Damaged
from cryptfs.format.log import SAYS_XATTRS
from cryptfs.format.packing import check_canonical, pack, unpack_map, want_bytes, want_int, want_list
from cryptfs.format.sidecar import Sealed, decode_sealed, encode_sealed
from cryptfs.types import ID_BYTES, Kind

_KEYS = frozenset("edxv")
SEALED_NAME_MIN, SEALED_NAME_MAX = 17, 271


@dataclass(frozen=True, slots=True)
class Entry:
    """One name. `sealed`: AES-SIV of it, 16 bytes longer; `rdev`: device number, 0 for all but devices."""

    sealed: bytes
    kind: Kind
    log_id: bytes
    rdev: int = 0


@dataclass(frozen=True, slots=True)
class DirPayload:
    """`gone` is applied before `entries`. `domain`: the 16-byte id of the volume whose place this directory is."""

    entries: tuple[Entry, ...] = ()
    gone: tuple[bytes, ...] = ()
    xattrs: Sealed | None = None
    xattrs_gone: bool = False
    domain: bytes = b""

    def encode(self) -> bytes:
        """The msgpack map."""
        out: dict[str, object] = {}
        if self.entries:
            out["e"] = [(e.sealed, int(e.kind), e.log_id, e.rdev) for e in self.entries]
        if self.gone:
            out["d"] = self.gone
        if self.xattrs or self.xattrs_gone:
            out["x"] = encode_sealed(self.xattrs) if self.xattrs else None
        if self.domain:
            out["v"] = self.domain
        return pack(out)

    @property
    def flags(self) -> int:
        """The head's flags."""
        return SAYS_XATTRS if self.xattrs or self.xattrs_gone else 0


def decode_dir(data: bytes | memoryview) -> DirPayload:
    """Raises `Damaged("payload")` for anything `encode` would not write."""
    value = unpack_map(data, _KEYS)
    entries = tuple(_decode_entry(item) for item in want_list(value.get("e", [])))
    gone = tuple(_sealed_name(item) for item in want_list(value.get("d", [])))
    xattrs = decode_sealed(value["x"]) if value.get("x") is not None else None
    domain = want_bytes(value["v"], ID_BYTES) if "v" in value else b""
    payload = DirPayload(entries, gone, xattrs, "x" in value and xattrs is None, domain)
    check_canonical(payload.encode(), data)
    return payload


def _sealed_name(value: object) -> bytes:
    name = want_bytes(value)
    if not SEALED_NAME_MIN <= len(name) <= SEALED_NAME_MAX:
        raise Damaged("payload", "length of a sealed name")
    return name


def _decode_entry(item: object) -> Entry:
    sealed, kind, log_id, rdev = want_list(item, 4)
    return Entry(_sealed_name(sealed), Kind(want_int(kind, 1, 7)), want_bytes(log_id, ID_BYTES), want_int(rdev))
