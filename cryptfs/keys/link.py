"""The daemon's connection to the agent: made when needed, made anew when lost.

While there is no agent, or it does not hold the volume's KEK, every request fails at once with `AgentUnavailable` or
`VolumeLocked`; the first request after it is back finds it again.

An agent that hangs keeps its connection. So it is asked for a sign of life (`hello`) every tick, whether anybody needs
a key or not, and given up like one that is gone when it was silent for three ticks. The shorter keys may live, the
shorter the ticks; never so short that an agent that is only slow is given up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import trio

from cryptfs.errors import AgentUnavailable, CryptfsError
from cryptfs.keys.agent_client import AgentClient, started
from cryptfs.keys.agent_connection import TICK_S
from cryptfs.keys.rotation_requests import Report
from cryptfs.keys.volume_requests import VolumeRequests

TICK_MIN_S = 5.0
TICKS_PER_LIFETIME = 4
"""The last tick of the silence, and the one before the first, are not whole: four are over with the last key."""


def tick_for(lifetime_s: float) -> float:
    """How often to ask for a sign of life (seconds) where no key lives longer than this."""
    return min(TICK_S, max(TICK_MIN_S, lifetime_s / TICKS_PER_LIFETIME))


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
    is lost (`heard_at`: when it was heard last, by the clock of keys, if it hangs), with `back` when there is one
    again.
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
        self.apart = False
        """While set, no request looks for an agent that is away: only `attach` does."""
        self.tick_s = TICK_S
        """How often to ask for a sign of life; see `tick_for`."""
        self._client: AgentClient | None = None
        self._joining: AgentClient | None = None
        self._connecting = trio.Lock()
        self._closing = False

    async def attach(self) -> None:
        """Connect and attach now. Raises what `connect` and `AgentClient.attach` raise."""
        await self._connected(anew=True)

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
        """Have requests that wait for the agent fail now, those among them that wait to be connected to it."""
        for client in (self._client, self._joining):
            if client is not None:
                client.interrupt()

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

    async def _connected(self, *, anew: bool = False) -> AgentClient:
        client = self._client_that_works(anew=anew)
        if client is not None:
            return client
        async with self._connecting:
            client = self._client_that_works(anew=anew)
            if client is not None:
                return client
            client = self._joining = started(self._nursery, self._socket_path, on_push=self._pushed)
            client.tick_s = self.tick_s
            try:
                await client.hello("daemon")
                await self._attach(client)
            except BaseException:
                client.close()
                raise
            finally:
                self._joining = None
            self._client = client
            self._nursery.start_soon(self._watch, client)
            self._nursery.start_soon(self._ask_for_signs_of_life, client)
            self._on_event("back", {})
            return client

    def _client_that_works(self, *, anew: bool) -> AgentClient | None:
        """Raises `AgentUnavailable` if there is none and none is to be made."""
        client = self._client
        if client is not None and not client.lost.is_set():
            return client
        if self._closing:
            raise AgentUnavailable("the volume is being unmounted")
        if self.apart and not anew:
            raise AgentUnavailable("the key agent is away")
        return None

    async def _watch(self, client: AgentClient) -> None:
        await client.lost.wait()
        if not self._closing:
            self._on_event("gone", {"heard_at": client.heard_at} if client.hangs else {})

    async def _ask_for_signs_of_life(self, client: AgentClient) -> None:
        """Until the connection is lost, which an unanswered question makes it."""
        while not client.lost.is_set():
            client.tick_s = self.tick_s
            with trio.move_on_after(self.tick_s):
                await client.lost.wait()
            # Interrupted (the volume is being locked), it is asked again.
            with suppress(CryptfsError):
                await client.hello("daemon")

    def _pushed(self, event: Mapping[str, Any]) -> None:
        kind = event.get("event")
        if type(kind) is str and event.get("volume_id") == self._mounted.volume_id:
            self._on_event(kind, event)
