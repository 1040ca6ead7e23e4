"""The log file of the agent and of a daemon: for its owner's eyes, and bounded."""

from __future__ import annotations

import os
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler

FILE_BYTES = 1 << 20
FILES_KEPT = 3


class PrivateLog(RotatingFileHandler):
    """Begins anew at 1 MiB and keeps the three files before, each of mode 0600 whatever the umask is."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Opens or makes `path`. Raises OSError."""
        super().__init__(path, maxBytes=FILE_BYTES, backupCount=FILES_KEPT, encoding="utf-8")

    def _open(self) -> TextIOWrapper:
        fd = os.open(self.baseFilename, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        return open(fd, "a", encoding="utf-8")
