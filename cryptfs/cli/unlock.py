"""`cryptfs unlock DIR`: bring a volume's KEK into the agent."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cryptfs.cli import protectors, ui
from cryptfs.cli.durations import DURATION
from cryptfs.cli.protectors import Given

if TYPE_CHECKING:
    from cryptfs.cli.hold import Hold


@click.command()
@click.argument("dir", type=click.Path(path_type=Path, readable=False))
@click.option("--for", "for_s", metavar="T", type=DURATION, help="Lock it again after T, for example 8h.")
@click.option("--idle", "idle_s", metavar="T", type=DURATION, help="Lock it when no key was needed for T.")
@protectors.options
def unlock(
    dir: Path,  # noqa: A002
    *,
    for_s: int | None,
    idle_s: int | None,
    given: Given,
) -> None:
    """Bring the key of the volume DIR, or of the domain mounted at DIR, into the agent; starts the agent if needed.

    If it is there already, `--for` and `--idle` are not changed.
    """
    from cryptfs.cli.located import cipher_dir_of

    if not unlock_volume(cipher_dir_of(dir), given, for_s=for_s, idle_s=idle_s):
        ui.note("it was unlocked already")
        if for_s is not None or idle_s is not None:
            ui.warning("--for and --idle count only when a volume is unlocked: lock it first to change them")


def unlock_volume(
    cipher_dir: Path, given: Given, *, for_s: int | None = None, idle_s: int | None = None, hold: Hold | None = None,
    beside: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> bool:  # fmt: skip
    """Unlock the volume in `cipher_dir` (resolved); returns whether it was locked. `hold`: only as long as that lasts.

    The secret is asked for only then, and a wrong one that was typed may be typed again (but no PIN). Each attempt is
    made within a `beside()`, once its secret is at hand. Raises `NotAVolume`, `VolumeDamaged`, `UnsupportedFormat`,
    `WrongSecret`, `BackendUnavailable`, `Denied`, `AgentUnavailable`, `UsageError`.
    """
    from cryptfs.cli import key_agent, shred_secret
    from cryptfs.cli.advice import hinted
    from cryptfs.errors import UnsupportedFormat
    from cryptfs.format.volume import parse_volume
    from cryptfs.ops.info import read_volume_file

    volume_file = read_volume_file(cipher_dir)
    volume = parse_volume(volume_file)
    if key_agent.stays_unlocked(volume.volume_id) if hold is None else hold.join(volume.volume_id):
        return False
    if volume.ephemeral:
        raise hinted(
            UnsupportedFormat("the ephemeral volume cannot be unlocked: its key is gone, what lies there is noise"),
            f"`cryptfs mount {cipher_dir} MOUNTPOINT` makes a new one in its place",
        )
    shredding = shred_secret.read(volume)
    choice = given.choose(volume)

    def use(secret: bytes) -> None:
        with ui.waiting("unlocking"), beside():
            key_agent.unlock(
                volume_file, cipher_dir, secret, kind=choice.kind, protector_id=choice.protector_id,
                shredding=shredding, for_s=for_s, idle_s=idle_s, hold=hold,
            )  # fmt: skip

    choice.tried(use)
    return True


@contextlib.contextmanager
def unlocked(cipher_dir: Path, volume_id: bytes, given: Given) -> Iterator[bool]:
    """The volume in `cipher_dir` (resolved), unlocked for the block, which is told whether it was locked before.

    If so it is locked again afterwards, and also if this process is killed. Raises as `unlock_volume`.
    """
    from cryptfs.cli.hold import Hold

    with Hold() as hold:
        was_locked = unlock_volume(cipher_dir, given, hold=hold)
        try:
            yield was_locked
        finally:
            hold.release(volume_id)
