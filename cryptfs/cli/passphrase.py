"""The five ways a passphrase or PIN can come in, one rule for all: bytes, not empty, at most 64 KiB, one source only.

prompt                  the controlling terminal, without echo; the bytes up to the line's end
--passfile FILE         everything in FILE but one trailing newline
--passfd N              everything up to end-of-file on descriptor N, but one trailing newline
--extpass CMD           the first line that `/bin/sh -c CMD` prints
CRYPTFS_PASSPHRASE      the variable's bytes as they are

A token's PIN has --pinfile, --pinfd, --extpin and CRYPTFS_PIN. Where an old and a new secret may both be wanted, the
new one has --new-passfile, CRYPTFS_NEW_PASSPHRASE and so on.

The variables leave this process's environment before anything else happens (`claim_environment`), so no child can
inherit them. From here a secret goes only over the agent's socket: never into an argument or an environment.
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
from cryptfs.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

F = TypeVar("F", bound="Callable[..., Any]")

LIMIT_BYTES = 64 * 1024
ATTEMPTS = 3
"""How often a person at a prompt may try."""


@dataclass(frozen=True, slots=True)
class Words:
    """What a typed secret is called: in messages (`noun`), in options (`stem`, after `prefix`) and as a variable."""

    noun: str
    stem: str
    variable: str
    prefix: str = ""

    @property
    def options(self) -> tuple[str, str, str]:
        """The options for a file, a descriptor and a command."""
        return f"--{self.prefix}{self.stem}file", f"--{self.prefix}{self.stem}fd", f"--{self.prefix}ext{self.stem}"


PASSPHRASE = Words("passphrase", "pass", "CRYPTFS_PASSPHRASE")
PIN = Words("PIN", "pin", "CRYPTFS_PIN")
NEW_PASSPHRASE = Words("new passphrase", "pass", "CRYPTFS_NEW_PASSPHRASE", "new-")
NEW_PIN = Words("token's PIN", "pin", "CRYPTFS_NEW_PIN", "new-")

ENVIRONMENT_VARIABLE = PASSPHRASE.variable
_VARIABLES = tuple(words.variable for words in (PASSPHRASE, PIN, NEW_PASSPHRASE, NEW_PIN))
_from_environment: Mapping[str, bytes] = {}


def claim_environment() -> None:
    """Move the variables that hold secrets out of the environment into this module; the first thing `main` does."""
    global _from_environment  # noqa: PLW0603  the environment is one per process, and so is what was taken from it
    there = {name: os.environb.pop(name.encode(), None) for name in _VARIABLES}
    _from_environment = {name: value for name, value in there.items() if value is not None}


@dataclass(frozen=True)
class Sources:
    """Where the secret is to come from; all empty means the prompt."""

    passfile: Path | None = None
    passfd: int | None = None
    extpass: str | None = None
    environment: bytes | None = field(default=None, repr=False)
    words: Words = PASSPHRASE

    @property
    def is_prompt(self) -> bool:
        """Whether a person has to be asked, and so may be asked again."""
        return not self.given

    @property
    def given(self) -> list[str]:
        """The names of the options and the variable that were given."""
        names = (*self.words.options, self.words.variable)
        values = (self.passfile, self.passfd, self.extpass, self.environment)
        return [name for name, value in zip(names, values, strict=True) if value is not None]

    def read(self) -> bytes:
        """The secret from a source that is no prompt. Raises `UsageError` if it cannot be had or is empty."""
        noun = self.words.noun
        if self.passfile is not None:
            return _checked(_read_file(self.passfile, noun), f"the file {self.passfile}", noun)
        if self.passfd is not None:
            return _checked(_read_descriptor(self.passfd, noun), f"file descriptor {self.passfd}", noun)
        if self.extpass is not None:
            option = self.words.options[2]
            return _checked(_read_command(self.extpass, option), f"the command given with {option}", noun)
        if self.environment is not None:
            return _checked(self.environment, self.words.variable, noun)
        raise AssertionError("a prompt is not read but asked")


def options(command: F, words: Words = PASSPHRASE) -> F:
    """Add the options of such a secret to a verb; it gets them as `passfile`, `passfd`, `extpass` or the like."""
    file, descriptor, shell = words.options
    for option in (
        click.option(
            shell, metavar="CMD", help=f"Take the first line that a shell command prints as the {words.noun}."
        ),
        click.option(
            descriptor, metavar="N", type=click.IntRange(min=0), help=f"Read the {words.noun} from a descriptor."
        ),
        click.option(
            file,
            metavar="FILE",
            type=click.Path(dir_okay=False, path_type=Path),
            help=f"Read the {words.noun} from a file.",
        ),
    ):
        command = option(command)
    return command


def choose(passfile: Path | None, passfd: int | None, extpass: str | None, words: Words = PASSPHRASE) -> Sources:
    """The one source that was given. Raises `UsageError` if there is more than one."""
    sources = Sources(passfile, passfd, extpass, _from_environment.get(words.variable), words)
    if len(sources.given) > 1:
        raise UsageError(f"more than one source for the {words.noun}: {' and '.join(sources.given)}")
    return sources


def ask(question: str = "Passphrase: ", words: Words = PASSPHRASE) -> bytes:
    """One secret from the terminal. Raises `UsageError` if there is no terminal or nothing was typed."""
    return _checked(_prompt(question, words), "the terminal", words.noun)


def ask_new(words: Words = PASSPHRASE) -> bytes:
    """A new passphrase from the terminal: rated, then typed again. Raises `UsageError` if the two never agree."""
    for _attempt in range(ATTEMPTS):
        first = _prompt("New passphrase: ", words)
        if not first:
            ui.warning("an empty passphrase protects nothing; try again")
            continue
        ui.note(_rating(first))
        if _prompt("Again, to be sure: ", words) == first:
            return _checked(first, "the terminal", words.noun)
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


def _checked(secret: bytes, source: str, noun: str) -> bytes:
    if not secret:
        raise UsageError(f"the {noun} from {source} is empty")
    if len(secret) > LIMIT_BYTES:
        raise UsageError(f"the {noun} from {source} is longer than {LIMIT_BYTES} bytes")
    return secret


def _read_all(fd: int) -> bytes:
    """Up to one byte more than is allowed, so that the caller can tell."""
    parts = bytearray()
    while len(parts) <= LIMIT_BYTES + 1 and (part := os.read(fd, LIMIT_BYTES + 2 - len(parts))):
        parts += part
    return bytes(parts)


def _read_file(path: Path, noun: str) -> bytes:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY)
        try:
            warn_if_open(path, os.fstat(fd))
            return _read_all(fd).removesuffix(b"\n")
        finally:
            os.close(fd)
    except OSError as failure:
        raise UsageError(f"cannot read the {noun} file {path}: {failure.strerror}") from failure


def warn_if_open(path: Path, status: os.stat_result) -> None:
    """Warn if other users may open a file that a secret was read from."""
    if stat.S_ISREG(status.st_mode) and status.st_mode & 0o077:
        ui.warning(f"other users may open {path} (mode {stat.S_IMODE(status.st_mode):04o}); chmod 600 ends that")


def _read_descriptor(fd: int, noun: str) -> bytes:
    try:
        return _read_all(fd).removesuffix(b"\n")
    except OSError as failure:
        raise UsageError(f"cannot read the {noun} from file descriptor {fd}: {failure.strerror}") from failure


def _read_command(command: str, option: str) -> bytes:
    # A shell on purpose, as for ssh's ProxyCommand: the text is the user's own, and its quoting is what they know.
    with subprocess.Popen(["/bin/sh", "-c", command], stdout=subprocess.PIPE) as child:
        output = _read_all(child.stdout.fileno()) if child.stdout else b""
    if child.returncode != 0:
        raise UsageError(f"the command given with {option} ended with status {child.returncode}")
    return output.split(b"\n", 1)[0]


def _prompt(question: str, words: Words) -> bytes:
    """One line from the controlling terminal, unseen; terminal settings are put back whatever happens (termios(3))."""
    try:
        terminal = os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError as failure:
        hint = f"give it with {', '.join(words.options)} or the variable {words.variable}"
        raise hinted(UsageError(f"no terminal to ask for the {words.noun}"), hint) from failure
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
