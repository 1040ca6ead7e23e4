"""Store calls made where they are asked for, without a thread: the same calls, always in the same order.

For tests that make hundreds of thousands of them on stores that never wait: most of the time would go into waking
threads. That calls do run in threads, several at once, is for `tests/fs` and every test with a mount.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar
from unittest import mock

from cryptfs.fs.context import FsContext

T = TypeVar("T")


async def _in_thread(self: FsContext, call: Callable[..., T], *args: object) -> T:
    return call(*args)


async def _in_threads(self: FsContext, calls: Sequence[tuple[Callable[[int], None], int]]) -> None:
    """One after the other. A cut between two of them is in any case one of the states that a cut before both leaves."""
    errors = []
    for call, fd in calls:
        try:
            call(fd)
        except OSError as error:
            errors.append(error)
    if errors:
        raise errors[0]


@contextmanager
def without_threads() -> Iterator[None]:
    """While this lasts."""
    with mock.patch.object(FsContext, "in_thread", _in_thread), mock.patch.object(FsContext, "in_threads", _in_threads):
        yield
