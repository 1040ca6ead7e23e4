"""What the kernel may ask about by number: inodes, the directories and files behind them, and how long each is kept.

An inode is its number in `tree/` (so that numbers survive a remount) and a way to it: its directory and name there.
Descriptors are held for open files, and for a bounded number of directories, never for every inode the kernel has
cached.
"""

from __future__ import annotations

import errno
import os
from collections import OrderedDict
from collections.abc import Callable

import trio

from cryptfs.errors import Damaged
from cryptfs.format.sidecar import Sealed
from cryptfs.fs.context import FsContext, log, open_ours
from cryptfs.fs.directory import DirNode
from cryptfs.fs.file import FileNode
from cryptfs.fs.history import XATTRS_LOST
from cryptfs.fs.reconcile import reconcile
from cryptfs.types import Kind

ROOT_INO = 1
"""FUSE's number for the root; no file system gives it to an entry of a directory in use."""

_DIRS_MAX = 256
_XATTRS_MAX_BYTES = 1024


class Inode:
    """One object of the tree. `path`: (directory, name in `tree/`), the best known of it; None: it has no name.

    `last_st`: its attributes when its last name went, while the kernel still knows it. `kept_fd`: an O_PATH descriptor
    that keeps the object alive below for as long, so that its number is not given to another one (the kernel says only
    the number), and so that it can still be opened and changed.
    """

    __slots__ = (
        "_others", "children", "file", "generation", "ino", "kept_fd", "kind", "last_st", "log_id", "lookups", "path",
        "settled", "xattrs", "xattrs_known",
    )  # fmt: skip

    def __init__(self, ino: int, kind: Kind, log_id: bytes, generation: int) -> None:
        self.ino = ino
        self.kind = kind
        self.log_id = log_id
        self.generation = generation
        self.lookups = 0
        self.children = 0
        self.path: tuple[Inode, bytes] | None = None
        self._others: dict[tuple[Inode, bytes], None] | None = None
        """The other names of one with several, which may be tens of thousands; the one that comes next last."""
        self.file: FileNode | None = None
        self.last_st: os.stat_result | None = None
        self.kept_fd = -1
        self.settled = False
        self.xattrs: Sealed | None = None
        self.xattrs_known = False

    def know_xattrs(self, xattrs: Sealed | None) -> None:
        """Remember the set, still sealed, so that asking for it again costs no disk access. Not a large one."""
        self.xattrs_known = xattrs is not XATTRS_LOST and (xattrs is None or len(xattrs.sealed) <= _XATTRS_MAX_BYTES)
        self.xattrs = xattrs if self.xattrs_known else None

    @property
    def in_use(self) -> bool:
        """Whether its file is open, or has still to be settled: one without a name is not worth that."""
        return self.file is not None and not (self.file.unlinked and self.file.opens == 0)

    @property
    def is_unnamed(self) -> bool:
        """Whether it is no directory, and its last name is gone."""
        return self.last_st is not None and self.kind != Kind.DIR

    @property
    def paths(self) -> list[tuple[Inode, bytes]]:
        """All that are known, the best one last."""
        return [] if self.path is None else [*(self._others or ()), self.path]

    def place(self) -> tuple[Inode, bytes]:
        """(directory, name in `tree/`). Raises ESTALE if it has no name any more."""
        if self.path is None:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return self.path

    def add_path(self, parent: Inode, name: bytes) -> None:
        """A name was seen or made."""
        pair = (parent, name)
        if self.path == pair:
            return
        if self._others is not None and pair in self._others:
            del self._others[pair]
        else:
            parent.children += 1
        if self.path is not None:
            if self._others is None:
                self._others = {}
            self._others[self.path] = None
        self.path = pair

    def drop_path(self, parent: Inode, name: bytes) -> None:
        """A name is gone."""
        pair = (parent, name)
        if self.path == pair:
            self.path = self._others.popitem()[0] if self._others else None
        elif self._others is not None and pair in self._others:
            del self._others[pair]
        else:
            return
        parent.children -= 1
        if not self._others:
            self._others = None

    def drop_paths(self) -> None:
        """All its names are gone, or nobody here needs to know them."""
        for parent, _ in self.paths:
            parent.children -= 1
        self.path = self._others = None


class InodeTable:
    """All inodes the kernel knows or something here needs, and the open directories."""

    def __init__(self, ctx: FsContext, root_ino: int = ROOT_INO) -> None:
        """`root_ino`: the number of the root, a domain's place's where that is not FUSE's own."""
        self.ctx = ctx
        self._inodes: dict[int, Inode] = {}
        self._dirs: OrderedDict[int, DirNode] = OrderedDict()
        self._opening: dict[int, trio.Event] = {}
        self._generation = 0
        self.open_ids: set[bytes] = set()
        self.on_dead: Callable[[Inode], None] | None = None
        """Called when nobody can come back to what has no name any more; its file is not in use, if it has one."""
        self.dropped = 0
        """How many inodes were given up."""
        self.root = Inode(root_ino, Kind.DIR, ctx.config.root_dir_id, 0)
        self.root.lookups = 1
        self._inodes[root_ino] = self.root

    def __len__(self) -> int:
        return len(self._inodes)

    def get(self, ino: int) -> Inode:
        """The inode the kernel names. Raises ESTALE."""
        try:
            return self._inodes[ino]
        except KeyError:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE)) from None

    def find(self, ino: int) -> Inode | None:
        """The inode of this number, if it is known."""
        return self._inodes.get(ino)

    def is_open(self, log_id: bytes) -> bool:
        """Whether a file of this id is open or not settled."""
        return log_id in self.open_ids

    def meet(self, ino: int, kind: Kind, log_id: bytes, parent: Inode, name: bytes) -> Inode:
        """The inode for an entry just found or made. A number used again for another object gets a new generation.

        Raises `Damaged` if the object of that number is open under another id.
        """
        inode = self._inodes.get(ino)
        if inode is None or inode.log_id != log_id or inode.kind != kind:
            self._generation += 1
            fresh = Inode(ino, kind, log_id, self._generation)
            if inode is not None:
                if inode.file is not None or ino in self._dirs:
                    raise Damaged("exchanged", "what lies there is open under another id")
                # The number was freed below and given out again; the kernel counts its references by number.
                fresh.lookups = inode.lookups
                inode.drop_paths()
                self._let_go(inode)
            inode = self._inodes[ino] = fresh
        inode.add_path(parent, name)
        return inode

    def forget(self, ino: int, count: int) -> None:
        """The kernel dropped `count` references."""
        inode = self._inodes.get(ino)
        if inode is not None:
            inode.lookups -= count
            self.release(inode)

    def release(self, inode: Inode) -> None:
        """Drop an inode nobody needs: not the kernel, no open file, no child's path."""
        while inode is not self.root and inode.lookups <= 0 and inode.children == 0 and not inode.in_use:
            if self._inodes.get(inode.ino) is inode:
                del self._inodes[inode.ino]
                self.dropped += 1
                # A directory the kernel let go of is cheap to open again and costs two descriptors meanwhile.
                node = self._dirs.get(inode.ino)
                if node is not None and not node.pins and not node.has_pending:
                    del self._dirs[inode.ino]
                    node.close()
            self._let_go(inode)
            parents = [parent for parent, _ in inode.paths]
            inode.drop_paths()
            if len(parents) != 1:
                for parent in parents:
                    self.release(parent)
                return
            inode = parents[0]

    def _let_go(self, inode: Inode) -> None:
        if inode.is_unnamed and self.on_dead is not None:
            self.on_dead(inode)
        if inode.kept_fd >= 0:
            self.ctx.store.close(inode.kept_fd)
            inode.kept_fd = -1

    def slim(self) -> None:
        """Give back the table's room for inodes that are gone: a dict never becomes smaller by itself."""
        self._inodes = dict(self._inodes)

    # directories -----------------------------------------------------------------------------------------------

    def dir_nowait(self, inode: Inode) -> DirNode | None:
        """The open directory, if it is open and nothing has to be awaited."""
        node = self._dirs.get(inode.ino)
        if node is not None:
            self._dirs.move_to_end(inode.ino)
        return node

    async def where(self, inode: Inode) -> tuple[DirNode, bytes]:
        """Directory and name in `tree/` of an inode, true until the caller's next await. Raises ESTALE and as `dir`."""
        while True:
            parent, name = place = inode.place()
            node = self.dir_nowait(parent) or await self.dir(parent)
            if inode.path == place:
                return node, name

    async def handle(self, inode: Inode) -> tuple[int, bytes]:
        """As `where`, with the directory's descriptor; (`kept_fd`, b"") for what has no name any more."""
        if inode.path is not None:
            try:
                node, name = await self.where(inode)
            except OSError as error:
                if error.errno != errno.ESTALE or inode.path is not None:
                    raise
            else:
                return node.fd, name
        if inode.kept_fd < 0:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return inode.kept_fd, b""

    async def dir(self, inode: Inode) -> DirNode:
        """The directory behind an inode, opened and verified. Raises ENOTDIR, ESTALE, `Damaged`, key errors.

        Whoever awaits anything while using it pins it.
        """
        if inode.kind != Kind.DIR:
            raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        way: list[Inode] = []
        while (node := self.dir_nowait(inode)) is None:
            # Up to the nearest that can be opened, and down again from there; in a loop, since a tree may be deeper
            # than calls may nest. One that has moved meanwhile has its way up looked for anew.
            here = way.pop() if way else inode
            if here is not inode and here.path is None:
                way.clear()
                continue
            while here is not self.root and here.place()[0].ino not in self._dirs:
                way.append(here)
                here = here.place()[0]
            await self._open_once(here)
            if here is not inode:
                self.release(here)
        return node

    async def _open_once(self, inode: Inode) -> None:
        """Open a directory if it is not open. The one above it is open, or it is the root."""
        while inode.ino in self._opening:
            # Never two at once: after a crash each would settle the directory, with a frame at the same place.
            await self._opening[inode.ino].wait()
        if inode.ino in self._dirs or (inode is not self.root and inode.place()[0].ino not in self._dirs):
            return
        done = self._opening[inode.ino] = trio.Event()
        # Whoever needs it may be elsewhere when it is open.
        inode.lookups += 1
        try:
            node = await self._open_dir(inode)
        finally:
            inode.lookups -= 1
            del self._opening[inode.ino]
            done.set()
        self._dirs[inode.ino] = node
        self._trim(node)

    async def _open_dir(self, inode: Inode) -> DirNode:
        store, flags = self.ctx.store, os.O_RDONLY | os.O_DIRECTORY
        if inode is self.root:
            fd = open_ours(store, store.root(), b"tree", flags)
        else:
            above, name = inode.place()
            fd = open_ours(store, self._dirs[above.ino].fd, name, flags)
        try:
            node = await DirNode.open(self.ctx, inode.ino, fd, inode.log_id)
            try:
                if node.needs_reconciling:
                    await reconcile(node)
            except BaseException:
                node.close_log()
                raise
        except BaseException:
            store.close(fd)
            raise
        return node

    def _trim(self, keep: DirNode) -> None:
        over = len(self._dirs) - _DIRS_MAX
        if over <= 0:
            return
        for ino, node in list(self._dirs.items()):
            if over <= 0:
                return
            if node is not keep and not node.pins and node.lock.idle and not node.has_pending and not node.removed:
                del self._dirs[ino]
                node.close()
                over -= 1

    def adopt_dir(self, inode: Inode, node: DirNode) -> None:
        """A directory that was just made."""
        node.ino = inode.ino
        stale = self._dirs.pop(inode.ino, None)
        if stale is not None:
            stale.close()
        self._dirs[inode.ino] = node
        self._trim(node)

    async def quiet(self) -> None:
        """Wait until the directories that are being opened now are open."""
        for opening in list(self._opening.values()):
            await opening.wait()

    def all(self) -> list[Inode]:
        """Every inode the kernel knows or something here needs."""
        return list(self._inodes.values())

    def open_dirs(self) -> list[DirNode]:
        """All open directories."""
        return list(self._dirs.values())

    def open_files(self) -> list[FileNode]:
        """All files somebody has open or that are not settled."""
        return [inode.file for inode in self.with_files() if inode.file is not None]

    def with_files(self) -> list[Inode]:
        """The inodes of these."""
        return [inode for inode in self._inodes.values() if inode.file is not None]

    def unnamed(self) -> list[Inode]:
        """The inodes of what has no name any more, is not open here, and may be opened again (`Inode.kept_fd`)."""
        return [inode for inode in self._inodes.values() if inode.is_unnamed and inode.file is None]

    def close(self) -> None:
        """Close every descriptor."""
        for node in self._dirs.values():
            node.close()
        self._dirs.clear()
        for file in self.open_files():
            log.debug("inode %d closed with the volume", file.state.ino)
            file.journal.close()
            file.state.close()
        for inode in self._inodes.values():
            if inode.kept_fd >= 0:
                self.ctx.store.close(inode.kept_fd)
        self._inodes.clear()
