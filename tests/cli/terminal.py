"""A terminal for a command under test: what a person would see and type, through a pty (pty(7))."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import subprocess
import termios
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

TIMEOUT_S = 60.0


class Terminal:
    """Runs a command with a pty as its controlling terminal, standard streams included."""

    def __init__(self, command: Sequence[str]) -> None:
        self._master, slave = pty.openpty()
        self.seen = ""
        self._at = 0
        try:
            self.process = subprocess.Popen(
                command,
                stdin=slave,
                stdout=slave,
                stderr=slave,
                start_new_session=True,
                preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509 - no threads in these tests
            )
        finally:
            os.close(slave)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._master)

    def expect(self, text: str) -> None:
        """Read until `text` is shown after what was expected before."""
        end = time.monotonic() + TIMEOUT_S
        while text not in self.seen[self._at :]:
            assert self._read(end), f"{text!r} was not shown; seen: {self.seen!r}"
        self._at = self.seen.index(text, self._at) + len(text)

    def type(self, text: str) -> None:
        """What a person types, without the Enter key."""
        os.write(self._master, text.encode())

    def enter(self, text: str) -> None:
        """A line typed and sent."""
        self.type(text + "\n")

    def ended(self) -> int:
        """Read the rest; the exit code."""
        end = time.monotonic() + TIMEOUT_S
        while self._read(end):
            pass
        return self.process.wait(TIMEOUT_S)

    def is_echoing(self) -> bool:
        """Whether the terminal shows what is typed."""
        return bool(termios.tcgetattr(self._master)[3] & termios.ECHO)

    def _read(self, end: float) -> bool:
        if not select.select([self._master], [], [], max(0.0, end - time.monotonic()))[0]:
            return False
        try:
            part = os.read(self._master, 65536)
        except OSError:  # EIO: the other side is closed
            return False
        self.seen += part.decode("utf-8", "replace")
        return bool(part)
