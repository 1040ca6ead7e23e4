"""A directory that a crash left without its log: made in the crashed epoch, so nothing in it was ever acknowledged.

(Before anything acknowledged moves into a directory, and on the first fsync below it, its log is synced: FORMAT.md §6.)
"""

from __future__ import annotations

import os

from cryptfs.errors import Damaged
from cryptfs.format.log import HEADER_BYTES
from cryptfs.fs.context import FsContext, log
from cryptfs.fs.directory import DirNode
from cryptfs.names import DIR_LOG
from cryptfs.ports import Kit
from cryptfs.types import ID_BYTES, Purpose


async def rebuild_directory(ctx: FsContext, ino: int, fd: int, dir_id: bytes) -> None:
    """An empty log for the directory behind `fd`, which stays open, under the id its parent gives it.

    Durable when this returns: once the parent has a new frame, nothing says any more that a log may be missing.
    Raises `Damaged` if there is more than a log that never was, or if this machine has seen the log.
    """
    store, found = ctx.store, True
    try:
        log_fd = store.open(fd, DIR_LOG, os.O_RDONLY)
    except FileNotFoundError:
        raw, found = b"", False
    else:
        try:
            raw = store.pread(log_fd, HEADER_BYTES, 0)
        finally:
            store.close(log_fd)
    if len(raw) == HEADER_BYTES and any(raw):
        raise Damaged("dir-log", "it is not a new one")
    await ctx.freshness.check_unborn(dir_id)
    log.warning("directory inode %d: its log never reached the disk before a crash, started anew", ino)
    kit = await kit_for(ctx, dir_id)
    for name in store.listdir(fd):
        if not name.startswith(b"."):
            # As new as the directory itself, and its name is lost with the log's names key.
            store.rename(fd, name, ctx.dir_fd(b"tmp"), ctx.random(ID_BYTES).hex().encode())
    if found:
        store.unlink(fd, DIR_LOG)
    node = DirNode.create(ctx, fd, kit)
    try:
        await ctx.in_threads([(store.fdatasync, node.log.fd), (store.fsync, fd)])
    finally:
        node.close_log()


async def kit_for(ctx: FsContext, dir_id: bytes) -> Kit:
    """A kit for an id that already has a name: keys are bound to the id, so stock will not do."""
    while True:
        names = await ctx.keys.generate(dir_id, Purpose.NAMES, 1)
        log_keys = await ctx.keys.generate(dir_id, Purpose.LOG_DIR, 1)
        # A log's header has one KEK version for both.
        if names.kek_version == log_keys.kek_version:
            break
    # Of the names key only the wrap is needed here; the key itself may have been wiped since it was made.
    return Kit(dir_id, log_keys.kek_version, log_keys.keys[0], log_keys.wrapped[0], None, names.wrapped[0], None)
