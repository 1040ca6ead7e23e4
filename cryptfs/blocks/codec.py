"""One run of blocks at a time: plaintext -> ciphertext and tags, and back. Synchronous, no I/O, no copies of plaintext.

A `Slots` object is scratch memory laid out as the primitive wants it, `block_size` + 16 bytes per block, while the
files hold ciphertext only: the views skip the tags, so that one `pwritev`/`preadv` moves a whole run.
"""

from __future__ import annotations

from collections.abc import Sequence

from cryptfs.blocks.extents import Extent
from cryptfs.crypto.aead import block_aad, open_into, seal_into
from cryptfs.types import TAG_BYTES, Buffer


class Slots:
    """Scratch for `count` blocks.

    `ciphers[i]`: block i's ciphertext; `tagged[i]`: ciphertext and tag; `tags[i]`: the tag.
    """

    __slots__ = ("block_size", "ciphers", "count", "tagged", "tags")

    def __init__(self, block_size: int, count: int) -> None:
        stride = block_size + TAG_BYTES
        view = memoryview(bytearray(stride * count))
        self.block_size = block_size
        self.count = count
        self.tagged = [view[i * stride : (i + 1) * stride] for i in range(count)]
        self.ciphers = [slot[:block_size] for slot in self.tagged]
        self.tags = [slot[block_size:] for slot in self.tagged]


class BlockCodec:
    """Blocks of one volume."""

    def __init__(self, volume_id: bytes, block_size: int) -> None:
        self.volume_id = volume_id
        self.block_size = block_size

    def seal_run(
        self, file_id: bytes, first: int, version: int, plains: Sequence[Buffer], deks: Sequence[Buffer], slots: Slots
    ) -> tuple[list[memoryview], bytes]:
        """Encrypt `plains` (blocks `first`…; all full but perhaps the last) under `deks`, one unused DEK each.

        Returns the ciphertexts (views into `slots`, good until its next use) and the tags (16 bytes per block).
        """
        volume_id, block_size = self.volume_id, self.block_size
        tagged, count = slots.tagged, len(plains)
        last_len = len(plains[-1])
        full = count if last_len == block_size else count - 1
        for i in range(full):
            aad = block_aad(volume_id, file_id, first + i, version, block_size)
            seal_into(deks[i], aad, plains[i], tagged[i])
        if full == count:
            return slots.ciphers[:count], b"".join(slots.tags[:count])
        short = tagged[full][: last_len + TAG_BYTES]
        aad = block_aad(volume_id, file_id, first + full, version, last_len)
        seal_into(deks[full], aad, plains[full], short)
        return [*slots.ciphers[:full], short[:last_len]], b"".join(slots.tags[:full]) + bytes(short[last_len:])

    def targets(self, extent: Extent, first: int, end: int, slots: Slots) -> list[memoryview]:
        """Where to read the ciphertexts of blocks first … end - 1 of `extent` into."""
        if end == extent.end and extent.last_len != self.block_size:
            count = end - first
            return [*slots.ciphers[: count - 1], slots.tagged[count - 1][: extent.last_len]]
        return slots.ciphers[: end - first]

    def open_run(
        self, file_id: bytes, extent: Extent, first: int, end: int, deks: Sequence[Buffer], slots: Slots,
        out: memoryview,
    ) -> int:  # fmt: skip
        """Decrypt what `targets` was read into, to `out` ((end - first) · block_size bytes.

        A short block leaves its end alone).

        Returns -1, or the index of the first block that is not authentic: then nothing in `out` may be used.
        """
        volume_id, block_size, version = self.volume_id, self.block_size, extent.version
        base = extent.base
        tags = extent.tags
        short_at = end - 1 if end == extent.end and extent.last_len != block_size else -1
        for i in range(end - first):
            block = first + i
            tag_at = (block - base) * TAG_BYTES
            tag = tags[tag_at : tag_at + TAG_BYTES]
            if block == short_at:
                length = extent.last_len
                sealed = slots.tagged[i][: length + TAG_BYTES]
                sealed[length:] = tag
            else:
                length = block_size
                slots.tags[i][:] = tag
                sealed = slots.tagged[i]
            aad = block_aad(volume_id, file_id, block, version, length)
            at = i * block_size
            if not open_into(deks[i], aad, sealed, out[at : at + length]):
                return block
        return -1
