"""Laying out a new volume with keys from the agent: the composition root of `cryptfs init`."""

from __future__ import annotations

import os
from pathlib import Path

from cryptfs.keys.agent_client import AgentClient
from cryptfs.keys.cache import KeyCache
from cryptfs.keys.clock import SystemClock
from cryptfs.keys.policy import CachePolicy
from cryptfs.keys.volume_requests import VolumeRequests
from cryptfs.ops.init import create_volume
from cryptfs.store.local import LocalStore


async def lay_out(cipher_dir: Path, volume_file: bytes, volume_id: bytes, client: AgentClient) -> None:
    """Fill the empty directory `cipher_dir`; every key comes from `client`, which holds the volume's KEK."""
    clock = SystemClock()
    keys = KeyCache(VolumeRequests.over(client, volume_id), CachePolicy(), clock)
    store = LocalStore(cipher_dir)
    try:
        await create_volume(cipher_dir, volume_file, store, keys, clock, os.urandom)
    finally:
        keys.wipe()
        store.close_store()
