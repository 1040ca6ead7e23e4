"""Sizes as people write them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from click import Context, Parameter

BLOCK_SIZE_MIN, BLOCK_SIZE_MAX = 4096, 1 << 20
"""In bytes (FORMAT.md §3)."""

_FACTORS = {"": 1, "K": 1 << 10, "KIB": 1 << 10, "M": 1 << 20, "MIB": 1 << 20}


class BlockSize(click.ParamType):
    """A block size in bytes, `16384` or `16K` or `1M`: a power of two, 4096 to 1048576."""

    name = "size"

    def convert(self, value: object, param: Parameter | None, ctx: Context | None) -> int:
        """The number of bytes; fails as click's own types do."""
        text = str(value).strip().upper()
        digits = text.rstrip("KMIB")
        factor = _FACTORS.get(text[len(digits) :])
        if factor is None or not (digits.isascii() and digits.isdecimal()) or len(digits) > 9:
            self.fail(f"{value!r} is no size, such as 16384, 16K or 1M", param, ctx)
        size = int(digits) * factor
        if size.bit_count() != 1 or not BLOCK_SIZE_MIN <= size <= BLOCK_SIZE_MAX:
            self.fail(f"{value!r} is no power of two from 4K to 1M", param, ctx)
        return size
