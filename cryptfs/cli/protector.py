"""`cryptfs protector`: the ways to a volume's key. They can be added, listed, changed and removed, mounted or not."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cryptfs.cli import new_protector, protectors, ui
from cryptfs.cli.advice import hinted
from cryptfs.cli.located import cipher_dir_of
from cryptfs.errors import UsageError

if TYPE_CHECKING:
    from cryptfs.cli.new_protector import NewProtector
    from cryptfs.cli.protectors import Given
    from cryptfs.format.volume import Protector, Volume

_new_options = functools.partial(new_protector.options, beside_another=True)


@click.group()
def protector() -> None:
    """The ways to a volume's key: passphrases, key files, recovery keys, tokens."""


@protector.command("list")
@click.argument("dir", type=click.Path(path_type=Path, readable=False))
@click.option("--json", "as_json", is_flag=True, help="Print a JSON document.")
def list_(dir: Path, *, as_json: bool) -> None:  # noqa: A002
    """List the protectors of the volume DIR. It is read without a key, so an edited file shows edited values."""
    from cryptfs.ops.info import read_info, read_volume

    if as_json:
        ui.out_json(read_info(cipher_dir_of(dir))["protectors"])
        return
    rows = [
        [each.protector_id.hex()[:8], each.kind, each.label, _day(each.created_s), protectors.described(each)]
        for each in read_volume(cipher_dir_of(dir)).protectors
    ]
    ui.table(["id", "kind", "label", "made", "details"], rows)


@protector.command()
@click.argument("dir", type=click.Path(path_type=Path, readable=False))
@click.option("--kind", type=new_protector.KIND_CHOICE, help="What opens it (default: what the options are for).")
@click.option("--label", metavar="TEXT", help="A name for it, readable by anyone (default: its kind).")
@_new_options
@protectors.options
def add(dir: Path, *, new: NewProtector, given: Given) -> None:  # noqa: A002
    """Add a protector to the volume DIR: unlocked, or opened for it with a secret that it has already."""
    from cryptfs.cli import shred_secret
    from cryptfs.cli.volume_edit import Edit, opened
    from cryptfs.keys.edit_requests import add_protector
    from cryptfs.ops.info import read_volume

    kind = new.checked()
    cipher_dir = cipher_dir_of(dir)
    label = kind if new.label is None else new.label
    shredding = shred_secret.read(read_volume(cipher_dir))
    with (
        opened(cipher_dir, given, lambda volume: _check_label(volume, label)) as volume,
        new.made(kind, label, cipher_dir, _mountpoint(volume)) as made,
        Edit.of(cipher_dir) as edit,
    ):
        edit.change(
            lambda client, data: add_protector(client, volume.volume_id, data, made.wish, shredding),
            lambda: made.kept(volume.volume_id),
        )
    ui.done(f"the protector {label!r} opens {cipher_dir} now")


@protector.command()
@click.argument("dir", type=click.Path(path_type=Path, readable=False))
@click.argument("name")
@click.option("--label", metavar="TEXT", help="Another label for it.")
@_new_options
@protectors.options
def change(dir: Path, name: str, *, new: NewProtector, given: Given) -> None:  # noqa: A002
    """Give the protector NAME (its label, or how its id begins) of the volume DIR a new secret."""
    from cryptfs.cli import shred_secret
    from cryptfs.cli.volume_edit import Edit, opened
    from cryptfs.keys.edit_requests import change_protector
    from cryptfs.ops.info import read_volume

    cipher_dir = cipher_dir_of(dir)
    volume = read_volume(cipher_dir)
    old = protectors.named(volume, name)
    shredding = shred_secret.read(volume)
    new = _like(new, old)
    kind = new.checked(old.kind)
    label = old.label if new.label is None else new.label

    def check(volume: Volume) -> None:
        if label != old.label:
            _check_label(volume, label)

    with (
        opened(cipher_dir, given, check) as volume,
        new.made(kind, label, cipher_dir, _mountpoint(volume)) as made,
        Edit.of(cipher_dir) as edit,
    ):
        edit.change(
            lambda client, data: change_protector(
                client, volume.volume_id, data, old.protector_id, made.wish, shredding
            ),
            lambda: made.kept(volume.volume_id),
        )
    if old.kind != protectors.PKCS11:
        _say_what_stays(cipher_dir, "the old secret")
    elif _root_key(protectors.named(read_volume(cipher_dir), old.protector_id.hex())) != _root_key(old):
        _say_what_stays(cipher_dir, f"the key that was {old.label!r}")
        _say_what_the_token_keeps(old)


@protector.command()
@click.argument("dir", type=click.Path(path_type=Path, readable=False))
@click.argument("name")
@click.option("--yes", is_flag=True, help="Do not ask.")
@protectors.options
def remove(dir: Path, name: str, *, yes: bool, given: Given) -> None:  # noqa: A002
    """Remove the protector NAME (its label, or how its id begins) from the volume DIR."""
    from cryptfs.cli.volume_edit import Edit, opened
    from cryptfs.keys.edit_requests import remove_protector
    from cryptfs.ops.info import read_volume

    cipher_dir = cipher_dir_of(dir)
    volume = read_volume(cipher_dir)
    gone = protectors.named(volume, name)
    _check_not_last(volume)
    if not yes:
        _confirm(gone)
    with opened(cipher_dir, given, _check_not_last) as volume, Edit.of(cipher_dir) as edit:
        edit.change(
            lambda client, data: remove_protector(client, volume.volume_id, data, gone.protector_id), lambda: None
        )
    _say_what_stays(cipher_dir, f"what opened {gone.label!r}")
    if gone.kind == protectors.PKCS11:
        _say_what_the_token_keeps(gone)


def _like(new: NewProtector, old: Protector) -> NewProtector:
    """A token's protector changes to a new key in the same token, unless another one is named."""
    from dataclasses import replace

    if old.kind != protectors.PKCS11:
        return new
    module, token = old.params.get("module"), old.params.get("token_serial")
    return replace(new, module=new.module or str(module), token=new.token or str(token))


def _check_label(volume: Volume, label: str) -> None:
    new_protector.check_label(label)
    if any(protector.label == label for protector in volume.protectors):
        raise hinted(UsageError(f"the volume has a protector {label!r} already"), "--label TEXT gives it another name")


def _check_not_last(volume: Volume) -> None:
    if len(volume.protectors) < 2:
        raise hinted(
            UsageError("it is the last protector: nothing would open the volume any more"),
            "add another one first: `cryptfs protector add DIR`",
        )


def _confirm(gone: Protector) -> None:
    """Have a person type the label. Raises `UsageError` if that does not come about."""
    from cryptfs.cli import terminal

    if terminal.ask_line(f"Type its label, {ui.printable(gone.label)}, to remove it: ") != gone.label:
        raise UsageError("that is not its label; nothing was removed")


def _say_what_stays(cipher_dir: Path, secret: str) -> None:
    ui.warning(
        f"{secret} still opens every old copy of {cipher_dir / 'volume'} (backups, snapshots), and with it what the "
        "volume holds today, until `cryptfs rotate --kek --destroy-old` is done"
    )


def _root_key(token: Protector) -> tuple[object, object]:
    """Which key in which token."""
    return token.params.get("token_serial"), token.params.get("key_id")


def _say_what_the_token_keeps(gone: Protector) -> None:
    """Nothing here ever deletes a key in a token: other volumes may have a protector of the same one."""
    from cryptfs.format.protectors import parse_pkcs11

    params = parse_pkcs11(gone.params)
    key, token = params.key_id.hex(), ui.printable(repr(params.token_label))
    ui.note(
        f"the root key {key} stays in the token {token}; destroy it there if nothing else needs it: "
        f"`pkcs11-tool --login --delete-object --type secrkey --id {key}`"
    )


def _mountpoint(volume: Volume) -> str | None:
    from cryptfs.cli import key_agent

    held = key_agent.find(volume.volume_id)
    return held.mountpoint if held is not None else None


def _day(seconds: int) -> str:
    from cryptfs.cli.info import day

    return day(seconds)
