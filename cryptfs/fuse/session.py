"""Mounting, serving and unmounting one volume through pyfuse3. One session per process, as pyfuse3 has it."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
from pathlib import Path

import pyfuse3
import trio

from cryptfs.errors import MissingDependency, MountpointUnusable
from cryptfs.fs.making import Owner
from cryptfs.fs.volume import Volume
from cryptfs.fuse import loop
from cryptfs.fuse.forgetting import Forgetting, sync_mount
from cryptfs.fuse.gate import Gate
from cryptfs.fuse.notify import Notifier, fuse_descriptor
from cryptfs.fuse.open_files import OpenFiles
from cryptfs.fuse.routing import Part, Routing

log = logging.getLogger("cryptfs")

_READ_AHEAD_KIB = 1024
_STOP_S = 30.0
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
        self.open_files = OpenFiles()
        self._forced = None if forced_owner is None else Owner(*forced_owner)
        self._traffic = gate.traffic
        self.routing = Routing(self.part(volume, gate))
        self._notifier: Notifier | None = None
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
            pyfuse3.init(self.routing, self._mountpoint, self._options)
        except RuntimeError as error:
            raise MountpointUnusable(f"mounting on {self._mountpoint} failed ({error})") from None
        self._notifier = Notifier(fuse_descriptor())

    def part(self, volume: Volume, gate: Gate) -> Part:
        """One of this mount's volumes, for `Routing`."""
        gate.traffic = self._traffic
        return Part(volume, gate, self.open_files, self._forced)

    def forgetting(self, volume: Volume, gate: Gate) -> Forgetting:
        """What makes the kernel forget one of the mount's volumes; `mount` must have succeeded."""
        assert self._notifier is not None
        return Forgetting(volume, gate, self._notifier, self.open_files, self._mountpoint)

    def clone(self) -> int:
        """A descriptor of the mount's connection to the kernel with requests of its own. Raises OSError."""
        if self._notifier is None:
            raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))
        return self._notifier.clone()

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

    # ending ----------------------------------------------------------------------------------------------------

    async def stop(self) -> None:
        """Unmount: what programs wrote is fetched from the kernel first.

        One still in use is detached and ends when it can.
        """
        with trio.move_on_after(_STOP_S):
            await trio.to_thread.run_sync(sync_mount, self._mountpoint, abandon_on_cancel=True)
        busy = await trio.to_thread.run_sync(_unmount, self._mountpoint)
        if busy:
            log.warning("the mount is in use, detaching it")
            pyfuse3.terminate()


def _device_of(mountpoint: str) -> str | None:
    """major:minor of the mount, from mountinfo (proc(5)): asking the mount itself would wait for this very thread."""
    with open("/proc/self/mountinfo", "rb") as table:
        for line in table:
            fields = line.split(b" ")
            where = fields[4].decode("unicode_escape").encode("latin-1")
            if where == os.fsencode(os.path.abspath(mountpoint)):
                return fields[2].decode()
    return None


def _unmount(mountpoint: str) -> bool:
    """Unmount; True if it is busy."""
    command = ["umount", mountpoint] if os.geteuid() == 0 else ["fusermount3", "-u", "-q", mountpoint]
    try:
        return subprocess.run(command, check=False, capture_output=True, timeout=_UNMOUNT_S).returncode != 0
    except subprocess.TimeoutExpired:
        return True
