"""A repair that is killed at any of its steps: the volume opens, a second repair ends it, and nothing got lost."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cryptfs.ops.check_repair import repair_volume
from cryptfs.ops.offline import Access
from cryptfs.ports import Store
from cryptfs.store.local import LocalStore
from tests.check import test_damage as damages
from tests.check.lab import Damage, Lab, summary

CHANGING = ("pwrite", "pwritev", "ftruncate", "mkdir", "rmdir", "unlink", "rename", "link", "symlink", "mknod")
POINTS = 3
"""Places to be killed at, spread over each repair."""
DAMAGES = [
    damages.block_flipped,
    damages.header_flipped,
    damages.names_exchanged,
    damages.directory_moved,
    damages.foreign_tree,
    damages.dir_log_flipped,
    damages.root_log_gone,
    damages.hard_link_became_an_older_copy,
]


class KilledError(Exception):
    """The process ends here."""


class DyingStore:
    """A store that makes `last` changes and none after that, as if the process had been killed."""

    def __init__(self, below: LocalStore, last: int) -> None:
        self.below = below
        self.left = last
        self.changes = 0
        self.fds: set[int] = set()

    def end(self) -> None:
        """What the kernel does for a process that was killed."""
        for fd in self.fds:
            os.close(fd)
        self.below.close_store()

    def close(self, fd: int) -> None:
        self.fds.discard(fd)
        os.close(fd)

    def open(self, dir_fd: int, name: bytes, flags: int, mode: int = 0o600) -> int:
        if flags & os.O_CREAT:
            self._count()
        fd = self.below.open(dir_fd, name, flags, mode)
        self.fds.add(fd)
        return fd

    def _count(self) -> None:
        if self.left <= 0:
            raise KilledError
        self.left -= 1
        self.changes += 1

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever the store has
        call: Callable[..., Any] = getattr(self.below, name)
        if name not in CHANGING:
            return call

        def counted(*args: Any, **rest: Any) -> Any:  # noqa: ANN401
            self._count()
            return call(*args, **rest)

        return counted


async def repair_until(lab: Lab, last: int) -> int:
    """Repair with a store that dies after `last` changes; how many it made."""
    stores: list[DyingStore] = []

    def make() -> Store:
        stores.append(DyingStore(lab.store(), last - sum(store.changes for store in stores)))
        return stores[-1]

    def close(store: Store) -> None:
        store.end()  # type: ignore[attr-defined]

    sample = lab.sample
    try:
        await repair_volume(Access(sample.config, make, close, sample.keys(), sample.clock, sample.random), deep=True)
    except KilledError:
        pass
    except BaseExceptionGroup as group:
        if group.split(KilledError)[1] is not None:
            raise
    return sum(store.changes for store in stores)


def copy(source: Path, to: Path) -> None:
    """With hard links, fifos and times."""
    subprocess.run(["cp", "-a", source, to], check=True)


def name_of(damage: object) -> str:
    return getattr(damage, "__name__", "")


@pytest.mark.parametrize("damage", DAMAGES, ids=name_of)
async def test_killed(damage: Damage, lab: Lab, tmp_path: Path) -> None:
    await kill_at(damage, lab, tmp_path, POINTS)


@pytest.mark.torture
@pytest.mark.parametrize("damage", [row[0] for row in damages.SEEN], ids=name_of)
async def test_killed_everywhere(damage: Damage, lab: Lab, tmp_path: Path) -> None:
    await kill_at(damage, lab, tmp_path, 1 << 30)


async def kill_at(damage: Damage, lab: Lab, tmp_path: Path, points: int) -> None:
    damage(lab, await lab.places())
    before = await lab.read()
    pristine = tmp_path / "damaged"
    copy(lab.root, pristine)
    total = await repair_until(lab, 1 << 30)
    assert total > 3
    points = min(points, total - 1)
    for last in sorted({1 + (total - 2) * n // (points - 1) for n in range(points)}):
        shutil.rmtree(lab.root)
        copy(pristine, lab.root)
        assert await repair_until(lab, last) == last
        await lab.read()  # it opens
        report = await lab.repair(deep=True)
        assert not report.damage, (last, summary(report.damage))
        again = await lab.check(deep=True)
        assert not again.damage, (last, summary(again.damage))
        after = await lab.read()
        contents = [value for value in after.values() if value and not isinstance(value, Exception)]
        for path, value in before.items():
            if isinstance(value, bytes) and value:
                assert value in contents, (last, path)
        assert not [path for path, value in after.items() if isinstance(value, Exception)], last
