"""A sidecar frame's payload: which block has which wrapped DEK, tag, home and version (FORMAT.md §8)."""

from __future__ import annotations

from dataclasses import dataclass

from cryptfs.errors import Damaged
from cryptfs.format.log import SAYS_XATTRS
from cryptfs.format.packing import check_canonical, pack, unpack_map, want_bytes, want_int, want_list
from cryptfs.types import TAG_BYTES, WRAPPED_BYTES

_KEYS = frozenset("rhxt")
BLOCKS_MAX = 1 << 51
"""2^63 bytes in blocks of 4 KiB."""


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive blocks written together: all `block_size` long but the last, all in one home.

    `wrapped` holds 40 bytes and `tags` 16 bytes per block.
    """

    first: int
    version: int
    last_len: int
    home: int
    kek_version: int
    wrapped: bytes
    tags: bytes

    @property
    def count(self) -> int:
        """Number of blocks."""
        return len(self.tags) // TAG_BYTES


@dataclass(frozen=True, slots=True)
class Sealed:
    """A symlink's target or an xattr set under its own attribute key; `sealed` is ciphertext and tag."""

    generation: int
    kek_version: int
    wrapped: bytes
    sealed: bytes


@dataclass(frozen=True, slots=True)
class SidecarPayload:
    """`holes`: (first block, count), applied before `runs`. `xattrs_gone` is the explicit nil of key `x`."""

    runs: tuple[Run, ...] = ()
    holes: tuple[tuple[int, int], ...] = ()
    xattrs: Sealed | None = None
    xattrs_gone: bool = False
    target: Sealed | None = None

    def encode(self) -> bytes:
        """The msgpack map."""
        out: dict[str, object] = {}
        if self.runs:
            out["r"] = [(r.first, r.version, r.last_len, r.home, r.kek_version, r.wrapped, r.tags) for r in self.runs]
        if self.holes:
            out["h"] = self.holes
        if self.xattrs or self.xattrs_gone:
            out["x"] = encode_sealed(self.xattrs) if self.xattrs else None
        if self.target:
            out["t"] = encode_sealed(self.target)
        return pack(out)

    @property
    def flags(self) -> int:
        """The head's flags."""
        return SAYS_XATTRS if self.xattrs or self.xattrs_gone else 0

    def extent(self) -> tuple[int, int]:
        """(first block touched, one past the last), (0, 0) for none: the head's `first` and `end`."""
        spans = [(r.first, r.first + r.count) for r in self.runs] + [(f, f + c) for f, c in self.holes]
        return (min(s[0] for s in spans), max(s[1] for s in spans)) if spans else (0, 0)


def encode_sealed(value: Sealed) -> list[object]:
    """As it stands in a payload."""
    return [value.generation, value.kek_version, value.wrapped, value.sealed]


def decode_sealed(value: object) -> Sealed:
    """Raises `Damaged("payload")`."""
    generation, kek_version, wrapped, sealed = want_list(value, 4)
    return Sealed(
        want_int(generation),
        want_int(kek_version, 1, 2**32 - 1),
        want_bytes(wrapped, WRAPPED_BYTES),
        want_bytes(sealed),
    )


def decode_sidecar(data: bytes | memoryview, block_size: int) -> SidecarPayload:
    """Raises `Damaged("payload")` for anything `encode` would not write."""
    value = unpack_map(data, _KEYS)
    runs = tuple(_decode_run(item, block_size) for item in want_list(value.get("r", [])))
    holes = tuple(
        (want_int(first, 0, BLOCKS_MAX), want_int(count, 1, BLOCKS_MAX))
        for first, count in (want_list(item, 2) for item in want_list(value.get("h", [])))
    )
    xattrs = decode_sealed(value["x"]) if value.get("x") is not None else None
    gone = "x" in value and xattrs is None
    target = decode_sealed(value["t"]) if "t" in value else None
    payload = SidecarPayload(runs, holes, xattrs, gone, target)
    check_canonical(payload.encode(), data)
    return payload


def _decode_run(item: object, block_size: int) -> Run:
    first, version, last_len, home, kek_version, wrapped, tags = want_list(item, 7)
    run = Run(
        want_int(first, 0, BLOCKS_MAX), want_int(version, 1), want_int(last_len, 1, block_size), want_int(home, 0, 1),
        want_int(kek_version, 1, 2**32 - 1), want_bytes(wrapped), want_bytes(tags),
    )  # fmt: skip
    if not run.count or len(tags) != run.count * TAG_BYTES or len(wrapped) != run.count * WRAPPED_BYTES:
        raise Damaged("payload", "a run's keys and tags differ in number")
    return run
