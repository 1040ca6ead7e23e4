"""What is asked of the agent about a `volume` file: making one, opening one, and new versions of one.

The edits return the file's new bytes; they count once those are in place and `commit` was said (`agent.edit_verbs`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cryptfs.keys.agent_answers import get_bin, get_int

if TYPE_CHECKING:
    from cryptfs.keys.agent_client import AgentClient

ParamValue = int | str | bytes

KDF_PATIENCE_TICKS = 60
"""For requests that run a KDF, perhaps behind another one."""
KDF_PATIENCE_S = 600.0
"""The same for who waits without a loop that ticks."""


def unlock_args(  # noqa: PLR0913 - a keyword for each argument of the request
    volume: bytes, cipher_dir: str, secret: bytes | bytearray, *, kind: str, protector_id: bytes = b"",
    shred_secret: bytes | bytearray = b"", for_s: int | None = None, idle_s: int | None = None,
    while_connected: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Arguments of `unlock`; what they mean says `AgentClient.unlock`."""
    return {
        "volume": volume,
        "cipher_dir": os.fsencode(cipher_dir),
        "secret": bytes(secret),
        "for_s": for_s,
        "idle_s": idle_s,
        "kind": kind,
        "protector_id": protector_id,
        "shred_secret": bytes(shred_secret),
        "while_connected": while_connected,
    }


@dataclass(frozen=True, slots=True)
class ProtectorWish:
    """A protector to be made. `wish` is the kind's own, for example ``{"cost": "normal"}`` of a passphrase."""

    kind: str
    label: str
    secret: bytes | bytearray = field(repr=False)
    wish: Mapping[str, ParamValue] = field(default_factory=dict)

    def args(self) -> dict[str, Any]:
        """As arguments of a request."""
        return {"kind": self.kind, "wish": dict(self.wish), "label": self.label, "secret": bytes(self.secret)}


@dataclass(frozen=True, slots=True)
class VolumeWish:
    """A volume to be made; `protector` is None for an ephemeral one.

    `shred_kind`: empty (none), ``agent`` (made and kept there) or another kind, with `shred_secret` (32 bytes) and what
    says where it lies.
    """

    block_size: int
    protector: ProtectorWish | None
    policy: Mapping[str, int] = field(default_factory=dict)
    shred_kind: str = ""
    shred_params: Mapping[str, ParamValue] = field(default_factory=dict)
    shred_secret: bytes | bytearray = field(default=b"", repr=False)

    def args(self) -> dict[str, Any]:
        """As arguments of a request."""
        protector = self.protector or ProtectorWish("", "", b"")
        return {
            "block_size": self.block_size,
            **protector.args(),
            "policy": dict(self.policy),
            "shred_kind": self.shred_kind,
            "shred_params": dict(self.shred_params),
            "shred_secret": bytes(self.shred_secret),
        }


async def set_policy(client: AgentClient, volume_id: bytes, volume: bytes, policy: Mapping[str, int]) -> bytes:
    """The file with another policy (FORMAT.md §3). Raises `UsageError`, `VolumeLocked`, `VolumeDamaged`."""
    return await _edited(client, "policy-set", volume_id, volume, policy=dict(policy))


async def add_feature(client: AgentClient, volume_id: bytes, volume: bytes, feature: str) -> bytes:
    """The file with one feature more (FORMAT.md §3). Raises `UsageError`, `VolumeLocked`, `VolumeDamaged`."""
    return await _edited(client, "feature-add", volume_id, volume, feature=feature)


async def add_protector(
    client: AgentClient, volume_id: bytes, volume: bytes, new: ProtectorWish, shred_secret: bytes = b""
) -> bytes:
    """The file with one protector more, which was seen to open. Raises as `set_policy`, and what the root raises."""
    return await _edited(client, "protector-add", volume_id, volume, **new.args(), shred_secret=shred_secret)


async def change_protector(
    client: AgentClient, volume_id: bytes, volume: bytes, protector_id: bytes, new: ProtectorWish,
    shred_secret: bytes = b"",
) -> bytes:  # fmt: skip
    """The file with another secret for one of its protectors. Raises as `add_protector`."""
    args = {**new.args(), "protector_id": protector_id, "shred_secret": shred_secret}
    return await _edited(client, "protector-change", volume_id, volume, **args)


async def remove_protector(client: AgentClient, volume_id: bytes, volume: bytes, protector_id: bytes) -> bytes:
    """The file without one of its protectors. Raises `UsageError` for the last one, and as `set_policy`."""
    return await _edited(client, "protector-remove", volume_id, volume, protector_id=protector_id)


async def rotate_kek(
    client: AgentClient, volume_id: bytes, volume: bytes, carried: Sequence[tuple[bytes, bytes]],
    shred_secret: bytes = b"",
) -> bytes:  # fmt: skip
    """The file with a new KEK version beside the older ones.

    `carried`: (protector id, secret) of those that will open it; all others are left out. Raises `WrongSecret`, and as
    `add_protector`.
    """
    rows = [[protector_id, secret] for protector_id, secret in carried]
    return await _edited(client, "rotate-kek", volume_id, volume, carried=rows, shred_secret=shred_secret)


async def destroy_keks(client: AgentClient, volume_id: bytes, volume: bytes) -> bytes:
    """The file with the newest KEK version only. Whatever is wrapped under an older one is noise after `commit`."""
    return await _edited(client, "destroy-keks", volume_id, volume)


async def commit(client: AgentClient, volume_id: bytes, volume: bytes) -> int:
    """The file is durable in its place: it counts from here on, and an older one is refused. Its KEK version.

    May be said again. Raises `RolledBack`, `VolumeLocked`, `VolumeDamaged`, `FreshnessUnavailable`.
    """
    result = await client.request("commit", {"volume_id": volume_id, "volume": volume})
    with client.rubbish_is_loss():
        return get_int(result, "kek_version")


async def shred(client: AgentClient, volume: bytes, shred_secret: bytes = b"") -> bool:
    """Destroy the shred secret that the agent or a token keeps, and lock the volume; whether there was one.

    `shred_secret`: the token's PIN, or a key file's content. Raises `VolumeBusy` while it is mounted,
    `ShredSecretMissing` if it is another volume's, what a token raises.
    """
    args = {"volume": volume, "shred_secret": shred_secret}
    result = await client.request("shred", args, patience_ticks=KDF_PATIENCE_TICKS)
    return bool(result.get("destroyed"))


async def check_shred(client: AgentClient, volume: bytes, shred_secret: bytes = b"") -> bool:
    """Whether there is a shred secret to destroy, and it is the volume's. Raises as `shred`, but for `VolumeBusy`."""
    args = {"volume": volume, "shred_secret": shred_secret}
    result = await client.request("shred-check", args, patience_ticks=KDF_PATIENCE_TICKS)
    return bool(result.get("there"))


async def shred_id(client: AgentClient, volume_id: bytes) -> bool:
    """As `shred`, for a volume whose file cannot be read: what the agent itself keeps for it."""
    result = await client.request("shred-id", {"volume_id": volume_id})
    return bool(result.get("destroyed"))


async def _edited(client: AgentClient, verb: str, volume_id: bytes, volume: bytes, **args: object) -> bytes:
    args |= {"volume_id": volume_id, "volume": volume}
    result = await client.request(verb, args, patience_ticks=KDF_PATIENCE_TICKS)
    with client.rubbish_is_loss():
        return get_bin(result, "volume")
