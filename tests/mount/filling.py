"""`python -m tests.mount.filling VAULT DIRECTORIES FILES`: that many directories with that many empty files in each.

In a volume that is not mounted, with keys from the agent, a directory's names at once, and without sidecars: through a
mount half a million would take the most part of an hour. Such files can be listed and looked at, not opened.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import trio

from cryptfs.cli.passphrase import PIN, Sources
from cryptfs.cli.protectors import Given
from cryptfs.cli.volume_access import Reached, with_volume
from cryptfs.format.datafile import DataHeader
from cryptfs.format.dirlog import Entry
from cryptfs.fs.context import FsContext, write_all
from cryptfs.fs.directory import DirNode
from cryptfs.fs.making import Owner
from cryptfs.fs.volume import Volume
from cryptfs.names import tree_name
from cryptfs.ops.offline import open_to_repair, shut
from cryptfs.types import ID_BYTES, Kind


async def fill(volume: Volume, directories: int, files: int) -> None:
    owner = Owner(os.geteuid(), os.getegid())
    for number in range(directories):
        above = (await volume.names.mkdir(volume.root, b"%d" % number, 0o755, owner)).inode
        above.lookups += 1
        node = await volume.inodes.dir(above)
        async with node.lock.exclusive():
            await fill_directory(volume.ctx, node, files)
        volume.inodes.forget(above.ino, 1)


async def fill_directory(ctx: FsContext, node: DirNode, files: int) -> None:
    """All names in one frame; all that attributes come from is a header."""
    ids = [ctx.random(ID_BYTES) for _ in range(files)]
    volume_key = await ctx.volume_key()
    headers = [ctx.sign_header(volume_key, DataHeader(log_id, ctx.next_generation())) for log_id in ids]
    keys = await node.keys()
    names = [keys.names.seal(b"%d" % number) for number in range(files)]
    node.apply(keys.log_key, [Entry(name, Kind.FILE, log_id) for name, log_id in zip(names, ids, strict=True)])
    for name, header in zip(names, headers, strict=True):
        fd = ctx.store.open(node.fd, tree_name(name), os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        write_all(ctx.store, fd, header, 0)
        ctx.store.close(fd)
    node.settled()


def main(words: list[str]) -> None:
    vault, directories, files = Path(words[0]), int(words[1]), int(words[2])

    async def work(reached: Reached) -> None:
        looking = await open_to_repair(reached.access)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(looking.volume.serve)
                await fill(looking.volume, directories, files)
                nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                assert await shut(reached.access, looking)

    with_volume(
        vault, Given(Sources(environment=os.environb[b"CRYPTFS_PASSPHRASE"]), Sources(words=PIN)), work, exclusive=True
    )


if __name__ == "__main__":
    main(sys.argv[1:])
