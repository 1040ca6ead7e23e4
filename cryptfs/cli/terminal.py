"""A question to the person at the controlling terminal, answered in the clear."""

from __future__ import annotations

import os

from cryptfs.cli.advice import hinted
from cryptfs.errors import UsageError

LINE_MAX_BYTES = 4096


def ask_yes(question: str) -> bool:
    """Whether the answer begins with a y. Raises `UsageError` if there is no terminal."""
    return ask_line(f"{question} [y/N]: ").strip().lower() in ("y", "yes")


def ask_line(question: str) -> str:
    """One line, without its end. Raises `UsageError` if there is no terminal."""
    try:
        terminal = os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError as failure:
        raise hinted(UsageError("no terminal to ask on"), "--yes answers in advance") from failure
    try:
        os.write(terminal, question.encode())
        line = bytearray()
        while len(line) < LINE_MAX_BYTES and (part := os.read(terminal, LINE_MAX_BYTES)):
            line += part
            if part.endswith(b"\n"):
                break
        return line.removesuffix(b"\n").decode("utf-8", "replace")
    finally:
        os.close(terminal)
