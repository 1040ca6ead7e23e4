"""How far something is that is counted, without an event loop: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Self

from cryptfs.cli import ui

if TYPE_CHECKING:
    from types import TracebackType

_LINE_S = 30.0


class Meter:
    """`with Meter("rewriting") as meter: meter.show(3, 10)`."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._stack = ExitStack()
        self._said_s = time.monotonic()

    def __enter__(self) -> Self:
        self._bar = None
        if ui.is_fancy(sys.stderr):
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._stack.enter_context(bar)
            self._bar, self._task = bar, bar.add_task(self._what, total=None)
        return self

    def show(self, done: int, total: int) -> None:
        """So many of so many."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total or None)
        elif time.monotonic() - self._said_s >= _LINE_S:
            self._said_s = time.monotonic()
            ui.note(f"{self._what}: {done} of {total}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
