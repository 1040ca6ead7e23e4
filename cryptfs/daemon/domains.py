"""The domains of one mount: opened when they are entered, made, removed, closed (docs/adr/0013-domains.md).

Each is a volume with everything a mounted volume has: agent link, key cache, gate, locking, background work. It lives
in one task, from the first use of what is in it while the agent holds its KEK to the end of the mount or its removal.
Locking does not close it: as with the mounted volume, what has been written stays here until it can be written on.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import trio

from cryptfs.daemon.args import DaemonArgs
from cryptfs.daemon.keyed import Keyed
from cryptfs.errors import CryptfsError, Damaged, NotAVolume, VolumeBusy, VolumeDamaged, VolumeLocked
from cryptfs.fs.attributes import without_links
from cryptfs.fs.directory import pinned
from cryptfs.fs.domain import (
    MISSING,
    SHREDDED,
    aside_name,
    domains_fd,
    find_name,
    is_shredded,
    make_place,
    put_aside,
    put_in_place,
    root_stat,
    show_at_place,
)
from cryptfs.fs.inodes import Inode
from cryptfs.fs.reaper import remove_tree
from cryptfs.fs.volume import Volume, open_volume
from cryptfs.fuse.routing import Part
from cryptfs.fuse.session import FuseSession
from cryptfs.keys.clock import SystemClock
from cryptfs.keys.link import AgentLink, Mounted
from cryptfs.ops.domains import domain_dir
from cryptfs.ops.info import read_volume_file
from cryptfs.ops.init import config_of
from cryptfs.store.owner import local_store
from cryptfs.types import DOMAINS_DIR

log = logging.getLogger("cryptfs")


@dataclass(slots=True)
class _Open:
    """A domain that is open, or about to be. `place`: the inode number of its place."""

    domain_id: bytes
    place: int
    ending: trio.Event = field(default_factory=trio.Event)
    over: trio.Event = field(default_factory=trio.Event)
    part: Part | None = None
    clean: bool = True


class Domains:
    """`fuse.routing.Domains`. Their tasks run in `nursery`; `close` before the mounted volume is closed."""

    def __init__(
        self, nursery: trio.Nursery, args: DaemonArgs, volume: Volume, link: AgentLink, session: FuseSession,
        clock: SystemClock,
    ) -> None:  # fmt: skip
        """`link`: the mounted volume's."""
        self._nursery = nursery
        self._args = args
        self._volume = volume
        self._link = link
        self._session = session
        self._clock = clock
        self._open: dict[bytes, _Open] = {}
        self._opening = trio.Lock()
        """One is opened at a time: each opening syncs the file system anyway."""
        self._removed: list[_Open] = []
        """Without a place, and still open because a file of it is."""
        session.routing.domains = self
        volume.names.removing_domain = self.removing
        with suppress(FileNotFoundError, Damaged):
            domains_fd(volume.ctx)
            session.routing.begin()

    # opening ---------------------------------------------------------------------------------------------------

    async def enter(self, place: Inode, domain_id: bytes) -> Part:
        """See `fuse.routing.Domains`."""
        async with self._opening:
            known = self._open.get(domain_id)
            if known is not None and known.part is not None:
                if known.place != place.ino:
                    raise Damaged("domain", f"{domain_id.hex()} has its place elsewhere")
                return known.part
            name = find_name(self._volume.ctx, domain_id)
            self._volume_file(domain_id)
            if not await self._link.is_unlocked(domain_id):
                raise VolumeLocked("the domain is locked")
            if name == aside_name(domain_id) and not self._args.read_only:
                # Its making was cut short by a crash after the place had named it, or its removal came to nothing.
                await self._volume.ctx.in_thread(put_in_place, self._volume.ctx, domain_id)
            opened = await self._start(place, domain_id)
            assert opened.part is not None
            self._session.routing.place(place.ino, opened.part)
        await self._shown(opened, place)
        return opened.part

    def _volume_file(self, domain_id: bytes) -> bytes:
        """A domain's `volume` file. Raises `Damaged` if there is none or it is another volume's."""
        try:
            # It may have been put aside when it was opened, and be in its place by now.
            file = read_volume_file(domain_dir(self._args.cipher_dir, domain_id))
            found = config_of(file).volume_id
        except (NotAVolume, VolumeDamaged) as error:
            raise Damaged("domain", f"{domain_id.hex()}: {error}") from error
        if found != domain_id:
            raise Damaged("domain", f"domains/{domain_id.hex()} holds another volume")
        return file

    async def _start(self, place: Inode, domain_id: bytes) -> _Open:
        """Open a domain, put aside or not. Raises `VolumeLocked`, `Damaged`, EBUSY, OSError."""
        opened = _Open(domain_id, place.ino)
        mountpoint = self._args.mountpoint / os.fsdecode(await self._volume.names.path_of(place))
        failure: BaseException | None = None
        try:
            await self._nursery.start(self._live, opened, mountpoint)
        except (Exception, trio.Cancelled) as error:  # noqa: BLE001 - raised again below, out of its group
            failure = error
        while isinstance(failure, BaseExceptionGroup) and len(failure.exceptions) == 1:
            failure = failure.exceptions[0]
        if isinstance(failure, VolumeBusy):
            log.warning("domain %s is in use elsewhere: %s", domain_id.hex(), failure)
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        if isinstance(failure, VolumeDamaged):
            raise Damaged("domain", f"{domain_id.hex()}: {failure}")
        if failure is not None:
            raise failure
        return opened

    async def _live(self, opened: _Open, mountpoint: Path, task_status: trio.TaskStatus[None]) -> None:
        """A domain's life, as `daemon.main` has the mounted volume's."""
        args = self._args

        def read_volume() -> bytes:
            return self._volume_file(opened.domain_id)

        config = config_of(read_volume())
        store = local_store(domain_dir(args.cipher_dir, opened.domain_id))
        try:
            if store.fstat(store.root()).st_dev != self._volume.ctx.store.fstat(self._volume.ctx.store.root()).st_dev:
                raise Damaged("domain", f"domains/{opened.domain_id.hex()} lies on another file system")
            async with trio.open_nursery() as nursery:
                volume: Volume | None = None
                cipher_dir = args.cipher_dir / DOMAINS_DIR / opened.domain_id.hex()
                mounted = Mounted(config.volume_id, str(cipher_dir), str(mountpoint), read_volume)
                keyed = Keyed(nursery, args, mounted, self._clock)
                try:
                    await keyed.link.attach()
                    keyed.serve_keys()
                    volume = await open_volume(
                        config,
                        store,
                        keyed.keys,
                        self._clock,
                        os.urandom,
                        read_only=args.read_only,
                        root_ino=opened.place,
                    )
                    opened.part = self._session.part(volume, keyed.gate)
                    keyed.serve_volume(volume, self._session.forgetting(volume, keyed.gate))
                    self._open[opened.domain_id] = opened
                    self._session.routing.add(opened.part)
                    log.info("domain %s is open on %s", opened.domain_id.hex(), mountpoint)
                    task_status.started()
                    await opened.ending.wait()
                finally:
                    with trio.CancelScope(shield=True):
                        if volume is not None:
                            await self._leave(opened, volume)
                        await keyed.leave()
                    nursery.cancel_scope.cancel()
        finally:
            store.close_store()
            opened.over.set()

    async def _leave(self, opened: _Open, volume: Volume) -> None:
        place = self._volume.inodes.find(opened.place)
        if self._open.get(opened.domain_id) is opened:
            del self._open[opened.domain_id]
            if place is not None:
                await self._shown(opened, place, times=True)
        if opened.part is not None:
            self._session.routing.remove(opened.place, opened.part)
        opened.clean = await volume.close()

    async def _shown(self, opened: _Open, place: Inode, *, times: bool = False) -> None:
        """Copy what `stat` says of the domain's root to its place. What fails is logged: it is for show."""
        assert opened.part is not None
        try:
            await show_at_place(self._volume, place, opened.part.volume, times=times)
        except (OSError, CryptfsError) as error:
            log.warning("inode %d: the domain's place does not show its attributes: %s", place.ino, error)

    # making ----------------------------------------------------------------------------------------------------

    async def make(self, place: Inode, domain_id: bytes) -> None:
        """See `fuse.routing.Domains`."""
        ctx = self._volume.ctx
        async with self._opening:
            if domain_id in self._open:
                raise OSError(errno.EEXIST, os.strerror(errno.EEXIST))
            ctx.store.lstat(domains_fd(ctx), aside_name(domain_id))
            if not await self._link.is_unlocked(domain_id):
                raise VolumeLocked("the domain is locked")
            opened = await self._start(place, domain_id)
        assert opened.part is not None
        # Not under `_opening`: who removes a directory waits for that while it has locks that this needs.
        try:
            await make_place(self._volume, place, opened.part.volume)
            await ctx.in_thread(put_in_place, ctx, domain_id)
        except BaseException:
            opened.ending.set()
            with trio.CancelScope(shield=True):
                await opened.over.wait()
            raise
        self._session.routing.place(place.ino, opened.part)

    # removing --------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def removing(self, place: Inode, domain_id: bytes) -> AsyncIterator[None]:
        """See `Removing.removing_domain`: the domain must be unlocked and empty, and stays so while its place goes.

        Or shredded: then nobody can look into it, and it goes with all that is in it.
        """
        if await self._volume.ctx.in_thread(is_shredded, self._volume.ctx, domain_id):
            log.warning("inode %d: the place of a shredded domain is removed, and what is left of it", place.ino)
            yield
            self._put_aside(place, domain_id)
            return
        try:
            part = await self.enter(place, domain_id)
        except Damaged as error:
            if error.reason != MISSING:
                raise
            log.warning("inode %d: the place of a domain is removed, of which there is nothing left", place.ino)
            yield
            return
        part.gate.check()
        volume, root = part.volume, part.volume.root
        node = await volume.inodes.dir(root)
        with pinned(node):
            async with node.lock.exclusive():
                if node.entries:
                    raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))
                yield
                node.removed, root.last_st = True, without_links(root_stat(volume))
        self._put_aside(place, domain_id)

    def _put_aside(self, place: Inode, domain_id: bytes) -> None:
        """After a domain's place is gone."""
        opened = self._open.pop(domain_id, None)
        if opened is None:
            opened = _Open(domain_id, place.ino)
            opened.over.set()
        self._session.routing.unplace(place.ino)
        try:
            put_aside(self._volume.ctx, domain_id)
        except (OSError, Damaged) as error:
            log.warning("domain %s is removed, and its directory could not be put aside: %s", domain_id.hex(), error)
            return
        self._removed.append(opened)
        if opened.part is None or not opened.part.volume.inodes.with_files():
            self._nursery.start_soon(self._bury, opened)

    async def _bury(self, opened: _Open) -> None:
        """Delete a removed domain's directory, once the removal of its place is durable."""
        opened.ending.set()
        await opened.over.wait()
        try:
            await self._volume.ctx.sync_everything()
        except OSError as error:
            log.warning("a removed domain's directory stays until `check --repair`: %s", error.strerror)
            return
        await self._delete(opened)

    async def _delete(self, opened: _Open) -> None:
        ctx = self._volume.ctx
        await ctx.in_thread(remove_tree, ctx.store, domains_fd(ctx), aside_name(opened.domain_id), SHREDDED)
        self._removed.remove(opened)

    # closing ---------------------------------------------------------------------------------------------------

    async def close(self) -> bool:
        """Close every domain; True if all were left clean. Then nothing of them is used any more."""
        ending = [*self._open.values(), *self._removed]
        for opened in ending:
            opened.ending.set()
        for opened in ending:
            await opened.over.wait()
        if self._removed:
            with suppress(OSError):
                await self._volume.ctx.sync_everything()
                for opened in list(self._removed):
                    await self._delete(opened)
        return all(opened.clean for opened in ending)
