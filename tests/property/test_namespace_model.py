"""The whole tree against a directory of the kernel's: the same calls give the same tree and the same errors."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest
import trio
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, rule

from cryptfs.fs import directory, journal
from cryptfs.fs import inodes as inodes_module
from cryptfs.ports import RENAME_EXCHANGE, RENAME_NOREPLACE
from cryptfs.store.local import LocalStore
from cryptfs.store.memory import MemoryStore
from tests.fs.tree import Tree

T = TypeVar("T")
Ours = Callable[..., Coroutine[Any, Any, object]]
Snapshot = dict[bytes, tuple[str, bytes]]
"""Path -> (kind and link count, content or target)."""

NAMES = [b"a", b"b", b"c", b"long " * 51, b"\xff\n"]
names = st.sampled_from(NAMES)
flags = st.sampled_from((0, 0, 0, RENAME_NOREPLACE, RENAME_EXCHANGE))
KINDS = {
    stat.S_IFREG: "file", stat.S_IFDIR: "directory", stat.S_IFLNK: "symlink", stat.S_IFIFO: "fifo",
}  # fmt: skip


class Plain:
    """The same calls on a directory of the kernel's. Paths are relative to it; its own is empty."""

    def __init__(self, root: Path) -> None:
        self.root = os.fsencode(root)
        self.store = LocalStore(root)

    def at(self, path: bytes) -> bytes:
        return os.path.join(self.root, path) if path else self.root

    def write(self, path: bytes, content: bytes) -> None:
        fd = os.open(self.at(path), os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
        os.write(fd, content)
        os.close(fd)

    def create(self, path: bytes) -> None:
        os.close(os.open(self.at(path), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))

    def rename(self, old: bytes, new: bytes, how: int) -> None:
        self.store.rename(self.store.root(), self.at(old), self.store.root(), self.at(new), how)

    def snapshot(self) -> Snapshot:
        out: Snapshot = {}
        todo = [b""]
        while todo:
            above = todo.pop()
            for name in os.listdir(self.at(above)):
                path = os.path.join(above, name)
                st_ = os.lstat(self.at(path))
                kind = KINDS[stat.S_IFMT(st_.st_mode)]
                content = b""
                if kind == "directory":
                    todo.append(path)
                elif kind == "symlink":
                    content = os.readlink(self.at(path))
                elif kind == "file":
                    content = Path(os.fsdecode(self.at(path))).read_bytes()
                out[path] = (kind if kind == "directory" else f"{kind} {st_.st_nlink}", content)
        return out


async def snapshot(tree: Tree) -> Snapshot:
    out: Snapshot = {}
    todo = [b""]
    while todo:
        above = todo.pop()
        for name in await tree.names(above):
            path = os.path.join(above, name)
            attr = await tree.lookup(path)
            kind = KINDS[stat.S_IFMT(attr.st.st_mode)]
            content = b""
            if kind == "directory":
                todo.append(path)
            elif kind == "symlink":
                content = await tree.readlink(path)
            elif kind == "file":
                content = await tree.read(path)
            out[path] = (kind if kind == "directory" else f"{kind} {attr.st.st_nlink}", content)
    return out


@pytest.fixture(autouse=True, scope="module")
def _little_is_kept() -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal, "_COMPACT_MIN_BYTES", 1024)
        patch.setattr(directory, "_COMPACT_MIN_BYTES", 1024)
        patch.setattr(inodes_module, "_DIRS_MAX", 3)
        yield


class TreeMachine(RuleBasedStateMachine):
    """Directories come and go under the machine's hands: a path in `dirs` may be a file by now, or nothing."""

    local = False
    dirs = Bundle("dirs")

    def __init__(self) -> None:
        super().__init__()
        self.scratch = Path(tempfile.mkdtemp(prefix="cfs-"))
        (self.scratch / "plain").mkdir()
        (self.scratch / "cipher").mkdir()
        self.plain = Plain(self.scratch / "plain")
        self.written = 0
        self.tree: Tree

    def run(self, call: Callable[..., Coroutine[Any, Any, T]], *args: object) -> T:
        async def bounded() -> T:
            with trio.fail_after(20):
                return await call(*args)

        return trio.run(bounded)

    def both(self, ours: Ours, theirs: Callable[..., object], *args: object) -> bool:
        """Whether it succeeded; fails unless both did or both failed with the same errno."""

        def outcome(call: Callable[[], object]) -> str:
            try:
                call()
            except OSError as error:
                return errno.errorcode[error.errno or 0]
            return "ok"

        expected, got = outcome(lambda: theirs(*args)), outcome(lambda: self.run(ours, *args))
        assert got == expected, f"{ours.__name__}{args}: {got}, but {expected} on the kernel's file system"
        return got == "ok"

    @initialize(target=dirs)
    def begin(self) -> bytes:
        store = LocalStore(self.scratch / "cipher") if self.local else MemoryStore()

        async def make() -> None:
            self.tree = await Tree.make(store)

        self.run(make)
        return b""

    # calls -------------------------------------------------------------------------------------------------------

    @rule(target=dirs, above=dirs, name=names)
    def mkdir(self, above: bytes, name: bytes) -> object:
        path = os.path.join(above, name)
        made = path.count(b"/") < 4 and self.both(self.tree.mkdir, lambda p: os.mkdir(self.plain.at(p), 0o755), path)
        return path if made else multiple()

    @rule(above=dirs, name=names)
    def create(self, above: bytes, name: bytes) -> None:
        async def create(path: bytes) -> None:
            await self.tree.create(path)
            await self.tree.release(self.tree.open_files[-1])

        self.both(create, self.plain.create, os.path.join(above, name))

    @rule(above=dirs, name=names)
    def write(self, above: bytes, name: bytes) -> None:
        path = os.path.join(above, name)
        if KINDS.get(stat.S_IFMT(self.mode_of(path))) in {None, "file"}:
            self.written += 1
            content = b"%d " % self.written * (self.written % 3000)
            self.both(self.tree.write, self.plain.write, path, content)

    def mode_of(self, path: bytes) -> int:
        try:
            return os.lstat(self.plain.at(path)).st_mode
        except OSError:
            return 0

    @rule(above=dirs, name=names)
    def symlink(self, above: bytes, name: bytes) -> None:
        target = b"to " + name
        self.both(
            lambda path: self.tree.symlink(target, path),
            lambda path: os.symlink(target, self.plain.at(path)),
            os.path.join(above, name),
        )

    @rule(above=dirs, name=names)
    def mkfifo(self, above: bytes, name: bytes) -> None:
        self.both(
            lambda path: self.tree.mknod(path, stat.S_IFIFO | 0o644),
            lambda path: os.mkfifo(self.plain.at(path), 0o644),
            os.path.join(above, name),
        )

    @rule(old_above=dirs, old=names, new_above=dirs, new=names)
    def link(self, old_above: bytes, old: bytes, new_above: bytes, new: bytes) -> None:
        old_path, new_path = os.path.join(old_above, old), os.path.join(new_above, new)
        if stat.S_ISDIR(self.mode_of(old_path)):
            return  # The kernel answers by itself, with whichever of several errors it finds first.
        self.both(
            self.tree.link, lambda a, b: os.link(self.plain.at(a), self.plain.at(b), follow_symlinks=False),
            old_path, new_path,
        )  # fmt: skip

    @rule(above=dirs, name=names)
    def unlink(self, above: bytes, name: bytes) -> None:
        self.both(self.tree.unlink, lambda path: os.unlink(self.plain.at(path)), os.path.join(above, name))

    @rule(above=dirs, name=names)
    def rmdir(self, above: bytes, name: bytes) -> None:
        self.both(self.tree.rmdir, lambda path: os.rmdir(self.plain.at(path)), os.path.join(above, name))

    @rule(target=dirs, old_above=dirs, old=names, new_above=dirs, new=names, how=flags)
    def rename(self, old_above: bytes, old: bytes, new_above: bytes, new: bytes, how: int) -> object:
        old_path, new_path = os.path.join(old_above, old), os.path.join(new_above, new)
        is_dir = stat.S_ISDIR(self.mode_of(old_path))
        if (old_path + b"/").startswith(new_path + b"/") and old_path != new_path and how == 0:
            return multiple()  # Onto a directory above it: the kernel answers by itself.
        done = self.both(self.tree.rename, self.plain.rename, old_path, new_path, how)
        return new_path if done and is_dir else multiple()

    # what happens besides ----------------------------------------------------------------------------------------

    @rule()
    def forget(self) -> None:
        self.tree.forget_all()
        self.run(self.tree.volume.files.settle)
        assert len(self.tree.volume.inodes) == 1

    @rule()
    def settle(self) -> None:
        self.run(self.tree.volume.files.settle)

    @rule(seconds=st.sampled_from((1, 61)))
    def let_time_pass(self, seconds: int) -> None:
        self.tree.sample.clock.advance(seconds)

    @rule()
    def unmount_and_mount(self) -> None:
        self.run(self.tree.remount)

    @rule()
    def kill_and_mount(self) -> None:
        """What a daemon did is in the page cache when it is killed; names and closed files need nothing more."""
        self.tree.kill()
        if isinstance(self.tree.store, MemoryStore):
            killed = self.tree.store.killed()
            self.tree.store.close_store()
            self.tree.store = killed
        self.run(self.tree.mount)

    @invariant()
    def both_trees_are_the_same(self) -> None:
        if hasattr(self, "tree"):
            assert self.run(snapshot, self.tree) == self.plain.snapshot()

    def teardown(self) -> None:
        if hasattr(self, "tree"):
            self.run(self.tree.finish)
            self.tree.store.close_store()
        self.plain.store.close_store()
        shutil.rmtree(self.scratch)


class TreeOnTheKernel(TreeMachine):
    local = True


TestTree = TreeMachine.TestCase
TestTree.settings = settings(max_examples=40, stateful_step_count=40)
TestTreeOnTheKernel = TreeOnTheKernel.TestCase
TestTreeOnTheKernel.settings = settings(max_examples=15, stateful_step_count=30)
