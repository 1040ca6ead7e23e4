"""The agent's verbs about keys and freshness, for one volume: what `keys.cache` asks, over any connection."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence

from cryptfs.keys.agent_answers import get_bool, get_floors, get_int, get_rewrapped
from cryptfs.keys.agent_client import AgentClient
from cryptfs.keys.upstream import KitBytes, UnwrapItem

KITS_AT_ONCE = 256
LOGS_AT_ONCE = 1024
_GENERATION_BYTES = 8


class VolumeRequests:
    """`keys.cache.Upstream`. `connected` gives a connection that works, or raises."""

    def __init__(self, volume_id: bytes, connected: Callable[[], Awaitable[AgentClient]]) -> None:
        self.volume_id = volume_id
        self._connection = connected

    @classmethod
    def over(cls, client: AgentClient, volume_id: bytes) -> VolumeRequests:
        """All over one connection."""

        async def connected() -> AgentClient:
            return client

        return cls(volume_id, connected)

    async def unwrap(self, items: Sequence[UnwrapItem]) -> tuple[list[bytes | None], list[int]]:
        """See `Upstream`."""
        return await (await self._connection()).unwrap(self.volume_id, items)

    async def generate(self, log_id: bytes, purpose: str, count: int) -> tuple[int, bytes, bytes]:
        """See `Upstream`."""
        return await (await self._connection()).generate(self.volume_id, log_id, purpose, count)

    async def rewrap(self, items: Sequence[UnwrapItem]) -> tuple[int, list[bytes | None]]:
        """See `Upstream`; at most 4096 keys at once."""
        client = await self._connection()
        result = await client.request("rewrap", {"volume_id": self.volume_id, "items": items})
        with client.rubbish_is_loss():
            return get_int(result, "kek_version"), get_rewrapped(result, items)

    async def kits(self, *, directory: bool, count: int, deks: int) -> tuple[int, list[KitBytes]]:
        """See `Upstream`; at most 256 at once."""
        client = await self._connection()
        return await client.kits(self.volume_id, directory=directory, count=min(count, KITS_AT_ONCE), deks=deks)

    # freshness -------------------------------------------------------------------------------------------------

    async def floors(self, log_ids: Sequence[bytes]) -> list[int]:
        """See `Upstream`."""
        floors: list[int] = []
        for at in range(0, len(log_ids), LOGS_AT_ONCE):
            ids = log_ids[at : at + LOGS_AT_ONCE]
            client = await self._connection()
            result = await client.request("floors", {"volume_id": self.volume_id, "ids": b"".join(ids)})
            with client.rubbish_is_loss():
                floors += get_floors(result, len(ids))
        return floors

    async def begin(self, state_sequence: int) -> bool:
        """See `Upstream`."""
        client = await self._connection()
        result = await client.request("begin", {"volume_id": self.volume_id, "state_sequence": state_sequence})
        with client.rubbish_is_loss():
            return get_bool(result, "first_sight")

    async def record(self, logs: Mapping[bytes, int], gone: Sequence[bytes], state_sequence: int | None) -> None:
        """See `Upstream`. In several requests if there is much; the last one carries `state_sequence`."""
        raised, buried = list(logs.items()), list(gone)
        while True:
            now, raised = raised[:LOGS_AT_ONCE], raised[LOGS_AT_ONCE:]
            dead, buried = buried[:LOGS_AT_ONCE], buried[LOGS_AT_ONCE:]
            last = not raised and not buried
            args = {
                "volume_id": self.volume_id,
                "logs": _joined(now),
                "gone": b"".join(dead),
                "state_sequence": state_sequence if last else None,
            }
            await (await self._connection()).request("record", args)
            if last:
                return

    async def accept(self, logs: Mapping[bytes, int]) -> None:
        """See `Upstream`."""
        rows = list(logs.items())
        for at in range(0, len(rows), LOGS_AT_ONCE):
            args = {"volume_id": self.volume_id, "logs": _joined(rows[at : at + LOGS_AT_ONCE])}
            await (await self._connection()).request("accept", args)

    async def accept_volume(self, volume_file: bytes, state_sequence: int) -> tuple[int, int]:
        """Take the whole volume as it is: forget every floor, set those of `state` and `volume` to what they are now.

        Returns the `state` sequence and the mount epoch that had been seen. Raises `VolumeBusy` while it is mounted,
        `VolumeLocked`, `VolumeDamaged`, `FreshnessUnavailable`.
        """
        client = await self._connection()
        args = {"volume_id": self.volume_id, "volume": volume_file, "state_sequence": state_sequence}
        result = await client.request("accept-volume", args)
        with client.rubbish_is_loss():
            return get_int(result, "state_sequence"), get_int(result, "epoch")


def _joined(logs: Sequence[tuple[bytes, int]]) -> bytes:
    """24 bytes each: id, then generation, big-endian."""
    return b"".join(log_id + generation.to_bytes(_GENERATION_BYTES, "big") for log_id, generation in logs)
