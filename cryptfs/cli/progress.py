"""How far a long look into a volume is, with an estimate: a bar on a terminal, else a line on stderr now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import trio

from cryptfs.cli import ui

if TYPE_CHECKING:
    from cryptfs.ops.check_report import Tally

_DRAW_S = 0.2
_LINE_S = 30.0


@asynccontextmanager
async def shown(tally: Tally, *, by_bytes: bool) -> AsyncIterator[None]:
    """Show `tally` while the block runs. `by_bytes`: the work is reading content, else it is looking at files."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_draw if ui.is_fancy(sys.stderr) else _say, tally, by_bytes)
        yield
        nursery.cancel_scope.cancel()


def _progress(tally: Tally, by_bytes: bool) -> tuple[int, int | None]:
    done, total = (tally.done_bytes, tally.total_bytes) if by_bytes else (tally.files, tally.total_files)
    return done, total if tally.measured else None


async def _draw(tally: Tally, by_bytes: bool) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    amount = DownloadColumn(binary_units=True) if by_bytes else MofNCompleteColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), amount, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(tally.stage, total=None)
        while True:
            done, total = _progress(tally, by_bytes)
            bar.update(task, description=ui.printable(tally.stage), completed=done, total=total)
            await trio.sleep(_DRAW_S)


async def _say(tally: Tally, by_bytes: bool) -> None:
    started_s = time.monotonic()
    while True:
        await trio.sleep(_LINE_S)
        done, total = _progress(tally, by_bytes)
        said = f"{tally.stage}: {tally.files} files, {size(tally.done_bytes)}"
        if total and done:
            left_s = (time.monotonic() - started_s) * max(0, total - done) / done
            said += f", {min(100, 100 * done // total)} %, about {left_s:.0f} s left"
        ui.note(said)


def size(count: int) -> str:
    """A number of bytes for people."""
    value = float(count)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
