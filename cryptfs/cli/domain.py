"""`cryptfs domain`: directories of a volume with keys of their own."""

from __future__ import annotations

import functools
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cryptfs.cli import new_protector, new_shred_secret, protectors, ui
from cryptfs.cli.sizes import block_size_given

if TYPE_CHECKING:
    from cryptfs.cli.located import Inside
    from cryptfs.cli.new_protector import NewProtector
    from cryptfs.cli.new_shred_secret import NewShredSecret
    from cryptfs.cli.protectors import Given
    from cryptfs.format.volume import Volume


@click.group()
def domain() -> None:
    """Directories of a volume with keys of their own: locked, unlocked and changed on their own."""


@domain.command()
@click.argument("path", type=click.Path(path_type=Path, readable=False))
@click.option(
    "--block-size",
    metavar="N",
    callback=lambda ctx, param, text: None if text is None else block_size_given(ctx, param, text),
    help="Bytes per block: a power of two from 4K to 1M.  [default: the volume's]",
)
@click.option(
    "--protector", "kind", type=new_protector.KIND_CHOICE, help="What opens it (default: what the options are for)."
)
@click.option("--label", metavar="TEXT", help="A name for its protector, readable by anyone (default: its kind).")
@functools.partial(new_shred_secret.options, what="domain", by_default=True)
@functools.partial(new_protector.options, beside_another=False)
def create(
    path: Path,
    *,
    block_size: int | None,
    shred: NewShredSecret,
    new: NewProtector,
) -> None:
    """Make the directory PATH, in a mounted volume, a domain with a key of its own.

    PATH is made, or must be empty. The domain is unlocked afterwards.
    """
    from cryptfs.cli import key_agent
    from cryptfs.errors import UsageError
    from cryptfs.keys.edit_requests import VolumeWish
    from cryptfs.ops.info import read_volume

    kind = new.checked()
    label = kind if new.label is None else new.label
    new_protector.check_label(label)
    inside = _place(path)
    volume = read_volume(inside.cipher_dir)
    if volume.ephemeral:
        raise UsageError(f"the volume on {inside.mountpoint} is ephemeral: a domain would outlive its directory")
    if block_size is None:
        block_size = volume.block_size
    empty = _made(inside.path)
    try:
        _announce(inside.cipher_dir, volume)
        with new.made(kind, label, inside.cipher_dir, str(inside.mountpoint)) as made:
            with (
                ui.waiting("making the domain"),
                shred.made() as shredding,
            ):
                wish = VolumeWish(block_size, made.wish, **shredding)
                volume_id = key_agent.create_domain(inside.cipher_dir, inside.path, wish)
            made.kept(volume_id)
    except BaseException:
        if empty and not _is_or_may_be_domain(inside.path):
            with suppress(OSError):
                os.rmdir(inside.path)
        raise
    if shred.by_agent:
        ui.note("its shred secret is kept by this machine's key agent: nothing opens the domain without it")
    ui.done(f"{inside.path} is a domain now; `cryptfs lock {inside.path}` locks it and nothing else")


def _place(path: Path) -> Inside:
    """Where the domain is to be. Raises `UsageError` for a place where none can be, `VolumeLocked`."""
    from cryptfs.cli import located, mounts
    from cryptfs.cli.advice import hinted
    from cryptfs.errors import UsageError
    from cryptfs.ops.domains import is_domain

    inside = located.inside_mount(path)
    if inside is None or inside.path == inside.mountpoint:
        wrong = UsageError(f"{path} is no directory in a mounted volume")
        raise hinted(wrong, "mount the volume, and give the path of the new domain in it")
    try:
        flags = mounts.answer_of(lambda: os.statvfs(inside.mountpoint).f_flag)
    except OSError as error:
        raise located.failure(inside.mountpoint, error) from None
    if flags & os.ST_RDONLY:
        raise UsageError(f"{inside.mountpoint} is mounted read-only")
    if is_domain(inside.cipher_dir):
        raise UsageError(f"the volume on {inside.mountpoint} is itself a domain: domains do not nest")
    for above in inside.path.parents:
        if above == inside.mountpoint:
            break
        if located.domain_at(above) is not None:
            raise UsageError(f"{above} is a domain: domains do not nest")
    return inside


def _made(path: Path) -> bool:
    """Make the directory, or see that it is empty; whether it was made."""
    from cryptfs.cli import located
    from cryptfs.errors import UsageError

    try:
        try:
            os.mkdir(path)
        except FileExistsError:
            pass
        else:
            return True
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            raise UsageError(f"{path} is no directory")
        if located.domain_at(path) is not None:
            raise UsageError(f"{path} is a domain already")
        if os.listdir(path):
            raise UsageError(f"{path} is not empty")
    except OSError as error:
        raise located.failure(path, error) from None
    return False


def _announce(cipher_dir: Path, volume: Volume) -> None:
    """Have the `volume` file say that there are domains, for programs that do not know them: they refuse it.

    Before there is the first one; a crash after it leaves a volume that says so and has none.
    """
    from cryptfs.cli.volume_edit import Edit
    from cryptfs.format.volume import DOMAINS, parse_volume
    from cryptfs.keys.edit_requests import add_feature

    if DOMAINS in volume.features:
        return
    with Edit.of(cipher_dir) as edit:
        if DOMAINS not in parse_volume(edit.data).features:
            edit.change(lambda client, data: add_feature(client, volume.volume_id, data, DOMAINS), lambda: None)


def _is_or_may_be_domain(path: Path) -> bool:
    from cryptfs.cli import located
    from cryptfs.errors import CryptfsError

    try:
        return located.domain_at(path) is not None
    except CryptfsError:
        return True


@domain.command("list")
@click.argument("path", type=click.Path(path_type=Path, readable=False))
@click.option("--json", "as_json", is_flag=True, help="Print a JSON document: a list of domains.")
@protectors.options
def list_domains(path: Path, *, as_json: bool, given: Given) -> None:
    """List the domains of the volume PATH, a cipher directory or anything in a mount.

    The volume is unlocked for it if need be; its domains are not.
    """
    rows = domains_of(path, given)
    if as_json:
        ui.out_json(rows)
    elif rows:
        shown = [[ui.printable(row["path"] or "-"), row["state"], row["volume_id"]] for row in rows]
        ui.table(["path", "state", "volume"], shown)
    else:
        ui.note("it has no domains")


def domains_of(path: Path, given: Given) -> list[dict[str, Any]]:
    """As docs/CLI_ABI.md lists it; by path, those that no directory names last. `path`: see `list_domains`."""
    from cryptfs.cli import key_agent, located
    from cryptfs.cli.volume_access import Reached, with_volume
    from cryptfs.ops.domains import domain_dir, domain_ids
    from cryptfs.ops.info import read_volume
    from cryptfs.ops.paths_by_id import Names, names_in

    inside = located.inside_mount(path)
    cipher_dir = inside.cipher_dir if inside is not None else Path(os.path.realpath(path))
    read_volume(cipher_dir)
    there = domain_ids(cipher_dir)

    async def work(reached: Reached) -> Names:
        return await names_in(reached.access)

    places = with_volume(cipher_dir, given, work, exclusive=False).domains
    states = {held.volume_id: held.state for held in key_agent.held()}
    rows = [
        {
            "path": os.fsdecode(places[domain_id]) if domain_id in places else None,
            "volume_id": domain_id.hex(),
            "state": _state(cipher_dir, domain_id, states) if domain_id in there else "missing",
            "cipher_dir": str(domain_dir(cipher_dir, domain_id)),
        }
        for domain_id in {*there, *places}
    ]
    return sorted(rows, key=lambda row: (row["path"] is None, row["path"] or "", row["volume_id"]))


def _state(cipher_dir: Path, domain_id: bytes, states: dict[bytes, str]) -> str:
    from cryptfs.cli.volume_access import is_shredded
    from cryptfs.ops.domains import domain_dir

    return "shredded" if is_shredded(domain_dir(cipher_dir, domain_id)) else states.get(domain_id, "locked")
