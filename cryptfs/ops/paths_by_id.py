"""The paths of a volume by id, those of its domains' places too: what the ids in the audit log are called now."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from cryptfs.errors import Damaged
from cryptfs.fs.context import FsContext
from cryptfs.fs.directory import DirNode
from cryptfs.names import tree_name
from cryptfs.ops.check_dirs import join
from cryptfs.ops.offline import Access, open_to_read, shut
from cryptfs.types import Kind

_WITH_ID = (Kind.FILE, Kind.DIR, Kind.SYMLINK)

Paths = dict[bytes, list[bytes]]


@dataclass(slots=True)
class Names:
    """`paths` by id, from ``/``; a file with several names has several. `domains`: by volume id, the place's path."""

    paths: Paths
    domains: dict[bytes, bytes] = field(default_factory=dict)


async def paths_by_id(access: Access) -> Paths:
    """All paths. Raises as `names_in`."""
    return (await names_in(access)).paths


async def names_in(access: Access) -> Names:
    """All names. What is damaged, or gone by now, is left out. Raises `VolumeDamaged`, OSError, key errors."""
    looking = await open_to_read(access)
    try:
        ctx = looking.ctx
        out = Names({access.config.root_dir_id: [b"/"]})
        top = ctx.store.open(ctx.store.root(), b"tree", os.O_RDONLY | os.O_DIRECTORY)
        # One descriptor per directory that waits: depth first, so few do.
        waiting = [(top, access.config.root_dir_id, b"/")]
        try:
            while waiting:
                fd, dir_id, path = waiting.pop()
                try:
                    waiting += await _visit(ctx, fd, dir_id, path, out)
                except Damaged:
                    continue
                finally:
                    ctx.store.close(fd)
        finally:
            for fd, _, _ in waiting:
                ctx.store.close(fd)
        return out
    finally:
        await shut(access, looking)


async def _visit(ctx: FsContext, fd: int, dir_id: bytes, path: bytes, out: Names) -> list[tuple[int, bytes, bytes]]:
    node = await DirNode.open(ctx, ctx.store.fstat(fd).st_ino, fd, dir_id)
    try:
        names = (await node.keys()).names
        if node.domain:
            out.domains[node.domain] = path
        entries = [(sealed, entry) for sealed, entry in node.entries.items() if entry.kind in _WITH_ID]
        opened = []
        for sealed, entry in entries:
            try:
                opened.append((names.open(sealed), sealed, entry))
            except Damaged:
                continue
    finally:
        node.close_log()
    below = []
    for name, sealed, entry in opened:
        there = join(path, name)
        out.paths.setdefault(entry.log_id, []).append(there)
        if entry.kind is Kind.DIR:
            try:
                inner = ctx.store.open(fd, tree_name(sealed), os.O_RDONLY | os.O_DIRECTORY)
            except OSError:
                continue
            below.append((inner, entry.log_id, there))
    return below
