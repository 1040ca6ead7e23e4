"""Whole volumes for tests: no mount, no agent, on any store."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from cryptfs.crypto.wrap import ZERO_ID, volume_mac
from cryptfs.format.volume import Protector, Volume, WrappedKey, encode_volume
from cryptfs.fs.volume import Volume as OpenVolume
from cryptfs.fs.volume import open_volume
from cryptfs.ops.init import config_of, create_volume
from cryptfs.ports import DekProvider, Store
from cryptfs.testing.clock import FakeClock
from cryptfs.testing.freshness import FakeRecord
from cryptfs.testing.keys import FakeDekProvider, FakeKek
from cryptfs.testing.randomness import SeededRandom
from cryptfs.types import ID_BYTES, Purpose


class SampleVolume:
    """A volume's secrets, file, clock and randomness, which outlive its stores: what a crash left opens with them.

    `make_keys` gives each opening its keys; by default a `FakeDekProvider`.
    """

    def __init__(
        self,
        *,
        block_size: int = 4096,
        seed: int = 1,
        make_keys: Callable[[FakeKek, FakeClock], DekProvider] = FakeDekProvider,
    ) -> None:
        self.random = SeededRandom(seed)
        self.clock = FakeClock()
        self.volume_id = self.random(ID_BYTES)
        self.kek = FakeKek(self.volume_id, self.random)
        self._make_keys = make_keys
        self.freshness: FakeRecord | None = None
        """What the machine has seen of the volume. None: each opening is on a machine that never saw it."""
        self.volume_file = self._volume_file(block_size)
        self.config = config_of(self.volume_file)
        self._first = self.config, self.kek.kek

    def keys(self) -> DekProvider:
        """Keys as a daemon that starts now has them: none in clear."""
        keys = self._make_keys(self.kek, self.clock)
        if self.freshness is not None and isinstance(keys, FakeDekProvider):
            keys.freshness = self.freshness
        return keys

    async def create(self, store: Store) -> None:
        """Lay the volume out on an empty store."""
        await create_volume(Path("sample"), self.volume_file, store, self.keys(), self.clock, self.random)

    async def open(self, store: Store, *, keys: DekProvider | None = None, read_only: bool = False) -> OpenVolume:
        """As a daemon does. Raises what `open_volume` raises."""
        if keys is None:  # an empty cache is false
            keys = self.keys()
        return await open_volume(self.config, store, keys, self.clock, self.random, read_only=read_only)

    def rotate(self) -> int:
        """A new KEK version for everything new, and the volume key under it: what precedes the rewriting of logs."""
        self.kek.rotate()
        self.rewrap_volume_key()
        return self.kek.version

    def restart(self) -> None:
        """Only the KEK it was made with, again."""
        self.config, kek = self._first
        self.kek.keks, self.kek.version, self.kek.least = {1: kek}, 1, 1

    def rewrap_volume_key(self) -> None:
        """Have the volume key under the newest KEK."""
        before = self.config
        wrapped = self.kek.rewrap(ZERO_ID, Purpose.VOLUME, before.volume_key_kek, before.volume_key_wrapped)
        assert wrapped is not None
        self.config = replace(before, volume_key_kek=self.kek.version, volume_key_wrapped=wrapped)

    def _volume_file(self, block_size: int) -> bytes:
        _, volume_key = self.kek.fresh(ZERO_ID, Purpose.VOLUME, 1)
        keks = (WrappedKey(1, b"wrapped by nobody"),)
        protector = Protector(self.random(ID_BYTES), "fake", "", 0, {}, keks)
        volume = Volume(
            volume_id=self.volume_id, serial=0, created_s=0, block_size=block_size, features=(),
            root_dir_id=self.random(ID_BYTES), kek_version=1, volume_key=WrappedKey(1, volume_key),
            protectors=(protector,),
        )  # fmt: skip
        signed = encode_volume(volume)
        return signed + volume_mac(self.kek.kek, self.volume_id, 1, signed)


async def open_test_volume(store: Store, *, block_size: int = 4096, seed: int = 1) -> tuple[OpenVolume, SampleVolume]:
    """A new volume on an empty store, open; and what opens it again."""
    sample = SampleVolume(block_size=block_size, seed=seed)
    await sample.create(store)
    return await sample.open(store), sample


def abandon(volume: OpenVolume) -> None:
    """Let a volume go as kill -9 would: descriptors closed, nothing written."""
    volume.inodes.close()
    volume.ctx.close()
