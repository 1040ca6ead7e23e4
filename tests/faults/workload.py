"""A fixed run of operations that meets every way this filesystem writes, and the model of what it must lead to."""

from __future__ import annotations

import os
import stat
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from cryptfs.ports import RENAME_EXCHANGE, RENAME_NOREPLACE
from tests.faults.driver import Driver

BLOCK = 4096
LONG = b"long-" * 50


@dataclass(eq=False)
class Node:
    """An object of the tree. `history`: everything a file ever held, in order; `acked`: the index of what was synced.

    `names`: wherever it may be found after a crash. `content`: None for a directory or fifo.
    """

    history: list[bytes | None]
    names: set[bytes] = field(default_factory=set)
    acked: int | None = None
    gone: bool = False
    is_dir: bool = False

    @property
    def now(self) -> bytes | None:
        return self.history[-1]


class Model:
    """What the tree must be."""

    def __init__(self) -> None:
        self.at: dict[bytes, Node] = {}
        self.everything: list[Node] = []

    def snapshot(self) -> dict[bytes, bytes | None]:
        return {path: node.now for path, node in self.at.items()}

    def add(self, path: bytes, content: bytes | None = b"", *, is_dir: bool = False) -> None:
        node = Node([content], {path}, is_dir=is_dir)
        self.everything.append(node)
        self.at[path] = node

    def put(self, path: bytes, offset: int, data: bytes) -> None:
        old = self.at[path].now
        assert old is not None
        content = bytearray(old.ljust(offset, b"\0"))
        content[offset : offset + len(data)] = data
        self.at[path].history.append(bytes(content))

    def cut(self, path: bytes, size: int) -> None:
        old = self.at[path].now
        assert old is not None
        self.at[path].history.append(old[:size].ljust(size, b"\0"))

    def link(self, old: bytes, new: bytes) -> None:
        self.at[new] = self.at[old]
        self.at[new].names.add(new)

    def remove(self, path: bytes) -> None:
        node = self.at.pop(path)
        node.gone = node not in self.at.values()

    def rename(self, old: bytes, new: bytes) -> None:
        if new in self.at:
            self.remove(new)
        for path in [p for p in self.at if p == old or p.startswith(old + b"/")]:
            node = self.at.pop(path)
            here = new + path[len(old) :]
            node.names.add(here)
            self.at[here] = node

    def exchange(self, a: bytes, b: bytes) -> None:
        self.at[a], self.at[b] = self.at[b], self.at[a]
        self.at[a].names.add(a)
        self.at[b].names.add(b)

    def acknowledge(self, path: bytes) -> None:
        node = self.at[path]
        node.acked = len(node.history) - 1
        node.names = {p for p, n in self.at.items() if n is node}

    def acknowledge_all(self) -> None:
        for path in self.at:
            self.acknowledge(path)

    def check_after_crash(self, found: dict[bytes, bytes | None]) -> None:
        """What a power cut left: nothing acknowledged is lost, nothing is what it never was."""
        for path, content in found.items():
            owners = [n for n in self.everything if path in n.names and content in n.history[n.acked or 0 :]]
            assert owners, f"{path!r} is something it never was, or was before it was synced: {_brief(content)}"
        for node in self.everything:
            if node.acked is not None and not node.gone:
                assert any(name in found and found[name] in node.history[node.acked :] for name in node.names), (
                    f"{node.names} is lost"
                )


def _brief(content: bytes | None) -> str:
    return "nothing" if content is None else f"{len(content)} bytes, {content[:12]!r}…"


Handles = dict[bytes, Any]


@dataclass(frozen=True)
class Step:
    """`do` is the call; `then` what the model becomes if it succeeds. `frees`: it gives room, so it works when full.

    `touches`: the top of each path it concerns; steps that have none in common can change places.
    """

    what: str
    touches: frozenset[bytes]
    do: Callable[[Driver, Handles], Awaitable[None]]
    then: Callable[[Model], None]
    frees: bool = False


def pattern(seed: int, count: int) -> bytes:
    """Content that differs from block to block and from write to write."""
    unit = b"".join(b"%03d-%05d " % (seed, i) for i in range(64))
    return (unit * (count // len(unit) + 1))[seed : seed + count].ljust(count, b".")


class _Script:
    """Collects steps; handles are known by the path they were opened by."""

    def __init__(self) -> None:
        self.steps: list[Step] = []

    def step(
        self, what: str, paths: Sequence[bytes], do: Callable[[Driver, Handles], Awaitable[None]],
        then: Callable[[Model], None] | None = None, *, frees: bool = False,
    ) -> None:  # fmt: skip
        tops = frozenset(path.partition(b"/")[0] for path in paths)
        self.steps.append(Step(f"{what} {b' '.join(paths)[:60]!r}", tops, do, then or _nothing, frees))

    def create(self, path: bytes) -> None:
        async def do(d: Driver, handles: Handles) -> None:
            handles[path] = await d.create(path)

        self.step("create", [path], do, lambda m: m.add(path))

    def open(self, path: bytes, flags: int = os.O_RDWR) -> None:
        async def do(d: Driver, handles: Handles) -> None:
            handles[path] = await d.open(path, flags)

        self.step("open", [path], do, (lambda m: m.cut(path, 0)) if flags & os.O_TRUNC else _nothing)

    def write(self, path: bytes, offset: int, data: bytes) -> None:
        self.step(f"write {offset}+{len(data)}", [path], lambda d, handles: d.write(handles[path], offset, data),
                  lambda m: m.put(path, offset, data))  # fmt: skip

    def fsync(self, path: bytes, *, data_only: bool = False) -> None:
        self.step("fsync", [path], lambda d, handles: d.fsync(handles[path], data_only=data_only),
                  lambda m: m.acknowledge(path))  # fmt: skip

    def close(self, path: bytes) -> None:
        async def do(d: Driver, handles: Handles) -> None:
            await d.close(handles.pop(path))

        self.step("close", [path], do)

    def truncate(self, path: bytes, size: int) -> None:
        self.step(f"truncate {size}", [path], lambda d, _: d.truncate(path, size), lambda m: m.cut(path, size))

    def rename(self, old: bytes, new: bytes, flags: int = 0) -> None:
        def then(model: Model) -> None:
            (model.exchange if flags == RENAME_EXCHANGE else model.rename)(old, new)

        self.step(f"rename {flags}", [old, new], lambda d, _: d.rename(old, new, flags), then)

    def unlink(self, path: bytes) -> None:
        self.step("unlink", [path], lambda d, _: d.unlink(path), lambda m: m.remove(path), frees=True)

    def settle(self) -> None:
        """What the background does now and then; it reports nothing and tries again."""
        self.step("settle", [], lambda d, _: d.volume.files.settle())


def _nothing(_: Model) -> None:
    return


def workload() -> list[Step]:
    """About sixty operations, on the tree that `prepare` makes."""
    s = _Script()
    _files(s)
    _tree(s)
    _ends(s)
    return s.steps


def _files(s: _Script) -> None:
    s.settle()
    # A new file: created, written, appended to, rewritten before it was ever synced.
    s.create(b"new")
    s.write(b"new", 0, pattern(1, 3 * BLOCK + 100))
    s.write(b"new", 3 * BLOCK + 100, pattern(2, 200))
    s.write(b"new", BLOCK - 50, pattern(3, BLOCK + 100))
    s.write(b"new", 0, pattern(4, 2 * BLOCK))
    s.fsync(b"new")
    s.write(b"new", 0, pattern(5, 2 * BLOCK))
    s.write(b"new", 10, pattern(6, 2 * BLOCK))
    s.close(b"new")
    # An old one: overwritten beside its durable version, again and again, synced, cut, grown.
    s.open(b"old")
    s.write(b"old", 5, pattern(7, 10))
    s.write(b"old", 0, pattern(8, 3 * BLOCK))
    s.write(b"old", BLOCK, pattern(9, BLOCK))
    s.fsync(b"old", data_only=True)
    s.write(b"old", 4 * BLOCK - 7, pattern(10, BLOCK))
    s.truncate(b"old", 2 * BLOCK + 11)
    s.truncate(b"old", 4 * BLOCK + 1)
    s.write(b"old", 7 * BLOCK, pattern(11, 5))
    s.fsync(b"old")
    s.write(b"old", 7 * BLOCK + 5, pattern(12, BLOCK))
    s.close(b"old")


def _tree(s: _Script) -> None:
    s.step("mkdir", [b"dir"], lambda d, _: d.mkdir(b"dir"), lambda m: m.add(b"dir", None, is_dir=True))
    s.create(b"dir/inside")
    s.write(b"dir/inside", 0, pattern(13, 100))
    s.fsync(b"dir/inside")
    s.close(b"dir/inside")
    s.step("symlink", [b"dir/link"], lambda d, _: d.symlink(b"some/target", b"dir/link"),
           lambda m: m.add(b"dir/link", b"-> some/target"))  # fmt: skip
    s.step("mknod", [b"fifo"], lambda d, _: d.mknod(b"fifo", stat.S_IFIFO | 0o600), lambda m: m.add(b"fifo", None))
    s.create(LONG)
    s.close(LONG)
    s.step("link", [b"old", b"dir/old-too"], lambda d, _: d.link(b"old", b"dir/old-too"),
           lambda m: m.link(b"old", b"dir/old-too"))  # fmt: skip
    s.rename(b"new", b"dir/new")
    s.rename(b"dir/new", b"victim")
    s.rename(b"victim", b"other", RENAME_EXCHANGE)
    s.rename(b"sub/one", b"one", RENAME_NOREPLACE)
    s.rename(b"one", b"dir/" + LONG)
    s.rename(b"sub", b"empty")
    s.settle()
    s.step("chmod", [b"old"], lambda d, _: d.chmod(b"old", 0o600))
    s.step("utime", [b"other"], lambda d, _: d.utime(b"other", 10**18))
    s.step("fsyncdir", [b"dir"], lambda d, _: d.fsyncdir(b"dir"))


def _ends(s: _Script) -> None:
    s.unlink(b"victim")
    s.unlink(b"dir/link")
    s.open(b"other")
    s.unlink(b"other")
    s.step("write to the unlinked", [b"other"], lambda d, h: d.write(h[b"other"], 0, pattern(14, BLOCK)))
    s.close(b"other")
    s.step("rmdir", [b"gone"], lambda d, _: d.rmdir(b"gone"), lambda m: m.remove(b"gone"), frees=True)
    s.open(b"cut", os.O_RDWR | os.O_TRUNC)
    s.write(b"cut", 0, pattern(15, 9))
    s.close(b"cut")
    s.open(b"old")
    s.write(b"old", 1, pattern(16, 2 * BLOCK))
    s.fsync(b"old")
    s.close(b"old")
    s.settle()


async def prepare(d: Driver, model: Model) -> None:
    """What is there before: all of it acknowledged once the volume was left cleanly."""
    for path in (b"sub", b"empty", b"gone"):
        await d.mkdir(path)
        model.add(path, None, is_dir=True)
    for seed, (path, size) in enumerate([
        (b"old", 4 * BLOCK - 3), (b"other", 10), (b"victim", BLOCK), (b"sub/one", 2 * BLOCK), (b"sub/two", 0),
        (b"cut", 2 * BLOCK),
    ], start=100):  # fmt: skip
        fh = await d.create(path)
        model.add(path)
        await d.write(fh, 0, pattern(seed, size) if size else b"")
        model.put(path, 0, pattern(seed, size) if size else b"")
        await d.close(fh)
