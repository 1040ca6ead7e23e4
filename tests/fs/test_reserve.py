"""Which files have keys brought ahead: those that are written and stay open, none that is made and closed at once."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import cast

import trio
from trio.testing import MockClock

from cryptfs.fs.file import FileNode
from cryptfs.fs.reserve import BLOCKS, SHORTLY_S, Reserve


class File:
    """As much of a `FileNode` as a reserve looks at."""

    def __init__(self) -> None:
        self.opens = 1
        self.deks = 0
        self.stocked_at: list[float] = []

    def has_deks(self, count: int) -> bool:
        return self.deks >= count

    async def stock_up(self, count: int) -> None:
        self.deks = count
        self.stocked_at.append(trio.current_time())


@asynccontextmanager
async def serving() -> AsyncIterator[Reserve]:
    reserve = Reserve()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(reserve.serve)
        yield reserve
        nursery.cancel_scope.cancel()


def write(reserve: Reserve, file: File) -> None:
    reserve.about_to_be_written(cast(FileNode, file))


async def test_files_that_are_made_and_closed_one_after_the_other_have_none(autojump_clock: MockClock) -> None:
    files = []
    async with serving() as reserve:
        for _ in range(500):
            file = File()
            files.append(file)
            write(reserve, file)
            await trio.sleep(0.002)
            file.opens = 0
        await trio.sleep(1)
    assert sum(len(file.stocked_at) for file in files) == 0


async def test_a_file_that_stays_open_has_them_shortly_after_whenever_it_is_written(autojump_clock: MockClock) -> None:
    async with serving() as reserve:
        for pause_s in (0.0, 0.001, 0.012, 0.024, 0.03, 1.0):
            await trio.sleep(pause_s)
            file, began = File(), trio.current_time()
            write(reserve, file)
            await trio.sleep(SHORTLY_S + 0.001)
            [at] = file.stocked_at
            assert SHORTLY_S / 2 - 1e-6 <= at - began <= SHORTLY_S + 1e-6
            file.deks = BLOCKS - 1
            write(reserve, file)
            await trio.sleep(SHORTLY_S + 0.001)
            assert len(file.stocked_at) == 2
            assert file.has_deks(BLOCKS)
            file.opens = 0
