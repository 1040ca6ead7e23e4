"""Protectors that a rotation carries over: a new KEK is wrapped by each once more, which takes the secret of each.

One secret is that which the command is given as every other one (`protectors.Given`). The others come from `--keep`,
or from a person who is asked for each of them. Everything is read before anything is changed. Who is carried over by
nobody is left out, and only if somebody agreed to that.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cryptfs.cli import ui
from cryptfs.cli.advice import hinted
from cryptfs.cli.passphrase import PIN, Sources
from cryptfs.cli.protectors import KEYFILE, PASSPHRASE, PKCS11, RECOVERY, Choice, Given, named
from cryptfs.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cryptfs.format.volume import Protector, Volume

Carried = list[tuple[bytes, bytes]]
"""(protector id, secret) of each."""


@dataclass(frozen=True)
class Kept:
    """A protector named with `--keep`, and where its secret is; None: a person is asked."""

    protector: Protector
    file: Path | None

    def read(self) -> bytes:
        """The secret. Raises `UsageError`."""
        if self.file is None and self.protector.kind == KEYFILE:
            raise hinted(
                UsageError(f"the protector {self.protector.label!r} is opened by a key file"),
                f"say which: --keep {self.protector.label}=FILE",
            )
        return _choice(self.protector, self.file).read()


def kept(volume: Volume, words: Sequence[str]) -> list[Kept]:
    """What the values of `--keep` say. Raises `UsageError` for one that names no protector, or one a second time."""
    found = [_kept(volume, word) for word in words]
    for number, each in enumerate(found):
        if any(each.protector == other.protector for other in found[:number]):
            raise UsageError(f"the protector {each.protector.label!r} is to be kept twice")
    return found


def _kept(volume: Volume, word: str) -> Kept:
    failure: UsageError | None = None
    at = word.find("=")
    while at >= 0:
        # A label may have a sign of equality in it, too.
        try:
            return Kept(named(volume, word[:at]), Path(word[at + 1 :]))
        except UsageError as error:
            failure = failure or error
            at = word.find("=", at + 1)
    try:
        return Kept(named(volume, word), None)
    except UsageError as error:
        raise failure or error from None


def tries(volume: Volume, opened_with: Choice, value: bytes, others: Sequence[Kept], *, ask: bool) -> list[Carried]:
    """What to carry over: the first of these whose secrets all fit.

    `value` is the secret of the protector that was chosen, or of any one of its kind; `others` are read, and with `ask`
    a person is asked for the rest. Raises `UsageError`.
    """
    ids = [each.protector.protector_id for each in others]
    if opened_with.protector is not None:
        first = [opened_with.protector_id]
        if first[0] in ids:
            raise UsageError(f"the protector {opened_with.protector.label!r} is given two secrets")
    else:
        first = [p.protector_id for p in volume.protectors if p.kind == opened_with.kind and p.protector_id not in ids]
    more = [(each.protector.protector_id, each.read()) for each in others]
    if ask and len(first) == 1:
        more += _asked(volume, {*first, *ids})
    return [[(each, value), *more] for each in first] or [more]


def _asked(volume: Volume, known: set[bytes]) -> Carried:
    """The other protectors that a person wants to keep, with their secrets."""
    from cryptfs.cli import terminal
    from cryptfs.cli.keyfile import read_keyfile

    out: Carried = []
    for protector in volume.protectors:
        if protector.protector_id in known:
            continue
        name = f"{protector.label!r} ({protector.kind})"
        if not terminal.ask_yes(f"Shall {ui.printable(name)} go on opening the volume? It takes its secret"):
            continue
        if protector.kind == KEYFILE:
            secret = read_keyfile(Path(terminal.ask_line("Its key file: ")))
        else:
            secret = _choice(protector, None).read()
        out.append((protector.protector_id, secret))
    return out


def _choice(protector: Protector, file: Path | None) -> Choice:
    def only(kind: str) -> Path | None:
        return file if protector.kind == kind else None

    given = Given(
        Sources(only(PASSPHRASE)), Sources(only(PKCS11), words=PIN), keyfile=only(KEYFILE), recovery_file=only(RECOVERY)
    )
    return Choice(protector.kind, protector, given)


def agree(others: Sequence[Protector], *, asking: bool, drop_others: bool) -> None:
    """Say who is left out. Raises `UsageError` if nobody wants that."""
    from cryptfs.cli import terminal

    names = ui.printable(", ".join(f"{protector.label!r} ({protector.kind})" for protector in others))
    if drop_others:
        ui.note(f"left out, and no way into the volume any more: {names}")
    elif not asking:
        raise hinted(
            UsageError(f"these protectors would be left out: {names}"),
            "--keep NAME=FILE carries one over, with its secret from a file; --drop-others agrees to their going",
        )
    elif not terminal.ask_yes(f"Leave out {names}?"):
        raise UsageError("nothing was changed")
