"""What the cache asks the agent for, as a protocol: `keys.link` implements it, tests have a fake."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

UnwrapItem = tuple[bytes, str, int, bytes, int]
"""(log id, purpose, KEK version, wrapped keys joined, first block)."""
KitBytes = tuple[bytes, bytes, bytes, bytes, bytes, bytes, bytes]
"""(log id, log key, its wrap, names key, its wrap, DEKs, their wraps)."""


class Upstream(Protocol):
    """The agent, for one volume (`keys.link`)."""

    async def unwrap(self, items: Sequence[UnwrapItem]) -> tuple[list[bytes | None], list[int]]:
        """The keys of each item, joined; None where any of its wraps is not authentic. And its log's floor.

        Keys are the caller's to overwrite, here and below: nobody else may have the objects.
        """
        ...

    async def generate(self, log_id: bytes, purpose: str, count: int) -> tuple[int, bytes, bytes]:
        """KEK version, new keys joined, their wraps joined."""
        ...

    async def rewrap(self, items: Sequence[UnwrapItem]) -> tuple[int, list[bytes | None]]:
        """Newest KEK version, and each item's keys wrapped under it, joined; None where any is not authentic."""
        ...

    async def kits(self, *, directory: bool, count: int, deks: int) -> tuple[int, list[KitBytes]]:
        """KEK version and at most `count` kits."""
        ...

    async def floors(self, log_ids: Sequence[bytes]) -> list[int]:
        """The floors of logs."""
        ...

    async def begin(self, state_sequence: int) -> bool:
        """See `FreshnessRecord.begin`."""
        ...

    async def record(self, logs: Mapping[bytes, int], gone: Sequence[bytes], state_sequence: int | None) -> None:
        """See `FreshnessRecord.record`."""
        ...

    async def accept(self, logs: Mapping[bytes, int]) -> None:
        """See `FreshnessRecord.accept`."""
        ...
