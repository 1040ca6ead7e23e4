"""A cipher directory to tamper with: what is in it, an older copy of it, and the way back after each change."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import trio

from cryptfs.store.local import LocalStore
from cryptfs.testing.freshness import FakeRecord
from cryptfs.testing.volumes import SampleVolume
from cryptfs.types import Kind
from tests.faults.driver import Driver
from tests.faults.workload import pattern

BLOCK = 4096
LONG = b"long-" * 50


@dataclass(frozen=True)
class Place:
    """One object: where it lies below, and its id. `names`: every path that shows the same file."""

    path: bytes
    kind: Kind
    below: Path
    log_id: bytes
    names: frozenset[bytes]
    content: bytes = b""

    @property
    def blocks(self) -> int:
        return -(-len(self.content) // BLOCK)


@dataclass
class Vault:
    """`root` is tampered with and put right again; `past` is the same volume some time ago, left clean as well."""

    root: Path
    past: Path
    sample: SampleVolume
    places: dict[bytes, Place]
    deleted: dict[bytes, Place]
    """What was there in the past and is no more; `below` is where it lay."""
    _undo: list[Callable[[], None]] = field(default_factory=list)
    _taken: int = 0

    # what is where -----------------------------------------------------------------------------------------------

    def of_kind(self, kind: Kind) -> list[Place]:
        return [place for path, place in sorted(self.places.items()) if place.kind == kind]

    def sidecar(self, place: Place) -> Path:
        name = place.log_id.hex()
        return self.root / "sidecars" / name[:2] / name

    def twin(self, place: Place) -> Path:
        return self.sidecar(place).with_suffix(".twin")

    def log(self, place: Place) -> Path:
        return place.below / ".dir" if place.kind == Kind.DIR else self.sidecar(place)

    def older(self, path: Path) -> Path:
        """The same file in the past; it may not be there."""
        return self.past / path.relative_to(self.root)

    def victims(self, place: Place) -> set[bytes]:
        """Everything that damage of this object may cost: a directory takes along what is in it."""
        below = {p for p in self.places if p.startswith(place.path + b"/") or not place.path}
        return set(place.names) | (below if place.kind == Kind.DIR else set())

    # changing it, with a way back --------------------------------------------------------------------------------

    def write(self, path: Path, data: bytes) -> None:
        """The whole content, in place."""
        before = path.read_bytes()
        path.write_bytes(data)
        self._undo.append(lambda: _rewrite(path, before))

    def take(self, path: Path) -> Path:
        """Away with a file or directory; where it went."""
        self._taken += 1
        aside = self.root.parent / f"taken{self._taken}"
        path.rename(aside)
        self._undo.append(partial(os.rename, aside, path))
        return aside

    def move(self, old: Path, new: Path) -> None:
        if new.exists() or new.is_symlink():
            self.take(new)
        old.rename(new)
        self._undo.append(partial(os.rename, new, old))

    def swap(self, one: Path, two: Path) -> None:
        spare = one.with_name("spare")
        for old, new in ((one, spare), (two, one), (spare, two)):
            self.move(old, new)

    def add(self, path: Path, make: Callable[[Path], object]) -> None:
        if path.exists() or path.is_symlink():
            self.take(path)
        self._undo.append(lambda: _remove(path))
        make(path)

    def copy(self, source: Path, path: Path) -> None:
        """`source`, of any kind, at `path` instead of what is there."""
        self.add(path, lambda to: _copy(source, to))

    def forget(self) -> None:
        """The way back is no longer needed: all of the volume is put there anew."""
        self._undo.clear()
        self.restore()

    def restore(self) -> None:
        """As before the first change since the last call."""
        while self._undo:
            self._undo.pop()()
        for aside in self.root.parent.glob("taken*"):
            _remove(aside)


def _rewrite(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif path.exists() or path.is_symlink():
        path.unlink()


def _copy(source: Path, to: Path) -> None:
    mode = source.lstat().st_mode
    if stat.S_ISDIR(mode):
        shutil.copytree(source, to, symlinks=True, copy_function=_copy_any)
    elif stat.S_ISLNK(mode):
        to.symlink_to(os.readlink(source))
    elif stat.S_ISFIFO(mode):
        os.mkfifo(to)
    else:
        shutil.copy(source, to)


# building one ----------------------------------------------------------------------------------------------------

FIRST = {
    b"data": 5 * BLOCK + 100, b"same": 5 * BLOCK + 100, b"small": 10, b"empty": 0, b"grown": 700, b"shrunk": 3 * BLOCK,
    b"deleted": 2 * BLOCK, b"replaced": BLOCK, b"d1/x": BLOCK, b"d1/y": 2 * BLOCK + 1, b"d2/x": BLOCK,
    b"d2/y": 2 * BLOCK + 1, b"d1/sub/deep": 50, LONG: 2 * BLOCK, b"still": 3 * BLOCK,
}  # fmt: skip


async def _put(driver: Driver, path: bytes, offset: int, data: bytes, *, sync: bool = True) -> None:
    fh = await driver.open(path)
    await driver.write(fh, offset, data)
    if sync:
        await driver.fsync(fh)
    await driver.close(fh)


async def _first(driver: Driver) -> None:
    for path in (b"d1", b"d2", b"d1/sub", b"d3", b"d1/gone"):
        await driver.mkdir(path)
    for seed, (path, size) in enumerate(FIRST.items()):
        fh = await driver.create(path)
        if size:
            await driver.write(fh, 0, pattern(seed, size))
        await driver.close(fh)
    await driver.symlink(b"a/target", b"link")
    await driver.symlink(b"t" * 300, b"d2/link")
    await driver.symlink(b"gone", b"d2/dead")
    await driver.mknod(b"fifo", stat.S_IFIFO | 0o600)


async def _second(driver: Driver) -> None:
    """Every kind of later frame: blocks in both homes, growth, a cut, holes; entries come, go, and change places."""
    await _put(driver, b"data", BLOCK, pattern(30, 2 * BLOCK))
    await _put(driver, b"data", 2 * BLOCK, pattern(31, 100))
    await _put(driver, b"data", 4 * BLOCK, pattern(32, 50), sync=False)
    for part in range(4):
        await _put(driver, b"grown", 700 + 900 * part, pattern(40 + part, 900))
    await _put(driver, b"grown", 9 * BLOCK, pattern(45, 20))
    await driver.truncate(b"shrunk", BLOCK + 5)
    await _put(driver, b"d1/x", 0, pattern(50, BLOCK))
    await _put(driver, b"small", 0, b"0123456789")
    await driver.unlink(b"deleted")
    await driver.unlink(b"d2/dead")
    await driver.rmdir(b"d1/gone")
    fh = await driver.create(b"newer")
    await driver.write(fh, 0, pattern(51, BLOCK))
    await driver.close(fh)
    await driver.rename(b"newer", b"replaced")
    await driver.link(b"data", b"d2/data-too")
    await driver.symlink(b"another", b"d1/link")
    await driver.rename(b"d2/x", b"moved")


async def _places(driver: Driver, root: Path) -> dict[bytes, Place]:
    snapshot = await driver.snapshot()
    found: dict[bytes, tuple[Path, bytes, Kind]] = {}
    for path in [b"", *snapshot]:
        inode = driver.volume.inodes.get(int(await driver.ino(path)))
        here = inode
        parts: list[str] = []
        while here.path is not None:
            here, name = here.place()
            parts.insert(0, os.fsdecode(name))
        found[path] = (root.joinpath("tree", *parts), inode.log_id, inode.kind)
    out: dict[bytes, Place] = {}
    for path, (below, log_id, kind) in found.items():
        names = frozenset(p for p, (_, other, _) in found.items() if other == log_id)
        out[path] = Place(path, kind, below, log_id, names, snapshot.get(path) or b"")
    return out


def build(parent: Path) -> Vault:
    """A volume with a history, left clean, and a copy from the middle of it."""

    async def make() -> Vault:
        root, past = parent / "vault", parent / "past"
        root.mkdir()
        store, sample = LocalStore(root), SampleVolume(block_size=BLOCK)
        sample.freshness = FakeRecord()
        try:
            await sample.create(store)
            driver = await Driver.mount(store, sample)
            await _first(driver)
            assert await driver.unmount()
            shutil.copytree(root, past, symlinks=True, copy_function=_copy_any)
            driver = await Driver.mount(store, sample)
            before = await _places(driver, root)
            await _second(driver)
            assert await driver.unmount()
            driver = await Driver.mount(store, sample, read_only=True)
            places = await _places(driver, root)
            await driver.unmount()
        finally:
            store.close_store()
        gone = {path: place for path, place in before.items() if path not in places and place.kind != Kind.DIR}
        return Vault(root, past, sample, places, gone)

    return trio.run(make)


def _copy_any(source: str, to: str) -> None:
    _copy(Path(source), Path(to))
