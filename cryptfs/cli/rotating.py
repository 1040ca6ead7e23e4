"""The steps of `rotate`: what is asked of agent and daemon, and what is done here when there is no daemon."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from cryptfs.cli import key_agent, ui
from cryptfs.cli.advice import hinted
from cryptfs.errors import (
    AgentUnavailable,
    CryptfsError,
    StoreFailed,
    UsageError,
    VolumeBusy,
    VolumeLocked,
    WrongSecret,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cryptfs.cli.hold import Hold
    from cryptfs.cli.kept import Kept
    from cryptfs.cli.protectors import Choice, Given
    from cryptfs.format.volume import Volume
    from cryptfs.keys.agent_client import AgentClient
    from cryptfs.keys.rotation_requests import Known

POLL_S = 0.3
BEGIN_S = 20.0
"""How long a daemon may take to begin, on a machine with other things to do."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Everything was looked at. `left`: how many things need an older KEK; `ids`: which, the first of them."""

    kek_version: int
    done: int
    left: int
    ids: tuple[bytes, ...]

    @property
    def did_nothing(self) -> bool:
        """Everything was under the newest KEK before."""
        return not self.done and not self.left


# asking ------------------------------------------------------------------------------------------------------------


def known(volume: Volume) -> Known | None:
    """What the agent knows of a volume's rotation; None if no agent runs."""
    from cryptfs.cli import plain_agent
    from cryptfs.keys.rotation_requests import get_known

    return plain_agent.ask("rotation-get", {"volume_id": volume.volume_id}, get_known, None)


def start(cipher_dir: Path) -> None:
    """Have the daemon go on with it, if it is not at it."""
    volume = _read(cipher_dir)
    now = known(volume)
    report = now.report if now is not None and now.attached else None
    if report is not None and _is_about(report.kek_version, volume) and report.state in {"running", "done"}:
        return
    with suppress(VolumeBusy):  # it began by itself meanwhile
        _tell(volume, "rotate-start")


def check_mounted(cipher_dir: Path) -> None:
    """Raise `UsageError` if there is no daemon to do anything."""
    if _mounted_on(cipher_dir) is None:
        raise UsageError("the volume is not mounted: nobody would rewrite it in the background")


def cancel(cipher_dir: Path) -> bool:
    """Have the daemon stop; whether it was at work, or about to be. Raises `UsageError` if there is none."""
    from cryptfs.cli.rotate import older_versions

    volume = _read(cipher_dir)
    now = known(volume)
    if not _tell(volume, "rotate-cancel"):
        raise hinted(UsageError("the volume is not mounted: nothing is being rewritten"), "a `rotate` ends on ctrl-C")
    report = now.report if now is not None else None
    return bool(older_versions(volume)) and (report is None or report.state in {"running", "waiting"})


def _tell(volume: Volume, verb: str) -> bool:
    from cryptfs.keys.rotation_requests import get_was_attached

    async def request(client: AgentClient) -> bool:
        return get_was_attached(await client.request(verb, {"volume_id": volume.volume_id}))

    return key_agent.ask(request)


def _read(cipher_dir: Path) -> Volume:
    from cryptfs.ops.info import read_volume

    return read_volume(cipher_dir)


def _is_about(kek_version: int, volume: Volume) -> bool:
    return kek_version == volume.kek_version


def is_unfinished(cipher_dir: Path) -> bool:
    """Whether there are older KEK versions whose logs are not known to be all rewritten.

    Raises `VolumeBusy` if they are being rewritten right now.
    """
    from cryptfs.cli.rotate import older_versions

    volume = _read(cipher_dir)
    if not older_versions(volume):
        return False
    now = known(volume)
    if now is None or now.report is None or not _is_about(now.report.kek_version, volume):
        return True
    if now.report.state == "running":
        raise hinted(
            VolumeBusy("a rotation is under way: everything is being rewritten"),
            f"`cryptfs rotate {cipher_dir} --status` shows how far it is, --cancel stops it",
        )
    return now.report.state != "done" or now.report.left > 0


# keys --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Secret:
    """What was given to open the volume, and for which protector (None: any of its kind)."""

    choice: Choice
    value: bytes = field(repr=False)


@contextmanager
def unlocked(cipher_dir: Path, given: Given, *, secret_wanted: bool) -> Iterator[Secret | None]:
    """Have the volume unlocked for the length of a block, or as long as it is mounted; the secret, if it is wanted.

    Raises as `unlock_volume`.
    """
    from cryptfs.cli.hold import Hold
    from cryptfs.cli.unlock import unlock_volume

    volume, secret = _read(cipher_dir), None
    with Hold() as hold:
        if secret_wanted and not volume.ephemeral:
            secret = _secret(cipher_dir, volume, given, hold)
        else:
            unlock_volume(cipher_dir, given, hold=hold)
        try:
            yield secret
        finally:
            hold.release(volume.volume_id)


def _secret(cipher_dir: Path, volume: Volume, given: Given, hold: Hold) -> Secret:
    """Read once, as a descriptor can be: it unlocks the volume, and wraps the new KEK."""
    from cryptfs.cli import shred_secret
    from cryptfs.ops.info import read_volume_file

    choice, is_unlocked = given.choose(volume), hold.join(volume.volume_id)

    def use(value: bytes) -> Secret:
        if not is_unlocked:
            with ui.waiting("unlocking"):
                key_agent.unlock(
                    read_volume_file(cipher_dir), cipher_dir, value, kind=choice.kind,
                    protector_id=choice.protector_id, shredding=shred_secret.read(volume), hold=hold,
                )  # fmt: skip
        return Secret(choice, value)

    return choice.tried(use)


def add_version(cipher_dir: Path, secret: Secret | None, others: Sequence[Kept], *, drop_others: bool) -> int:
    """A new KEK version in the `volume` file, durable and in use when this returns; which one.

    Every protector that is to open the volume from then on needs its secret once more: that of `secret`, and `others`.
    The rest is left out. Raises `WrongSecret`, `UsageError` (nobody agreed to leave the rest out), `StoreFailed`,
    `VolumeBusy`.
    """
    from cryptfs.cli import kept, shred_secret
    from cryptfs.cli.volume_edit import Edit
    from cryptfs.format.volume import parse_volume
    from cryptfs.keys.edit_requests import rotate_kek

    volume = _read(cipher_dir)
    asking = secret is None or secret.choice.is_prompt
    tries: list[kept.Carried] = [[]]
    if secret is not None:
        tries = kept.tries(volume, secret.choice, secret.value, others, ask=asking and not drop_others)
    shredding = shred_secret.read(volume)

    async def make(client: AgentClient, data: bytes) -> bytes:
        new = None
        while new is None:
            carried = tries.pop(0)
            try:
                new = await rotate_kek(client, volume.volume_id, data, carried, shredding)
            except WrongSecret:
                if not tries:
                    raise
        carried_over = {protector.protector_id for protector in parse_volume(new).protectors}
        left_out = [protector for protector in volume.protectors if protector.protector_id not in carried_over]
        if left_out:
            kept.agree(left_out, asking=asking, drop_others=drop_others)
        return new

    with Edit.of(cipher_dir) as edit:
        try:
            edit.change(make, lambda: None)
        except WrongSecret as failure:
            raise secret.choice.explained(failure) if secret is not None else failure from None
    return _read(cipher_dir).kek_version


def destroy_older(cipher_dir: Path) -> None:
    """Take the older KEK versions out of the `volume` file. What needs one of them is noise when this returns."""
    from cryptfs.cli.volume_edit import Edit
    from cryptfs.keys.edit_requests import destroy_keks

    volume_id = _read(cipher_dir).volume_id
    with Edit.of(cipher_dir) as edit, ui.waiting("destroying the older keys"):
        edit.change(lambda client, data: destroy_keks(client, volume_id, data), lambda: None)


def check_in_use(cipher_dir: Path, given: Given) -> None:
    """That the `volume` file is authentic and this volume's, before it is changed, or anybody waits for a daemon.

    The agent looks at it, and tells the daemon of a mounted volume, as an earlier call that was killed did not. One
    that is not mounted is opened, and nothing written: it may be the `volume` file of another. Raises `VolumeDamaged`,
    `RolledBack`, `VolumeLocked`, `VolumeBusy` (another process is changing it).
    """
    from cryptfs.cli.volume_access import Reached, with_volume
    from cryptfs.cli.volume_edit import Edit
    from cryptfs.keys.edit_requests import commit
    from cryptfs.ops.offline import open_to_read, shut

    volume_id = _read(cipher_dir).volume_id
    if _mounted_on(cipher_dir) is None:

        async def look(reached: Reached) -> None:
            await shut(reached.access, await open_to_read(reached.access))

        with_volume(cipher_dir, given, look, exclusive=True)
    with Edit.of(cipher_dir) as edit:
        key_agent.ask(lambda client: commit(client, volume_id, edit.data))


# rewriting ---------------------------------------------------------------------------------------------------------


def rewrite(cipher_dir: Path, given: Given) -> Outcome:
    """Everything under the newest KEK: by the daemon of a mounted volume, else here.

    Raises `StoreFailed` (full disk), `VolumeLocked`, `AgentUnavailable`, `VolumeBusy`; then it can be gone on with.
    """
    mountpoint = _mounted_on(cipher_dir)
    return _rewrite_here(cipher_dir, given) if mountpoint is None else _rewrite_there(cipher_dir, mountpoint)


def _mounted_on(cipher_dir: Path) -> Path | None:
    """Where a daemon has it, or has the volume whose domain it is, as far as it told the agent."""
    from cryptfs.cli import mounts

    daemon = mounts.daemon_of_volume(cipher_dir)
    if daemon is not None:
        return daemon.mountpoint
    held = key_agent.find(_read(cipher_dir).volume_id)
    return Path(held.mountpoint or "/") if held is not None and held.daemon_pid is not None else None


def served_on(cipher_dir: Path) -> Path | None:
    """Where a daemon that the agent does not know has the volume or, if it is a domain, the volume it is in."""
    from cryptfs.cli import mounts
    from cryptfs.ops.domains import is_domain

    daemon = mounts.daemon_of_volume(cipher_dir)
    if daemon is None and is_domain(cipher_dir):
        daemon = mounts.daemon_of_volume(cipher_dir.parent.parent)
    if daemon is None or any(held.daemon_pid == daemon.pid for held in key_agent.held()):
        return None
    return daemon.mountpoint


def _rewrite_here(cipher_dir: Path, given: Given) -> Outcome:
    from cryptfs.cli.meter import Meter
    from cryptfs.cli.volume_access import Reached, with_volume
    from cryptfs.fs.rotation import Progress
    from cryptfs.ops.rotate import rotate_offline

    version = _read(cipher_dir).kek_version
    with Meter("rewriting") as meter:

        def show(now: Progress) -> None:
            meter.show(now.done, now.total)

        async def work(reached: Reached) -> Outcome:
            ended = await rotate_offline(reached.access, version, show)
            return Outcome(version, ended.progress.done, len(ended.left), tuple(sorted(ended.left)))

        return with_volume(cipher_dir, given, work, exclusive=True)


def _rewrite_there(cipher_dir: Path, mountpoint: Path) -> Outcome:
    from cryptfs.cli.meter import Meter

    volume = _read(cipher_dir)
    since_s, begun = time.monotonic(), False
    with Meter("rewriting") as meter:
        while True:
            now = known(volume)
            if now is None:
                raise AgentUnavailable("the key agent is gone; the mounted volume goes on once it is back and unlocked")
            report = now.report if now.attached else None
            if report is None or not _is_about(report.kek_version, volume):
                if time.monotonic() - since_s > BEGIN_S:
                    raise AgentUnavailable(f"the daemon of {mountpoint} does not answer; the next mount goes on")
                # One that lost sight of the agent finds it when something in the mount needs a key.
                with suppress(OSError):
                    os.listdir(mountpoint)
            elif report.state == "running":
                begun = True
                meter.show(report.done, report.total)
            elif report.state == "done" and begun:
                return Outcome(report.kek_version, report.done, report.left, report.ids)
            elif report.state == "waiting":
                raise VolumeLocked(f"{report.message}; the rewriting goes on once the volume is unlocked")
            elif begun:
                _raise_stopped(report.state, report.message)
            else:
                # As an earlier call left it: the word to go on makes the agent forget this report, and the daemon look
                # at everything once more, for what was mended, deleted or put back since.
                with suppress(VolumeBusy):
                    _tell(volume, "rotate-start")
                begun, since_s = True, time.monotonic()
            time.sleep(POLL_S)


def _raise_stopped(state: str, message: str) -> None:
    if state == "cancelled":
        raise hinted(
            StoreFailed("the rewriting was cancelled; what is done stays done"), "`cryptfs rotate DIR --kek` goes on"
        )
    raise StoreFailed(f"the rewriting has stopped: {message}; what is done stays done")


def names_of(cipher_dir: Path, given: Given, ids: Sequence[bytes]) -> list[str]:
    """What these ids are called in the volume, as far as that can be found out; else the id."""
    from cryptfs.cli.volume_access import Reached, with_volume
    from cryptfs.ops.paths_by_id import Paths, paths_by_id

    async def work(reached: Reached) -> Paths:
        return await paths_by_id(reached.access)

    found: Paths = {}
    with suppress(CryptfsError, OSError):
        found = with_volume(cipher_dir, given, work, exclusive=False)
    return [
        ui.printable(found[log_id][0].decode(errors="surrogateescape")) if found.get(log_id) else f"id {log_id.hex()}"
        for log_id in ids
    ]
