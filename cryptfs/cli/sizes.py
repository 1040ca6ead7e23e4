"""Sizes as people write them."""

from __future__ import annotations

import click

BLOCK_SIZE_MIN, BLOCK_SIZE_MAX = 4096, 1 << 20
"""In bytes (FORMAT.md §3)."""

_FACTORS = {"": 1, "K": 1 << 10, "KIB": 1 << 10, "M": 1 << 20, "MIB": 1 << 20}


def block_size_given(_ctx: click.Context | None, _param: click.Parameter | None, text: str) -> int:
    """A block size in bytes, from `16384`, `16K` or `1M`: a power of two, 4096 to 1048576.

    Raises `click.BadParameter`.
    """
    upper = text.strip().upper()
    digits = upper.rstrip("KMIB")
    factor = _FACTORS.get(upper[len(digits) :])
    if factor is None or not (digits.isascii() and digits.isdecimal()) or len(digits) > 9:
        raise click.BadParameter(f"{text!r} is no size, such as 16384, 16K or 1M", _ctx, _param)
    size = int(digits) * factor
    if size.bit_count() != 1 or not BLOCK_SIZE_MIN <= size <= BLOCK_SIZE_MAX:
        raise click.BadParameter(f"{text!r} is no power of two from 4K to 1M", _ctx, _param)
    return size
