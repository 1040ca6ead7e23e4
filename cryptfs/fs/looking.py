"""Names that are there: looking one up, listing a directory, the way back from an inode to its path.

No lock is taken. Entries change only in stretches without an await, so a look sees a change whole or not at all; the
exception, a change that syncs between its frame and its call on the tree (`linking`), is waited for if it shows.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence

from cryptfs.errors import Damaged, VolumeLocked
from cryptfs.format.dirlog import Entry
from cryptfs.fs.attributes import Attr, kind_of
from cryptfs.fs.context import FsContext, log
from cryptfs.fs.directory import DirNode, pinned
from cryptfs.fs.files import Files
from cryptfs.fs.inodes import Inode, InodeTable
from cryptfs.names import NAME_MAX_BYTES, tree_name


def os_error(code: int) -> OSError:
    """An OSError as the kernel would say it."""
    return OSError(code, os.strerror(code))


class Looking:
    """The tree of one volume, as it is."""

    def __init__(self, ctx: FsContext, inodes: InodeTable, files: Files) -> None:
        self.ctx = ctx
        self.inodes = inodes
        self.files = files

    async def lookup(self, parent: Inode, name: bytes) -> Attr:
        """The entry of that name. Raises ENOENT, `Damaged`, key errors."""
        check_name(name)
        node = self.inodes.dir_nowait(parent) or await self.inodes.dir(parent)
        node.pins += 1
        try:
            names = node.names_nowait() or (await node.keys()).names
            entry = node.entries.get(names.seal(name))
            if entry is None:
                check_not_place(node)
                raise os_error(errno.ENOENT)
            return await self._look(parent, node, entry)
        finally:
            node.pins -= 1

    async def behind(self, parent: Inode, node: DirNode, entry: Entry) -> Attr:
        """What an entry of a directory stands for, the directory being pinned. Raises as `lookup`."""
        return await self._look(parent, node, entry)

    async def _look(self, parent: Inode, node: DirNode, entry: Entry, *, locked: bool = False) -> Attr:
        """The entry's attributes, the directory being pinned. `locked`: the caller holds its lock."""
        try:
            inode, st = self._met(parent, node, entry)
        except Damaged:
            if locked or node.lock.idle:
                raise
            # A change that had to sync between frame and tree is under way: look again when it is done.
            async with node.lock.shared():
                now = node.entries.get(entry.sealed)
                if now is None:
                    raise os_error(errno.ENOENT) from None
                entry = now
                inode, st = self._met(parent, node, entry)
        name = tree_name(entry.sealed)
        # Held meanwhile: finding the attributes out may open and release the file, and nobody else may know it yet.
        inode.lookups += 1
        try:
            attr = await self.files.attr_of(inode, node.fd, name, st)
        except BaseException:
            inode.lookups -= 1
            self.inodes.release(inode)
            raise
        inode.lookups -= 1
        return attr

    def _met(self, parent: Inode, node: DirNode, entry: Entry) -> tuple[Inode, os.stat_result]:
        """The inode behind an entry. Raises `Damaged` if log and tree are of two minds about it."""
        name = tree_name(entry.sealed)
        try:
            st = self.ctx.store.lstat(node.fd, name)
        except FileNotFoundError:
            raise Damaged("missing", "an entry that .dir names is not in the tree") from None
        if kind_of(st) != entry.kind or (entry.rdev and entry.rdev != st.st_rdev):
            raise Damaged("exchanged", "an entry is of another kind than .dir says")
        inode = self.inodes.meet(st.st_ino, entry.kind, entry.log_id, parent, name)
        inode.last_st = None
        return inode, st

    async def listing(self, inode: Inode) -> list[Entry]:
        """The directory's entries now, in a stable order: what one pass of readdir walks over."""
        if inode.last_st is not None:
            return []
        node = await self.inodes.dir(inode)
        check_not_place(node)
        node.listed = True
        return list(node.entries.values())

    async def described(self, inode: Inode, entries: Sequence[Entry]) -> list[tuple[bytes, Attr | None] | None]:
        """(name, attributes) of each name of a listing, as it is now: a rename may have put another thing there.

        None for a name that is gone by now, attributes None for an entry that is damaged or not shown to us.
        """
        node = await self.inodes.dir(inode)
        node.pins += 1
        try:
            out: list[tuple[bytes, Attr | None] | None] = []
            for listed in entries:
                names = node.names_nowait() or (await node.keys()).names
                entry = node.entries.get(listed.sealed)
                if entry is None:
                    out.append(None)
                    continue
                name = names.open(entry.sealed)
                try:
                    out.append((name, await self._look(inode, node, entry)))
                except FileNotFoundError:
                    # It went while a change that was under way was waited for.
                    out.append(None)
                except Damaged as error:
                    self.report(inode.ino, error)
                    out.append((name, None))
                except PermissionError:
                    # Whoever asks for it by name is told.
                    out.append((name, None))
            return out
        finally:
            node.pins -= 1

    async def known(self, *, everywhere: bool) -> list[tuple[int, bytes]]:
        """(directory's inode number, name) of what the kernel may know by name: in the root, or everywhere.

        Raises `Damaged`, OSError, key errors.
        """
        below: dict[Inode, list[bytes]] = {}
        for inode in self.inodes.all():
            for parent, name in inode.paths:
                if everywhere or parent is self.inodes.root:
                    below.setdefault(parent, []).append(name)
        out: list[tuple[int, bytes]] = []
        for parent, names_below in below.items():
            node = self.inodes.dir_nowait(parent) or await self.inodes.dir(parent)
            with pinned(node):
                sealed = {tree_name(s): s for s in node.entries}
                wanted = [sealed[name] for name in names_below if name in sealed]
                names = (await node.keys()).names
                out += [(parent.ino, names.open(s)) for s in wanted]
        return out

    async def path_of(self, inode: Inode) -> bytes:
        """The path of something that has a name, from the root, without a leading slash.

        Raises ESTALE, `Damaged`, OSError, key errors.
        """
        parts: list[bytes] = []
        while inode is not self.inodes.root:
            parent, below = inode.place()
            node = await self.inodes.dir(parent)
            with pinned(node):
                names = (await node.keys()).names
                sealed = next((s for s in node.entries if tree_name(s) == below), None)
                if sealed is None:
                    raise os_error(errno.ESTALE)
                parts.append(names.open(sealed))
            inode = parent
        return b"/".join(reversed(parts))

    def report(self, ino: int, error: Damaged) -> None:
        """One log line for damage."""
        log.error("inode %d: %s", ino, error)


def check_not_place(node: DirNode) -> None:
    """Raises `VolumeLocked` for a domain's place: what is in there is another volume's to say."""
    if node.domain:
        raise VolumeLocked("the directory is a domain's, which is not open")


def check_name(name: bytes) -> None:
    """Raises ENAMETOOLONG."""
    if len(name) > NAME_MAX_BYTES:
        raise os_error(errno.ENAMETOOLONG)
