from __future__ import annotations

import click
import pytest

from cryptfs.cli.sizes import block_size_given


@pytest.mark.parametrize(
    ("text", "size"),
    [("4096", 4096), ("4K", 4096), ("16k", 16384), ("16KiB", 16384), ("1M", 1 << 20), ("1048576", 1 << 20)],
)
def test_a_block_size_as_people_write_it(text: str, size: int) -> None:
    assert block_size_given(None, None, text) == size


@pytest.mark.parametrize("text", ["", "K", "2K", "2M", "12K", "-4K", "4.0K", "4G", "4KK", "٤K", "9" * 5000, "1 M", "0"])
def test_a_block_size_that_no_volume_can_have(text: str) -> None:
    with pytest.raises(click.BadParameter):
        block_size_given(None, None, text)
