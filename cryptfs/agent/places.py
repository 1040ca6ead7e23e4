"""Where the agent keeps what must outlive it: never in a cryptfs mount, found out without asking that mount.

A mount of ours answers with keys from the agent; an agent that asked it about its own files would wait for itself.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from cryptfs.errors import CryptfsError, NotPermitted
from cryptfs.paths import private_dir

_FILESYSTEM_TYPE = b"fuse.cryptfs"
_LINKS_MAX = 40


def cryptfs_mounts() -> frozenset[str]:
    """The mount points of all cryptfs mounts (proc(5), mountinfo)."""
    found = set()
    for line in Path("/proc/self/mountinfo").read_bytes().split(b"\n"):
        left, separator, right = line.partition(b" - ")
        fields = left.split(b" ")
        if separator and right.startswith(_FILESYSTEM_TYPE + b" ") and len(fields) > 4:
            found.add(os.fsdecode(_unescaped(fields[4])))
    return frozenset(found)


def _unescaped(field: bytes) -> bytes:
    # The kernel writes space, tab, newline and backslash as three octal digits.
    return re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), field)


def covering_mount(path: str, mounts: frozenset[str] | None = None) -> str | None:
    """The cryptfs mount that `path` (absolute; need not exist) lies in, symlinks followed, or None.

    Goes down step by step and never looks at a mount point itself or at what is below it.
    """
    among = cryptfs_mounts() if mounts is None else mounts
    rest = [part for part in path.split("/") if part][::-1]
    here, links = "/", 0
    while rest:
        part = rest.pop()
        if part == "..":
            here = os.path.dirname(here)
            continue
        here = os.path.join(here, part) if part != "." else here
        if here in among:
            return here
        try:
            target = os.readlink(here)
        except OSError:
            continue
        links += 1
        if links > _LINKS_MAX:
            return None
        rest += [part for part in target.split("/") if part][::-1]
        here = "/" if target.startswith("/") else os.path.dirname(here)
    return None


def private_state_dir(directory: str, called: str, refusal: type[CryptfsError]) -> None:
    """Make `directory` and the one it lies in, mode 0700, unless they are there. `called`: what it is, for people.

    Raises `refusal` if it lies in a cryptfs mount or is not ours alone.
    """
    inside = covering_mount(directory)
    if inside is not None:
        raise refusal(
            f"{called} {directory} lies in the cryptfs mount {inside}: "
            "the agent would wait for a file system that waits for the agent"
        )
    try:
        private_dir(os.path.dirname(directory))
        private_dir(directory)
    except NotPermitted as error:
        raise refusal(str(error)) from error
