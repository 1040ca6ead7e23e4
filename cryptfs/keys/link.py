"""The daemon's connection to the agent: made when needed, made anew when lost.

While there is no agent, or it does not hold the volume's KEK, every request fails at once with `AgentUnavailable` or
`VolumeLocked`; the first request after it is back finds it again. Nothing polls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import trio

from cryptfs.errors import AgentUnavailable
from cryptfs.keys.agent_client import AgentClient, connect
from cryptfs.keys.rotation_requests import Report
from cryptfs.keys.volume_requests import VolumeRequests


@dataclass(frozen=True, slots=True)
class Mounted:
    """What the agent is told about this daemon when it attaches. `read_volume` gives the `volume` file's bytes now."""

    volume_id: bytes
    cipher_dir: str
    mountpoint: str
    read_volume: Callable[[], bytes]


class AgentLink(VolumeRequests):
    """The agent's connection of one mounted volume. `nursery` runs the connection's tasks.

    `on_event` is called, between two awaits, with what the agent pushes about the volume (`locking`, `locked`,
    `unlocked`, `policy`, `report`: docs/AGENT_PROTOCOL.md), `policy` when attached too, with `gone` when the connection
    is lost, with `back` when there is one again.
    """

    def __init__(
        self, nursery: trio.Nursery, socket_path: str, mounted: Mounted,
        on_event: Callable[[str, Mapping[str, Any]], None],
    ) -> None:  # fmt: skip
        super().__init__(mounted.volume_id, self._connected)
        self._nursery = nursery
        self._socket_path = socket_path
        self._mounted = mounted
        self._on_event = on_event
        self.read_volume = mounted.read_volume
        self.shown = b""
        """The `volume` file as the agent last found it authentic."""
        self._client: AgentClient | None = None
        self._connecting = trio.Lock()
        self._closing = False

    async def attach(self) -> None:
        """Connect and attach now. Raises what `connect` and `AgentClient.attach` raise."""
        await self._connected()

    @property
    def connected(self) -> bool:
        """Whether there is a connection that works."""
        return self._client is not None and not self._client.lost.is_set()

    async def is_unlocked(self, volume_id: bytes) -> bool:
        """Whether the agent holds the KEK of a volume, this one or another. Raises as `attach`."""
        status = await (await self._connected()).status()
        return any(v.volume_id == volume_id and v.state == "unlocked" for v in status.volumes)

    async def reattach(self) -> None:
        """Show the agent the `volume` file again, as it was unlocked again. Raises as `AgentClient.attach` does."""
        await self._attach(await self._connected())

    async def locked(self, unwritten: int) -> None:
        """Tell the agent that no key of the volume is left here. Raises as `AgentClient.locked` does."""
        if self._client is not None:
            await self._client.locked(self._mounted.volume_id, unwritten)

    async def report(self, cache: Mapping[str, int], policy: Mapping[str, int | None], overridden: list[str]) -> None:
        """Answer the agent's `report`. Raises what `AgentClient.request` raises."""
        if self._client is not None:
            await self._client.request(
                "report",
                {
                    "volume_id": self._mounted.volume_id, "cache": cache, "policy": policy, "overridden": overridden,
                },
            )  # fmt: skip

    async def report_rotation(self, report: Report) -> None:
        """Tell the agent how far a rotation is, for whoever asks there. Raises as `AgentClient.request` does."""
        await (await self._connected()).request("rotation", report.args(self._mounted.volume_id))

    def interrupt(self) -> None:
        """Have requests that wait for the agent fail now."""
        if self._client is not None:
            self._client.interrupt()

    async def _attach(self, client: AgentClient) -> None:
        mounted, data = self._mounted, self.read_volume()
        attached = await client.attach(
            volume_id=mounted.volume_id, cipher_dir=mounted.cipher_dir, mountpoint=mounted.mountpoint, volume=data
        )  # fmt: skip
        self.shown = data
        self._on_event("policy", {"serial": attached.serial, "policy": attached.policy.encode()})

    async def detach(self, *, keep: bool = False) -> None:
        """Leave the agent: it forgets the KEK unless told to keep it. Never raises."""
        self._closing = True
        client, self._client = self._client, None
        if client is not None:
            try:
                await client.detach(self._mounted.volume_id, keep=keep)
            except AgentUnavailable:
                return
            finally:
                client.close()

    async def _connected(self) -> AgentClient:
        client = self._client
        if client is not None and not client.lost.is_set():
            return client
        if self._closing:
            raise AgentUnavailable("the volume is being unmounted")
        async with self._connecting:
            client = self._client
            if client is not None and not client.lost.is_set():
                return client
            client = await connect(self._nursery, self._socket_path, role="daemon", on_push=self._pushed)
            try:
                await self._attach(client)
            except BaseException:
                client.close()
                raise
            self._client = client
            self._nursery.start_soon(self._watch, client)
            self._on_event("back", {})
            return client

    async def _watch(self, client: AgentClient) -> None:
        await client.lost.wait()
        if not self._closing:
            self._on_event("gone", {})

    def _pushed(self, event: Mapping[str, Any]) -> None:
        kind = event.get("event")
        if type(kind) is str and event.get("volume_id") == self._mounted.volume_id:
            self._on_event(kind, event)
