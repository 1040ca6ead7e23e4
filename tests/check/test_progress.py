"""What is said while a check is under way, where nobody draws a bar."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from cryptfs.cli import progress
from cryptfs.ops.check_report import Tally


async def test_a_line_now_and_then(autojump_clock: MockClock, capsys: pytest.CaptureFixture[str]) -> None:
    tally = Tally("reading", files=3, done_bytes=5 << 20)
    async with progress.shown(tally, by_bytes=True):
        await trio.sleep(31)
        tally.total_bytes, tally.measured = 20 << 20, True
        await trio.sleep(30)
    first, second = capsys.readouterr().err.splitlines()
    assert first == "note: reading: 3 files, 5.0 MiB"
    assert second.startswith("note: reading: 3 files, 5.0 MiB, 25 %, about ")


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 bytes"), (1023, "1023 bytes"), (1536, "1.5 KiB"), (3 << 40, "3.0 TiB")]
)
def test_sizes(count: int, text: str) -> None:
    assert progress.size(count) == text
