"""What the verbs ask of the agent, each a plain function: connect, one or two requests, disconnect.

Functions that only look (`held`, `find`, ...) take "no agent runs" for "nothing is held"; only those that bring a key
in start an agent. One that is just ending may close the door on us: connecting is tried again, requests are not.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from cryptfs import paths
from cryptfs.cli import agent_process, plain_agent
from cryptfs.cli.plain_agent import NotReached
from cryptfs.errors import AgentUnavailable, CryptfsError

if TYPE_CHECKING:
    from cryptfs.cli.hold import Hold
    from cryptfs.format.policy import Policy
    from cryptfs.keys.agent_answers import AgentStatus, Report
    from cryptfs.keys.agent_client import AgentClient, LockOutcome, VolumeStatus
    from cryptfs.keys.audit_requests import About
    from cryptfs.keys.edit_requests import VolumeWish

T = TypeVar("T")
Request = Callable[["AgentClient"], Awaitable[T]]

CONNECT_ATTEMPTS = 3


async def _once(request: Request[T]) -> T:
    from cryptfs.keys.agent_client import open_agent

    reached = False
    try:
        async with open_agent(paths.agent_socket()) as client:
            reached = True
            return await request(client)
    except AgentUnavailable as error:
        if reached or error.silent_pid:
            raise
        raise NotReached(str(error)) from error


def _run(request: Request[T]) -> T:
    import trio  # only now: half of the time that `cryptfs status` takes when no agent runs

    return trio.run(_once, request)


def ask(request: Request[T]) -> T:
    """Ask an agent, starting one if needed. Raises what the request raises, or `AgentUnavailable`."""
    return _reaching(lambda: _run(request))


def _reaching(ask_once: Callable[[], T]) -> T:
    """`ask_once` with an agent that runs, again as long as it raises `NotReached`."""
    why = ""
    for _attempt in range(CONNECT_ATTEMPTS):
        agent_process.ensure_running()
        try:
            return ask_once()
        except NotReached as error:
            why = str(error)
            time.sleep(0.1)
    raise plain_agent.stranger(why)


def _ask_running(request: Request[T], otherwise: T) -> T:
    """Ask the agent if one runs; `otherwise` if none does."""
    if not agent_process.is_running():
        return otherwise
    try:
        return _run(request)
    except NotReached as error:
        if agent_process.is_running():
            raise plain_agent.stranger(str(error)) from None
        return otherwise


def held() -> Sequence[VolumeStatus]:
    """The volumes that the agent holds a key for or that are attached to it."""
    from cryptfs.keys.agent_answers import get_volumes

    return plain_agent.ask("status", {}, get_volumes, ())


def reports() -> Mapping[bytes, tuple[Policy | None, Report | None]]:
    """Of each volume that is unlocked or mounted: its policy, and what its daemon says of its cache."""
    from cryptfs.keys.agent_answers import get_reports

    nobody: Mapping[bytes, tuple[Policy | None, Report | None]] = {}
    return plain_agent.ask("reports", {}, get_reports, nobody)


def pid() -> int | None:
    """The agent's process, if one runs."""
    status = _status()
    return None if status is None else status.pid


def _status() -> AgentStatus | None:
    from cryptfs.keys.agent_answers import get_status

    return plain_agent.ask("status", {}, get_status, None)


def about() -> About | None:
    """What the agent says about itself; None if none runs."""
    from cryptfs.keys.audit_requests import about_agent

    return _ask_running(about_agent, None)


def ending_pid() -> int | None:
    """The process of an agent that will end by itself in a moment, as it holds nothing."""
    status = _status()
    return status.pid if status is not None and status.exit_when_empty and not status.volumes else None


def find(volume_id: bytes) -> VolumeStatus | None:
    """What the agent knows of a volume."""
    return next((volume for volume in held() if volume.volume_id == volume_id), None)


def find_mounted_on(mountpoint: Path) -> VolumeStatus | None:
    """The volume whose daemon said that it is mounted on exactly this path."""
    return next((volume for volume in held() if volume.mountpoint == str(mountpoint)), None)


def is_unlocked(volume_id: bytes) -> bool:
    """Whether the agent holds the volume's KEK."""
    volume = find(volume_id)
    return volume is not None and volume.state == "unlocked"


def unlock(  # noqa: PLR0913 - a keyword for each argument of the request
    volume_file: bytes, cipher_dir: Path, secret: bytes, *, kind: str, protector_id: bytes = b"",
    shredding: bytes = b"", for_s: int | None = None, idle_s: int | None = None, hold: Hold | None = None,
) -> None:  # fmt: skip
    """Unlock a volume by all protectors of a kind, or the one of an id.

    `shredding`: its shred secret, unless the agent keeps it. `hold`: only as long as that lasts. Raises `WrongSecret`,
    `VolumeDamaged`, `UnsupportedFormat`, `ShredSecretMissing`, `Denied`, `BackendUnavailable`, `AgentUnavailable`.
    """
    from cryptfs.keys.agent_answers import get_unlocked
    from cryptfs.keys.edit_requests import KDF_PATIENCE_S, unlock_args

    args = unlock_args(
        volume_file, str(cipher_dir), secret, kind=kind, protector_id=protector_id, shred_secret=shredding, for_s=for_s,
        idle_s=idle_s, while_connected=hold is not None,
    )  # fmt: skip
    if hold is not None:
        held = hold
        _reaching(lambda: held.unlock(args, patience_s=KDF_PATIENCE_S))
        return
    _reaching(lambda: plain_agent.tell("unlock", args, get_unlocked, patience_s=KDF_PATIENCE_S))


@functools.cache
def locked_ahead() -> tuple[bytes | None, LockOutcome]:
    """Which volume was locked by what `lock_first` sent, and how that ended; None: none.

    Which one the path means is still to be seen: the agent goes by what it was told when it got the key.
    """
    from cryptfs.cli import lock_first
    from cryptfs.keys.agent_answers import LockOutcome, get_located_lock

    nothing: tuple[bytes | None, LockOutcome] = None, LockOutcome(was_unlocked=False, unwritten=0)
    sent = lock_first.pending()
    return nothing if sent is None else plain_agent.answered(sent, get_located_lock, nothing)


def lock(volume_id: bytes) -> LockOutcome:
    """Make daemon and agent forget every key of the volume; how that ended."""
    from cryptfs.keys.agent_answers import LockOutcome, get_lock_outcome

    ahead, outcome = locked_ahead()
    if ahead == volume_id:
        return outcome
    return plain_agent.ask("lock", {"volume_id": volume_id}, get_lock_outcome, LockOutcome(False, 0))


def stays_unlocked(volume_id: bytes) -> bool:
    """Have a volume that is unlocked stay so, also if that was for some commands only; whether it is unlocked."""
    from cryptfs.cli.hold import get_was_unlocked

    return plain_agent.ask("hold", {"volume_id": volume_id, "while_connected": False}, get_was_unlocked, False)


def keep(volume_id: bytes, *, keep: bool) -> None:
    """Whether the KEK stays when the volume's daemon ends."""
    plain_agent.ask("keep", {"volume_id": volume_id, "keep": keep}, _nothing, None)


def shred(volume_file: bytes, given: bytes) -> bool:
    """Have the agent destroy a volume's shred secret and forget its key; whether there was one. `given`: a token's PIN.

    Starts an agent if none runs: it alone answers for its state directory. Raises `AgentUnavailable`, `VolumeBusy`,
    `AuditUnavailable`, `ShredSecretMissing`, what a token raises.
    """
    from cryptfs.keys import edit_requests

    return ask(lambda client: edit_requests.shred(client, volume_file, given))


def check_shred(volume_file: bytes, given: bytes) -> bool:
    """Whether there is a shred secret for `shred` to destroy, and it is the volume's. Raises as that."""
    from cryptfs.keys import edit_requests

    return ask(lambda client: edit_requests.check_shred(client, volume_file, given))


def shred_id(volume_id: bytes) -> bool:
    """Have the agent destroy the shred secret that it keeps for this volume; whether there was one."""
    from cryptfs.keys import edit_requests

    return ask(lambda client: edit_requests.shred_id(client, volume_id))


def stop() -> None:
    """Make the agent forget every key and end."""
    plain_agent.ask("stop", {}, _nothing, None)


def _nothing(_result: Mapping[str, Any]) -> None:
    return


def create_volume(cipher_dir: Path, new: VolumeWish, hold: Hold | None = None) -> None:
    """Make a new volume in the empty directory `cipher_dir`; it is locked again afterwards, unless there is a `hold`.

    Raises `AgentUnavailable`, `StoreFailed`, `Denied`, `UsageError`, and what the root key's holder raises.
    """
    import trio

    from cryptfs.cli.new_volume import lay_out
    from cryptfs.format.volume import parse_volume

    async def request(client: AgentClient) -> None:
        # Killed while it is made, it is locked.
        volume_file = await client.create(new, while_connected=True)
        volume_id = parse_volume(volume_file).volume_id
        done = False
        try:
            await lay_out(cipher_dir, volume_file, volume_id, client)
            done = True
        finally:
            with trio.CancelScope(shield=True):
                if not done:
                    await _undone(client, new, volume_id)
                elif hold is None or not hold.join(volume_id):
                    await client.lock(volume_id)

    ask(request)


async def _undone(client: AgentClient, new: VolumeWish, volume_id: bytes) -> None:
    """Nothing came of a new volume: its key goes, and its shred secret, if the agent keeps it."""
    from cryptfs.keys import edit_requests

    await client.lock(volume_id)
    if new.shred_kind:
        with contextlib.suppress(CryptfsError):
            await edit_requests.shred_id(client, volume_id)


def create_domain(cipher_dir: Path, place: Path, new: VolumeWish) -> bytes:
    """Make a domain of the volume in `cipher_dir`, mounted, in the empty directory `place` of the mount.

    It is unlocked afterwards. Returns its volume id. Raises as `create_volume` and as `new_domain.make` do.
    """
    import trio

    from cryptfs.cli import new_domain
    from cryptfs.format.volume import parse_volume
    from cryptfs.ops.domains import domain_dir

    async def request(client: AgentClient) -> bytes:
        volume_file = await client.create(new, while_connected=True)
        volume_id = parse_volume(volume_file).volume_id
        try:
            await new_domain.make(cipher_dir, place, volume_file, volume_id, client)
            await client.hold(volume_id, while_connected=False)
        except BaseException:
            with trio.CancelScope(shield=True):
                if domain_dir(cipher_dir, volume_id).exists():
                    # It is, or may be, one all the same.
                    await client.lock(volume_id)
                else:
                    await _undone(client, new, volume_id)
            raise
        return volume_id

    return ask(request)
