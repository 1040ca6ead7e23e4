"""Blocks: what comes out is what went in, and nothing else opens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cryptfs.blocks.codec import BlockCodec, Slots
from cryptfs.blocks.extents import FRESH, HOME_DATA, Extent
from cryptfs.crypto.aead import ATTR_TARGET, ATTR_XATTRS, block_aad, open_attr, seal_attr
from cryptfs.errors import Damaged
from cryptfs.testing.randomness import SeededRandom
from cryptfs.types import TAG_BYTES, WRAPPED_BYTES

VOLUME_ID, FILE_ID = b"V" * 16, b"F" * 16
BLOCK_SIZE = 4096


def sealed(
    plains: list[bytes], *, first: int = 3, version: int = 9, slots: Slots | None = None
) -> tuple[list[bytes], Extent, list[bytes]]:
    """(ciphertexts as they lie on disk, the extent, the DEKs)."""
    random = SeededRandom(1)
    deks = [random(32) for _ in plains]
    slots = slots or Slots(BLOCK_SIZE, len(plains))
    ciphers, tags = BlockCodec(VOLUME_ID, BLOCK_SIZE).seal_run(FILE_ID, first, version, plains, deks, slots)
    wrapped = bytes(WRAPPED_BYTES * len(plains))
    extent = Extent(first, first + len(plains), version, len(plains[-1]), HOME_DATA, 1, wrapped, tags, FRESH)
    return [bytes(c) for c in ciphers], extent, deks


def opened(
    ciphers: list[bytes], extent: Extent, deks: list[bytes], first: int | None = None, end: int | None = None,
    *, file_id: bytes = FILE_ID, volume_id: bytes = VOLUME_ID,
) -> tuple[int, bytes]:  # fmt: skip
    first = extent.first if first is None else first
    end = extent.end if end is None else end
    codec = BlockCodec(volume_id, BLOCK_SIZE)
    slots = Slots(BLOCK_SIZE, 64)
    for target, cipher in zip(codec.targets(extent, first, end, slots), ciphers, strict=True):
        target[:] = cipher
    out = memoryview(bytearray((end - first) * BLOCK_SIZE))
    bad = codec.open_run(file_id, extent, first, end, deks, slots, out)
    return bad, bytes(out)


lengths = st.one_of(st.sampled_from((1, 2, BLOCK_SIZE - 1, BLOCK_SIZE)), st.integers(1, BLOCK_SIZE))


@given(st.integers(1, 5), lengths, st.data())
def test_any_part_of_a_run_opens_to_its_plaintext(count: int, last_len: int, data: st.DataObject) -> None:
    plains = [bytes([65 + i]) * BLOCK_SIZE for i in range(count - 1)] + [b"z" * last_len]
    ciphers, extent, deks = sealed(plains)
    assert list(map(len, ciphers)) == list(map(len, plains))
    assert len(extent.tags) == TAG_BYTES * count
    a = data.draw(st.integers(0, count - 1))
    b = data.draw(st.integers(a + 1, count))
    bad, out = opened(ciphers[a:b], extent, deks[a:b], 3 + a, 3 + b)
    assert bad == -1
    assert out == b"".join(p.ljust(BLOCK_SIZE, b"\0") for p in plains[a:b])


def test_scratch_is_good_for_another_run() -> None:
    slots = Slots(BLOCK_SIZE, 4)
    sealed([b"long" * 1024] * 4, slots=slots)
    ciphers, extent, deks = sealed([b"x" * 10], slots=slots)
    assert opened(ciphers, extent, deks) == (-1, (b"x" * 10).ljust(BLOCK_SIZE, b"\0"))


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("at", [0, -1])
def test_one_changed_bit_is_found_in_its_block(index: int, at: int) -> None:
    ciphers, extent, deks = sealed([b"a" * BLOCK_SIZE, b"b" * BLOCK_SIZE, b"c" * 77])
    changed = bytearray(ciphers[index])
    changed[at] ^= 1
    ciphers[index] = bytes(changed)
    assert opened(ciphers, extent, deks)[0] == extent.first + index


def test_blocks_do_not_open_in_each_others_place() -> None:
    ciphers, extent, deks = sealed([b"a" * BLOCK_SIZE, b"b" * BLOCK_SIZE])
    assert opened([ciphers[1], ciphers[0]], extent, deks)[0] == extent.first
    # Key and tag moved along with the block: what is left to tell is the index.
    moved = Extent(extent.first, extent.end, extent.version, BLOCK_SIZE, HOME_DATA, 1, extent.wrapped,
                   extent.tags[16:] + extent.tags[:16], FRESH)  # fmt: skip
    assert opened([ciphers[1], ciphers[0]], moved, deks[::-1])[0] == extent.first


@pytest.mark.parametrize("what", ["file", "volume", "version", "dek", "tag", "length"])
def test_a_block_is_bound_to_what_it_is(what: str) -> None:
    ciphers, extent, deks = sealed([b"p" * 100])
    if what == "version":
        extent.version += 1
    elif what == "tag":
        extent.tags = bytes([extent.tags[0] ^ 1]) + extent.tags[1:]
    elif what == "dek":
        deks = [bytes(32)]
    elif what == "length":
        extent.last_len = 99
        ciphers = [ciphers[0][:99]]
    file_id = b"G" * 16 if what == "file" else FILE_ID
    volume_id = b"W" * 16 if what == "volume" else VOLUME_ID
    assert opened(ciphers, extent, deks, file_id=file_id, volume_id=volume_id)[0] == extent.first


def test_the_additional_data_is_the_formats_60_bytes() -> None:
    aad = block_aad(VOLUME_ID, FILE_ID, 0x0102, 0x0304, 0x0506)
    assert aad == b"CFBLOCK1" + VOLUME_ID + FILE_ID + bytes(6) + b"\1\2" + bytes(6) + b"\3\4" + bytes(2) + b"\5\6"
    assert len(aad) == 60


@pytest.mark.parametrize("change", ["what", "volume", "log", "generation", "key", "bit", "short", "empty"])
def test_an_attribute_is_bound_to_what_it_is(change: str) -> None:
    key = b"k" * 32
    value = seal_attr(key, ATTR_TARGET, VOLUME_ID, FILE_ID, 5, b"target")
    assert open_attr(key, ATTR_TARGET, VOLUME_ID, FILE_ID, 5, value) == b"target"
    what = ATTR_XATTRS if change == "what" else ATTR_TARGET
    volume_id = b"W" * 16 if change == "volume" else VOLUME_ID
    log_id = b"G" * 16 if change == "log" else FILE_ID
    generation = 6 if change == "generation" else 5
    key = b"l" * 32 if change == "key" else key
    if change == "bit":
        value = bytes([value[0] ^ 1]) + value[1:]
    elif change == "short":
        value = value[:-1]
    elif change == "empty":
        value = b""
    with pytest.raises(Damaged) as caught:
        open_attr(key, what, volume_id, log_id, generation, value)
    assert caught.value.reason == "attr"
