"""A tree to rotate, and looking at what may not change by it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from cryptfs.format.log import HEADER_BYTES, decode_header
from cryptfs.fs.pace import Pace
from cryptfs.fs.rotation import Rotation
from cryptfs.ports import Store
from cryptfs.store.local import LocalStore
from cryptfs.testing.keys import FakeDekProvider
from tests.fs.tree import Tree

BLOCK = 4096
LONG = b"L" * 200


DOMAIN = b"v" * 16
XATTRS = (b"d/e/xattrs", b"fifo", b"link", b"d/e", b"")


async def populate(tree: Tree) -> dict[bytes, bytes]:
    """Every kind of thing there is; the contents of the files."""
    await tree.mkdir(b"d")
    await tree.mkdir(b"d/e")
    await tree.mkdir(b"empty")
    files = {
        b"small": b"s" * 10, b"empty file": b"", b"d/blocks": os.urandom(5 * BLOCK + 7), b"d/e/deep": b"deep" * 3000,
        b"d/" + LONG: b"long", b"d/e/xattrs": b"x" * 5000,
    }  # fmt: skip
    for path, content in files.items():
        await tree.write(path, content)
    file = await tree.open(b"d/blocks")
    await file.journal.fsync()
    # The next version goes to the twin.
    await file.write(BLOCK, b"t" * (BLOCK + 9))
    files[b"d/blocks"] = files[b"d/blocks"][:BLOCK] + b"t" * (BLOCK + 9) + files[b"d/blocks"][2 * BLOCK + 9 :]
    await file.truncate(20 * BLOCK)
    files[b"d/blocks"] = files[b"d/blocks"].ljust(20 * BLOCK, b"\0")
    await tree.close(b"d/blocks")
    await tree.symlink(b"target of link", b"link")
    await tree.symlink(b"t" * 3000, b"d/link")
    await tree.mknod(b"fifo", stat.S_IFIFO | 0o644)
    await tree.mknod(b"d/plain fifo", stat.S_IFIFO | 0o644)
    await tree.link(b"small", b"d/hard link")
    files[b"d/hard link"] = files[b"small"]
    for path in XATTRS:
        await tree.volume.xattrs.set(await tree.inode(path), b"user.name", b"value of " + path)
    async with tree.volume.names.changing(await tree.inode(b"empty")) as node:
        await node.give_to_domain(DOMAIN)
    return files


async def look(tree: Tree, files: dict[bytes, bytes]) -> None:
    """That all `populate` made is there."""
    for path, content in files.items():
        assert await tree.read(path) == content, path
    assert await tree.readlink(b"link") == b"target of link"
    assert await tree.readlink(b"d/link") == b"t" * 3000
    for path in XATTRS:
        inode = await tree.inode(path)
        assert await tree.volume.xattrs.get(inode, b"user.name") == b"value of " + path
    assert await tree.names() == sorted([b"d", b"empty", b"small", b"empty file", b"link", b"fifo"])
    assert (await tree.volume.inodes.dir(await tree.inode(b"empty"))).domain == DOMAIN


def data_files(tree: Tree) -> dict[str, tuple[bytes, int]]:
    """Name and content and time of change of everything in the tree but logs, and of twins."""
    assert isinstance(tree.store, LocalStore)
    out = {}
    top = Path(os.readlink(f"/proc/self/fd/{tree.store.root()}"))
    for path in top.rglob("*"):
        if (
            path.is_file()
            and not path.is_symlink()
            and (path.suffix == ".twin" or "tree" in path.parts)
            and path.name != ".dir"
        ):
            out[str(path)] = (path.read_bytes(), path.stat().st_mtime_ns)
        elif path.is_dir():
            out[str(path)] = (b"", path.stat().st_mtime_ns if "tree" in path.parts else 0)
    return out


async def rotated(tree: Tree, *, check: bool = True, workers: int = 1) -> Rotation:
    """A new KEK, everything rewritten under it, the old one destroyed."""
    version = tree.sample.rotate()
    rotation = Rotation(tree.volume, version, Pace(workers=workers))
    await rotation.run()
    if check:
        assert (rotation.left, rotation.failures) == (frozenset(), {})
        await tree.volume.ctx.adopt_volume_key(tree.sample.config.volume_key_kek, tree.sample.config.volume_key_wrapped)
        tree.sample.kek.destroy_older()
    return rotation


def forget_keys(tree: Tree) -> None:
    """As if the max age were over."""
    assert isinstance(tree.volume.ctx.keys, FakeDekProvider)
    tree.volume.ctx.keys.wipe()


def read_own(store: Store, name: bytes) -> bytes:
    """A file of the volume's own, whole."""
    fd = store.open(store.root(), name, os.O_RDONLY)
    try:
        return store.pread(fd, 1 << 20, 0)
    finally:
        store.close(fd)


def versions(tree: Tree) -> set[int]:
    """KEK versions in the headers of all sidecars."""
    ctx, out = tree.volume.ctx, set()
    for first in range(256):
        where = ctx.sidecar_dir(bytes([first]))
        for name in ctx.store.listdir(where):
            if len(name) == 32:
                fd = ctx.store.open(where, name, os.O_RDONLY)
                out.add(decode_header(ctx.store.pread(fd, HEADER_BYTES, 0)).kek_version)
                ctx.store.close(fd)
    return out
