"""`cryptfs export`: copy a file or a subtree out of a volume, without FUSE.

Modes, times, symlinks, hard links, holes and extended attributes are kept, owners if root runs it; what the destination
or this user may not have of the attributes is named. Nothing that exists is overwritten:
everything is made with O_EXCL. A file appears under its name when it is begun and goes again if it cannot be finished.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol, TypeVar

from cryptfs.errors import Damaged, UsageError, VolumeDamaged, VolumeLocked
from cryptfs.format.sidecar import Sealed
from cryptfs.fs.attr_log import find_attr_log
from cryptfs.fs.context import FsContext
from cryptfs.fs.domain import is_shredded
from cryptfs.fs.symlink import read_target
from cryptfs.fs.xattr import open_set
from cryptfs.names import tree_name
from cryptfs.ops.blocks import BlockReader
from cryptfs.ops.check_dirs import Look, Placed, join, look
from cryptfs.ops.check_files import opened
from cryptfs.ops.check_report import Tally
from cryptfs.ops.offline import Access, Looking, Settle, open_for_reading, open_to_read, shut
from cryptfs.types import Kind

T = TypeVar("T")


class Reached(Protocol):
    """A domain that is unlocked, and how to reach those in it."""

    @property
    def access(self) -> Access:
        """How to open it."""
        ...

    @property
    def settle(self) -> Settle | None:
        """Asks its daemon, if it is mounted."""
        ...

    @property
    def domain(self) -> OpenDomain:
        """As this one was."""
        ...


OpenDomain = Callable[[bytes, bytes], AbstractAsyncContextManager["Reached | None"]]
"""Reaches a domain, given its volume id and its place's path; None if it is locked or shredded. Raises `Damaged`."""

_TRIES = 3
"""How often something of a mounted volume is looked at before it counts as damaged."""


@dataclass(frozen=True, slots=True)
class Loss:
    """Something that could not be copied whole. `lost_bytes`: (offset, length) ranges that are zeros in the copy.

    None of them: it is missing from the copy altogether.
    """

    path: bytes
    reason: str
    lost_bytes: tuple[tuple[int, int], ...] = ()


@dataclass(slots=True)
class Exported:
    """The outcome. `left_out`: special files that this user may not make.

    `xattrs_left_out`: (path, names) of extended attributes that could not be set on the copy.
    `locked`: domains of which the copy has the directory only; `shredded`: likewise, and there is nothing else.
    """

    losses: list[Loss] = field(default_factory=list)
    left_out: list[bytes] = field(default_factory=list)
    xattrs_left_out: list[tuple[bytes, list[bytes]]] = field(default_factory=list)
    locked: list[bytes] = field(default_factory=list)
    shredded: list[bytes] = field(default_factory=list)

    def add(self, path: bytes, inner: Exported) -> None:
        """What came of the domain at `path`."""

        def there(below: bytes) -> bytes:
            return path.rstrip(b"/") + (below if below != b"/" else b"")

        self.losses += [replace(loss, path=there(loss.path)) for loss in inner.losses]
        self.left_out += map(there, inner.left_out)
        self.xattrs_left_out += [(there(below), names) for below, names in inner.xattrs_left_out]
        self.locked += map(there, inner.locked)
        self.shredded += map(there, inner.shredded)


@dataclass(slots=True)
class _Level:
    """A directory being copied: where from, where to, what is left of it."""

    fd: int
    path: bytes
    dest: bytes
    st: os.stat_result
    todo: list[Placed]
    xattrs: dict[bytes, bytes]


async def export_tree(
    access: Access, path: bytes, dest: bytes, *, skip_damaged: bool = False, settle: Settle | None = None,
    tally: Tally | None = None, domains: OpenDomain | None = None,
) -> Exported:  # fmt: skip
    """Copy what is at `path` in the volume (absolute; b"/": all of it) to `dest`, which is made.

    If `dest` is a directory that exists, the copy is made in it, under its own name; b"/" fills it. Raises `UsageError`
    (no such path, or something exists already), `VolumeLocked` (it is in a domain that is), `Damaged` unless
    `skip_damaged`, OSError, key errors.
    """
    looking = await open_to_read(access, settle)
    try:
        export = _Export(looking, tally or Tally(), skip_damaged=skip_damaged, domains=domains)
        await export.run(path, dest)
        return export.out
    finally:
        await shut(access, looking)


def check_dest(cipher_dir: Path, dest: Path) -> None:
    """That the copy does not go into the volume's own cipher directory. Raises `UsageError`."""
    real = Path(os.path.realpath(dest))
    if real == cipher_dir or cipher_dir in real.parents:
        raise UsageError(f"{dest} lies inside the volume {cipher_dir}")


class _Export:
    def __init__(self, looking: Looking, tally: Tally, *, skip_damaged: bool, domains: OpenDomain | None) -> None:
        self._domains = domains
        self.ctx: FsContext = looking.ctx
        self.out = Exported()
        self._tally = tally
        self._skip = skip_damaged
        self._tries = _TRIES if looking.live else 1
        self._settle = looking.settle
        self._copies: dict[int, bytes] = {}
        """Inode of a file with several names -> where its first copy lies."""
        self._is_root = os.geteuid() == 0

    async def run(self, path: bytes, dest: bytes) -> None:
        parts = [part for part in path.split(b"/") if part and part != b"."]
        if b".." in parts:
            raise UsageError("PATH may not contain `..`")
        fd, dir_id, here = self._open_root(), self.ctx.config.root_dir_id, b"/"
        try:
            for at, name in enumerate(parts):
                found = await self._look(fd, dir_id, here)
                if found.domain:
                    if not await self._domain(found.domain, here, b"/" + b"/".join(parts[at:]), dest):
                        state = "shredded: nothing opens it" if is_shredded(self.ctx, found.domain) else "locked"
                        raise VolumeLocked(f"{os.fsdecode(here)} is a domain, and {state}")
                    return
                placed = next((p for p in found.placed if p.name == name), None)
                here = join(here, name)
                if placed is None:
                    lost = next((a for a in found.absent if a.path == here), None)
                    if lost is not None:
                        raise Damaged(lost.finding.reason, os.fsdecode(here))
                    raise UsageError(f"there is no {os.fsdecode(here)} in the volume")
                if at == len(parts) - 1 and placed.entry.kind is not Kind.DIR:
                    await self._one(fd, placed, here, _into(dest, name))
                    return
                if placed.entry.kind is not Kind.DIR:
                    raise UsageError(f"{os.fsdecode(here)} is no directory")
                below = self.ctx.store.open(fd, tree_name(placed.entry.sealed), os.O_RDONLY | os.O_DIRECTORY)
                self.ctx.store.close(fd)
                fd, dir_id = below, placed.entry.log_id
            # Everything below is closed by `_tree`.
            top, fd = fd, -1
            await self._tree(top, dir_id, here, _into(dest, parts[-1]) if parts else dest)
        finally:
            if fd >= 0:
                self.ctx.store.close(fd)

    def _open_root(self) -> int:
        return self.ctx.store.open(self.ctx.store.root(), b"tree", os.O_RDONLY | os.O_DIRECTORY)

    async def _look(self, fd: int, dir_id: bytes, path: bytes) -> Look:
        for attempt in range(self._tries):
            try:
                return await look(self.ctx, fd, dir_id, path, ())
            except Damaged as error:
                if attempt == self._tries - 1:
                    raise Damaged(error.reason, os.fsdecode(path)) from None
        raise AssertionError("the last attempt returns or raises")

    # trees -----------------------------------------------------------------------------------------------------

    async def _tree(self, fd: int, dir_id: bytes, path: bytes, dest: bytes) -> None:
        levels: list[_Level] = []
        try:
            await self._enter(levels, fd, dir_id, path, dest, top=True)
            while levels:
                level = levels[-1]
                if not level.todo:
                    levels.pop()
                    self.ctx.store.close(level.fd)
                    self._dress(level.path, level.dest, level.st, level.xattrs)
                    continue
                placed = level.todo.pop()
                here, there = join(level.path, placed.name), level.dest + b"/" + placed.name
                if placed.entry.kind is not Kind.DIR:
                    await self._one(level.fd, placed, here, there)
                    continue
                below = self.ctx.store.open(level.fd, tree_name(placed.entry.sealed), os.O_RDONLY | os.O_DIRECTORY)
                await self._enter(levels, below, placed.entry.log_id, here, there, top=False)
        finally:
            for level in levels:
                self.ctx.store.close(level.fd)

    async def _enter(
        self, levels: list[_Level], fd: int, dir_id: bytes, path: bytes, dest: bytes, *, top: bool
    ) -> None:
        """Make the copy of a directory; its entries are left for later. Owns `fd`."""
        try:
            found = await self._look(fd, dir_id, path)
            st = self.ctx.store.fstat(fd)
            if found.domain and await self._domain(found.domain, path, b"/", dest):
                self.ctx.store.close(fd)
                return
        except Damaged as error:
            self.ctx.store.close(fd)
            self._lose(path, error.reason, error)
            return
        except BaseException:
            self.ctx.store.close(fd)
            raise
        if found.domain:
            (self.out.shredded if is_shredded(self.ctx, found.domain) else self.out.locked).append(path)
        levels.append(_Level(fd, path, dest, st, [], await self._xattrs(path, dir_id, found.xattrs)))
        for absent in found.absent:
            self._lose(absent.path, absent.finding.reason, None)
        # Writable while it is filled; its own mode comes last.
        _make(lambda: os.mkdir(dest, 0o700), dest, may_exist=top)
        self._tally.directories += 1
        levels[-1].todo = found.placed

    async def _domain(self, domain_id: bytes, place: bytes, path: bytes, dest: bytes) -> bool:
        """Copy `path` in the domain; False if nobody can. Raises `Damaged` if it is not there, or not itself."""
        if self._domains is None:
            return False
        async with self._domains(domain_id, place) as domain:
            if domain is None:
                return False
            try:
                inner = await export_tree(
                    domain.access, path, dest, skip_damaged=self._skip, settle=domain.settle, tally=self._tally,
                    domains=domain.domain,
                )  # fmt: skip
            except VolumeDamaged as error:
                raise Damaged("domain", str(error)) from error
            self.out.add(place, inner)
            return True

    # single entries --------------------------------------------------------------------------------------------

    async def _one(self, fd: int, placed: Placed, path: bytes, dest: bytes) -> None:
        entry, st = placed.entry, placed.seen.st
        if st.st_nlink > 1 and st.st_ino in self._copies:
            _make(lambda: os.link(self._copies[st.st_ino], dest, follow_symlinks=False), dest)
            return
        made = False
        if entry.kind is Kind.FILE:
            made = await self._file(fd, placed, path, dest)
        elif entry.kind is Kind.SYMLINK:
            made = await self._symlink(placed, path, dest)
        else:
            made = await self._special(placed, path, dest)
        if made and st.st_nlink > 1:
            self._copies[st.st_ino] = dest

    async def _file(self, fd: int, placed: Placed, path: bytes, dest: bytes) -> bool:
        for attempt in range(self._tries):
            try:
                await self._copy(fd, placed, path, dest)
            except Damaged as error:
                if attempt < self._tries - 1:
                    if self._settle is not None:
                        await self._settle(path)
                    continue
                self._lose(path, error.reason, error)
                return False
            self._tally.files += 1
            return True
        return False

    async def _copy(self, fd: int, placed: Placed, path: bytes, dest: bytes) -> None:
        """One file's content. Raises `Damaged`; then there is no copy."""
        ctx, file_id = self.ctx, placed.entry.log_id
        data_fd = open_for_reading(ctx.store, fd, tree_name(placed.entry.sealed))
        st = ctx.store.fstat(data_fd)
        with opened(ctx, st.st_ino, file_id, data_fd) as file:
            await file.journal.load()
            xattrs = await self._xattrs(path, file_id, file.journal.xattrs)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            out = _make(lambda: os.open(dest, flags, 0o600), dest)
            assert out is not None
            try:

                async def write(offset: int, data: memoryview) -> None:
                    done = 0
                    while done < len(data):
                        done += os.pwrite(out, data[done:], offset + done)

                def count(read: int) -> None:
                    self._tally.done_bytes += read

                reader = BlockReader(ctx, file.state, write, count, strict=not self._skip)
                bad = await reader.run(list(file.state.blocks))
                if bad.ranges and not self._skip:
                    raise Damaged(bad.reasons[0], f"block {bad.ranges[0][0]}")
                os.ftruncate(out, file.state.size)
            except BaseException:
                os.unlink(dest)
                raise
            finally:
                os.close(out)
            if bad.ranges:
                lost = bad.lost_bytes(ctx.config.block_size, file.state.size)
                self.out.losses.append(Loss(path, ", ".join(bad.reasons), tuple(lost)))
        self._dress(path, dest, st, xattrs)

    async def _symlink(self, placed: Placed, path: bytes, dest: bytes) -> bool:
        try:
            target = await read_target(self.ctx, placed.entry.log_id)
        except Damaged as error:
            self._lose(path, error.reason, error)
            return False
        _make(lambda: os.symlink(target, dest), dest)
        self._tally.symlinks += 1
        self._dress(path, dest, placed.seen.st, await self._other_xattrs(path, placed))
        return True

    async def _special(self, placed: Placed, path: bytes, dest: bytes) -> bool:
        st = placed.seen.st
        try:
            _make(lambda: os.mknod(dest, st.st_mode, st.st_rdev), dest)
        except PermissionError:
            self.out.left_out.append(path)
            return False
        self._tally.others += 1
        self._dress(path, dest, st, await self._other_xattrs(path, placed))
        return True

    async def _xattrs(self, path: bytes, log_id: bytes, sealed: Sealed | None) -> dict[bytes, bytes]:
        """Those of a copy. Raises `Damaged` if they are, unless that is to be passed over."""
        try:
            return await open_set(self.ctx, log_id, sealed)
        except Damaged as error:
            self._lose_xattrs(path, error)
            return {}

    async def _other_xattrs(self, path: bytes, placed: Placed) -> dict[bytes, bytes]:
        log_id = placed.entry.log_id
        try:
            found = await find_attr_log(self.ctx, log_id)
            return await open_set(self.ctx, log_id, found.xattrs) if found is not None else {}
        except Damaged as error:
            self._lose_xattrs(path, error)
            return {}

    def _lose_xattrs(self, path: bytes, error: Damaged) -> None:
        if not self._skip:
            raise error
        self.out.losses.append(Loss(path, f"its extended attributes: {error.reason}"))

    def _dress(self, path: bytes, dest: bytes, st: os.stat_result, xattrs: dict[bytes, bytes]) -> None:
        """Owner, xattrs, mode and times of a copy, in the order that keeps each: a change of owner takes capabilities.

        An ACL's mask is the mode's, which comes after it.
        """
        if self._is_root:
            os.chown(dest, st.st_uid, st.st_gid, follow_symlinks=False)
        refused = []
        for name, value in xattrs.items():
            try:
                os.setxattr(dest, name, value, follow_symlinks=False)
            except OSError:
                refused.append(name)
        if refused:
            self.out.xattrs_left_out.append((path, refused))
        if not stat.S_ISLNK(st.st_mode):
            os.chmod(dest, stat.S_IMODE(st.st_mode))
        os.utime(dest, ns=(st.st_atime_ns, st.st_mtime_ns), follow_symlinks=False)

    def _lose(self, path: bytes, reason: str, error: Damaged | None) -> None:
        """Note something damaged. Raises `Damaged` unless it is to be passed over."""
        if not self._skip:
            detail = f": {error}" if error is not None and str(error) != reason else ""
            raise Damaged(reason, os.fsdecode(path) + detail)
        self.out.losses.append(Loss(path, reason))


def _into(dest: bytes, name: bytes) -> bytes:
    """`dest`, or a name in it if it is a directory."""
    return dest.rstrip(b"/") + b"/" + name if os.path.isdir(dest) else dest


def _make(call: Callable[[], T], dest: bytes, *, may_exist: bool = False) -> T | None:
    """`call()`, which makes `dest`. Raises `UsageError` if something is there already and may not be."""
    try:
        return call()
    except FileExistsError:
        if may_exist and stat.S_ISDIR(os.lstat(dest).st_mode):
            return None
        raise UsageError(f"{os.fsdecode(dest)} exists already; nothing is overwritten") from None
