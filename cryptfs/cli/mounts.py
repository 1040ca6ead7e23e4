"""What the kernel says about mount points and daemons, and the checks that depend on it.

Nothing here waits for a filesystem that may have died: mounts are read from /proc/self/mountinfo, daemons from
/proc/PID/cmdline (proc(5)), and a mount point itself is only touched from a thread that may be left behind.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import re
import shutil
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from cryptfs.cli import processes
from cryptfs.cli.advice import hinted
from cryptfs.errors import MissingDependency, MountpointUnusable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cryptfs.cli.processes import Watch

T = TypeVar("T")

FILESYSTEM_TYPE = "fuse.cryptfs"
DAEMON_MODULE = "cryptfs.daemon"
LEAVING_S = 30.0
ANSWER_S = 5.0
"""How long a mount point may take to answer before it counts as hung."""


@dataclass(frozen=True)
class Mount:
    """One line of mountinfo: where, of what type, from what source."""

    mountpoint: Path
    fstype: str
    source: str

    @property
    def is_ours(self) -> bool:
        """Whether it is a cryptfs mount, dead or alive."""
        return self.fstype == FILESYSTEM_TYPE


def parse_mountinfo(text: str) -> list[Mount]:
    """Every mount of a mountinfo file, in its order: of two on one mount point, the later one is on top."""
    mounts = []
    for line in text.split("\n"):  # not splitlines: a path may contain any other line separator of Unicode
        left, separator, right = line.partition(" - ")
        before, after = left.split(" "), right.split(" ")
        if separator and len(before) > 4 and len(after) > 1:
            mounts.append(Mount(Path(_unescaped(before[4])), _unescaped(after[0]), _unescaped(after[1])))
    return mounts


def _unescaped(field: str) -> str:
    # The kernel writes space, tab, newline and backslash as three octal digits.
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def mount_at(mountpoint: Path) -> Mount | None:
    """The topmost mount on exactly this (absolute, resolved) path, or None."""
    return next((mount for mount in reversed(all_mounts()) if mount.mountpoint == mountpoint), None)


def mount_over(path: Path) -> Mount | None:
    """The mount that the (absolute, resolved) path lies in, which need not exist."""
    above = {mount.mountpoint: mount for mount in all_mounts()}
    return next((above[each] for each in (path, *path.parents) if each in above), None)


def all_mounts() -> list[Mount]:
    """The mounts of this process's namespace."""
    return parse_mountinfo(os.fsdecode(Path("/proc/self/mountinfo").read_bytes()))


def resolved(path: Path) -> Path:
    """`path`, absolute and free of symlinks, without asking a filesystem that is mounted on it.

    A mount point whose daemon died or hangs would answer with ENOTCONN or never.
    """
    plain = Path(os.path.abspath(path))
    located = Path(os.path.realpath(plain.parent)) / plain.name
    if mount_at(located) is not None or not os.path.islink(located):
        return located
    return Path(os.path.realpath(plain))


def answer_of(ask: Callable[[], T], timeout_s: float = ANSWER_S) -> T:
    """`ask()`'s result or exception, from a thread that is left behind if it takes too long. Raises `TimeoutError`."""
    result: list[T] = []
    failure: list[OSError] = []

    def run() -> None:
        try:
            result.append(ask())
        except OSError as error:
            failure.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout_s)
    if failure:
        raise failure[0]
    if not result:
        raise TimeoutError
    return result[0]


def is_dead(mountpoint: Path) -> bool:
    """Whether a mount's daemon is gone without having unmounted: the kernel answers ENOTCONN (or EIO while it aborts).

    Raises `MountpointUnusable` if it does not answer at all.
    """
    try:
        answer_of(lambda: os.statvfs(mountpoint))  # not stat: the kernel may answer that from its cache for ever
    except TimeoutError:
        hang = MountpointUnusable(f"{mountpoint} does not answer")
        raise hinted(hang, "end its daemon (`cryptfs status` shows the process), then `cryptfs umount` it") from None
    except OSError as error:
        return error.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    return False


def check_usable(mountpoint: Path, cipher_dir: Path) -> None:
    """That something can be mounted on `mountpoint` (both resolved); clears a dead mount of ours that is in the way.

    Raises `MountpointUnusable`: inside, equal to or above the cipher directory; missing; no directory; a mount; not
    empty.
    """
    if mountpoint == cipher_dir:
        raise MountpointUnusable(f"the mount point {mountpoint} is the volume itself")
    if cipher_dir in mountpoint.parents:
        raise MountpointUnusable(f"the mount point {mountpoint} lies inside the volume {cipher_dir}")
    if mountpoint in cipher_dir.parents:
        raise MountpointUnusable(f"the volume {cipher_dir} lies under the mount point {mountpoint} and would be hidden")
    clear_dead(mountpoint)
    if (mount := mount_at(mountpoint)) is not None:
        what = "a cryptfs volume" if mount.is_ours else f"a file system of type {mount.fstype}"
        raise hinted(MountpointUnusable(f"{what} is mounted on {mountpoint} already"), "choose an empty directory")
    try:
        with os.scandir(mountpoint) as entries:
            empty = next(entries, None) is None
    except FileNotFoundError:
        missing = MountpointUnusable(f"the mount point {mountpoint} does not exist")
        raise hinted(missing, f"mkdir {mountpoint}") from None
    except NotADirectoryError:
        raise MountpointUnusable(f"the mount point {mountpoint} is no directory") from None
    except OSError as error:
        raise MountpointUnusable(f"the mount point {mountpoint} cannot be read: {error.strerror}") from error
    if not empty:
        raise hinted(MountpointUnusable(f"the mount point {mountpoint} is not empty"), "choose an empty directory")


def clear_dead(mountpoint: Path) -> bool:
    """Unmount what killed daemons left on `mountpoint`; only mounts of our type. Returns whether there was one."""
    cleared = False
    while (mount := mount_at(mountpoint)) is not None and mount.is_ours and is_dead(mountpoint):
        try:
            unmount(mountpoint)
        except MountpointUnusable:
            unmount(mountpoint, lazily=True)  # programs still hold descriptors in it; nothing of theirs can be saved
        cleared = True
    return cleared


_BUSY_TRIES, _BUSY_PAUSE_S = 5, 0.1


def unmount(mountpoint: Path, *, lazily: bool = False) -> None:
    """fusermount3 -u, or umount(8) for root where that is missing.

    Raises `MountpointUnusable` (busy, or not ours to unmount) and `MissingDependency`.
    """
    if tool := shutil.which("fusermount3"):
        command = [tool, "-u", *(["-z"] if lazily else []), "--", str(mountpoint)]
    elif os.geteuid() == 0 and (tool := shutil.which("umount")):
        command = [tool, *(["-l"] if lazily else []), "--", str(mountpoint)]
    else:
        raise _no_fusermount()
    said = ""
    for _ in range(_BUSY_TRIES):
        ended = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, env=_C_LOCALE)
        if ended.returncode == 0:
            return
        said = ended.stderr.strip()
        if "busy" not in said.lower():
            break
        # For a moment it may be the daemon's own helper, which has the kernel write what is dirty.
        time.sleep(_BUSY_PAUSE_S)
    if "busy" in said.lower():
        busy = MountpointUnusable(f"{mountpoint} is in use; it stays mounted")
        raise hinted(busy, f"close what uses it: `fuser -vm {mountpoint}` shows the programs")
    raise MountpointUnusable(f"cannot unmount {mountpoint}: {said}")


_C_LOCALE = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}


def check_dependencies() -> None:
    """That this machine can mount anything. Raises `MissingDependency` with what to install."""
    import importlib.util

    if shutil.which("fusermount3") is None:
        raise _no_fusermount()
    if not os.path.exists("/dev/fuse"):
        missing = MissingDependency("/dev/fuse is missing")
        raise hinted(missing, "load the module with `modprobe fuse`; in a container, start it with --device /dev/fuse")
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        denied = MissingDependency("/dev/fuse may not be opened by this user")
        raise hinted(denied, "its mode should be 0666, or this user should be in its group: `ls -l /dev/fuse`")
    if importlib.util.find_spec("pyfuse3") is None:
        raise hinted(
            MissingDependency("the Python package pyfuse3 is missing"), "pip install pyfuse3 (Debian: libfuse3-dev)"
        )


def _no_fusermount() -> MissingDependency:
    return hinted(MissingDependency("fusermount3 is missing"), "install the Debian package fuse3")


@dataclass(frozen=True)
class Daemon:
    """A running daemon as its own command line describes it."""

    pid: int
    cipher_dir: Path
    mountpoint: Path
    agent_socket: Path


def running_daemons() -> list[Daemon]:
    """Every daemon of this user: its command line holds no secret and says what it serves, so no pid file is needed."""
    maybe = (_daemon_of(int(name)) for name in os.listdir("/proc") if name.isdecimal())
    return [daemon for daemon in maybe if daemon is not None]


def daemon_of_volume(cipher_dir: Path) -> Daemon | None:
    """The daemon of this user that serves the (resolved) cipher directory."""
    return next((daemon for daemon in running_daemons() if daemon.cipher_dir == cipher_dir), None)


def daemon_of_mount(mountpoint: Path) -> Daemon | None:
    """The daemon of this user that serves the (resolved) mount point."""
    return next((daemon for daemon in running_daemons() if daemon.mountpoint == mountpoint), None)


def _daemon_of(pid: int) -> Daemon | None:
    with contextlib.suppress(OSError):
        if _effective_uid(pid) == os.geteuid():
            words = [os.fsdecode(word) for word in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")]
            values = dict(itertools.pairwise(words))
            wanted = ("--cipher-dir", "--mountpoint", "--agent-socket")
            if values.get("-m") == DAEMON_MODULE and all(name in values for name in wanted):
                if _is_held(pid, values.get("--go-fd")):
                    return None
                return Daemon(pid, *(Path(values[name]) for name in wanted))
    return None


def _is_held(pid: int, go_fd: str | None) -> bool:
    """Whether the process waits for its command to bring a key in, and serves nothing (`daemon.process.may_go`).

    One that does is readable, as it has nothing to hide yet; one that goes on makes itself non-dumpable.
    """
    if go_fd is None:
        return False
    try:
        return os.readlink(f"/proc/{pid}/fd/{go_fd}").startswith("pipe:")
    except OSError:
        return False


def _effective_uid(pid: int) -> int | None:
    # Not the owner of /proc/PID: that is root for a process which made itself non-dumpable.
    ids = re.search(rb"^Uid:\t\d+\t(\d+)", Path(f"/proc/{pid}/status").read_bytes(), re.MULTILINE)
    return int(ids[1]) if ids else None


@contextlib.contextmanager
def watched(daemon: Daemon | None) -> Iterator[Watch]:
    """`processes.watched` for a daemon, sure not to watch another process that got its number."""
    with processes.watched(daemon.pid if daemon else None) as watch:
        if watch.fd is not None and daemon is not None and _daemon_of(daemon.pid) != daemon:
            yield processes.Watch(None)
        else:
            yield watch


def is_leaving(daemon: Daemon, timeout_s: float = LEAVING_S) -> bool:
    """Whether the daemon ends by itself in time: its mount is gone (fusermount3 -u does not wait), it is writing back.

    Returns as soon as it has ended, or as soon as its mount is there after all, because it is just starting.
    """

    def is_mounted() -> bool:
        mount = mount_at(daemon.mountpoint)
        return mount is not None and mount.is_ours

    with watched(daemon) as watch:
        wait_until(lambda: watch.has_ended(0) or is_mounted(), timeout_s)
        return watch.has_ended(0)


def wait_until(condition: Callable[[], bool], timeout_s: float) -> bool:
    """Poll `condition` until it holds, at most `timeout_s`; returns whether it did."""
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True
