"""What a mounted volume, or a domain of one, has its keys by: agent link, cache, gate, policies, locking."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import trio

from cryptfs.daemon.args import DaemonArgs
from cryptfs.daemon.locking import Locking
from cryptfs.daemon.memory import GivingBack
from cryptfs.daemon.policies import Policies
from cryptfs.daemon.rotating import Rotating
from cryptfs.fs.volume import Volume
from cryptfs.fuse.forgetting import Forgetting
from cryptfs.fuse.gate import Gate
from cryptfs.keys.cache import KeyCache
from cryptfs.keys.link import AgentLink, Mounted, tick_for
from cryptfs.ports import Clock


class Keyed:
    """One per volume. `serve_keys` once the link is attached, `serve_volume` once the volume is open."""

    def __init__(self, nursery: trio.Nursery, args: DaemonArgs, mounted: Mounted, clock: Clock) -> None:
        """`nursery` runs the link's tasks, and what the two methods start."""
        self._nursery = nursery
        self.gate = Gate()
        self.policies = Policies(args.overrides)
        self.locking = Locking(self.gate, self.policies, clock)
        self.heard: list[Callable[[str, Mapping[str, Any]], None]] = []
        """Who else is told what the agent pushes, as `AgentLink` tells it."""
        self.link = AgentLink(nursery, args.agent_socket, mounted, self._on_event)
        self.link.tick_s = tick_for(self.policies.now.lifetime_s)
        self.keys = KeyCache(self.link, self.policies.now, clock)
        self.policies.rule(self.keys)

    def _on_event(self, kind: str, event: Mapping[str, Any]) -> None:
        for hears in self.heard:
            hears(kind, event)
        if not self.policies.on_event(kind, event):
            self.locking.on_event(kind, event)
        elif kind == "policy":
            self.link.tick_s = tick_for(self.policies.now.lifetime_s)

    def serve_keys(self) -> None:
        """Start what keeps keys no longer than they may be kept, and answers the agent about them."""
        self._nursery.start_soon(self.keys.serve)
        self._nursery.start_soon(self.policies.serve, self.link)

    def serve_volume(self, volume: Volume, forgetting: Forgetting) -> None:
        """Start the volume's background work, rotations and giving memory back among it, and its locking."""
        rotating = Rotating(self.link, volume, self.gate.traffic)
        self.heard.append(rotating.on_event)
        self._nursery.start_soon(volume.serve, rotating.serve, GivingBack(volume.inodes).serve)
        self._nursery.start_soon(self.locking.serve, self.link, self.keys, volume, forgetting)

    async def leave(self) -> None:
        """Overwrite every key and tell the agent. Never raises."""
        self.keys.wipe()
        await self.link.detach()
