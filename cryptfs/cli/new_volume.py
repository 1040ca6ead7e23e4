"""Laying out a new volume with keys from the agent: the composition root of `cryptfs init`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from cryptfs.keys.agent_client import AgentClient
from cryptfs.keys.cache import KeyCache, KitBytes, UnwrapItem
from cryptfs.keys.clock import SystemClock
from cryptfs.keys.policy import CachePolicy
from cryptfs.ops.init import create_volume
from cryptfs.store.local import LocalStore


async def lay_out(cipher_dir: Path, volume_file: bytes, volume_id: bytes, client: AgentClient) -> None:
    """Fill the empty directory `cipher_dir`; every key comes from `client`, which holds the volume's KEK."""
    clock = SystemClock()
    keys = KeyCache(_Upstream(client, volume_id), CachePolicy(), clock)
    store = LocalStore(cipher_dir)
    try:
        await create_volume(cipher_dir, volume_file, store, keys, clock, os.urandom)
    finally:
        keys.wipe()
        store.close_store()


class _Upstream:
    """The agent, for one volume."""

    def __init__(self, client: AgentClient, volume_id: bytes) -> None:
        self._client = client
        self._volume_id = volume_id

    async def unwrap(self, items: Sequence[UnwrapItem]) -> list[bytes | None]:
        return await self._client.unwrap(self._volume_id, items)

    async def generate(self, log_id: bytes, purpose: str, count: int) -> tuple[int, bytes, bytes]:
        return await self._client.generate(self._volume_id, log_id, purpose, count)

    async def kits(self, *, directory: bool, count: int, deks: int) -> tuple[int, list[KitBytes]]:
        return await self._client.kits(self._volume_id, directory=directory, count=count, deks=deks)
