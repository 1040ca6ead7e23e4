"""Mounting, serving and unmounting one volume through pyfuse3. One session per process, as pyfuse3 has it."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pyfuse3
import trio

from cryptfs.errors import CryptfsError, MissingDependency, MountpointUnusable
from cryptfs.fs.namespace import Owner
from cryptfs.fs.volume import Volume
from cryptfs.fuse import loop
from cryptfs.fuse.gate import Gate
from cryptfs.fuse.notify import Notifier, fuse_descriptor
from cryptfs.fuse.operations import Operations
from cryptfs.types import Kind

log = logging.getLogger("cryptfs")

_READ_AHEAD_KIB = 1024
_STOP_S = 30.0
_THREADS = 8
_UNMOUNT_S = 600.0
"""umount waits while the kernel writes its dirty pages to this process, which goes on answering."""


class FuseSession:
    """`mount`, then `run` until it is unmounted from outside or by `stop`."""

    def __init__(
        self,
        volume: Volume,
        gate: Gate,
        *,
        source: Path,
        mountpoint: Path,
        options: frozenset[str],
        read_only: bool,
        forced_owner: tuple[int, int] | None = None,
    ) -> None:
        self._volume = volume
        self.gate = gate
        self._forced = None if forced_owner is None else Owner(*forced_owner)
        self._notifier: Notifier | None = None
        self._threads = trio.CapacityLimiter(_THREADS)
        self._mountpoint = str(mountpoint)
        # A comma in fsname would start another option (libfuse's escaping is a backslash).
        name = str(source).replace("\\", "\\\\").replace(",", "\\,")
        self._options = {f"fsname={name}", "subtype=cryptfs", "default_permissions", *options}
        if read_only:
            self._options.add("ro")

    def mount(self) -> None:
        """Raises `MissingDependency`, `MountpointUnusable`."""
        if not os.path.exists("/dev/fuse"):
            raise MissingDependency("/dev/fuse is missing: the kernel's FUSE module is not loaded")
        loop.install()
        try:
            pyfuse3.init(Operations(self._volume, self.gate, self._forced), self._mountpoint, self._options)
        except RuntimeError as error:
            raise MountpointUnusable(f"mounting on {self._mountpoint} failed ({error})") from None
        self._notifier = Notifier(fuse_descriptor())

    async def answering(self) -> None:
        """Return once the mount has answered a request; `run` must be running."""
        await trio.to_thread.run_sync(os.statvfs, self._mountpoint)
        # Not before: the kernel sets its read-ahead anew when the binding has introduced itself.
        self._raise_read_ahead()

    def _raise_read_ahead(self) -> None:
        """Larger reads cost fewer requests; only root may ask for them, so failing is fine."""
        device = _device_of(self._mountpoint)
        if device is None or os.geteuid() != 0:
            return
        try:
            Path(f"/sys/class/bdi/{device}/read_ahead_kb").write_text(str(_READ_AHEAD_KIB))
        except OSError as error:
            log.info("read-ahead stays as it is: %s", error.strerror)

    async def run(self) -> None:
        """Answer requests until the mount is gone."""
        try:
            await pyfuse3.main()
        finally:
            if self._notifier is not None:
                self._notifier.close()
            pyfuse3.close(unmount=True)

    # forgetting ------------------------------------------------------------------------------------------------

    def expires_names(self) -> bool:
        """Whether the kernel can be told to ask again for every name at once."""
        return self._notifier is not None and self._notifier.expire_names()

    async def sync(self) -> None:
        """Fetch what programs wrote from the kernel, which may take as long as this process takes to write it."""
        await trio.to_thread.run_sync(_sync_mount, self._mountpoint, abandon_on_cancel=True, limiter=self._threads)

    async def drop_everything(self) -> None:
        """Have the kernel forget all names and content it knows; what was written and not fetched yet is fetched.

        Names first, with all that hangs on them and is not in use; then files nobody writes; then the others. On
        threads of their own, so that one that waits for a slow disk does not hold up the others. May be cancelled.
        """
        names = await self._top_names()
        await self._in_threads([functools.partial(self._drop_names, names)])
        clean, dirty = self._by_dirtiness()
        pieces = [clean[at::_THREADS] for at in range(_THREADS)]
        await self._in_threads([functools.partial(self._drop_pages, piece) for piece in pieces if piece])
        await self._in_threads([functools.partial(self._drop_pages, [ino]) for ino in dirty])

    async def drop_files_in_use(self) -> None:
        """The same once more for the content of open files."""
        clean, dirty = self._by_dirtiness(open_only=True)
        await self._in_threads([functools.partial(self._drop_pages, [ino]) for ino in clean + dirty])

    async def drop_range(self, ino: int, offset: int, length: int) -> None:
        """Have the kernel forget some pages."""
        if self._notifier is not None:
            await self._in_threads([functools.partial(_quietly, self._notifier.drop_pages, ino, offset, length)])

    def _by_dirtiness(self, *, open_only: bool = False) -> tuple[list[int], list[int]]:
        """Inode numbers of files: those without and those with something that no frame says yet; open ones first."""
        files = [i for i in self._volume.inodes.all() if i.kind == Kind.FILE and (i.file is not None or not open_only)]
        files.sort(key=lambda i: i.file is None)
        dirty = [i.ino for i in files if i.file is not None and i.file.journal.needs_frame]
        owing = set(dirty)
        return [i.ino for i in files if i.ino not in owing], dirty

    async def _top_names(self) -> list[tuple[int, bytes]]:
        """What the kernel knows in the root: dropped, it takes along everything below that nobody uses.

        Where it cannot be told to ask again for every name, all the names it may know.
        """
        everywhere = not self.expires_names()
        try:
            return await self._volume.names.known(everywhere=everywhere)
        except (OSError, CryptfsError) as error:
            log.warning("some names stay with the kernel for %.0f s at most: %s", self.gate.entry_timeout_s, error)
            return []

    def _drop_names(self, names: list[tuple[int, bytes]]) -> None:
        for parent, name in names:
            if self._notifier is not None:
                _quietly(self._notifier.drop_name, parent, name)

    def _drop_pages(self, inos: list[int]) -> None:
        for ino in inos:
            if self._notifier is not None:
                _quietly(self._notifier.drop_pages, ino)

    async def _in_threads(self, calls: list[Callable[[], None]]) -> None:
        async def one(call: Callable[[], None]) -> None:
            await trio.to_thread.run_sync(call, abandon_on_cancel=True, limiter=self._threads)

        async with trio.open_nursery() as nursery:
            for call in calls:
                nursery.start_soon(one, call)

    # ending ----------------------------------------------------------------------------------------------------

    async def stop(self) -> None:
        """Unmount: what programs wrote is fetched from the kernel first.

        One still in use is detached and ends when it can.
        """
        with trio.move_on_after(_STOP_S):
            await trio.to_thread.run_sync(_sync_mount, self._mountpoint, abandon_on_cancel=True)
        busy = await trio.to_thread.run_sync(_unmount, self._mountpoint)
        if busy:
            log.warning("the mount is in use, detaching it")
            pyfuse3.terminate()


def _quietly(call: Callable[..., bool], *args: object) -> None:
    """A page that cannot be dropped (EBUSY: being read or written this moment) must not keep the others."""
    try:
        call(*args)
    except OSError as error:
        log.info("the kernel could not drop what it was told to: %s", error.strerror)


def _device_of(mountpoint: str) -> str | None:
    """major:minor of the mount, from mountinfo (proc(5)): asking the mount itself would wait for this very thread."""
    with open("/proc/self/mountinfo", "rb") as table:
        for line in table:
            fields = line.split(b" ")
            where = fields[4].decode("unicode_escape").encode("latin-1")
            if where == os.fsencode(os.path.abspath(mountpoint)):
                return fields[2].decode()
    return None


def _sync_mount(mountpoint: str) -> None:
    """syncfs(2) on the mount: the kernel writes its dirty pages to this process, which must go on answering."""
    fd = os.open(mountpoint, os.O_RDONLY | os.O_DIRECTORY)
    try:
        ctypes.CDLL(None, use_errno=True).syncfs(fd)
    finally:
        os.close(fd)


def _unmount(mountpoint: str) -> bool:
    """Unmount; True if it is busy."""
    command = ["umount", mountpoint] if os.geteuid() == 0 else ["fusermount3", "-u", "-q", mountpoint]
    try:
        return subprocess.run(command, check=False, capture_output=True, timeout=_UNMOUNT_S).returncode != 0
    except subprocess.TimeoutExpired:
        return True
