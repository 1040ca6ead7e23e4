"""The daemon as a process: its log, its limits, its word to whoever started it."""

from __future__ import annotations

import ctypes
import logging
import os
import resource
import sys
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler
from pathlib import Path

_PR_SET_DUMPABLE = 4
LOG_BYTES = 1 << 20
LOGS_KEPT = 3


class _PrivateLog(RotatingFileHandler):
    """Every file of it has mode 0600, whatever the umask: the daemon's is that of the mount."""

    def _open(self) -> TextIOWrapper:
        fd = os.open(self.baseFilename, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        return open(fd, "a", encoding="utf-8")


def open_log(path: Path | None) -> None:
    """Log to `path` (made with mode 0600), or to stderr."""
    handler: logging.Handler
    if path is None:
        handler = logging.StreamHandler(sys.stderr)
    else:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600))
        handler = _PrivateLog(path, maxBytes=LOG_BYTES, backupCount=LOGS_KEPT, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.INFO)


def harden() -> None:
    """No core dumps, and other processes of the user cannot read this one's memory (prctl(2), PR_SET_DUMPABLE)."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def say(fd: int | None, line: str) -> None:
    """One line to the process that waits for this one, and no more."""
    if fd is None:
        return
    try:
        os.write(fd, line.replace("\n", " ").encode() + b"\n")
        os.close(fd)
    except OSError:
        return
