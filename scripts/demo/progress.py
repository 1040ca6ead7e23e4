"""Progress while the demo works: a moving line on a terminal, one plain line per step elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table


@dataclass(slots=True)
class Progress:
    """Times steps and shows them; `seconds[(where, title)]` keeps every duration."""

    console: Console
    seconds: dict[tuple[str, str], float] = field(default_factory=dict)

    def heading(self, text: str) -> None:
        """Starts a part of the demo."""
        self.console.print(f"\n[bold]{text}[/bold]")

    def line(self, text: str) -> None:
        """Prints something worth seeing as it is."""
        self.console.print(f"  {text}", markup=False, soft_wrap=True)

    @contextlib.contextmanager
    def step(self, where: str, title: str) -> Iterator[Callable[[int], None]]:
        """Shows a step while it runs and how long it took; yields a function that counts entries done."""
        began, done = time.monotonic(), 0
        with contextlib.ExitStack() as stack:
            status = stack.enter_context(self.console.status(f"{where}: {title}")) if self.console.is_terminal else None

            def advance(count: int) -> None:
                nonlocal done
                done += count
                if status is not None:
                    status.update(f"{where}: {title} ({done:,})")

            yield advance
        took = time.monotonic() - began
        self.seconds[where, title] = took
        self.console.print(f"  {where}: {title}{f' ({done:,})' if done else ''}, {took:.1f} s", markup=False)

    def summary(self, rows: list[tuple[str, str, str]]) -> None:
        """The closing table: what, result, seconds."""
        table = Table(title="cryptfs demo", title_justify="left")
        for heading in ("what", "result"):
            table.add_column(heading)
        table.add_column("seconds", justify="right")
        for row in rows:
            table.add_row(*row)
        self.console.print()
        self.console.print(table)
