"""`cryptfs shred DIR`: destroy a volume or a domain for good (`cli.shredding`)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cryptfs.cli import protectors, ui

if TYPE_CHECKING:
    from cryptfs.cli.protectors import Given
    from cryptfs.cli.shredding import Condemned

_NAME_DIGITS = 8


@click.command()
@click.argument("dir", type=click.Path(path_type=Path, readable=False), required=False)
@click.argument("path", type=click.Path(path_type=Path, readable=False), required=False)
@click.option("--yes", is_flag=True, help="Do not ask: for scripts.")
@click.option("--without-secret", is_flag=True, help="Go on although a shred secret is lost; copies of it stay good.")
@click.option("--id", "volume_id", metavar="HEX", help="The id of a volume whose `volume` file is damaged or gone.")
@protectors.options
def shred(
    dir: Path | None,  # noqa: A002
    path: Path | None,
    *,
    yes: bool,
    without_secret: bool,
    volume_id: str | None,
    given: Given,
) -> None:
    """Destroy the keys of the volume DIR: what is encrypted under them is noise from then on, for everybody.

    With PATH, the keys of the domain at that path in it, and nothing else; a domain can also be named by its directory
    in a mount. It may be mounted, and is locked first; a whole volume must not be.

    With a shred secret that holds for every copy of the volume, too. Nothing is asked for but your word: no passphrase
    is needed to destroy, but to find a domain by its PATH while the volume is locked.

    With --id and nothing else, the shred secret that this machine keeps for that volume.
    """
    from cryptfs.errors import UsageError

    if (volume_id is None) == (dir is None):
        raise UsageError("name a volume's directory, or give its --id")
    if volume_id is not None:
        _shred_id(volume_id, yes=yes)
    elif dir is not None:
        _shred(dir, path, given, yes=yes, without_secret=without_secret)


def _shred(dir: Path, path: Path | None, given: Given, *, yes: bool, without_secret: bool) -> None:  # noqa: A002
    from cryptfs.cli import key_agent, shredding
    from cryptfs.cli.advice import hinted
    from cryptfs.cli.located import cipher_dir_of
    from cryptfs.errors import VolumeDamaged
    from cryptfs.ops.domains import domain_dir, domain_ids, is_domain

    cipher_dir = cipher_dir_of(dir) if path is None else _domain_in(dir, path, given)
    part = is_domain(cipher_dir)
    try:
        whole = shredding.seen(cipher_dir, part=part, without_secret=without_secret)
    except VolumeDamaged as error:
        raise hinted(error, "`cryptfs shred --id ID` destroys a shred secret that this machine keeps for it") from None
    # Domains have keys of their own, and open without the volume they lie in.
    inner = [] if part else domain_ids(cipher_dir)
    known: list[Condemned] = []
    unknown: list[bytes] = []
    for domain_id in inner:
        domain = _domain(domain_dir(cipher_dir, domain_id), without_secret=without_secret)
        if domain is None:
            unknown.append(domain_id)
        else:
            known.append(domain)
    for each in (whole, *known):
        shredding.say_what_goes(each)
    if not yes:
        _ask(_name_of((path or dir) if part else cipher_dir), "the directory's name")
    with ui.waiting("destroying the keys"):
        for domain_id in unknown:
            key_agent.shred_id(domain_id)
        for each in (*known, whole):
            shredding.destroy(each)
    if part:
        ui.done("the domain is shredded; `rmdir` of its directory in the mounted volume removes what is left of it")
    else:
        ui.done(f"{cipher_dir} is shredded: what lies there is noise, and can be removed")


def _domain(cipher_dir: Path, *, without_secret: bool) -> Condemned | None:
    """A domain of the volume, or None if it has no `volume` file that can be read: shredded already, or damaged."""
    from cryptfs.cli import shredding
    from cryptfs.errors import NotAVolume, UnsupportedFormat, VolumeDamaged

    try:
        return shredding.seen(cipher_dir, part=False, without_secret=without_secret)
    except (NotAVolume, VolumeDamaged, UnsupportedFormat) as error:
        ui.note(f"of the domain in {cipher_dir} only a secret that the agent keeps can be destroyed: {error}")
        return None


def _shred_id(volume_id: str, *, yes: bool) -> None:
    from cryptfs.cli import key_agent
    from cryptfs.errors import ShredSecretMissing, UsageError
    from cryptfs.types import ID_BYTES

    try:
        wanted = bytes.fromhex(volume_id)
    except ValueError:
        wanted = b""
    if len(wanted) != ID_BYTES:
        raise UsageError(f"an id has {2 * ID_BYTES} hexadecimal digits; {volume_id!r} is none")
    ui.warning(
        f"if this machine keeps a shred secret for volume {wanted.hex()}, it is to be destroyed: nothing opens that "
        "volume or a copy of it then"
    )
    if not yes:
        _ask(wanted.hex()[:_NAME_DIGITS], f"the first {_NAME_DIGITS} digits of its id")
    if not key_agent.shred_id(wanted):
        raise ShredSecretMissing(f"this machine keeps no shred secret for volume {wanted.hex()}")
    ui.done(f"volume {wanted.hex()} is shredded: nothing opens it or a copy of it any more")


def _domain_in(dir: Path, path: Path, given: Given) -> Path:  # noqa: A002
    """The cipher directory of the domain at `path`, seen from the root of the volume `dir`. Raises `UsageError`."""
    from cryptfs.cli.domain import domains_of
    from cryptfs.errors import UsageError

    wanted = f"/{str(path).strip('/')}"
    for row in domains_of(dir, given):
        if row["path"] is not None and f"/{str(row['path']).strip('/')}" == wanted:
            return Path(row["cipher_dir"])
    raise UsageError(f"{dir} has no domain at {wanted}")


def _name_of(path: Path) -> str:
    return os.path.basename(os.path.abspath(path))


def _ask(name: str, what: str) -> None:
    from cryptfs.cli import terminal
    from cryptfs.errors import UsageError

    typed = terminal.ask_line(f"Type {what} ({ui.printable(name)}) to destroy it for good: ")
    if not name or typed != name:
        raise UsageError("that is not it: nothing was changed")
