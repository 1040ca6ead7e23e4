"""Operations in words, run on a volume and noted in a `World`; and looking at all there is in a volume.

    rename a d/x        one operation
    hold                files stay open until the end of the workload (else every operation opens and closes its file)

Every file's first byte says which file it is, and no operation changes it.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from unittest import mock

import trio
import trio.testing

from cryptfs.fs import journal
from cryptfs.fs.file import FileNode
from cryptfs.fs.inodes import Inode
from cryptfs.fs.rotation import Rotation
from cryptfs.ports import RENAME_EXCHANGE
from cryptfs.types import Kind
from tests.crash.machine import BLOCK
from tests.crash.world import ROOT, UNKNOWN, Look, Place, Seen, World
from tests.fs.tree import Tree

LONG = b"L" * 200


def spelled(path: str) -> bytes:
    """The path a word means: "/" is the root, L a long name."""
    return re.sub(r"\bL\b", LONG.decode(), path).strip("/").encode()


@dataclass(frozen=True, slots=True)
class Op:
    """One operation: `verb` and up to two paths."""

    verb: str
    first: bytes = b""
    second: bytes = b""

    @classmethod
    def parse(cls, text: str) -> Op:
        verb, *paths = text.split()
        return cls(verb, *map(spelled, paths))

    def __str__(self) -> str:
        words = [path.decode().replace(LONG.decode(), "L") or "/" for path in (self.first, self.second)]
        takes = (
            0
            if self.verb in {"settle", "reap", "rotate", "rewrite", "remount", "kill", "hold"}
            else 2
            if self.verb in TWO_PATHS
            else 1
        )
        return " ".join([self.verb, *words[:takes]])


TWO_PATHS = {"rename", "exchange", "link"}


async def nothing() -> None:
    """What is left out."""


def parse_ops(text: str) -> tuple[Op, ...]:
    """Operations separated by semicolons."""
    return tuple(Op.parse(each) for each in text.split(";") if each.strip())


@dataclass
class Run:
    """One volume in use, and what is known of it."""

    tree: Tree
    world: World
    held: bool = False
    written: int = 0
    _open: dict[int, FileNode] = field(default_factory=dict)

    # can it be done --------------------------------------------------------------------------------------------

    def possible(self, op: Op) -> bool:
        """Whether a program could do `op` now without an error."""
        world = self.world
        first, place = world.number(op.first), world.place(op.first)
        kind = world.things[first].kind if first is not None else None
        match op.verb:
            case "settle" | "reap" | "rotate" | "rewrite" | "remount" | "hold":
                return True
            case "create" | "touch" | "mkdir" | "symlink":
                return first is None and place is not None
            case "overwrite" | "append" | "grow" | "cut" | "empty" | "stretch" | "fsync" | "fdatasync":
                return kind == Kind.FILE
            case "unlink":
                return kind in {Kind.FILE, Kind.SYMLINK}
            case "fsyncdir":
                return kind == Kind.DIR
            case "compact":
                return kind in {Kind.FILE, Kind.DIR}
            case "rmdir":
                return kind == Kind.DIR and first != ROOT and not self._filled(first)
            case "link":
                return kind == Kind.FILE and world.number(op.second) is None and world.place(op.second) is not None
            case "rename" | "exchange":
                return self._may_rename(op, first, kind)
        raise ValueError(op.verb)

    def _filled(self, directory: int | None) -> bool:
        return any(above == directory for above, _ in self.world.now)

    def _may_rename(self, op: Op, first: int | None, kind: Kind | None) -> bool:
        world = self.world
        second = world.number(op.second)
        if first is None or second == first or world.place(op.second) is None:
            return False
        if (op.second + b"/").startswith(op.first + b"/") or (op.first + b"/").startswith(op.second + b"/"):
            return False
        if op.verb == "exchange":
            return second is not None
        if second is None:
            return True
        if Kind.DIR in {kind, world.things[second].kind}:
            return kind == world.things[second].kind and not self._filled(second)
        return True

    # doing it --------------------------------------------------------------------------------------------------

    async def do(self, op: Op) -> None:
        """Note what may be found from now on, do it, note what it acknowledged."""
        calls: dict[str, Callable[[Op], Awaitable[None]]] = {
            "create": self._create, "touch": self._create, "mkdir": self._mkdir, "symlink": self._symlink,
            "fsync": self._fsync, "fdatasync": self._fsync, "fsyncdir": self._fsyncdir, "compact": self._compact,
            "unlink": self._unlink, "rmdir": self._unlink, "link": self._link, "rename": self._rename,
            "exchange": self._rename, "settle": self._settle, "reap": self._reap, "rotate": self._rotate,
            "rewrite": self._rewrite, "remount": self._remount, "hold": self._hold,
        }  # fmt: skip
        await calls.get(op.verb, self._change)(op)

    async def do_all(self, ops: tuple[Op, ...]) -> None:
        """One after the other; files held open stay open."""
        for op in ops:
            assert self.possible(op), str(op)
            await self.do(op)

    async def finish(self) -> None:
        """Close what was held open."""
        self._open.clear()
        for inode in list(self.tree.open_files):
            await self.tree.release(inode)

    def content(self, tag: int, size: int) -> bytes:
        """`size` bytes that no other write has; the first says which file."""
        self.written += 1
        return (bytes([tag]) + b"%d." % self.written * (size // 2))[:size]

    async def _opened(self, path: bytes) -> FileNode:
        number = self.world.number(path)
        assert number is not None
        if number not in self._open:
            self._open[number] = await self.tree.open(path)
        return self._open[number]

    async def _closed(self) -> None:
        if not self.held:
            await self.finish()

    async def _create(self, op: Op) -> None:
        place = self.world.place(op.first)
        assert place is not None
        number = self.world.make(place, Kind.FILE, op.first[-20:].decode())
        content = self.content(64 + number, 5000) if op.verb == "create" else b""
        if content:
            self.world.write(number, content)
        file = await self.tree.create(op.first)
        self.world.ids[file.state.file_id] = number
        self._open[number] = file
        await file.write(0, content)
        await self._closed()

    async def _change(self, op: Op) -> None:
        number = self.world.number(op.first)
        assert number is not None
        now = self.world.things[number].history[-1]
        tag = 64 + number
        at, data, size = len(now), b"", len(now)
        match op.verb:
            case "overwrite":
                at, data = (1, self.content(tag, 4500)) if now else (0, self.content(tag, 4500))
            case "append":
                data = self.content(tag, 300)
            case "grow":
                data = self.content(tag, 5000)
            case "cut":
                size = (len(now) + 1) // 2
            case "empty":
                size = 0
            case "stretch":
                size = len(now) + 5000
        new = now[:at].ljust(at, b"\0") + data + now[at + len(data) :] if data else now[:size].ljust(size, b"\0")
        self.world.write(number, new)
        file = await self._opened(op.first)
        await (file.write(at, data) if data else file.truncate(size))
        await self._closed()

    async def _fsync(self, op: Op) -> None:
        number = self.world.number(op.first)
        assert number is not None
        file = await self._opened(op.first)
        await file.journal.fsync(data_only=op.verb == "fdatasync")
        self.world.file_synced(number)
        await self._closed()

    async def _fsyncdir(self, op: Op) -> None:
        number = self.world.number(op.first)
        assert number is not None
        await self.tree.fsync(op.first)
        self.world.directory_synced(number)

    async def _compact(self, op: Op) -> None:
        inode = await self.tree.inode(op.first)
        if inode.kind == Kind.DIR:
            volume = self.tree.volume
            await (await volume.inodes.dir(inode)).compact(volume.files.sync_targets)
            return
        file = await self._opened(op.first)
        await file.read(0, 1)
        await file.journal.compact()
        await self._closed()

    async def _mkdir(self, op: Op) -> None:
        place = self.world.place(op.first)
        assert place is not None
        number = self.world.make(place, Kind.DIR, op.first[-20:].decode())
        inode = await self.tree.mkdir(op.first)
        self.world.ids[inode.log_id] = number

    async def _symlink(self, op: Op) -> None:
        place = self.world.place(op.first)
        assert place is not None
        target = self.content(ord("/"), 60)
        number = self.world.make(place, Kind.SYMLINK, op.first[-20:].decode(), target)
        inode = await self.tree.symlink(target, op.first)
        self.world.ids[inode.log_id] = number

    async def _unlink(self, op: Op) -> None:
        place = self.world.place(op.first)
        assert place is not None
        self.world.change(gone=(place,))
        await (self.tree.rmdir if op.verb == "rmdir" else self.tree.unlink)(op.first)

    async def _link(self, op: Op) -> None:
        number, place = self.world.number(op.first), self.world.place(op.second)
        assert number is not None
        assert place is not None
        self.world.change({place: number})
        await self.tree.link(op.first, op.second)

    async def _rename(self, op: Op) -> None:
        number, source, target = self.world.number(op.first), self.world.place(op.first), self.world.place(op.second)
        assert number is not None
        assert source is not None
        assert target is not None
        if op.verb == "exchange":
            other = self.world.number(op.second)
            assert other is not None
            self.world.change({target: number, source: other})
            await self.tree.rename(op.first, op.second, RENAME_EXCHANGE)
        else:
            self.world.change({target: number}, (source,))
            await self.tree.rename(op.first, op.second)

    async def _settle(self, op: Op) -> None:
        await self.tree.volume.files.settle()

    async def _reap(self, op: Op) -> None:
        """One pass of what runs in the background."""
        reaper = self.tree.volume.reaper
        reaper._many.set()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(reaper.serve)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()

    async def _rotate(self, op: Op) -> None:
        """To a new KEK. What a crash leaves may need the old one, and is looked at with both."""
        sample = self.tree.sample
        rotation = Rotation(self.tree.volume, sample.rotate())
        await rotation.run()
        assert not rotation.left
        assert not rotation.failures
        self.world.rotated(rotation.kek_version)

    async def _rewrite(self, op: Op) -> None:
        """A rotation as it is in the middle: logs have been replaced, nothing was synced yet, and programs go on."""
        rotation = Rotation(self.tree.volume, self.tree.sample.rotate())
        # Files are closed after it, as they are where compaction is not always due.
        usual = mock.patch.object(journal, "_COMPACT_MIN_BYTES", 1 << 16)
        with usual, mock.patch.object(rotation, "_look_again", nothing):
            await rotation.run()
        assert not rotation.failures

    async def _remount(self, op: Op) -> None:
        await self.finish()
        await self.tree.unmount()
        self.world.all_synced()
        await self.tree.mount()

    async def _hold(self, op: Op) -> None:
        self.held = True


# looking -----------------------------------------------------------------------------------------------------------


async def look_at(tree: Tree, world: World) -> Look:
    """Everything in the volume, read to its end, with every name known by id. Raises what reading raises."""
    found: Look = {}
    await _walk(tree, world, tree.volume.root, ROOT, found)
    return found


async def _walk(tree: Tree, world: World, inode: Inode, number: int, found: Look) -> None:
    names, files = tree.volume.names, tree.volume.files
    for item in await names.described(inode, await names.listing(inode)):
        assert item is not None
        name, attr = item
        if attr is None:
            attr = await names.lookup(inode, name)  # says what is wrong with it
        child = tree.take(attr)
        content = b""
        if child.kind == Kind.FILE:
            file = await files.open(child)
            try:
                content = await file.read(0, attr.size + BLOCK)
            finally:
                await files.release(child)
            if len(content) != attr.size:
                raise AssertionError(f"{name[:20]!r} has {attr.size} bytes by stat, {len(content)} to read")
        elif child.kind == Kind.SYMLINK:
            content = await files.readlink(child)
        child_number = world.ids.get(child.log_id, UNKNOWN)
        place: Place = (number, name)
        found[place] = Seen(child_number, child.kind, content, child.log_id)
        if child.kind == Kind.DIR:
            inner: Look = {}
            await _walk(tree, world, child, child_number, inner)
            if child_number == UNKNOWN and inner:
                raise AssertionError(f"directory {name[:20]!r} has a new id, and entries")
            found |= inner
