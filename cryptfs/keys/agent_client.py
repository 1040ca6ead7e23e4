"""The client's side of docs/AGENT_PROTOCOL.md, for daemon and command line: a method for each verb.

How requests and answers travel is `agent_connection`'s affair.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

import trio

from cryptfs.errors import ProtocolError
from cryptfs.keys.agent_answers import (
    AgentStatus,
    Attached,
    Kit,
    LockOutcome,
    VolumeStatus,
    fits,
    get_attached,
    get_bin,
    get_bool,
    get_floors,
    get_hello,
    get_int,
    get_kit,
    get_lock_outcome,
    get_status,
    get_unlocked,
)
from cryptfs.keys.agent_connection import AgentConnection
from cryptfs.keys.agent_socket import connected
from cryptfs.keys.edit_requests import KDF_PATIENCE_TICKS, VolumeWish, unlock_args
from cryptfs.types import DEK_BYTES, ID_BYTES, NAMES_KEY_BYTES, WRAPPED_BYTES, WRAPPED_NAMES_BYTES

__all__ = ["AgentClient", "AgentStatus", "Kit", "LockOutcome", "VolumeStatus", "connect", "open_agent"]


class AgentClient(AgentConnection):
    """A connection to the agent. Made by `open_agent` or `connect`."""

    async def hello(self, role: str) -> int:
        """Say who we are (`cli` or `daemon`); the agent's pid."""
        result = await self.request("hello", {"role": role})
        with self.rubbish_is_loss():
            return get_hello(result)

    async def create(self, new: VolumeWish, *, while_connected: bool = False) -> bytes:
        """A new volume: the bytes of its whole `volume` file.

        The agent holds its KEK afterwards; `while_connected`: until this connection ends, if `hold` says nothing else.
        """
        args = {**new.args(), "while_connected": while_connected}
        result = await self.request("create", args, patience_ticks=KDF_PATIENCE_TICKS)
        with self.rubbish_is_loss():
            return get_bin(result, "volume")

    async def unlock(  # noqa: PLR0913 - a keyword for each argument of the request
        self,
        *,
        volume: bytes,
        cipher_dir: str,
        secret: bytes | bytearray,
        kind: str = "",
        protector_id: bytes = b"",
        shred_secret: bytes | bytearray = b"",
        for_s: int | None = None,
        idle_s: int | None = None,
        while_connected: bool = False,
    ) -> tuple[bytes, int]:
        """Unlock with a secret: (volume id, KEK version). `volume` is the whole file's bytes.

        The secret is tried on all protectors of `kind`, or of every kind if that is empty; or on the one of an id.
        `shred_secret`: 32 bytes, where the volume has one that the agent does not keep. It is locked again `for_s`
        seconds from now, or when no key was asked for in `idle_s`; None: as its policy says. `while_connected`: also
        when this connection ends, if it was locked before (see `hold`).

        Raises `WrongSecret`; `VolumeDamaged` if the secret is right but the file was changed; `UnsupportedFormat`,
        `ShredSecretMissing`.
        """
        args = unlock_args(
            volume, cipher_dir, secret, kind=kind, protector_id=protector_id, shred_secret=shred_secret, for_s=for_s,
            idle_s=idle_s, while_connected=while_connected,
        )  # fmt: skip
        result = await self.request("unlock", args, patience_ticks=KDF_PATIENCE_TICKS)
        with self.rubbish_is_loss():
            return get_unlocked(result)

    async def hold(self, volume_id: bytes, *, while_connected: bool) -> bool:
        """Have a volume that is unlocked stay so: for good, or at least as long as this connection; whether it is.

        One that was unlocked for good is so whatever `while_connected` says.
        """
        result = await self.request("hold", {"volume_id": volume_id, "while_connected": while_connected})
        with self.rubbish_is_loss():
            return get_bool(result, "was_unlocked")

    async def lock(self, volume_id: bytes) -> bool:
        """Have the agent lock the volume, its daemon first; whether it was unlocked."""
        return (await self.lock_told(volume_id)).was_unlocked

    async def lock_told(self, volume_id: bytes) -> LockOutcome:
        """As `lock`, with what the volume's daemon said."""
        result = await self.request("lock", {"volume_id": volume_id})
        with self.rubbish_is_loss():
            return get_lock_outcome(result)

    async def locked(self, volume_id: bytes, unwritten: int) -> None:
        """The daemon's word that it holds no key of the volume any more; the agent drops the KEK.

        `unwritten`: files whose last changes could not be written and wait in memory. Raises `ProtocolError` if nobody
        wants the volume locked.
        """
        await self.request("locked", {"volume_id": volume_id, "unwritten": unwritten})

    async def status(self) -> AgentStatus:
        """The agent and its volumes."""
        result = await self.request("status", {})
        with self.rubbish_is_loss():
            return get_status(result)

    async def attach(self, *, volume_id: bytes, cipher_dir: str, mountpoint: str, volume: bytes) -> Attached:
        """Make this connection the volume's daemon. When the connection ends, the KEK is forgotten.

        Raises `VolumeLocked`, `VolumeDamaged` (the file's MAC does not match), `RolledBack` (an older file than was
        seen), `FreshnessUnavailable`, or `VolumeBusy` (another daemon is attached).
        """
        args = {
            "volume_id": volume_id,
            "cipher_dir": os.fsencode(cipher_dir),
            "mountpoint": os.fsencode(mountpoint),
            "volume": volume,
        }
        result = await self.request("attach", args)
        with self.rubbish_is_loss():
            return get_attached(result)

    async def detach(self, volume_id: bytes, *, keep: bool) -> None:
        """The reverse of `attach`: afterwards the connection's end means nothing; the KEK stays held only if `keep`."""
        await self.request("detach", {"volume_id": volume_id, "keep": keep})

    async def keep(self, volume_id: bytes, *, keep: bool) -> bool:
        """Have the KEK stay when the volume's daemon detaches or is gone, whatever it says; whether one is attached."""
        result = await self.request("keep", {"volume_id": volume_id, "keep": keep})
        with self.rubbish_is_loss():
            return get_bool(result, "was_attached")

    async def generate(self, volume_id: bytes, log_id: bytes, purpose: str, count: int) -> tuple[int, bytes, bytes]:
        """`count` (at most 4096) new keys for one log: (KEK version, keys joined, their wraps joined).

        Raises `VolumeLocked`.
        """
        args = {"volume_id": volume_id, "id": log_id, "purpose": purpose, "count": count}
        result = await self.request("generate", args)
        key_bytes, wrapped_bytes = (
            (NAMES_KEY_BYTES, WRAPPED_NAMES_BYTES) if purpose == "names" else (DEK_BYTES, WRAPPED_BYTES)
        )
        with self.rubbish_is_loss():
            return (
                get_int(result, "kek_version"),
                get_bin(result, "keys", count * key_bytes),
                get_bin(result, "wrapped", count * wrapped_bytes),
            )

    async def kits(self, volume_id: bytes, *, directory: bool, count: int, deks: int) -> tuple[int, list[Kit]]:
        """(KEK version, `count` kits of `deks` DEKs each); at most 256 kits and 4096 DEKs. Raises `VolumeLocked`."""
        args = {"volume_id": volume_id, "directory": directory, "count": count, "deks": deks}
        result = await self.request("kits", args)
        names = (NAMES_KEY_BYTES, WRAPPED_NAMES_BYTES) if directory else (0, 0)
        sizes = (ID_BYTES, DEK_BYTES, WRAPPED_BYTES, *names, deks * DEK_BYTES, deks * WRAPPED_BYTES)
        with self.rubbish_is_loss():
            rows = result.get("kits")
            if not isinstance(rows, list) or len(rows) != count:
                raise ProtocolError("kits is no array of the right length")
            return get_int(result, "kek_version"), [get_kit(row, sizes) for row in rows]

    async def unwrap(
        self, volume_id: bytes, items: Sequence[tuple[bytes, str, int, bytes, int]]
    ) -> tuple[list[bytes | None], list[int]]:
        """The keys of each item ``(id, purpose, KEK version, wraps joined, first block)``, joined; and its floor.

        No keys where any of the item's wraps is not authentic. At most 4096 keys in all. The floor of a log key's item
        is the generation its log must have at least, or `DELETED`; that of any other is 0. Raises `VolumeLocked`,
        `FreshnessUnavailable`.
        """
        result = await self.request("unwrap", {"volume_id": volume_id, "items": items})
        with self.rubbish_is_loss():
            keys = result.get("keys")
            if type(keys) is not list or len(keys) != len(items):
                raise ProtocolError("keys is no array of the right length")
            floors = get_floors(result, len(items))
            for key, item in zip(keys, items, strict=True):
                if key is not None and (type(key) is not bytes or not fits(key, item)):
                    raise ProtocolError("keys of a wrong length")
            return keys, floors

    async def stop(self) -> None:
        """Have the agent forget everything and end."""
        await self.request("stop", {})


@contextlib.asynccontextmanager
async def open_agent(
    socket_path: str,
    *,
    role: str = "cli",
    on_push: Callable[[Mapping[str, Any]], None] | None = None,
    linger: bool = True,
) -> AsyncIterator[AgentClient]:
    """A client for the length of a block. Raises as `connect` does."""
    failure: BaseException | None = None
    async with trio.open_nursery() as nursery:
        # Carried around the nursery, which would wrap it in a group: that a nursery is in here is nobody's business.
        try:
            client = await connect(nursery, socket_path, role=role, on_push=on_push, linger=linger)
            try:
                yield client
            finally:
                client.close()
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - raised again below
            failure = error
    if failure is not None:
        raise failure


async def connect(
    nursery: trio.Nursery,
    socket_path: str,
    *,
    role: str,
    on_push: Callable[[Mapping[str, Any]], None] | None = None,
    linger: bool = True,
) -> AgentClient:
    """Connect, check that the agent is the user's own, say hello; the client's tasks run in `nursery` until `close`.

    `on_push` is called with each event, between two awaits of the loop: it must neither block nor raise. Raises
    `AgentUnavailable` if no agent answers; `NotPermitted` if the socket or the agent is another user's.
    """
    client = started(nursery, socket_path, on_push=on_push, linger=linger)
    try:
        await client.hello(role)
    except BaseException:
        client.close()
        raise
    return client


def started(
    nursery: trio.Nursery,
    socket_path: str,
    *,
    on_push: Callable[[Mapping[str, Any]], None] | None = None,
    linger: bool = True,
) -> AgentClient:
    """As `connect`, but for `hello`, which is the caller's to say. Raises as `agent_socket.connected`."""
    client = AgentClient(connected(socket_path), on_push, linger=linger)
    nursery.start_soon(client.run)
    return client
