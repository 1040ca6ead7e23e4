"""A small volume with everything in it, on a real directory, to be damaged: no mount, no agent."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from cryptfs.fs.inodes import Inode
from cryptfs.fs.making import Owner
from cryptfs.fs.volume import Volume
from cryptfs.names import tree_name
from cryptfs.ops.check import check_volume
from cryptfs.ops.check_repair import repair_volume
from cryptfs.ops.check_report import Finding, Report
from cryptfs.ops.offline import Access
from cryptfs.ports import Store
from cryptfs.store.local import LocalStore
from cryptfs.testing.volumes import SampleVolume

BLOCK = 4096
OWN = Owner(os.geteuid(), os.getegid())


@dataclass
class Lab:
    """A volume in `root`, closed, and what is in it: path -> content (bytes), target (str) or None (directory)."""

    root: Path
    sample: SampleVolume = field(default_factory=SampleVolume)
    content: dict[bytes, bytes | str | None] = field(default_factory=dict)

    @property
    def tree(self) -> Path:
        return self.root / "tree"

    def store(self) -> LocalStore:
        return LocalStore(self.root)

    @property
    def access(self) -> Access:
        def close(store: Store) -> None:
            assert isinstance(store, LocalStore)
            store.close_store()

        return Access(self.sample.config, self.store, close, self.sample.keys(), self.sample.clock, self.sample.random)

    async def check(self, *, deep: bool = False) -> Report:
        return await check_volume(self.access, deep=deep)

    async def repair(self, *, deep: bool = False) -> Report:
        return await repair_volume(self.access, deep=deep)

    # making ----------------------------------------------------------------------------------------------------

    async def make(self) -> None:
        store = self.store()
        try:
            await self.sample.create(store)
            volume = await self.sample.open(store)
            rng = random.Random(7)
            docs = await self.mkdir(volume, volume.root, b"docs")
            deep = await self.mkdir(volume, docs, b"deep")
            for path, parent, name, size in (
                (b"/small", volume.root, b"small", 100),
                (b"/empty", volume.root, b"empty", 0),
                (b"/docs/a", docs, b"a", 3 * BLOCK + 17),
                (b"/docs/b", docs, b"b", 5 * BLOCK),
                (b"/docs/deep/c", deep, b"c", 2 * BLOCK + 1),
                (b"/docs/" + b"n" * 200, docs, b"n" * 200, 50),
            ):
                await self.write_file(volume, parent, name, path, rng.randbytes(size))
            await self.write_sparse(volume, docs)
            await self.overwrite(volume, docs, b"a", rng.randbytes(BLOCK))
            await volume.names.symlink(volume.root, b"link", b"docs/a", OWN)
            self.content[b"/link"] = "docs/a"
            attr = await volume.names.lookup(docs, b"b")
            await volume.names.link(attr.inode, deep, b"also-b")
            self.content[b"/docs/deep/also-b"] = self.content[b"/docs/b"]
            await volume.names.mknod(volume.root, b"pipe", 0o010600, 0, OWN)
            assert await volume.close()
        finally:
            store.close_store()

    async def mkdir(self, volume: Volume, parent: Inode, name: bytes) -> Inode:
        attr = await volume.names.mkdir(parent, name, 0o755, OWN)
        attr.inode.lookups += 1
        self.content[self._path(volume, attr.inode, name, parent)] = None
        return attr.inode

    def _path(self, volume: Volume, inode: Inode, name: bytes, parent: Inode) -> bytes:
        return b"/docs/deep" if name == b"deep" else b"/" + name

    async def write_file(self, volume: Volume, parent: Inode, name: bytes, path: bytes, data: bytes) -> None:
        attr, file = await volume.names.create(parent, name, 0o640, OWN)
        attr.inode.lookups += 1
        await file.write(0, data)
        await file.journal.fsync()
        await volume.files.release(attr.inode)
        self.content[path] = data

    async def write_sparse(self, volume: Volume, parent: Inode) -> None:
        attr, file = await volume.names.create(parent, b"sparse", 0o600, OWN)
        attr.inode.lookups += 1
        await file.write(0, b"start")
        await file.write(9 * BLOCK, b"end")
        await volume.files.release(attr.inode)
        self.content[b"/docs/sparse"] = b"start" + bytes(9 * BLOCK - 5) + b"end"

    async def overwrite(self, volume: Volume, parent: Inode, name: bytes, data: bytes) -> None:
        """Block 1 of a durable file: its new version lies in the twin."""
        attr = await volume.names.lookup(parent, name)
        attr.inode.lookups += 1
        file = await volume.files.open(attr.inode, writing=True)
        await file.write(BLOCK, data)
        await file.journal.fsync()
        await volume.files.release(attr.inode)
        old = self.content[b"/docs/a"]
        assert isinstance(old, bytes)
        self.content[b"/docs/a"] = old[:BLOCK] + data + old[2 * BLOCK :]

    # looking ---------------------------------------------------------------------------------------------------

    async def read(self) -> dict[bytes, bytes | str | Exception | None]:
        """Everything in the volume, as a mount would show it; an exception where something cannot be read."""
        store = self.store()
        volume = await self.sample.open(store, read_only=True)
        out: dict[bytes, bytes | str | Exception | None] = {}
        try:
            todo = [(volume.root, b"")]
            while todo:
                inode, path = todo.pop()
                try:
                    entries = await volume.names.listing(inode)
                    described = await volume.names.described(inode, entries)
                except Exception as error:  # noqa: BLE001 - whatever it is, it is what a reader gets
                    out[path or b"/"] = error
                    continue
                for item in described:
                    assert item is not None
                    name, attr = item
                    here = path + b"/" + name
                    if attr is None:
                        out[here] = OSError("damaged")
                        continue
                    attr.inode.lookups += 1
                    try:
                        if attr.inode.kind == 2:
                            out[here] = None
                            todo.append((attr.inode, here))
                        elif attr.inode.kind == 3:
                            out[here] = os.fsdecode(await volume.files.readlink(attr.inode))
                        elif attr.inode.kind == 1:
                            file = await volume.files.open(attr.inode)
                            try:
                                out[here] = await file.read(0, 1 << 20)
                            finally:
                                await volume.files.release(attr.inode)
                    except Exception as error:  # noqa: BLE001 - likewise
                        out[here] = error
        finally:
            await volume.close()
            store.close_store()
        return out

    async def places(self) -> dict[bytes, tuple[Path, bytes]]:
        """Path -> (where it lies in `tree/`, its id)."""
        store = self.store()
        volume = await self.sample.open(store, read_only=True)
        out: dict[bytes, tuple[Path, bytes]] = {b"/": (self.tree, self.sample.config.root_dir_id)}
        try:
            todo = [(volume.root, b"", self.tree)]
            while todo:
                inode, path, below = todo.pop()
                node = await volume.inodes.dir(inode)
                names = (await node.keys()).names
                for sealed, entry in node.entries.items():
                    here, lies = path + b"/" + names.open(sealed), below / os.fsdecode(tree_name(sealed))
                    out[here] = (lies, entry.log_id)
                    if entry.kind == 2:
                        attr = await volume.names.lookup(inode, names.open(sealed))
                        attr.inode.lookups += 1
                        todo.append((attr.inode, here, lies))
        finally:
            await volume.close()
            store.close_store()
        return out

    def sidecar(self, log_id: bytes, suffix: str = "") -> Path:
        return self.root / "sidecars" / log_id.hex()[:2] / (log_id.hex() + suffix)


def flip(path: Path, offset: int = -1) -> None:
    """One bit of a byte."""
    raw = bytearray(path.read_bytes())
    raw[offset] ^= 0x10
    path.write_bytes(raw)


def swap(one: Path, other: Path) -> None:
    """Exchange two names."""
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def summary(findings: list[Finding]) -> set[tuple[str, str, str]]:
    """(what, path, reason) of each, and why it was not put right."""
    return {(f.what.value, os.fsdecode(f.path), f"{f.reason} {f.detail}") for f in findings}


Damage = Callable[[Lab, dict[bytes, tuple[Path, bytes]]], None]
