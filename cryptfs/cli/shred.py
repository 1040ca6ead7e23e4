"""`cryptfs shred DIR`: destroy a volume for good.

What a crash leaves, in the order of things: nothing done; the shred secret destroyed, so that nothing opens the volume
or a copy of it; the `volume` file overwritten as well, which where there is no shred secret makes this copy noise.
Of a domain a file is left before all that which says so (`DOMAIN_SHREDDED`): without the `volume` file it lets `rmdir`
remove the domain's directory, beside one it means nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from cryptfs.cli import protectors, ui

if TYPE_CHECKING:
    from cryptfs.cli.protectors import Given
    from cryptfs.format.volume import Volume


@click.command()
@click.argument("dir", type=click.Path(path_type=Path))
@click.argument("path", type=click.Path(path_type=Path), required=False)
@click.option("--yes", is_flag=True, help="Do not ask: for scripts.")
@protectors.options
def shred(dir: Path, path: Path | None, *, yes: bool, given: Given) -> None:  # noqa: A002
    """Destroy the keys of the volume DIR: what is encrypted under them is noise from then on, for everybody.

    With PATH, the keys of the domain at that path in it, and nothing else; a domain can also be named by its directory
    in a mount. It may be mounted, and is locked first; a whole volume must not be.

    With a shred secret that holds for every copy of the volume, too. Nothing is asked for but your word: no passphrase
    is needed to destroy, but to find a domain by its PATH while the volume is locked.
    """
    from cryptfs.cli.located import cipher_dir_of
    from cryptfs.ops.domains import domain_dir, domain_ids, is_domain
    from cryptfs.ops.info import read_volume

    cipher_dir = cipher_dir_of(dir) if path is None else _domain_in(dir, path, given)
    part = is_domain(cipher_dir)
    if not part:
        _check_idle(cipher_dir, read_volume(cipher_dir))
    # Domains have keys of their own, and open without the volume they lie in.
    inner = [] if part else [domain_dir(cipher_dir, domain_id) for domain_id in sorted(domain_ids(cipher_dir))]
    for each in (cipher_dir, *inner):
        _say_what_goes(each, read_volume(each))
    if not yes:
        _ask((path or dir) if part else cipher_dir)
    with ui.waiting("destroying the keys"):
        for each in (*inner, cipher_dir):
            _destroy(each, part=part)
    if part:
        ui.done("the domain is shredded; `rmdir` of its directory in the mounted volume removes what is left of it")
    else:
        ui.done(f"{cipher_dir} is shredded: what lies there is noise, and can be removed")


def _domain_in(dir: Path, path: Path, given: Given) -> Path:  # noqa: A002
    """The cipher directory of the domain at `path`, seen from the root of the volume `dir`. Raises `UsageError`."""
    from cryptfs.cli.domain import domains_of
    from cryptfs.errors import UsageError

    wanted = f"/{str(path).strip('/')}"
    for row in domains_of(dir, given):
        if row["path"] is not None and f"/{str(row['path']).strip('/')}" == wanted:
            return Path(row["cipher_dir"])
    raise UsageError(f"{dir} has no domain at {wanted}")


def _destroy(cipher_dir: Path, *, part: bool) -> None:
    from cryptfs.cli import key_agent
    from cryptfs.format.volume import parse_volume
    from cryptfs.ops.domains import say_shredded
    from cryptfs.ops.volume_file import VolumeEdit

    with VolumeEdit.of(cipher_dir) as edit:
        volume = parse_volume(edit.data)
        if part:
            # What programs wrote into it need not be kept: only that nobody reads it any more counts.
            key_agent.lock(volume.volume_id)
        else:
            _check_idle(cipher_dir, volume)
        if part:
            say_shredded(cipher_dir)
        _destroy_secret(volume, edit.data)
        edit.overwrite()


def _destroy_secret(volume: Volume, volume_file: bytes) -> None:
    from cryptfs.cli import key_agent, shred_secret

    path = shred_secret.path_of(volume)
    given = b""
    if path is None or path.exists():
        # What is no secret of this kind is not ours to overwrite.
        given = shred_secret.read(volume)
    # The agent first, as it refuses if somebody has mounted the volume meanwhile.
    destroyed = key_agent.shred(volume_file, given)
    if path is not None:
        destroyed = shred_secret.destroy(path)
    if volume.shred is not None and not destroyed:
        ui.note("the shred secret was not on this machine (any more)")


def _check_idle(cipher_dir: Path, volume: Volume) -> None:
    from cryptfs.cli import key_agent, mounts
    from cryptfs.cli.advice import hinted
    from cryptfs.errors import VolumeBusy

    daemon = mounts.daemon_of_volume(cipher_dir)
    held = key_agent.find(volume.volume_id)
    if daemon is not None or (held is not None and held.daemon_pid is not None):
        where = daemon.mountpoint if daemon is not None else held.mountpoint if held is not None else "?"
        raise hinted(VolumeBusy(f"the volume is mounted on {where}"), f"`cryptfs umount {where}` first")


def _say_what_goes(cipher_dir: Path, volume: Volume) -> None:
    from datetime import UTC, datetime

    from cryptfs.cli import shred_secret

    made = datetime.fromtimestamp(volume.created_s, UTC)
    ui.note(f"{cipher_dir} says it is volume {volume.volume_id.hex()}, made on {made:%Y-%m-%d}")
    if volume.ephemeral:
        ui.note("an ephemeral volume: its key was never stored anywhere, only its `volume` file is removed")
    elif volume.shred is None:
        names = ", ".join(f"{protector.label!r} ({protector.kind})" for protector in volume.protectors)
        ui.warning(
            f"{cipher_dir} has no shred secret: whoever has a copy of its file `volume` and the secret of one of its "
            f"protectors ({names}) can still open whatever was copied along with it"
        )
    elif volume.shred.kind == shred_secret.KEYFILE:
        where = shred_secret.path_of(volume)
        ui.warning(f"the shred secret in {where} is destroyed; copies of that file are yours to destroy")
    elif volume.shred.kind == shred_secret.TOKEN:
        token = volume.shred.params.get("token_label")
        ui.warning(f"the key in the token {token!r} is destroyed: nothing opens the volume or a copy of it any more")
    else:
        ui.warning("the shred secret on this machine is destroyed: nothing opens the volume or a copy of it any more")


def _ask(named: Path) -> None:
    from cryptfs.errors import UsageError

    name = named.name
    typed = click.prompt(f"Type the directory's name ({name}) to destroy it for good", default="", show_default=False)
    if typed != name:
        raise UsageError("that is not its name: nothing was changed")
