"""A fixed run of operations that meets every way this filesystem writes, and the model of what it must lead to."""

from __future__ import annotations

import os
import stat
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from cryptfs.fs.namespace import RENAME_EXCHANGE, RENAME_NOREPLACE
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


Handles = dict[str, Any]


@dataclass(frozen=True)
class Step:
    """`do` is the call; `then` what the model becomes if it succeeds. `frees`: it gives room, so it works when full."""

    what: str
    do: Callable[[Driver, Handles], Awaitable[None]]
    then: Callable[[Model], None]
    frees: bool = False


def pattern(seed: int, count: int) -> bytes:
    """Content that differs from block to block and from write to write."""
    unit = b"".join(b"%03d-%05d " % (seed, i) for i in range(64))
    return (unit * (count // len(unit) + 1))[seed : seed + count].ljust(count, b".")


def workload() -> list[Step]:  # noqa: C901, PLR0915 - a script, not a decision
    """About fifty operations, on the tree that `prepare` makes."""
    steps: list[Step] = []

    def step(what: str, do: Callable[[Driver, Handles], Awaitable[None]], then: Callable[[Model], None], *,
             frees: bool = False) -> None:  # fmt: skip
        steps.append(Step(what, do, then, frees))

    def nothing(_: Model) -> None:
        pass

    def create(h: str, path: bytes) -> None:
        async def do(d: Driver, handles: Handles) -> None:
            handles[h] = await d.create(path)

        step(f"create {path[:20]!r}", do, lambda m: m.add(path))

    def open_(h: str, path: bytes, flags: int = os.O_RDWR) -> None:
        async def do(d: Driver, handles: Handles) -> None:
            handles[h] = await d.open(path, flags)

        step(f"open {path!r}", do, (lambda m: m.cut(path, 0)) if flags & os.O_TRUNC else nothing)

    def write(h: str, path: bytes, offset: int, data: bytes) -> None:
        step(f"write {path!r} {offset}+{len(data)}", lambda d, handles: d.write(handles[h], offset, data),
             lambda m: m.put(path, offset, data))  # fmt: skip

    def fsync(h: str, path: bytes, *, data_only: bool = False) -> None:
        step(f"fsync {path!r}", lambda d, handles: d.fsync(handles[h], data_only=data_only),
             lambda m: m.acknowledge(path))  # fmt: skip

    def close(h: str) -> None:
        async def do(d: Driver, handles: Handles) -> None:
            await d.close(handles.pop(h))

        step(f"close {h}", do, nothing)

    def truncate(path: bytes, size: int) -> None:
        step(f"truncate {path!r} {size}", lambda d, _: d.truncate(path, size), lambda m: m.cut(path, size))

    def rename(old: bytes, new: bytes, flags: int = 0) -> None:
        then: Callable[[Model], None] = lambda m: m.rename(old, new)  # noqa: E731
        if flags == RENAME_EXCHANGE:
            then = lambda m: m.exchange(old, new)  # noqa: E731
        step(f"rename {old!r} {new!r} {flags}", lambda d, _: d.rename(old, new, flags), then)

    # A new file: created, written, appended to, rewritten before it was ever synced.
    create("n", b"new")
    write("n", b"new", 0, pattern(1, 3 * BLOCK + 100))
    write("n", b"new", 3 * BLOCK + 100, pattern(2, 200))
    write("n", b"new", BLOCK - 50, pattern(3, BLOCK + 100))
    write("n", b"new", 0, pattern(4, 2 * BLOCK))
    fsync("n", b"new")
    write("n", b"new", 0, pattern(5, 2 * BLOCK))
    write("n", b"new", 10, pattern(6, 2 * BLOCK))
    close("n")
    # An old one: overwritten beside its durable version, again and again, synced, cut, grown.
    open_("o", b"old")
    write("o", b"old", 5, pattern(7, 10))
    write("o", b"old", 0, pattern(8, 3 * BLOCK))
    write("o", b"old", BLOCK, pattern(9, BLOCK))
    fsync("o", b"old", data_only=True)
    write("o", b"old", 4 * BLOCK - 7, pattern(10, BLOCK))
    truncate(b"old", 2 * BLOCK + 11)
    truncate(b"old", 4 * BLOCK + 1)
    write("o", b"old", 7 * BLOCK, pattern(11, 5))
    fsync("o", b"old")
    write("o", b"old", 7 * BLOCK + 5, pattern(12, BLOCK))
    close("o")
    # The tree.
    step("mkdir dir", lambda d, _: d.mkdir(b"dir"), lambda m: m.add(b"dir", None, is_dir=True))
    create("i", b"dir/inside")
    write("i", b"dir/inside", 0, pattern(13, 100))
    fsync("i", b"dir/inside")
    close("i")
    step(
        "symlink", lambda d, _: d.symlink(b"some/target", b"dir/link"), lambda m: m.add(b"dir/link", b"-> some/target")
    )
    step("mknod", lambda d, _: d.mknod(b"fifo", stat.S_IFIFO | 0o600), lambda m: m.add(b"fifo", None))
    create("l", LONG)
    close("l")
    step("link", lambda d, _: d.link(b"old", b"dir/old-too"), lambda m: m.link(b"old", b"dir/old-too"))
    rename(b"new", b"dir/new")
    rename(b"dir/new", b"victim")
    rename(b"victim", b"other", RENAME_EXCHANGE)
    rename(b"sub/one", b"one", RENAME_NOREPLACE)
    rename(b"one", b"dir/" + LONG)
    rename(b"sub", b"empty")
    step("chmod", lambda d, _: d.chmod(b"old", 0o600), nothing)
    step("utime", lambda d, _: d.utime(b"other", 10**18), nothing)
    step("fsyncdir", lambda d, _: d.fsyncdir(b"dir"), nothing)
    step("unlink", lambda d, _: d.unlink(b"victim"), lambda m: m.remove(b"victim"), frees=True)
    step("unlink link", lambda d, _: d.unlink(b"dir/link"), lambda m: m.remove(b"dir/link"), frees=True)
    open_("u", b"other")
    step("unlink open", lambda d, _: d.unlink(b"other"), lambda m: m.remove(b"other"), frees=True)
    step("write to it", lambda d, h: d.write(h["u"], 0, pattern(14, BLOCK)), nothing)
    close("u")
    step("rmdir", lambda d, _: d.rmdir(b"gone"), lambda m: m.remove(b"gone"), frees=True)
    open_("t", b"cut", os.O_RDWR | os.O_TRUNC)
    write("t", b"cut", 0, pattern(15, 9))
    close("t")
    open_("r", b"old")
    write("r", b"old", 1, pattern(16, 2 * BLOCK))
    fsync("r", b"old")
    close("r")
    return steps


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
