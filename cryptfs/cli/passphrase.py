"""The five ways a passphrase can come in, one rule for all: bytes, not empty, at most 64 KiB, exactly one source.

prompt                  the controlling terminal, without echo; the bytes up to the line's end
--passfile FILE         everything in FILE but one trailing newline
--passfd N              everything up to end-of-file on descriptor N, but one trailing newline
--extpass CMD           the first line that `/bin/sh -c CMD` prints
CRYPTFS_PASSPHRASE      the variable's bytes as they are

The variable leaves this process's environment before anything else happens (`claim_environment`), so no child can
inherit it. From here a passphrase goes only over the agent's socket: never into an argument or an environment.
"""

from __future__ import annotations

import os
import stat
import subprocess
import termios
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

from cryptfs.cli import ui
from cryptfs.cli.advice import hinted
from cryptfs.errors import CryptfsError, UsageError, WrongSecret

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

F = TypeVar("F", bound="Callable[..., Any]")

ENVIRONMENT_VARIABLE = "CRYPTFS_PASSPHRASE"
LIMIT_BYTES = 64 * 1024
ATTEMPTS = 3
"""How often a person at a prompt may try."""

_NO_TERMINAL_HINT = "give it with --passfile FILE, --passfd N, --extpass CMD or the variable CRYPTFS_PASSPHRASE"
_from_environment: bytes | None = None


def claim_environment() -> None:
    """Move CRYPTFS_PASSPHRASE out of the environment into this module; the first thing `main` does."""
    global _from_environment  # noqa: PLW0603  the environment is one per process, and so is what was taken from it
    _from_environment = os.environb.pop(ENVIRONMENT_VARIABLE.encode(), None)


@dataclass(frozen=True)
class Sources:
    """Where the passphrase is to come from; all empty means the prompt."""

    passfile: Path | None = None
    passfd: int | None = None
    extpass: str | None = None
    environment: bytes | None = field(default=None, repr=False)

    @property
    def is_prompt(self) -> bool:
        """Whether a person has to be asked, and so may be asked again."""
        return self == Sources()

    def read(self) -> bytes:
        """The passphrase from a source that is no prompt. Raises `UsageError` if it cannot be had or is empty."""
        if self.passfile is not None:
            return _checked(_read_file(self.passfile), f"the file {self.passfile}")
        if self.passfd is not None:
            return _checked(_read_descriptor(self.passfd), f"file descriptor {self.passfd}")
        if self.extpass is not None:
            return _checked(_read_command(self.extpass), "the command given with --extpass")
        if self.environment is not None:
            return _checked(self.environment, ENVIRONMENT_VARIABLE)
        raise AssertionError("a prompt is not read but asked")


def options(command: F) -> F:
    """Add the passphrase options to a verb; it gets them as `passfile`, `passfd`, `extpass`."""
    for option in (
        click.option(
            "--extpass", metavar="CMD", help="Take the first line that a shell command prints as the passphrase."
        ),
        click.option(
            "--passfd", metavar="N", type=click.IntRange(min=0), help="Read the passphrase from a descriptor."
        ),
        click.option(
            "--passfile",
            metavar="FILE",
            type=click.Path(dir_okay=False, path_type=Path),
            help="Read the passphrase from a file.",
        ),
    ):
        command = option(command)
    return command


def choose(passfile: Path | None, passfd: int | None, extpass: str | None) -> Sources:
    """The one source that was given. Raises `UsageError` if there is more than one."""
    given = {
        "--passfile": passfile,
        "--passfd": passfd,
        "--extpass": extpass,
        ENVIRONMENT_VARIABLE: _from_environment,
    }
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise UsageError(f"more than one source for the passphrase: {' and '.join(names)}")
    return Sources(passfile, passfd, extpass, _from_environment)


def ask(question: str = "Passphrase: ") -> bytes:
    """One passphrase from the terminal. Raises `UsageError` if there is no terminal or nothing was typed."""
    return _checked(_prompt(question), "the terminal")


def ask_new() -> bytes:
    """A new passphrase from the terminal: rated, then typed again. Raises `UsageError` if the two never agree."""
    for _attempt in range(ATTEMPTS):
        first = _prompt("New passphrase: ")
        if not first:
            ui.warning("an empty passphrase protects nothing; try again")
            continue
        ui.note(_rating(first))
        if _prompt("Again, to be sure: ") == first:
            return _checked(first, "the terminal")
        ui.warning("the two are not the same; try again")
    raise UsageError("no passphrase was given twice the same")


def _rating(passphrase: bytes) -> str:
    """How long guessing would take, in words. Only `init` pays for the dictionaries that this loads."""
    from zxcvbn import zxcvbn

    text = passphrase.decode("utf-8", "replace")
    rated = zxcvbn(text[:72])  # its time grows with the square of the length, and 72 characters are strong or hopeless
    words = ("very weak", "weak", "fair", "good", "strong")[rated["score"]]
    time = rated["crack_times_display"]["offline_slow_hashing_1e4_per_second"]
    advice = [rated["feedback"]["warning"], *rated["feedback"]["suggestions"]]
    line = f"strength: {words} (guessed in {time} at 10,000 tries a second)"
    return ". ".join([line, *(part.rstrip(".") for part in advice if part)])


def _checked(passphrase: bytes, source: str) -> bytes:
    if not passphrase:
        raise UsageError(f"the passphrase from {source} is empty")
    if len(passphrase) > LIMIT_BYTES:
        raise UsageError(f"the passphrase from {source} is longer than {LIMIT_BYTES} bytes")
    return passphrase


def _read_all(fd: int) -> bytes:
    """Up to one byte more than is allowed, so that the caller can tell."""
    parts = bytearray()
    while len(parts) <= LIMIT_BYTES + 1 and (part := os.read(fd, LIMIT_BYTES + 2 - len(parts))):
        parts += part
    return bytes(parts)


def _read_file(path: Path) -> bytes:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY)
        try:
            status = os.fstat(fd)
            if stat.S_ISREG(status.st_mode) and status.st_mode & 0o077:
                ui.warning(
                    f"other users may open {path} (mode {stat.S_IMODE(status.st_mode):04o}); chmod 600 ends that"
                )
            return _read_all(fd).removesuffix(b"\n")
        finally:
            os.close(fd)
    except OSError as failure:
        raise UsageError(f"cannot read the passphrase file {path}: {failure.strerror}") from failure


def _read_descriptor(fd: int) -> bytes:
    try:
        return _read_all(fd).removesuffix(b"\n")
    except OSError as failure:
        raise UsageError(f"cannot read a passphrase from file descriptor {fd}: {failure.strerror}") from failure


def _read_command(command: str) -> bytes:
    # A shell on purpose, as for ssh's ProxyCommand: the text is the user's own, and its quoting is what they know.
    with subprocess.Popen(["/bin/sh", "-c", command], stdout=subprocess.PIPE) as child:
        output = _read_all(child.stdout.fileno()) if child.stdout else b""
    if child.returncode != 0:
        raise UsageError(f"the command given with --extpass ended with status {child.returncode}")
    return output.split(b"\n", 1)[0]


def _prompt(question: str) -> bytes:
    """One line from the controlling terminal, unseen; terminal settings are put back whatever happens (termios(3))."""
    try:
        terminal = os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError as failure:
        raise hinted(UsageError("no terminal to ask for the passphrase"), _NO_TERMINAL_HINT) from failure
    try:
        before = termios.tcgetattr(terminal)
        silent = termios.tcgetattr(terminal)
        silent[3] &= ~(termios.ECHO | termios.ECHONL)
        try:
            termios.tcsetattr(terminal, termios.TCSAFLUSH, silent)  # drops what was typed before it would be unseen
            os.write(terminal, question.encode())
            return _read_line(terminal)
        finally:
            termios.tcsetattr(terminal, termios.TCSAFLUSH, before)
            os.write(terminal, b"\n")
    finally:
        os.close(terminal)


def _read_line(terminal: int) -> bytes:
    line = bytearray()
    while len(line) <= LIMIT_BYTES and (part := os.read(terminal, 4096)):
        line += part
        if part.endswith(b"\n"):
            return bytes(line[:-1])
    return bytes(line)


def is_retryable(sources: Sources, failure: CryptfsError, attempt: int) -> bool:
    """Whether to ask again after attempt number `attempt` (from 1) failed."""
    return sources.is_prompt and isinstance(failure, WrongSecret) and attempt < ATTEMPTS
