"""What a person or a program gets to see. No other module of the command line prints.

Rules:

1. stdout carries only what was asked for: a table, a JSON document. Everything else (errors, hints, warnings, notes,
   waiting) goes to stderr, so `cryptfs status --json | jq` needs no filter.
2. A failure is one line `error: ...`, and where we know a way out, one line `hint: ...` under it. No stack trace
   without --debug.
3. `warning: ...` is for what went on although it should not have; `note: ...` for what a person may want to know.
4. Nothing is said on success that was not asked for, but `init`, `mount` and `agent run` say one line of what is now
   there when stderr is a terminal.
5. Colour and movement only on a terminal, and never when NO_COLOR is set (no-color.org) or TERM is `dumb`.
6. Text from outside (paths, labels, messages) is printed with its control characters escaped, so that a
   file's name cannot drive the terminal.
7. A passphrase is never echoed, printed, or part of any message.
8. JSON is one document (`audit show` and `follow`: one object per line), keys in snake_case, bytes as lower-case
   hexadecimal; docs/CLI_ABI.md lists every field.
9. The exit code comes from the error's class (`cryptfs.errors`), 130 after Ctrl-C, 70 for a fault of our own.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_RED, _YELLOW, _CYAN, _OFF = "\x1b[1;31m", "\x1b[1;33m", "\x1b[36m", "\x1b[0m"


def is_fancy(stream: TextIO) -> bool:
    """Whether colour and movement are welcome on `stream` (rule 5)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def printable(text: str) -> str:
    """`text` with control characters and undecodable bytes escaped (rule 6)."""
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


def _escaped(char: str) -> str:
    if "\udc80" <= char <= "\udcff":  # a byte that is no UTF-8, carried by PEP 383's surrogateescape
        return f"\\x{ord(char) - 0xDC00:02x}"
    return char.encode("unicode_escape").decode("ascii")


def error(message: str, hint: str = "") -> None:
    """Say why a command failed and, if known, what to do about it."""
    _say("error", _RED, message)
    if hint:
        _say("hint", _CYAN, hint)


def warning(message: str) -> None:
    """Say that something went on although it should not have."""
    _say("warning", _YELLOW, message)


def note(message: str) -> None:
    """Say something that is neither a failure nor what was asked for."""
    _say("note", _CYAN, message)


def done(message: str) -> None:
    """Say what is now there, to a person only (rule 4)."""
    if sys.stderr.isatty():
        _write(printable(message))


def _say(word: str, colour: str, message: str) -> None:
    label = f"{colour}{word}:{_OFF}" if is_fancy(sys.stderr) else f"{word}:"
    _write(f"{label} {printable(message)}")


def _write(line: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # a closed stderr must not change the exit code
        sys.stderr.write(line + "\n")
        sys.stderr.flush()


def out(line: str) -> None:
    """One line of what was asked for."""
    sys.stdout.write(line + "\n")


def out_json(document: object) -> None:
    """A JSON document on stdout (rule 8); undecodable bytes of a path come out as lone surrogates, escaped."""
    import json

    out(json.dumps(document, indent=2))


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Rows under headings: drawn on a terminal, else aligned columns that no width cuts."""
    safe = [[printable(cell) for cell in row] for row in rows]
    if is_fancy(sys.stdout):
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        drawn = Table(box=None, pad_edge=False, header_style="bold")
        for heading in headings:
            drawn.add_column(heading, overflow="fold")
        for row in safe:
            drawn.add_row(*(Text(cell) for cell in row))
        Console().print(drawn)
        return
    lines = [[heading.upper() for heading in headings], *safe]
    widths = [max(len(line[i]) for line in lines) for i in range(len(headings))]
    for line in lines:
        out("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """Show that `what` is going on, on a terminal only; leaves no trace."""
    if not is_fancy(sys.stderr):
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(printable(what)):
        yield
