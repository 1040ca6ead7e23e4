"""The daemon as a process: its log, its limits, its word to whoever started it."""

from __future__ import annotations

import ctypes
import logging
import os
import resource
import sys
from pathlib import Path

from cryptfs.private_log import PrivateLog

_PR_SET_DUMPABLE = 4


def open_log(path: Path | None) -> None:
    """Log to `path` (made with mode 0600), or to stderr."""
    handler: logging.Handler
    if path is None:
        handler = logging.StreamHandler(sys.stderr)
    else:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handler = PrivateLog(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.INFO)


def harden() -> None:
    """No core dumps, and other processes of the user cannot read this one's memory (prctl(2), PR_SET_DUMPABLE)."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def may_go(fd: int | None) -> bool:
    """Wait until whoever started this process lets it go on; False if it ended, or does not want it any more.

    The number stays taken, by /dev/null: as long as there is a pipe behind it, this process waits (`cli.mounts`).
    """
    if fd is None:
        return True
    go = os.read(fd, 1)
    null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    os.dup2(null, fd, inheritable=False)
    os.close(null)
    return bool(go)


def say(fd: int | None, line: str) -> None:
    """One line to the process that waits for this one, and no more."""
    if fd is None:
        return
    try:
        os.write(fd, line.replace("\n", " ").encode() + b"\n")
        os.close(fd)
    except OSError:
        return
