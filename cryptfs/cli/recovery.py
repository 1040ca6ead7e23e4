"""Recovery keys at the terminal: asked for, read from a file, and shown once.

The text of a key goes to the terminal itself or to a file of mode 0600, never to stdout or stderr, which somebody may
be keeping.
"""

from __future__ import annotations

import io
import os
from pathlib import Path

from cryptfs.cli import passphrase
from cryptfs.cli.advice import hinted
from cryptfs.errors import UsageError
from cryptfs.format.recovery_key import GROUPS, KEY_BYTES, BadRecoveryKey, from_text, to_text

FILE_MAX_BYTES = 4096
WORDS = passphrase.Words("recovery key", "", "")


class Mistyped(UsageError):
    """What was given is no recovery key; the message says which group is wrong."""


def new_key() -> bytes:
    """25 random bytes."""
    return os.urandom(KEY_BYTES)


def ask() -> bytes:
    """A recovery key from the terminal, unseen. Raises `Mistyped`, `UsageError`."""
    hint = "give it with --recovery-file FILE"
    try:
        typed = passphrase.ask("Recovery key: ", WORDS)
    except UsageError as failure:
        raise hinted(UsageError(str(failure)), hint) from None
    return _parsed(typed)


def read_file(path: Path) -> bytes:
    """The recovery key in a file; lines that begin with `#` are passed over. Raises `Mistyped`, `UsageError`."""
    try:
        with path.open("rb") as file:
            passphrase.warn_if_open(path, os.fstat(file.fileno()))
            content = file.read(FILE_MAX_BYTES + 1)
    except OSError as failure:
        raise UsageError(f"cannot read the recovery key file {path}: {failure.strerror}") from failure
    if len(content) > FILE_MAX_BYTES:
        raise UsageError(f"{path} is too long to be a recovery key")
    return _parsed(b"\n".join(line for line in content.split(b"\n") if not line.lstrip().startswith(b"#")))


def as_file(key: bytes | bytearray, cipher_dir: Path, label: str) -> bytes:
    """What `--out` writes: the key, and which volume it is for (of which, at `init`, there is no id yet)."""
    about = f"# cryptfs recovery key of {_one_line(str(cipher_dir))}, protector {_one_line(label)}\n"
    return (about + to_text(bytes(key)) + "\n").encode()


def has_terminal() -> bool:
    """Whether there is a terminal to show a key on."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def show(key: bytes, volume_id: bytes, label: str) -> None:
    """The key in groups and as a QR code, on the controlling terminal. Raises `UsageError` if there is none."""
    text = to_text(key)
    groups = text.split("-")
    half = GROUPS // 2
    lines = [
        "",
        f"Recovery key of the volume {volume_id.hex()[:8]}, protector {_one_line(label)}.",
        "It is shown this once. Write it down and keep it where the volume is not.",
        "",
        "    " + "-".join(groups[:half]) + "-",
        "    " + "-".join(groups[half:]),
        "",
        _qr_code(text),
    ]
    try:
        terminal = os.open("/dev/tty", os.O_WRONLY | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError as failure:
        raise UsageError("no terminal to show the recovery key on") from failure
    try:
        rest = "\n".join(lines).encode()
        while rest:
            rest = rest[os.write(terminal, rest) :]
    finally:
        os.close(terminal)


def _qr_code(text: str) -> str:
    import segno

    drawn = io.StringIO()
    # Half blocks, two modules a character: 33 by 17 for the 59 characters, all of QR's alphanumeric set.
    segno.make(text, micro=False, error="m").terminal(out=drawn, border=2, compact=True)
    return drawn.getvalue()


def _parsed(typed: bytes) -> bytes:
    try:
        return from_text(typed.decode("utf-8", "replace"))
    except BadRecoveryKey as failure:
        raise Mistyped(f"no recovery key: {failure}") from None


def _one_line(label: str) -> str:
    from cryptfs.cli import ui

    return ui.printable(label)
