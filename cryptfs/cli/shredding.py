"""One volume or domain to be shredded: seen first, destroyed then.

Everything that can stand in the way is met while nothing is destroyed yet: a mount, a shred secret that is not there or
another volume's, a wrong PIN. What a crash leaves, in the order of things: nothing done; the shred secret destroyed, so
that nothing opens the volume or a copy of it; the `volume` file overwritten as well, which where there is no shred
secret makes this copy noise. Of a domain a file is left before all that which says so (`DOMAIN_SHREDDED`): without the
`volume` file it lets `rmdir` remove the domain's directory, beside one it means nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from cryptfs.cli import key_agent, mounts, shred_secret, ui
from cryptfs.cli.advice import hinted
from cryptfs.errors import BackendUnavailable, Denied, ShredSecretMissing, VolumeBusy
from cryptfs.format.volume import Volume, parse_volume
from cryptfs.ops.domains import say_shredded
from cryptfs.ops.info import read_volume_file
from cryptfs.ops.volume_file import VolumeEdit


@dataclass(frozen=True)
class Condemned:
    """`part`: a domain that is named by itself, and may be mounted. `lost`: its shred secret is not to be had."""

    cipher_dir: Path
    data: bytes
    volume: Volume
    part: bool
    given: bytes = field(default=b"", repr=False)
    lost: bool = False


def seen(cipher_dir: Path, *, part: bool, without_secret: bool) -> Condemned:
    """Look at a volume whose keys are to be destroyed.

    Raises `NotAVolume` and what else reading `volume` raises, `VolumeBusy` if it is mounted, `ShredSecretMissing` if
    its shred secret is another one, or is not there and that was not said (`without_secret`), and what a token raises.
    """
    data = read_volume_file(cipher_dir)
    volume = parse_volume(data)
    if not part:
        _check_idle(cipher_dir, volume)
    given, lost = b"", False
    if volume.shred is not None:
        given, lost = _secret(volume, data, without_secret=without_secret)
    return Condemned(cipher_dir, data, volume, part, given, lost)


def destroy(condemned: Condemned) -> None:
    """Destroy the keys. Raises `VolumeBusy`, `StoreFailed`, `AuditUnavailable`, and what a token raises."""
    volume = condemned.volume
    with VolumeEdit.of(condemned.cipher_dir) as edit:
        if edit.data != condemned.data:
            raise VolumeBusy("the volume's keys were changed by another process meanwhile")
        if condemned.part:
            # What programs wrote into it need not be kept: only that nobody reads it any more counts.
            key_agent.lock(volume.volume_id)
            say_shredded(condemned.cipher_dir)
        else:
            _check_idle(condemned.cipher_dir, volume)
        if condemned.lost:
            key_agent.lock(volume.volume_id)
        else:
            # The agent first, as it refuses if somebody has mounted the volume meanwhile.
            key_agent.shred(condemned.data, condemned.given)
            path = shred_secret.path_of(volume)
            if path is not None:
                shred_secret.destroy(path)
        edit.overwrite()


def say_what_goes(condemned: Condemned) -> None:
    """What there is, and what could still be opened afterwards."""
    from datetime import UTC, datetime

    cipher_dir, volume = condemned.cipher_dir, condemned.volume
    made = datetime.fromtimestamp(volume.created_s, UTC)
    ui.note(f"{cipher_dir} says it is volume {volume.volume_id.hex()}, made on {made:%Y-%m-%d}")
    names = ", ".join(f"{protector.label!r} ({protector.kind})" for protector in volume.protectors)
    if volume.ephemeral:
        ui.note("an ephemeral volume: its key was never stored anywhere, only its `volume` file is removed")
    elif volume.shred is None:
        ui.warning(
            f"{cipher_dir} has no shred secret: whoever has a copy of its file `volume` and the secret of one of its "
            f"protectors ({names}) can still open whatever was copied along with it"
        )
    elif condemned.lost:
        ui.warning(
            f"the shred secret of {cipher_dir} is not here and cannot be destroyed: whoever has it, a copy of the file "
            f"`volume` and the secret of one of its protectors ({names}) can still open what was copied along with it"
        )
    elif volume.shred.kind == shred_secret.KEYFILE:
        where = shred_secret.path_of(volume)
        ui.warning(f"the shred secret in {where} is destroyed; copies of that file are yours to destroy")
    elif volume.shred.kind == shred_secret.TOKEN:
        token = volume.shred.params.get("token_label")
        ui.warning(f"the key in the token {token!r} is destroyed: nothing opens the volume or a copy of it any more")
    else:
        ui.warning("the shred secret on this machine is destroyed: nothing opens the volume or a copy of it any more")


def _secret(volume: Volume, data: bytes, *, without_secret: bool) -> tuple[bytes, bool]:
    """What leads to the shred secret, seen to be the volume's; whether it is lost."""
    path = shred_secret.path_of(volume)
    try:
        if path is not None and not path.exists():
            raise ShredSecretMissing(f"the volume's shred secret is not at {path}")
        given = shred_secret.read(volume)
        if key_agent.check_shred(data, given):
            return given, False
        raise ShredSecretMissing("the volume's shred secret is not on this machine (any more)")
    except (ShredSecretMissing, Denied, BackendUnavailable) as error:
        if without_secret:
            return b"", True
        raise hinted(
            error, "nothing was destroyed; if that secret is lost for good, `--without-secret` destroys the rest"
        ) from None


def _check_idle(cipher_dir: Path, volume: Volume) -> None:
    daemon = mounts.daemon_of_volume(cipher_dir)
    held = key_agent.find(volume.volume_id)
    if daemon is not None or (held is not None and held.daemon_pid is not None):
        where = daemon.mountpoint if daemon is not None else held.mountpoint if held is not None else "?"
        raise hinted(VolumeBusy(f"the volume is mounted on {where}"), f"`cryptfs umount {where}` first")
