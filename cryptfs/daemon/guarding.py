"""The daemon's side of its guardian (`daemon.guardian`): started after the mount, and again if it is gone."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import trio

import cryptfs
from cryptfs.fuse.session import FuseSession

log = logging.getLogger("cryptfs")

_MODULE = "cryptfs.daemon.guardian"
_AGAIN_S = 1.0


class Guarding:
    """One per mount. Run `serve` beside it; `let_go` when requests are answered no more."""

    def __init__(self, session: FuseSession) -> None:
        self._session = session
        self._alive: socket.socket | None = None
        self._over = False

    def let_go(self) -> None:
        """Have the guardian do its work now, as it does when this process ends without a word. Called once."""
        self._over = True
        if self._alive is not None:
            with suppress(OSError):
                self._alive.shutdown(socket.SHUT_RDWR)

    async def serve(self) -> None:
        """Keep a guardian beside this process. Without one the mount works; that is logged."""
        while not self._over:
            try:
                guardian, alive = self._start()
            except OSError as error:
                log.warning("nobody would cut open files off if this process were killed: %s", error.strerror)
                return
            self._alive = alive
            try:
                await trio.lowlevel.wait_readable(alive)
            finally:
                if guardian.poll() is None:
                    guardian.returncode = 0  # it outlives this process, and Popen would warn
                alive.close()
                self._alive = None
            if not self._over:
                log.warning("the guardian is gone (%s); starting another", guardian.returncode)
                await trio.sleep(_AGAIN_S)

    def _start(self) -> tuple[subprocess.Popen[bytes], socket.socket]:
        """Raises OSError."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        clone = -1
        try:
            clone = self._session.clone()
            passed = (theirs.fileno(), clone, self._session.open_files.fd)
            # No environment but where the package is; -S: it needs no other one.
            guardian = subprocess.Popen(
                [sys.executable, "-P", "-s", "-S", "-m", _MODULE, *map(str, passed)],
                env={"PYTHONPATH": str(Path(cryptfs.__file__).resolve().parent.parent)},
                pass_fds=passed, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
            if clone >= 0:
                os.close(clone)
        ours.settimeout(0)
        return guardian, ours
