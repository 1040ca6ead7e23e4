"""Which protector a command uses, and where its secret comes from: decided before any secret is tried.

The options name a source, and the source a kind: `--keyfile` fits key files, `--pinfile` tokens, `--recovery-key`
recovery keys, `--passfile` and its like passphrases. Without any, a person is asked for what the volume has, a
passphrase first. A token may lock itself after a few wrong PINs, so a PIN is only ever tried on the one token that was
chosen; other secrets are tried on all protectors of their kind, where `--protector` names none.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from cryptfs.cli import passphrase
from cryptfs.cli.advice import hinted
from cryptfs.cli.passphrase import Sources
from cryptfs.errors import CryptfsError, UsageError, WrongSecret

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cryptfs.format.volume import Protector, Volume

F = TypeVar("F", bound="Callable[..., Any]")
T = TypeVar("T")

ID_PREFIX_MIN_CHARS = 4
"""Hexadecimal digits of a protector's id that are taken for one."""

PASSPHRASE, KEYFILE, RECOVERY, PKCS11 = "passphrase", "keyfile", "recovery", "pkcs11"
KINDS = (PASSPHRASE, KEYFILE, RECOVERY, PKCS11)
_ASKED = (PASSPHRASE, PKCS11, RECOVERY)
"""Kinds a person can be asked for, in the order of preference."""

_NAMES = {
    PASSPHRASE: "passphrase",
    KEYFILE: "key file",
    RECOVERY: "recovery key",
    PKCS11: "PIN",
}
_WRONG_HINTS = {
    KEYFILE: "is it this volume's key file, and unchanged? Every byte of it counts",
    RECOVERY: "the key is well formed: it is another volume's, or its protector was removed",
    PKCS11: "no other token is tried with it, and this one may lock after a few wrong ones",
}


@dataclass(frozen=True)
class Given:
    """What a command line says about the secret that opens a volume."""

    passphrase: Sources
    pin: Sources
    protector: str | None = None
    keyfile: Path | None = None
    recovery_key: bool = False
    recovery_file: Path | None = None

    def kind(self) -> str | None:
        """The kind that the sources are for; None if there are none. Raises `UsageError` if there are several."""
        by_kind = {
            PASSPHRASE: self.passphrase.given,
            PKCS11: self.pin.given,
            KEYFILE: ["--keyfile"] if self.keyfile is not None else [],
            RECOVERY: ["--recovery-key"] * self.recovery_key + ["--recovery-file"] * (self.recovery_file is not None),
        }
        names = [name for given in by_kind.values() for name in given]
        if len(names) > 1:
            raise UsageError(f"more than one secret: {' and '.join(names)}")
        return next((kind for kind, given in by_kind.items() if given), None)

    def choose(self, volume: Volume) -> Choice:
        """The protector to use. Raises `UsageError` if there is none that fits, or it is not clear which."""
        kind = self.kind()
        if self.protector is not None:
            chosen = named(volume, self.protector)
            if kind is not None and kind != chosen.kind:
                raise UsageError(
                    f"the protector {chosen.label!r} is opened by a {_named_kind(chosen.kind)}, not by a {_NAMES[kind]}"
                )
            return self._choice(chosen.kind, chosen)
        if kind is None:
            kind = next((kind for kind in _ASKED if _of_kind(volume, kind)), None)
        if kind is None:
            kinds = " or ".join(sorted({_named_kind(protector.kind) for protector in volume.protectors}))
            raise hinted(
                UsageError(f"the volume is opened by a {kinds}, and none was given"), "give it: --keyfile PATH"
            )
        fitting = _of_kind(volume, kind)
        if not fitting:
            raise hinted(UsageError(f"the volume has no {_NAMES[kind]} among its protectors"), _list_hint(volume))
        if len(fitting) > 1 and kind == PKCS11:
            raise hinted(UsageError("the volume has several tokens: say which with --protector"), _list_hint(volume))
        return self._choice(kind, fitting[0] if len(fitting) == 1 else None)

    def _choice(self, kind: str, protector: Protector | None) -> Choice:
        if kind not in KINDS:
            label = protector.label if protector is not None else ""
            raise UsageError(f"the protector {label!r} is of the kind {kind}, which this program does not know")
        return Choice(kind, protector, self)


@dataclass(frozen=True)
class Choice:
    """A kind, and the one protector of it that was chosen (None: all of the kind are tried)."""

    kind: str
    protector: Protector | None
    given: Given

    @property
    def protector_id(self) -> bytes:
        """16 bytes, or none."""
        return self.protector.protector_id if self.protector is not None else b""

    @property
    def is_prompt(self) -> bool:
        """Whether a person is asked."""
        if self.kind == RECOVERY:
            return self.given.recovery_file is None
        if self.kind == KEYFILE:
            return False
        return (self.given.passphrase if self.kind == PASSPHRASE else self.given.pin).is_prompt

    def read(self) -> bytes:
        """The secret, from its source or a person. Raises `UsageError` (`recovery.Mistyped`)."""
        if self.kind == KEYFILE:
            from cryptfs.cli.keyfile import read_keyfile

            if self.given.keyfile is None:
                raise hinted(UsageError("this protector is opened by a key file"), "give it: --keyfile PATH")
            return read_keyfile(self.given.keyfile)
        if self.kind == RECOVERY:
            from cryptfs.cli import recovery

            return recovery.ask() if self.given.recovery_file is None else recovery.read_file(self.given.recovery_file)
        sources = self.given.passphrase if self.kind == PASSPHRASE else self.given.pin
        return passphrase.ask(self._question(), sources.words) if sources.is_prompt else sources.read()

    def tried(self, use: Callable[[bytes], T]) -> T:
        """What `use` makes of the secret; one that a person typed wrong may be typed again.

        Raises what `read` and `use` raise, with a hint that fits the kind.
        """
        from cryptfs.cli import ui

        attempt = 1
        while True:
            try:
                return use(self.read())
            except CryptfsError as failure:
                if not self.may_ask_again(failure, attempt):
                    raise self.explained(failure) from failure.__cause__
                ui.warning(f"{failure}; try again")
                attempt += 1

    def may_ask_again(self, failure: CryptfsError, attempt: int) -> bool:
        """Whether to ask once more after attempt number `attempt` (from 1). Never for a PIN: the token counts."""
        from cryptfs.cli.recovery import Mistyped

        wrong = isinstance(failure, WrongSecret | Mistyped)
        return self.is_prompt and self.kind != PKCS11 and wrong and attempt < passphrase.ATTEMPTS

    def explained(self, failure: CryptfsError) -> CryptfsError:
        """The same error with a hint that fits the kind."""
        if isinstance(failure, WrongSecret) and self.kind in _WRONG_HINTS:
            return hinted(failure, _WRONG_HINTS[self.kind])
        return failure

    def _question(self) -> str:
        if self.kind == PASSPHRASE:
            return "Passphrase: "
        label = self.protector.params.get("token_label") if self.protector is not None else None
        return f"PIN of the token {_shown(str(label))}: "


def options(command: F) -> F:
    """Add the options of secrets and `--protector` to a verb; it gets them as one parameter, `given`."""

    @functools.wraps(command)
    def gathered(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - whatever the verb takes
        given = Given(
            typed_sources(kwargs, passphrase.PASSPHRASE),
            typed_sources(kwargs, passphrase.PIN),
            **{name: kwargs.pop(name) for name in ("protector", "keyfile", "recovery_key", "recovery_file")},
        )
        given.kind()  # for its error, before anything is done
        return command(*args, given=given, **kwargs)

    path = click.Path(dir_okay=False, path_type=Path)
    for option in (
        click.option("--recovery-file", metavar="FILE", type=path, help="Read a recovery key from a file."),
        click.option("--recovery-key", is_flag=True, help="Ask for a recovery key."),
        functools.partial(passphrase.options, words=passphrase.PIN),
        click.option("--keyfile", metavar="FILE", type=path, help="Open it with this key file."),
        passphrase.options,
        click.option("--protector", metavar="NAME", help="Which protector: its label, or how its id begins."),
    ):
        gathered = option(gathered)
    return gathered  # type: ignore[return-value]


def typed_sources(kwargs: dict[str, Any], words: passphrase.Words) -> Sources:
    """Takes the parameters of a typed secret's options out of `kwargs`."""
    file, descriptor, shell = words.options
    return passphrase.choose(
        kwargs.pop(_parameter(file)), kwargs.pop(_parameter(descriptor)), kwargs.pop(_parameter(shell)), words
    )


def _parameter(option: str) -> str:
    """The name under which click hands over an option."""
    return option.lstrip("-").replace("-", "_")


def named(volume: Volume, name: str) -> Protector:
    """The protector with this label, or whose id begins so. Raises `UsageError` if it is not exactly one."""
    found = [protector for protector in volume.protectors if protector.label == name]
    if not found and len(name) >= ID_PREFIX_MIN_CHARS:
        found = [p for p in volume.protectors if p.protector_id.hex().startswith(name.lower())]
    if not found:
        raise hinted(UsageError(f"the volume has no protector {name!r}"), _list_hint(volume))
    if len(found) > 1:
        ids = ", ".join(protector.protector_id.hex()[:8] for protector in found)
        raise hinted(UsageError(f"{name!r} could be {len(found)} protectors"), f"name it by its id: {ids}")
    return found[0]


def described(protector: Protector) -> str:
    """What its params say to a person, without salts."""
    shown = {name: value for name, value in protector.params.items() if name not in ("salt", "key_id")}
    return ", ".join(f"{name} {value.hex() if isinstance(value, bytes) else value}" for name, value in shown.items())


def _of_kind(volume: Volume, kind: str) -> Sequence[Protector]:
    return [protector for protector in volume.protectors if protector.kind == kind]


def _named_kind(kind: str) -> str:
    return _NAMES.get(kind, kind)


def _list_hint(volume: Volume) -> str:
    return "it has " + ", ".join(f"{p.label!r} ({p.kind}, {p.protector_id.hex()[:8]})" for p in volume.protectors)


def _shown(text: str) -> str:
    from cryptfs.cli import ui

    return ui.printable(text)
