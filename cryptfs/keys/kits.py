"""Kits kept ready: what files that do not exist yet will need, made ahead by the agent, a stock at a time.

Whoever finds the stock empty doubles it: who creates this fast will create more.
"""

from __future__ import annotations

from collections import deque

import trio

from cryptfs.crypto.secret import overwrite
from cryptfs.errors import AgentUnavailable, CryptfsError
from cryptfs.keys.held_keys import Batch, HeldKeys
from cryptfs.keys.stretches import split
from cryptfs.keys.upstream import Upstream
from cryptfs.ports import FreshKeys, Kit
from cryptfs.types import DEK_BYTES, NAMES_KEY_BYTES, WRAPPED_BYTES, WRAPPED_NAMES_BYTES

ASKED_AGAIN = 1
"""Times the agent is asked once more for new keys, as its answer was under way while the KEK was replaced."""
_KITS_MAX = 256
_KITS_MIN = 8
_DEKS_PER_KIT = 2


class Kits:
    """The stock of one cache, whose `keys` hold what the kits have in clear. Run `serve` in the background."""

    def __init__(self, upstream: Upstream, keys: HeldKeys) -> None:
        self._upstream = upstream
        self._keys = keys
        self._ready: deque[tuple[Kit, Batch]] = deque()
        self._wanted = _KITS_MIN
        self._refill = trio.Event()
        self._refilling = trio.Lock()

    async def serve(self) -> None:
        """Refill on demand, for ever. The agent being away is the next caller's problem, not this task's."""
        while True:
            await self._refill.wait()
            self._refill = trio.Event()
            try:
                await self._fill()
            except CryptfsError:
                continue

    def take(self) -> Kit | None:
        """See `DekProvider.take_kit`."""
        while self._ready:
            kit, batch = self._ready.popleft()
            if len(self._ready) * 2 < self._wanted:
                self._refill.set()
            if self._keys.is_good(batch):
                return kit
        return None

    async def make(self, *, directory: bool) -> Kit:
        """See `DekProvider.make_kit`."""
        if directory:
            return (await self._new_kits(1, directory=True))[0][0]
        while True:
            kit = self.take()
            if kit is not None:
                return kit
            async with self._refilling:
                if not self._ready:
                    self._wanted = min(_KITS_MAX, self._wanted * 2)
                    self._ready.extend(await self._new_kits(self._wanted, directory=False))

    def renew(self) -> None:
        """Drop what is of an older KEK than the cache hands out."""
        self._ready = deque(each for each in self._ready if each[0].kek_version >= self._keys.least_version)
        self._refill.set()

    def clear(self) -> None:
        """Forget all of them; what they have in clear is the cache's to overwrite."""
        self._ready.clear()

    async def _fill(self) -> None:
        async with self._refilling:
            count = self._wanted - len(self._ready)
            if count > 0:
                self._ready.extend(await self._new_kits(count, directory=False))

    async def _new_kits(self, count: int, *, directory: bool) -> list[tuple[Kit, Batch]]:
        self._keys.check_open()
        deks = 0 if directory else _DEKS_PER_KIT
        for _ in range(ASKED_AGAIN + 1):
            self._keys.statistics.round_trips += 1
            kek_version, raw = await self._upstream.kits(directory=directory, count=count, deks=deks)
            if kek_version >= self._keys.least_version:
                break
            overwrite(key for row in raw for key in (row[1], row[3], row[5]))
        else:
            raise AgentUnavailable("the key agent makes keys under a KEK that was replaced")
        clear: list[bytes] = []
        wraps: list[bytes] = []
        widths: list[int] = []
        for _, log_key, log_wrapped, names_key, names_wrapped, dek_keys, dek_wraps in raw:
            clear += [log_key, names_key, dek_keys]
            wraps.append(log_wrapped)
            widths.append(DEK_BYTES)
            if directory:
                assert len(names_wrapped) == WRAPPED_NAMES_BYTES
                wraps.append(names_wrapped)
                widths.append(NAMES_KEY_BYTES)
            wraps += split(dek_wraps, WRAPPED_BYTES)
            widths += [DEK_BYTES] * deks
        views, batch = self._keys.store(bytearray().join(clear), wraps, widths)
        overwrite(clear)
        out = []
        for log_id, _, log_wrapped, _, names_wrapped, _, dek_wraps in raw:
            self._keys.know_floor(log_id, 0, batch)
            ours = split(dek_wraps, WRAPPED_BYTES)
            fresh = None if directory else FreshKeys(kek_version, [views[w] for w in ours], ours)
            if fresh is not None:
                batch.stocks.append(fresh)
            names_key_view = views[names_wrapped] if directory else None
            kit = Kit(
                log_id, kek_version, views[log_wrapped], log_wrapped, names_key_view, names_wrapped or None, fresh
            )
            out.append((kit, batch))
        return out
