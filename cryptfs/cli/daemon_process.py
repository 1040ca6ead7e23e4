"""Starting the daemon that serves one mount, and waiting until the mount answers."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cryptfs import paths
from cryptfs.cli import mounts, processes
from cryptfs.cli.advice import error_for, hinted
from cryptfs.errors import CryptfsError, MountpointUnusable, UsageError

_MEMORY = {
    "PYTHONMALLOC": "malloc",
    "GLIBC_TUNABLES": "glibc.malloc.arena_max=1:glibc.malloc.tcache_count=128"
    ":glibc.malloc.trim_threshold=268435456:glibc.malloc.mmap_threshold=33554432",
}
"""See `daemon.memory`. One arena: all threads allocate under the interpreter's lock anyway. The thresholds (256 and
32 MiB): memory goes back when `daemon.memory` asks for it, not whenever a request's buffer is freed."""
START_S = 60.0
"""How long a daemon may take until it is ready: it syncs the backing file system first, which may be much."""

FUSE_OPTIONS = frozenset(
    {
        "allow_other", "allow_root", "atime", "async", "auto_unmount", "default_permissions", "dev", "dirsync", "exec",
        "noatime", "nodev", "nodiratime", "noexec", "nosuid", "relatime", "ro", "rw", "suid", "sync",
    }
)  # fmt: skip
"""What the daemon takes after -o; it checks again, but by then a key has been brought in."""


@dataclass(frozen=True)
class MountOptions:
    """What the daemon is told besides where; None leaves the daemon's own default."""

    read_only: bool = False
    max_age_s: float | None = None
    max_entries: int | None = None
    max_uses: int | None = None
    caching: bool | None = None
    fuse_options: tuple[str, ...] = field(default=())
    force_owner: str | None = None

    def arguments(self) -> list[str]:
        """As the daemon's command line."""
        words = ["--read-only"] if self.read_only else []
        if self.caching is not None:
            words.append("--cache" if self.caching else "--no-cache")
        for name, value in (
            ("--max-age", self.max_age_s),
            ("--max-entries", self.max_entries),
            ("--max-uses", self.max_uses),
            ("--force-owner", self.force_owner),
        ):
            if value is not None:
                words += [name, str(value)]
        for option in self.fuse_options:
            words += ["-o", option]
        return words


def check(options: MountOptions) -> None:
    """That the daemon would take these options. Raises `UsageError`, before any key is brought in for nothing."""
    from cryptfs.format.policy import NO_POLICY
    from cryptfs.fs.owner import owner_of
    from cryptfs.keys.policy import Overrides

    Overrides(options.max_age_s, options.max_entries, options.max_uses, options.caching).over(NO_POLICY)
    owner_of(options.force_owner)
    given = {word for group in options.fuse_options for word in group.split(",") if word}
    if unknown := sorted(given - FUSE_OPTIONS):
        raise hinted(UsageError(f"unknown mount option: {unknown[0]}"), f"there are {', '.join(sorted(FUSE_OPTIONS))}")


def log_file(volume_id: bytes) -> Path:
    """Where the daemon of a volume (id of 16 bytes) writes its log; it never holds a secret."""
    return Path(paths.state_dir(), "log", f"{volume_id.hex()}.log")


def remove_logs(volume_id: bytes) -> None:
    """Remove what the daemon of a volume that nobody can mount any more has written there."""
    first = log_file(volume_id)
    for path in first.parent.glob(f"{first.name}*"):
        with contextlib.suppress(OSError):
            path.unlink()


@dataclass
class Launch:
    """A daemon to be started: `mounted`, and before that `ahead` while the key is brought in."""

    cipher_dir: Path
    mountpoint: Path
    volume_id: bytes
    options: MountOptions
    foreground: bool
    _held: processes.Starting | None = None

    @contextlib.contextmanager
    def ahead(self) -> Iterator[None]:
        """Its program is loaded beside what is done in the block, and touches nothing; if that fails, it is ended."""
        starting = self._started(held=True)
        try:
            yield
        except BaseException:
            starting.give_up()
            raise
        self._held = starting

    def mounted(self) -> processes.Starting:
        """A daemon whose mount answers; the caller lets it live (`leave`) or waits for it.

        Raises what the daemon reports, `MountpointUnusable` if the mount does not answer, `CryptfsError` if the daemon
        says nothing.
        """
        starting, self._held = self._held or self._started(held=False), None
        log = log_file(self.volume_id)
        try:
            starting.go()
            line = starting.wait_ready(START_S)
            if line == "ready":
                _check_answers(self.mountpoint)
                return starting
            if line is None:
                raise hinted(CryptfsError(f"the daemon was not ready within {START_S:.0f} s"), f"see {log}")
        except BaseException:
            with processes.ended_unless_left(starting):
                raise
        exit_code = starting.end()
        raise processes.reported(line, exit_code) or hinted(
            error_for(exit_code, "the daemon ended before it was ready"), f"see {log}"
        )

    def _started(self, *, held: bool) -> processes.Starting:
        log = log_file(self.volume_id)
        arguments = ["--cipher-dir", str(self.cipher_dir), "--mountpoint", str(self.mountpoint)]
        arguments += ["--agent-socket", paths.agent_socket(), *self.options.arguments()]
        arguments += ["--foreground"] if self.foreground else ["--log-file", str(log)]
        return processes.start(
            mounts.DAEMON_MODULE, arguments, log_file=None if self.foreground else log, settings=_MEMORY, held=held
        )


def _check_answers(mountpoint: Path) -> None:
    try:
        mounts.answer_of(lambda: os.statvfs(mountpoint))
    except TimeoutError:
        raise MountpointUnusable(f"the mount on {mountpoint} does not answer") from None
    except OSError as error:
        raise MountpointUnusable(f"the mount on {mountpoint} does not answer: {error.strerror}") from error
    mount = mounts.mount_at(mountpoint)
    if mount is None or not mount.is_ours:
        raise MountpointUnusable(f"the daemon is ready, but nothing is mounted on {mountpoint}")
