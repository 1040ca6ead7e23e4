"""Repair of what has no place or is not whole: strays, damaged files and symlinks, entries whose object is gone."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Awaitable, Callable
from contextlib import suppress

from cryptfs.errors import Damaged
from cryptfs.fs.attr_log import make_attr_log
from cryptfs.fs.context import FsContext
from cryptfs.fs.inodes import Inode
from cryptfs.fs.making import Owner
from cryptfs.fs.symlink import encode_target_text, read_target
from cryptfs.fs.volume import Volume
from cryptfs.names import DIR_LOG, tree_name
from cryptfs.ops.blocks import BlockReader
from cryptfs.ops.check import Check
from cryptfs.ops.check_dirs import Absent, Seen, Stray, opened_name, survey
from cryptfs.ops.check_files import opened
from cryptfs.ops.check_place import opened_whole
from cryptfs.ops.check_report import Finding, Spot, What
from cryptfs.ops.offline import open_for_reading
from cryptfs.ops.quarantine import Quarantine, drop_entry, inode_of, open_chain
from cryptfs.ops.salvage import Place, Salvaged, Source, read_records, salvage
from cryptfs.ports import RENAME_NOREPLACE
from cryptfs.types import ID_BYTES, Kind

_COPY_BYTES = 1 << 20


class Rescue:
    """For one repair."""

    def __init__(self, volume: Volume, quarantine: Quarantine) -> None:
        self.volume = volume
        self.ctx: FsContext = volume.ctx
        self.quarantine = quarantine
        self._own = Owner(os.geteuid(), os.getegid())

    # strays ----------------------------------------------------------------------------------------------------

    async def strays(self, check: Check) -> None:
        """Move what no `.dir` names to the quarantine, under the path it was found at."""
        for stray in list(check.strays):
            await _tried(stray.finding, self._stray, check, stray)

    async def _stray(self, check: Check, stray: Stray) -> None:
        above = self.quarantine.original(stray.path.rpartition(b"/")[0])
        fd = open_chain(self.ctx, stray.spot.above)
        try:
            name = await self._take_in(check, fd, stray.spot.name, above, stray.name, stray.seen)
        finally:
            self.ctx.store.close(fd)
        finding = stray.finding
        if finding.what is What.STRAY:
            finding.action = "moved to the quarantine" if name else "nothing of it could be read; kept in damaged/"
            finding.moved_to = self.quarantine.shown(above, name) if name else b""

    async def _take_in(self, check: Check, fd: int, below: bytes, path: bytes, name: bytes, seen: Seen) -> bytes:
        """Its name in the quarantine's directory for `path`; b"" if there was nothing to show. Raises OSError.

        What cannot be read at the moment stays where it is: what it is, and whose, will be seen when it can.
        """
        if seen.error:
            raise OSError(errno.EIO, f"it cannot be read: {seen.error}")
        known = check.ids.get(seen.log_id, seen.st.st_ino) if seen.log_id else None
        if seen.kind not in (Kind.FILE, Kind.DIR, Kind.SYMLINK):
            into = await self.quarantine.directory(path)
            rdev = seen.st.st_rdev if seen.kind in (Kind.CHAR, Kind.BLOCK) else 0
            return await self.quarantine.adopt(fd, below, into, name, (seen.kind, self.ctx.random(ID_BYTES), rdev))
        if known == seen.st.st_ino and await opened_whole(self.ctx, fd, below, seen):
            into = await self.quarantine.directory(path)
            check.ids[seen.log_id] = seen.st.st_ino
            return await self.quarantine.adopt(fd, below, into, name, (seen.kind, seen.log_id, 0))
        if seen.kind is Kind.DIR:
            return await self._take_in_children(check, fd, below, path, name)
        if seen.kind is Kind.SYMLINK:
            into = await self.quarantine.directory(path)
            free = await self.quarantine.free_name(into, name)
            target = self.ctx.store.readlink(fd, below)
            await self.volume.names.symlink(into, free, target, self._own)
            await self._sync_before_removal()
        elif seen.log_id:
            free = (await self._salvage_stray(fd, below, path, name, seen)).name
        else:
            free = await self._copy(fd, below, path, name)
        self.ctx.store.unlink(fd, below)
        return free

    async def _take_in_children(self, check: Check, fd: int, below: bytes, path: bytes, name: bytes) -> bytes:
        store = self.ctx.store
        inner = store.open(fd, below, os.O_RDONLY | os.O_DIRECTORY)
        try:
            path = path.rstrip(b"/") + b"/" + name
            await self.quarantine.directory(path)
            for child, seen in survey(store, inner).items():
                if child == DIR_LOG and seen.kind is Kind.FILE:
                    self.quarantine.keep_aside(inner, child, b"%d.dir" % store.fstat(inner).st_ino)
                    store.unlink(inner, child)
                else:
                    await self._take_in(check, inner, child, path, opened_name(None, child), seen)
        finally:
            store.close(inner)
        store.rmdir(fd, below)
        return name

    async def _salvage_stray(self, fd: int, below: bytes, path: bytes, name: bytes, seen: Seen) -> Salvaged:
        data_fd = open_for_reading(self.ctx.store, fd, below)
        try:
            source = Source(data_fd, seen.log_id, seen.st)
            out = await salvage(self.volume, source, self._place_in(path, name))
        finally:
            self.ctx.store.close(data_fd)
        if not out.exact:
            self.quarantine.keep_aside(fd, below, seen.log_id.hex().encode() + b".data")
        return out

    async def _copy(self, fd: int, below: bytes, path: bytes, name: bytes) -> bytes:
        """A file that is none of ours, as it is, into an ordinary file of the volume; durable when this returns."""
        volume, store = self.volume, self.ctx.store
        into = await self.quarantine.directory(path)
        free = await self.quarantine.free_name(into, name)
        source = open_for_reading(store, fd, below)
        try:
            mode = stat.S_IMODE(store.fstat(source).st_mode)
            attr, file = await volume.names.create(into, free, mode, self._own)
            attr.inode.lookups += 1
            try:
                offset = 0
                while data := store.pread(source, _COPY_BYTES, offset):
                    offset += await file.write(offset, data)
                await file.journal.fsync()
            except BaseException:
                await volume.files.release(attr.inode)
                await volume.names.unlink(into, free)
                raise
            await volume.files.release(attr.inode)
        finally:
            store.close(source)
        return free

    # damaged files ---------------------------------------------------------------------------------------------

    async def files(self, check: Check) -> None:
        """Salvage damaged files; remake symlinks; make one file again of copies with one id."""
        for finding in list(check.report.findings):
            if finding.action or finding.spot is None:
                continue
            if finding.what in (What.FILE, What.BLOCKS):
                await _tried(finding, self._file, check, finding)
            elif finding.what is What.XATTRS:
                await _tried(finding, self._xattrs, finding)
            elif finding.what is What.SYMLINK:
                await _tried(finding, self._symlink, check, finding)
            elif finding.what is What.DUPLICATE:
                await _tried(finding, self._duplicate, check, finding)

    async def _file(self, check: Check, finding: Finding) -> None:
        """Salvage, keep the ciphertext, drop the old names, and put what is whole back in its place."""
        assert finding.spot is not None
        names = check.names_of(finding)
        above, _, name = self.quarantine.original(finding.path).rpartition(b"/")
        fd = open_chain(self.ctx, finding.spot.above)
        try:
            data_fd = open_for_reading(self.ctx.store, fd, finding.spot.name)
            try:
                source = Source(data_fd, finding.log_id, self.ctx.store.fstat(data_fd))
                out = await salvage(self.volume, source, self._place_in(above, name))
            finally:
                self.ctx.store.close(data_fd)
            if not out.exact:
                self.quarantine.keep_aside(fd, finding.spot.name, finding.log_id.hex().encode() + b".data")
                self.quarantine.keep_sidecar_aside(finding.log_id)
        finally:
            self.ctx.store.close(fd)
        parents: list[tuple[Inode, bytes]] = []
        for spot, path in names:
            parent, own = await inode_of(self.volume, spot.above), path.rpartition(b"/")[2]
            await self.volume.names.unlink(parent, own)
            parents.append((parent, own))
        self.volume.reaper.add_id(finding.log_id)
        self._tell(finding, out, self.quarantine.shown(above, out.name))
        if out.exact and out.inode is not None:
            await self._put_back(out, await self.quarantine.directory(above), parents)
            finding.moved_to = b""

    async def _put_back(self, out: Salvaged, from_: Inode, names: list[tuple[Inode, bytes]]) -> None:
        assert out.inode is not None
        (parent, name), *others = names
        await self.volume.names.rename(from_, out.name, parent, name, RENAME_NOREPLACE)
        for parent, name in others:
            await self.volume.names.link(out.inode, parent, name)

    def _tell(self, finding: Finding, out: Salvaged, shown: bytes) -> None:
        finding.lost_bytes = out.lost_bytes
        if out.exact:
            finding.action = "every block of it is intact; written anew"
        elif not out.name:
            finding.action = "nothing of it could be read; kept in damaged/"
        else:
            finding.action = "its readable blocks were salvaged"
            finding.action += ", some of them perhaps in an older version" if out.older else ""
            finding.moved_to = shown

    async def _xattrs(self, finding: Finding) -> None:
        """Give them up: nobody can read them, and until then nobody can set any."""
        assert finding.spot is not None
        ctx, spot = self.ctx, finding.spot
        if spot.name:
            parent = await inode_of(self.volume, spot.above)
            node = await self.volume.inodes.dir(parent)
            entry = next((e for e in node.entries.values() if tree_name(e.sealed) == spot.name), None)
            if entry is None or entry.log_id != finding.log_id:
                finding.action = "went with what was salvaged"
                return
            ino = ctx.store.lstat(node.fd, spot.name).st_ino
            inode = self.volume.inodes.meet(ino, entry.kind, finding.log_id, parent, spot.name)
        else:
            inode = self.volume.root
        if inode.kind is not Kind.DIR:
            self.quarantine.keep_sidecar_aside(finding.log_id)
        if inode.kind in (Kind.FILE, Kind.DIR):
            inode.lookups += 1
            await self.volume.xattrs.give(inode, {})
            self.volume.inodes.forget(inode.ino, 1)
        else:
            # A new log with a newer generation: the record would take a missing one for a deletion.
            await make_attr_log(ctx, finding.log_id, None)
        finding.action = "they cannot be read; removed"

    async def _symlink(self, check: Check, finding: Finding) -> None:
        assert finding.spot is not None
        parent = await inode_of(self.volume, finding.spot.above)
        try:
            target = await read_target(self.ctx, finding.log_id)
        except Damaged:
            self.quarantine.keep_sidecar_aside(finding.log_id)
            for spot, path in check.names_of(finding):
                parent = await inode_of(self.volume, spot.above)
                await self.volume.names.unlink(parent, path.rpartition(b"/")[2])
            self.volume.reaper.add_id(finding.log_id)
            finding.action = "its target is lost; removed, its sidecar kept in damaged/"
            return
        node = await self.volume.inodes.dir(parent)
        text = encode_target_text(finding.log_id, len(target))
        self._replace(node.fd, finding.spot.name, lambda tmp, name: self.ctx.store.symlink(text, tmp, name))
        finding.action = "made again from its sidecar"

    async def _duplicate(self, check: Check, finding: Finding) -> None:
        """Names that `.dir` gives one id are hard links of one file; a copy that says the same is made one again."""
        assert finding.spot is not None
        original = check.ids[finding.log_id]
        at = find_spot(self.ctx, original)
        if at is None:
            return
        fd = open_chain(self.ctx, finding.spot.above)
        try:
            if stat.S_ISREG(self.ctx.store.lstat(fd, finding.spot.name).st_mode):
                await self._save_copy(finding, fd)
            src_fd = open_chain(self.ctx, at.above)
            try:
                self._replace(fd, finding.spot.name, lambda tmp, name: self.ctx.store.link(src_fd, at.name, tmp, name))
            finally:
                self.ctx.store.close(src_fd)
        finally:
            self.ctx.store.close(fd)
        finding.action = "made a hard link of the original again" + (", the copy differed" if finding.moved_to else "")

    async def _save_copy(self, finding: Finding, fd: int) -> None:
        assert finding.spot is not None
        above, _, name = self.quarantine.original(finding.path).rpartition(b"/")
        data_fd = open_for_reading(self.ctx.store, fd, finding.spot.name)
        try:
            st = self.ctx.store.fstat(data_fd)
            records = await read_records(self.ctx, finding.log_id)
            source = Source(data_fd, finding.log_id, st)
            if await is_whole(self.ctx, source):
                return
            out = await salvage(self.volume, source, self._place_in(above, name), records)
        finally:
            self.ctx.store.close(data_fd)
        self.quarantine.keep_aside(fd, finding.spot.name, finding.log_id.hex().encode() + b".data")
        self._tell(finding, out, self.quarantine.shown(above, out.name))

    # entries without an object ---------------------------------------------------------------------------------

    async def absent(self, check: Check) -> None:
        """Make again what can be made, salvage what the twin holds, and have `.dir` forget the rest.

        Nothing is forgotten while a part of the tree cannot be read: it may lie there.
        """
        for absent in check.absent:
            await _tried(absent.finding, self._absent, check, absent)

    async def _absent(self, check: Check, absent: Absent) -> None:
        entry, finding, spot, store = absent.entry, absent.finding, absent.spot, self.ctx.store
        fd = open_chain(self.ctx, spot.above)
        try:
            with suppress(FileNotFoundError):
                store.lstat(fd, spot.name)
                return  # Its place is taken by something that could not be moved.
            at = find_spot(self.ctx, check.ids[entry.log_id]) if entry.log_id in check.ids else None
            if at is not None and entry.kind is not Kind.DIR:
                src_fd = open_chain(self.ctx, at.above)
                try:
                    store.link(src_fd, at.name, fd, spot.name)
                finally:
                    store.close(src_fd)
                finding.action = "linked again to the file it is a name of"
                return
            if entry.kind is Kind.SYMLINK:
                with suppress(Damaged):
                    target = await read_target(self.ctx, entry.log_id)
                    store.symlink(encode_target_text(entry.log_id, len(target)), fd, spot.name)
                    finding.action = "made again from its sidecar"
                    return
        finally:
            store.close(fd)
        if not check.complete:
            raise OSError(errno.EIO, "it may lie in what cannot be read")
        above, _, name = self.quarantine.original(absent.path).rpartition(b"/")
        if entry.kind is Kind.FILE:
            empty_fd = self._empty()
            try:
                out = await salvage(self.volume, Source(empty_fd, entry.log_id, None), self._place_in(above, name))
            finally:
                store.close(empty_fd)
            self.quarantine.keep_sidecar_aside(entry.log_id)
            finding.lost_bytes = out.lost_bytes
            finding.moved_to = self.quarantine.shown(above, out.name) if out.name else b""
        await drop_entry(self.volume, await inode_of(self.volume, spot.above), entry.sealed)
        if entry.kind in (Kind.FILE, Kind.SYMLINK):
            self.quarantine.keep_sidecar_aside(entry.log_id)
            self.volume.reaper.add_id(entry.log_id)
        finding.action = "gone; its entry was removed" + (
            ", what its twin held was salvaged" if finding.moved_to else ""
        )

    # pieces ----------------------------------------------------------------------------------------------------

    def _empty(self) -> int:
        """A descriptor of an empty file without a name, in place of a data file that is gone."""
        store, tmp = self.ctx.store, self.ctx.dir_fd(b"tmp")
        fd = store.open(tmp, b"empty", os.O_RDWR | os.O_CREAT | os.O_EXCL)
        store.unlink(tmp, b"empty")
        return fd

    def _place_in(self, path: bytes, name: bytes) -> Place:
        async def place() -> tuple[Inode, bytes]:
            into = await self.quarantine.directory(path)
            return into, await self.quarantine.free_name(into, name)

        return place

    def _replace(self, dir_fd: int, name: bytes, make: Callable[[int, bytes], None]) -> None:
        """Make a new object in `tmp/` and rename it over (`dir_fd`, `name`)."""
        store, tmp = self.ctx.store, self.ctx.dir_fd(b"tmp")
        made = b"repair"
        with suppress(FileNotFoundError):
            store.unlink(tmp, made)
        make(tmp, made)
        store.rename(tmp, made, dir_fd, name)

    async def _sync_before_removal(self) -> None:
        await self.ctx.in_thread(self.ctx.store.syncfs, self.ctx.store.root())


async def is_whole(ctx: FsContext, source: Source) -> bool:
    """Whether a data file reads, block by block, as its sidecar says."""
    with opened(ctx, 0, source.file_id, os.dup(source.data_fd)) as file:
        try:
            await file.journal.load()
        except (Damaged, OSError):
            return False
        return not (await BlockReader(ctx, file.state).run(list(file.state.blocks))).ranges


def find_spot(ctx: FsContext, ino: int) -> Spot | None:
    """Where in `tree/` an inode lies, found by looking everywhere. Blocks. Raises OSError."""
    store = ctx.store
    todo: list[tuple[bytes, ...]] = [()]
    while todo:
        above = todo.pop()
        here = open_chain(ctx, above)
        try:
            for name in store.listdir(here):
                st = store.lstat(here, name)
                if st.st_ino == ino:
                    return Spot(above, name)
                if stat.S_ISDIR(st.st_mode):
                    todo.append((*above, name))
        finally:
            store.close(here)
    return None


async def _tried(finding: Finding, call: Callable[..., Awaitable[None]], *args: object) -> None:
    """Run one repair; a failure is said in its finding and leaves the others to go on."""
    if finding.action and finding.what is not What.EXCHANGED:
        return
    try:
        await call(*args)
    except Damaged as error:
        finding.detail = f"not put right: {error}"
    except OSError as error:
        finding.detail = f"not put right: {error.strerror}"
