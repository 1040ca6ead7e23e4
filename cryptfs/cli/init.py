"""`cryptfs init DIR`: make a new volume."""

from __future__ import annotations

import contextlib
import functools
import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cryptfs.cli import new_protector, new_shred_secret, ui
from cryptfs.cli.protectors import PASSPHRASE
from cryptfs.cli.sizes import block_size_given

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cryptfs.cli.new_protector import NewProtector
    from cryptfs.cli.new_shred_secret import NewShredSecret

DEFAULT_BLOCK_SIZE = "16K"


@click.command()
@click.argument("dir", type=click.Path(path_type=Path, readable=False))
@click.option(
    "--block-size",
    metavar="N",
    callback=block_size_given,
    default=DEFAULT_BLOCK_SIZE,
    show_default=True,
    help="Bytes per block: a power of two from 4K to 1M.",
)
@click.option(
    "--protector", "kind", type=new_protector.KIND_CHOICE, help="What opens it (default: what the options are for)."
)
@click.option("--label", metavar="TEXT", help="A name for its protector, readable by anyone (default: its kind).")
@functools.partial(new_shred_secret.options, what="volume", by_default=False)
@click.option("--ephemeral", is_flag=True, help="Scratch space: a new key at every mount, never stored anywhere.")
@functools.partial(new_protector.options, beside_another=False)
def init(
    dir: Path,  # noqa: A002
    *,
    block_size: int,
    shred: NewShredSecret,
    ephemeral: bool,
    new: NewProtector,
) -> None:
    """Make a volume in DIR, which is created or must be empty."""
    from cryptfs.cli import key_agent
    from cryptfs.format.volume import parse_volume
    from cryptfs.keys.edit_requests import VolumeWish
    from cryptfs.ops.info import read_volume_file

    kind = PASSPHRASE if ephemeral else new.checked()
    cipher_dir = Path(os.path.realpath(dir))
    _check_empty(cipher_dir)
    if ephemeral:
        _check_alone(shred, new)
    if ephemeral:
        with ui.waiting("making the volume"), _all_or_nothing(cipher_dir):
            key_agent.create_volume(cipher_dir, VolumeWish(block_size, None))
    else:
        label = kind if new.label is None else new.label
        new_protector.check_label(label)
        with new.made(kind, label, cipher_dir) as made:
            with (
                ui.waiting("making the volume"),
                _all_or_nothing(cipher_dir),
                shred.made() as shredding,
            ):
                key_agent.create_volume(cipher_dir, VolumeWish(block_size, made.wish, **shredding))
            made.kept(parse_volume(read_volume_file(cipher_dir)).volume_id)
    if shred.by_agent:
        ui.note("its shred secret is kept by this machine's key agent: nothing opens the volume without it")
    ui.done(f"{cipher_dir} is a volume now; `cryptfs mount {cipher_dir} MOUNTPOINT` shows what is in it")


def _check_alone(shred: NewShredSecret, new: NewProtector) -> None:
    """An ephemeral volume has neither. Raises `UsageError`."""
    from cryptfs.errors import UsageError

    if shred.places:
        raise UsageError("an ephemeral volume needs no shred secret: its key is never stored")
    if new.secret_options():
        raise UsageError("an ephemeral volume has no protector: its key is never stored")


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
    from cryptfs.cli.leftovers import MADE, remove

    try:
        os.mkdir(cipher_dir, 0o700)
        made_here = True
    except FileExistsError:
        made_here = False
    try:
        yield
    except BaseException:
        for name in MADE:
            remove(cipher_dir / name)
        if made_here:
            with contextlib.suppress(OSError):  # something else has been put there meanwhile: it is not ours to remove
                os.rmdir(cipher_dir)
        raise
