"""The three directories that are timed: a cryptfs volume, a gocryptfs volume, and a plain directory beside them."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from abc import ABC, abstractmethod
from pathlib import Path

from scripts.driver import CommandFailed, Volume, run

PASSPHRASE = "side by side"
DROP_CACHES = Path("/proc/sys/vm/drop_caches")


class Target(ABC):
    """A directory to work in, and how to make what is cached of it cold."""

    name: str
    root: Path
    """Where the workloads run."""
    backing: Path
    """The directory on disk behind it."""

    @abstractmethod
    def start(self) -> None:
        """Creates and mounts it; raises `CommandFailed`."""

    @abstractmethod
    def stop(self) -> None:
        """Unmounts it, by force if need be."""

    @abstractmethod
    def remount(self) -> None:
        """Empties the mount's own caches."""

    def make_cold(self) -> None:
        """Writes everything back, then empties the page, entry and attribute caches.

        As root the kernel drops all of them; otherwise the mount is renewed and the backing files are dropped one by
        one, which leaves the backing directory's entries and attributes cached (the same for all three).
        """
        os.sync()
        if os.access(DROP_CACHES, os.W_OK):
            DROP_CACHES.write_text("3", "ascii")
            return
        self.remount()
        for directory, _, files in os.walk(self.backing):
            for name in files:
                with contextlib.suppress(OSError):
                    descriptor = os.open(os.path.join(directory, name), os.O_RDONLY | os.O_NOFOLLOW)
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                    os.close(descriptor)


class Plain(Target):
    """The backing file system itself."""

    name = "plain"

    def __init__(self, base: Path) -> None:
        self.root = self.backing = base / "plain"

    def start(self) -> None:
        """Makes the directory."""
        self.root.mkdir()

    def stop(self) -> None:
        """Leaves it to the caller, who removes the base directory."""

    def remount(self) -> None:
        """There is no mount."""


class Cryptfs(Target):
    """A cryptfs volume made and mounted by the command."""

    name = "cryptfs"

    def __init__(self, base: Path, block_size: int | None = None) -> None:
        self.base = base / "cryptfs"
        self.volume = Volume(self.base)
        self.root, self.backing = self.volume.mountpoint, self.volume.cipher_dir
        self.options = [] if block_size is None else ["--block-size", str(block_size)]

    def start(self) -> None:
        """`cryptfs init`, `cryptfs mount`."""
        self.base.mkdir()
        self.volume.create(PASSPHRASE, "--kdf-cost", "low", *self.options)
        self.volume.mount(PASSPHRASE)

    def stop(self) -> None:
        """`cryptfs umount`, and the agent stopped."""
        self.volume.clean_up()

    def remount(self) -> None:
        """`cryptfs umount`, `cryptfs mount`."""
        self.volume.umount()
        self.volume.mount(PASSPHRASE)


class Gocryptfs(Target):
    """A gocryptfs volume with its default options and the cheapest passphrase hash."""

    name = "gocryptfs"

    def __init__(self, base: Path) -> None:
        self.base = base / "gocryptfs"
        self.root, self.backing = self.base / "mnt", self.base / "cipher"
        self.extpass = ["-extpass", f"echo {PASSPHRASE}"]

    def start(self) -> None:
        """`gocryptfs -init`, then the mount."""
        if shutil.which("gocryptfs") is None:
            raise CommandFailed("gocryptfs is not installed: apt-get install gocryptfs")
        self.root.mkdir(parents=True)
        self.backing.mkdir()
        run(["gocryptfs", "-init", "-q", "-scryptn", "10", *self.extpass, self.backing])
        self._mount()

    def _mount(self) -> None:
        # The daemon keeps the output it is given, so a pipe would never end; without syslogd it complains there.
        words = ["gocryptfs", "-q", *self.extpass, str(self.backing), str(self.root)]
        nowhere = subprocess.DEVNULL
        done = subprocess.run(words, check=False, stdin=nowhere, stdout=nowhere, stderr=nowhere)
        if done.returncode:
            raise CommandFailed(f"gocryptfs: exit code {done.returncode}")

    def stop(self) -> None:
        """Unmounts."""
        if self.root.is_mount():
            with contextlib.suppress(CommandFailed):
                run(["fusermount3", "-u", self.root])
        if self.root.is_mount():
            run(["fusermount3", "-u", "-z", self.root])

    def remount(self) -> None:
        """Unmounts and mounts again."""
        run(["fusermount3", "-u", self.root])
        self._mount()
