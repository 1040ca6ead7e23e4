"""Who is at the other end of a Unix socket, as the kernel says."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
from collections.abc import Callable, Iterator

from cryptfs.format.audit import TEXT_MAX_CHARS, PeerLine

_UCRED = struct.Struct("iII")
_SO_PEERPIDFD = 77
"""Linux 6.5; the socket module does not name it."""


def credentials(sock: socket.socket) -> tuple[int, int]:
    """(process, user) of the peer when it connected (SO_PEERCRED, unix(7))."""
    pid, uid, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return pid, uid


def exe_of(pid: int) -> str | None:
    """The program of a process, from /proc; None if it is hidden from us, or gone."""
    return _quietly(lambda: os.readlink(f"/proc/{pid}/exe"))


def describe(sock: socket.socket, pid: int, uid: int, exe_of: Callable[[int], str | None] = exe_of) -> PeerLine:
    """The peer's program, read now.

    By number, from /proc: where the kernel has SO_PEERPIDFD, only if that process is still the one that connected, so
    a number that was given out again shows nothing. None for what may not be read: of a process that made itself
    undumpable (our daemon, of a user other than root) the program is hidden, its name is not.
    """
    with _peer_pidfd(sock) as pidfd:
        exe = exe_of(pid)
        comm = _quietly(lambda: _comm_of(pid))
        if pidfd is not None and _has_ended(pidfd):
            exe = comm = None
    return PeerLine(pid, uid, exe and exe[:TEXT_MAX_CHARS], comm and comm[:TEXT_MAX_CHARS])


def _comm_of(pid: int) -> str:
    # No `Path`: it interns every part, and the interpreter's table of those grows with the connections there ever were.
    with open(f"/proc/{pid}/comm", "rb") as file:
        return file.read().decode("utf-8", "replace").rstrip("\n")


def _quietly(read: Callable[[], str]) -> str | None:
    try:
        return read()
    except OSError:
        return None


@contextlib.contextmanager
def _peer_pidfd(sock: socket.socket) -> Iterator[int | None]:
    try:
        pidfd = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    except OSError:
        yield None
        return
    try:
        yield pidfd
    finally:
        os.close(pidfd)


def _has_ended(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))
