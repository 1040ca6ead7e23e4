"""What a test left behind: descriptors, mounts, children, and processes that carry its directories.

Reads /proc only (proc(5)). Descriptors are compared by number and by what they point at; mounts and processes count
only if they lie under, or name, one of the directories given, since other programs use the machine at the same time.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeVar

Found = TypeVar("Found", bound=Sized)

GRACE_S = 5.0
"""How long a daemon may take to finish after the test that stopped it (it syncs and unmounts)."""
POLL_S = 0.02
SHOWN_MAX = 12
"""How many descriptors are named."""


@dataclass(frozen=True, slots=True)
class Watch:
    """What was there before the test."""

    roots: tuple[bytes, ...]
    fds: dict[int, str]
    mounts: frozenset[bytes]
    children: frozenset[int]
    strays: frozenset[int]

    @classmethod
    def start(cls, roots: Sequence[Path]) -> Self:
        """Notes what is there now; `roots` are the directories this test run owns."""
        owned = tuple(os.fsencode(root) for root in roots)
        return cls(owned, open_fds(), mounts_under(owned), children(), processes_naming(owned))

    def finish(self) -> list[str]:
        """One line per thing left behind, after a bounded wait; mounts and processes left are removed."""
        left = []
        if fds := settled(self._new_fds):
            shown = ", ".join(f"{fd} -> {target}" for fd, target in sorted(fds.items())[:SHOWN_MAX])
            left.append(f"{len(fds)} descriptors: {shown}")
        if mounts := settled(lambda: mounts_under(self.roots) - self.mounts):
            left += [f"mount {os.fsdecode(mountpoint)}" for mountpoint in sorted(mounts)]
            unmount(mounts)
        if pids := settled(lambda: (children() - self.children) | (processes_naming(self.roots) - self.strays)):
            left += [f"process {pid} ({describe(pid)})" for pid in sorted(pids)]
            end(pids)
        return left

    def _new_fds(self) -> dict[int, str]:
        if open_fds().items() - self.fds.items():
            gc.collect()  # what only garbage holds is no leak
        return dict(open_fds().items() - self.fds.items())


def settled(look: Callable[[], Found]) -> Found:
    """What `look` still finds after `GRACE_S`, or nothing as soon as it finds nothing."""
    deadline = time.monotonic() + GRACE_S
    while (found := look()) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    return found


def _path_of(fd: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        return "a path that is too long to be shown"


def open_fds() -> dict[int, str]:
    """This process's descriptors and what each points at."""
    fds = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the listing's own descriptor
            fds[int(name)] = _path_of(name)
    return {fd: target for fd, target in fds.items() if target != f"/proc/{os.getpid()}/fd"}


def mounts_under(roots: tuple[bytes, ...]) -> frozenset[bytes]:
    """Mount points of FUSE filesystems below `roots`."""
    found = set()
    for line in Path("/proc/self/mountinfo").read_bytes().splitlines():
        fields, _, rest = line.partition(b" - ")
        mountpoint = fields.split()[4].replace(rb"\040", b" ")
        if rest.startswith(b"fuse") and any(mountpoint.startswith(root + b"/") for root in roots):
            found.add(mountpoint)
    return frozenset(found)


def children() -> frozenset[int]:
    """Children of every thread of this process, zombies included (they are children until waited for)."""
    found: set[int] = set()
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(FileNotFoundError):
            found |= {int(pid) for pid in Path(f"/proc/self/task/{thread}/children").read_text("ascii").split()}
    return frozenset(found)


def processes_naming(roots: tuple[bytes, ...]) -> frozenset[int]:
    """Live processes but this one with a path below `roots` in their arguments or environment."""
    found: set[int] = set()
    for name in os.listdir("/proc") if roots else ():
        if name.isdigit() and int(name) != os.getpid():
            with contextlib.suppress(OSError):
                text = Path(f"/proc/{name}/cmdline").read_bytes()
                with contextlib.suppress(PermissionError):
                    text += Path(f"/proc/{name}/environ").read_bytes()
                if any(root + b"/" in text for root in roots):
                    found.add(int(name))
    return frozenset(found)


def describe(pid: int) -> str:
    """The state letter and command of a process."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(") ")[2][:1]
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace").strip()
    except OSError:
        return "gone"
    return "zombie" if state == "Z" else command


def unmount(mountpoints: frozenset[bytes]) -> None:
    """Detaches, innermost first."""
    for mountpoint in sorted(mountpoints, key=len, reverse=True):
        subprocess.run(["fusermount3", "-u", "-z", "--", mountpoint], check=False, stderr=subprocess.DEVNULL)


def end(pids: frozenset[int]) -> None:
    """Kills each by its id, and reaps those that are ours."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)
