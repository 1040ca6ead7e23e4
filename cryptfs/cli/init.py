"""`cryptfs init DIR`: make a new volume."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cryptfs.cli import passphrase, ui
from cryptfs.cli.sizes import block_size_given

if TYPE_CHECKING:
    from collections.abc import Iterator

DEFAULT_BLOCK_SIZE = "16K"
_MADE = ("volume", "volume.new", "state", "tree", "sidecars", "tmp")
"""What `init` may leave in the directory (FORMAT.md §2), and so what it may take away again."""


@click.command()
@click.argument("dir", type=click.Path(path_type=Path))
@click.option(
    "--block-size",
    metavar="N",
    callback=block_size_given,
    default=DEFAULT_BLOCK_SIZE,
    show_default=True,
    help="Bytes per block: a power of two from 4K to 1M.",
)
@click.option(
    "--kdf-cost",
    type=click.Choice(["low", "normal", "high"]),
    default="normal",
    show_default=True,
    help="How hard each guess at the passphrase is; recorded in the volume.",
)
@click.option(
    "--label", default="passphrase", show_default=True, help="A name for this passphrase, readable by anyone."
)
@click.option("--shred-secret", is_flag=True, help="Make a secret that `shred` destroys; this machine keeps it.")
@click.option(
    "--shred-keyfile",
    metavar="PATH",
    type=click.Path(path_type=Path),
    help="Make that secret in a new file of your own instead; without it nothing opens the volume.",
)
@click.option("--ephemeral", is_flag=True, help="Scratch space: a new key at every mount, never stored anywhere.")
@passphrase.options
def init(  # noqa: PLR0913  one parameter per option
    dir: Path,  # noqa: A002
    *,
    block_size: int,
    kdf_cost: str,
    label: str,
    shred_secret: bool,
    shred_keyfile: Path | None,
    ephemeral: bool,
    passfile: Path | None,
    passfd: int | None,
    extpass: str | None,
) -> None:
    """Make a volume in DIR, which is created or must be empty."""
    from cryptfs.cli import key_agent
    from cryptfs.keys.edit_requests import ProtectorWish, VolumeWish

    sources = passphrase.choose(passfile, passfd, extpass)
    cipher_dir = Path(os.path.realpath(dir))
    _check_empty(cipher_dir)
    _check_together(ephemeral=ephemeral, shred_secret=shred_secret, shred_keyfile=shred_keyfile, sources=sources)
    protector = None
    if not ephemeral:
        secret = passphrase.ask_new() if sources.is_prompt else sources.read()
        protector = ProtectorWish("passphrase", label, secret, {"cost": kdf_cost})
    with ui.waiting("making the volume"), _all_or_nothing(cipher_dir), _shredding(shred_keyfile) as shredding:
        kind = "agent" if shred_secret else ""
        new = (
            VolumeWish(block_size, protector, shred_kind=kind)
            if shredding is None
            else VolumeWish(
                block_size,
                protector,
                shred_kind="keyfile",
                shred_params={"path": shredding[0]},
                shred_secret=shredding[1],
            )
        )
        key_agent.create_volume(cipher_dir, new)
    if shred_secret:
        ui.note("its shred secret is kept by this machine's key agent: nothing opens the volume without it")
    ui.done(f"{cipher_dir} is a volume now; `cryptfs mount {cipher_dir} MOUNTPOINT` shows what is in it")


def _check_together(
    *, ephemeral: bool, shred_secret: bool, shred_keyfile: Path | None, sources: passphrase.Sources
) -> None:
    from cryptfs.errors import UsageError

    if shred_secret and shred_keyfile is not None:
        raise UsageError("--shred-secret and --shred-keyfile: the secret can be in one place only")
    if ephemeral and (shred_secret or shred_keyfile is not None):
        raise UsageError("an ephemeral volume needs no shred secret: its key is never stored")
    if ephemeral and (sources.passfile or sources.passfd is not None or sources.extpass):
        raise UsageError("an ephemeral volume has no passphrase: its key is never stored")


@contextlib.contextmanager
def _shredding(keyfile: Path | None) -> Iterator[tuple[str, bytes] | None]:
    """(path, secret) of a new shred key file, which is removed again if what follows fails."""
    from cryptfs.cli import shred_secret

    if keyfile is None:
        yield None
        return
    path = Path(os.path.realpath(keyfile))
    secret = shred_secret.make(path)
    try:
        yield str(path), secret
    except BaseException:
        shred_secret.destroy(path)
        raise


def _check_empty(cipher_dir: Path) -> None:
    from cryptfs.cli.advice import hinted
    from cryptfs.errors import UsageError

    try:
        names = os.listdir(cipher_dir)
    except FileNotFoundError:
        return
    except NotADirectoryError:
        raise UsageError(f"{cipher_dir} is no directory") from None
    if "volume" in names:
        raise hinted(UsageError(f"{cipher_dir} is a volume already"), f"`cryptfs info {cipher_dir}` shows it")
    if names:
        raise hinted(UsageError(f"{cipher_dir} is not empty"), "choose a directory that is empty or does not exist yet")


@contextlib.contextmanager
def _all_or_nothing(cipher_dir: Path) -> Iterator[None]:
    """Make the directory if it is missing, and if what follows fails leave things as they were."""
    try:
        os.mkdir(cipher_dir, 0o700)
        made_here = True
    except FileExistsError:
        made_here = False
    try:
        yield
    except BaseException:
        for name in _MADE:
            _remove(cipher_dir / name)
        if made_here:
            with contextlib.suppress(OSError):  # something else has been put there meanwhile: it is not ours to remove
                os.rmdir(cipher_dir)
        raise


def _remove(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
