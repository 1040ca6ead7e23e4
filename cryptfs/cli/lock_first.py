"""`cryptfs lock PATH`: the request goes out before anything else is imported, as every tenth of a second counts.

Only the interpreter's own small modules and ours without imports: on a busy machine importing the command line takes
longer than the agent and the daemon take together. Nothing is decided here. What the path is, what comes of it and
what to say about it is `cli.lock`'s, which asks for the answer (`pending`); whatever goes wrong here goes wrong there,
with an error.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence

from cryptfs import paths
from cryptfs.errors import CryptfsError
from cryptfs.format.lock_path import PATH_MAX_BYTES, encode_lock_path

_CONNECT_S = 5.0
_MOUNTINFO = "/proc/self/mountinfo"
_sent: socket.socket | None = None
_mountinfo: bytes | None = None


def send(words: Sequence[str]) -> None:
    """Ask the agent, if one runs, to lock what lies at or is mounted on the one path in `words`. Never raises."""
    global _sent, _mountinfo  # noqa: PLW0603  one command line per process, and at most one request ahead of it
    if len(words) != 1 or words[0].startswith("-"):
        return
    path = os.fsencode(os.path.abspath(words[0]))
    if len(path) > PATH_MAX_BYTES:
        return
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(_CONNECT_S)
        paths.connect(sock, paths.agent_socket())
        _mountinfo = _read_mountinfo()
        sock.sendall(encode_lock_path(path))
    except (OSError, CryptfsError):
        sock.close()
    else:
        _sent = sock


def mountinfo() -> bytes:
    """/proc/self/mountinfo, as it was before anything was sent, or is now if nothing was. Raises OSError."""
    return _mountinfo if _mountinfo is not None else _read_mountinfo()


def _read_mountinfo() -> bytes:
    with open(_MOUNTINFO, "rb") as file:
        return file.read()


def pending() -> socket.socket | None:
    """The connection on which the answer comes, the caller's from now on; None if nothing was sent."""
    global _sent
    sock, _sent = _sent, None
    return sock
