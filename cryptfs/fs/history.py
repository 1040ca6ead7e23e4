"""The block map that a sidecar's frames add up to."""

from __future__ import annotations

from cryptfs.blocks.extents import DURABLE, Extent, ExtentMap
from cryptfs.errors import Damaged
from cryptfs.format.log import SAYS_XATTRS, SNAPSHOT
from cryptfs.format.sidecar import Run, Sealed, SidecarPayload, decode_sidecar
from cryptfs.fs.sealed_log import Replay

POISON = 9
"""Home of blocks whose record is lost with a damaged frame: reading them is an error until they are written anew."""

XATTRS_LOST = Sealed(0, 0, b"", b"")
"""In place of an xattr set that was in a damaged frame: an error until the owner gives it up (`check --repair`)."""


def build_map(replayed: Replay, keep: int, block_size: int) -> tuple[ExtentMap, int]:
    """(block map, size) after the first `keep` frames. A frame whose payload is lost poisons the blocks it names.

    Behind a gap every block that the first frame's size covers and no frame states is poisoned.
    """
    blocks = ExtentMap(block_size)
    size = 0
    if replayed.gap and keep and replayed.heads[0].size:
        blocks.insert(_poison(0, -(-replayed.heads[0].size // block_size), block_size, 0))
    for i, head in enumerate(replayed.heads[:keep]):
        if head.kind == SNAPSHOT:
            blocks, size = ExtentMap(block_size), 0
        last = -(-head.size // block_size)
        if head.size < size:
            blocks.remove(last, max(last, -(-size // block_size)))
        size = head.size
        decoded = decoded_payload(replayed, i, block_size)
        if decoded is not None:
            if decoded.flags != head.flags:
                raise Damaged("payload", "xattrs that the head does not announce, or none that it does")
            for first, count in decoded.holes:
                blocks.remove(first, first + count)
            for run in decoded.runs:
                end = run.first + run.count
                if end > last or (end - 1) * block_size + run.last_len > size:
                    raise Damaged("payload", "a record past the end of the file")
                blocks.remove(run.first, end)
                blocks.insert(_extent(run, head.generation))
        elif head.first < head.end:
            blocks.remove(head.first, head.end)
            blocks.insert(_poison(head.first, head.end, block_size, head.generation))
    return blocks, size


def xattrs_after(replayed: Replay, keep: int, block_size: int) -> Sealed | None:
    """The xattr set after the first `keep` frames, sealed; `XATTRS_LOST` if the frame that says it may be."""
    xattrs: Sealed | None = XATTRS_LOST if replayed.gap else None
    for i, head in enumerate(replayed.heads[:keep]):
        if head.kind == SNAPSHOT:
            xattrs = None
        if head.flags & SAYS_XATTRS:
            decoded = decoded_payload(replayed, i, block_size)
            xattrs = XATTRS_LOST if decoded is None else decoded.xattrs
    return xattrs


def decoded_payload(replayed: Replay, frame: int, block_size: int) -> SidecarPayload | None:
    """A frame's payload, decoded once; None if it is lost. Raises `Damaged("payload")`."""
    decoded = replayed.decoded.get(frame)
    if decoded is None:
        payload = replayed.payloads[frame]
        if payload is None:
            return None
        decoded = replayed.decoded[frame] = decode_sidecar(payload, block_size)
    return decoded


def _poison(first: int, end: int, block_size: int, generation: int) -> Extent:
    return Extent(first, end, 0, block_size, POISON, 0, b"", b"", DURABLE, generation)


def _extent(run: Run, generation: int) -> Extent:
    end = run.first + run.count
    rest = (run.home, run.kek_version, run.wrapped, run.tags)
    return Extent(run.first, end, run.version, run.last_len, *rest, DURABLE, generation)
