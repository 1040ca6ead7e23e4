"""A protector to be made: its kind, label and new secret, from the options of `init`, `protector add` and `change`.

Crash and failure: a new key file, and a recovery key's `--out` file, are durable before the volume's file is replaced
and taken away again if that does not come about. So after a crash there may be a key that opens nothing, and never a
protector whose key was not kept. A recovery key for the terminal is shown once the protector is in its place.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from cryptfs.cli import passphrase, ui
from cryptfs.cli.advice import hinted
from cryptfs.cli.passphrase import Sources
from cryptfs.cli.protectors import KEYFILE, KINDS, PASSPHRASE, PKCS11, RECOVERY, typed_sources
from cryptfs.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cryptfs.keys.edit_requests import ProtectorWish

F = TypeVar("F", bound="Callable[..., Any]")


@dataclass(frozen=True)
class NewProtector:
    """What a command line says about a protector to be made. `kind` is None where it is to follow from the rest."""

    passphrase: Sources
    pin: Sources
    kind: str | None = None
    label: str | None = None
    kdf_cost: str | None = None
    use_keyfile: Path | None = None
    new_keyfile: Path | None = None
    out: Path | None = None
    module: str | None = None
    token: str | None = None
    key_id: bytes | None = None

    def checked(self, kind: str | None = None) -> str:
        """The kind to make; `kind` if that is settled. Raises `UsageError` for options that do not fit it."""
        by_kind = self._by_kind()
        kind = kind or self.kind or next((kind for kind, given in by_kind.items() if given), PASSPHRASE)
        for other, given in by_kind.items():
            if given and other != kind:
                raise UsageError(f"{given[0]} is for protectors of the kind {other}, and this one is {kind}")
        if kind == KEYFILE and len(by_kind[KEYFILE]) != 1:
            raise hinted(
                UsageError("a key file is needed, and one only"), "--new-keyfile PATH makes one of random bytes"
            )
        if kind == RECOVERY and self.out is None:
            from cryptfs.cli.recovery import has_terminal

            if not has_terminal():
                raise hinted(UsageError("no terminal to show the recovery key on"), "--out FILE writes it to a file")
        return kind

    def secret_options(self) -> list[str]:
        """The options given that say where a secret is; not the variables, which may be there for other volumes."""
        names = [name for given in self._by_kind().values() for name in given]
        return [name for name in names if name.startswith("--") and name != "--kdf-cost"]

    def _by_kind(self) -> dict[str, list[str]]:
        """The options and variables given for each kind."""
        tokens = {"--module": self.module, "--token": self.token, "--key-id": self.key_id}
        return {
            PASSPHRASE: [*self.passphrase.given, *_given({"--kdf-cost": self.kdf_cost})],
            KEYFILE: _given({"--new-keyfile": self.new_keyfile, "--keyfile": self.use_keyfile}),
            RECOVERY: _given({"--out": self.out}),
            PKCS11: [*_given(tokens), *self.pin.given],
        }

    @contextlib.contextmanager
    def made(self, kind: str, label: str, cipher_dir: Path, mountpoint: str | None = None) -> Iterator[Made]:
        """The wish for the agent. Files made for it are removed again if the block raises before `Made.is_kept`.

        Asks a person where no source was given. Raises `UsageError`, `StoreFailed`.
        """
        from cryptfs.cli import keyfile, recovery
        from cryptfs.keys.edit_requests import ProtectorWish

        written: Path | None = None
        if kind == PASSPHRASE:
            sources = self.passphrase
            secret = passphrase.ask_new(sources.words) if sources.is_prompt else sources.read()
            wish = ProtectorWish(kind, label, secret, {"cost": self.kdf_cost or "normal"})
        elif kind == KEYFILE:
            path = self.use_keyfile or self.new_keyfile
            assert path is not None
            keyfile.warn_of_place(path, cipher_dir, mountpoint)
            if self.use_keyfile is not None:
                secret = keyfile.read_keyfile(path)
                keyfile.check_random(path, secret)
            else:
                secret = keyfile.make_keyfile(path)
                written = path
            wish = ProtectorWish(kind, label, secret)
        elif kind == RECOVERY:
            wish = ProtectorWish(kind, label, recovery.new_key())
            if self.out is not None:
                keyfile.warn_of_place(self.out, cipher_dir, mountpoint)
                keyfile.write_secret_file(self.out, recovery.as_file(wish.secret, cipher_dir, label))
                written = self.out
        else:
            wish = self._token(label)
        made = Made(wish, to_show=kind == RECOVERY and self.out is None)
        try:
            yield made
        except BaseException:
            if written is not None and not made.is_kept:
                written.unlink(missing_ok=True)
            raise

    def _token(self, label: str) -> ProtectorWish:
        from cryptfs.keys.edit_requests import ProtectorWish

        if self.token is None:
            raise hinted(UsageError("which token?"), "--token LABEL, or its serial number")
        wish: dict[str, int | str | bytes] = {"token": self.token}
        if self.module is not None:
            wish["module"] = self.module
        if self.key_id is not None:
            wish["key_id"] = self.key_id
        question = f"PIN of the token {ui.printable(self.token)}: "
        secret = passphrase.ask(question, self.pin.words) if self.pin.is_prompt else self.pin.read()
        return ProtectorWish(PKCS11, label, secret, wish)


@dataclass
class Made:
    """A wish with its secret. Set `is_kept` once the volume's file holds the protector."""

    wish: ProtectorWish
    to_show: bool
    is_kept: bool = False

    def kept(self, volume_id: bytes) -> None:
        """The protector is in its place: its files stay, and a recovery key is shown, this once."""
        from cryptfs.cli import recovery

        if not self.is_kept and self.to_show:
            try:
                recovery.show(bytes(self.wish.secret), volume_id, self.wish.label)
            except UsageError as failure:
                hint = f"nobody has its key: `cryptfs protector change DIR {self.wish.label}` makes another one"
                raise hinted(UsageError(f"the protector is there, but {failure}"), hint) from None
        self.is_kept = True


def options(command: F, *, beside_another: bool) -> F:
    """Add the options of a new protector but its kind and label to a verb, which gets them as one parameter, `new`.

    `beside_another`: an old secret may be wanted too, so that the sources of the new one are called `--new-…`.
    """
    words = (
        (passphrase.NEW_PASSPHRASE, passphrase.NEW_PIN) if beside_another else (passphrase.PASSPHRASE, passphrase.PIN)
    )
    keyfile_option = "--use-keyfile" if beside_another else "--keyfile"

    @functools.wraps(command)
    def gathered(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - whatever the verb takes
        typed = [typed_sources(kwargs, each) for each in words]
        names = ("new_keyfile", "use_keyfile", "out", "module", "token", "key_id", "kdf_cost", "kind", "label")
        own = {name: kwargs.pop(name) for name in names if name in kwargs}
        return command(*args, new=NewProtector(typed[0], typed[1], **own), **kwargs)

    path = click.Path(dir_okay=False, path_type=Path)
    for option in (
        click.option(
            "--key-id", metavar="HEX", callback=_hex_given, help="A key that the token has; else one is made."
        ),
        click.option("--token", metavar="NAME", help="The token's label or serial number."),
        click.option("--module", metavar="NAME", help="The PKCS#11 module, by its name in agent.toml."),
        functools.partial(passphrase.options, words=words[1]),
        click.option("--out", metavar="FILE", type=path, help="Write the recovery key to a new file."),
        click.option(keyfile_option, "use_keyfile", metavar="FILE", type=path, help="A file of random bytes."),
        click.option("--new-keyfile", metavar="FILE", type=path, help="Make a file of random bytes."),
        functools.partial(passphrase.options, words=words[0]),
        click.option(
            "--kdf-cost",
            type=click.Choice(["low", "normal", "high"]),
            help="How hard each guess at the passphrase is (normal if not given); recorded in the volume.",
        ),
    ):
        gathered = option(gathered)
    return gathered  # type: ignore[return-value]


KIND_CHOICE = click.Choice(KINDS)


def check_label(label: str) -> None:
    """Raise `UsageError` for a label that could not be typed or shown."""
    from cryptfs.format.volume import LABEL_MAX_CHARS

    if not label or len(label) > LABEL_MAX_CHARS or not label.isprintable():
        raise UsageError(f"a label is 1 to {LABEL_MAX_CHARS} printable characters")


def _given(options: dict[str, Any]) -> list[str]:
    return [name for name, value in options.items() if value is not None]


def _hex_given(_context: click.Context, _parameter: click.Parameter, value: str | None) -> bytes | None:
    if value is None:
        return None
    try:
        key_id = bytes.fromhex(value)
    except ValueError:
        key_id = b""
    if not 1 <= len(key_id) <= 64:
        raise click.BadParameter("1 to 64 bytes as hexadecimal digits")
    return key_id
