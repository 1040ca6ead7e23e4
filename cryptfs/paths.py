"""Where cryptfs keeps its socket and its state, and who may look in: directories of mode 0700 that are the user's own.

runtime   $XDG_RUNTIME_DIR/cryptfs, else /run/cryptfs for root, else <temporary directory>/cryptfs-<uid>
state     $XDG_STATE_HOME/cryptfs, else ~/.local/state/cryptfs
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import struct
import time
from collections.abc import Iterator

from cryptfs.errors import NotPermitted

_FULL_PAUSE_S = 0.005
_UCRED = struct.Struct("iII")
SOCKET_NAME = "agent.sock"
SUN_PATH_MAX_BYTES = 107
"""Longest path that fits sockaddr_un with its terminating zero (unix(7))."""


def runtime_dir() -> str:
    """The directory of the agent's socket; made with mode 0700 if missing.

    Raises `NotPermitted` if it is another user's, open to others, or no directory.
    """
    base = os.environ.get("XDG_RUNTIME_DIR", "")
    # The XDG specification: relative paths in these variables are invalid and to be ignored.
    if os.path.isabs(base):
        return private_dir(os.path.join(base, "cryptfs"))
    if os.geteuid() == 0:
        return private_dir("/run/cryptfs")
    import tempfile  # noqa: PLC0415 - rarely needed, and as slow to import as everything else here together

    return private_dir(os.path.join(tempfile.gettempdir(), f"cryptfs-{os.geteuid()}"))


def agent_socket() -> str:
    """The path of the agent's socket. The socket itself need not exist. Raises as `runtime_dir` does."""
    return os.path.join(runtime_dir(), SOCKET_NAME)


def state_dir() -> str:
    """The directory of what must survive a reboot; made with mode 0700 if missing. Raises as `runtime_dir` does."""
    return private_dir(state_path())


def state_path() -> str:
    """Where `state_dir` is or will be; touches nothing."""
    base = os.environ.get("XDG_STATE_HOME", "")
    if not os.path.isabs(base):
        base = os.path.join(os.path.expanduser("~"), ".local", "state")
    return os.path.join(base, "cryptfs")


def config_path() -> str:
    """Where the user's configuration of cryptfs is, if there is any; touches nothing."""
    base = os.environ.get("XDG_CONFIG_HOME", "")
    if not os.path.isabs(base):
        base = os.path.join(os.path.expanduser("~"), ".config")
    return os.path.join(base, "cryptfs")


def private_dir(path: str) -> str:
    """Make `path` (and what is missing above it) with mode 0700, or check that it is ours alone; return it.

    Raises `NotPermitted` if it is another user's, open to others, a symlink, no directory, or cannot be made.
    """
    try:
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        # Not exist_ok for the last part: whatever is there already is examined, not trusted.
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700)
        found = os.lstat(path)
    except OSError as error:
        raise NotPermitted(f"cannot make the directory {path}: {error.strerror}") from error
    if not stat.S_ISDIR(found.st_mode):
        raise NotPermitted(f"{path} is not a directory")
    if found.st_uid != os.geteuid():
        raise NotPermitted(f"{path} belongs to another user (uid {found.st_uid})")
    if found.st_mode & 0o077:
        raise NotPermitted(f"{path} is open to other users (mode {stat.S_IMODE(found.st_mode):04o}); it must be 0700")
    return path


def connect(sock: socket.socket, path: str) -> None:
    """Connect a Unix stream socket to whoever serves `path`, who must be of our own user.

    Whoever serves it is told paths, ids and passphrases, whatever the socket file's owner. Raises `NotPermitted` before
    anything is sent; `OSError` as connect(2) does. A socket with a timeout waits that long for room in the backlog.
    """
    end_s = time.monotonic() + (sock.gettimeout() or 0.0)
    with socket_address(path) as address:
        while True:
            try:
                sock.connect(address)
                break
            except BlockingIOError:
                # A full backlog: connect(2) waits for room only where the socket has no timeout at all.
                if time.monotonic() >= end_s:
                    raise
                time.sleep(_FULL_PAUSE_S)
    _, uid = peer_of(sock)
    if uid != os.geteuid():
        raise NotPermitted(f"the key agent at {path} belongs to another user (uid {uid})")


def peer_of(sock: socket.socket) -> tuple[int, int]:
    """(process, user) of whoever listens at the other end of a connected Unix socket (SO_PEERCRED, unix(7))."""
    pid, uid, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return pid, uid


@contextlib.contextmanager
def socket_address(path: str) -> Iterator[str]:
    """A name for `path` that fits a socket address: itself, or for long ones a detour over a directory descriptor.

    Raises `OSError` if the directory of a long path cannot be opened.
    """
    if len(os.fsencode(path)) <= SUN_PATH_MAX_BYTES:
        yield path
        return
    directory, name = os.path.split(path)
    dir_fd = os.open(directory or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{dir_fd}/{name}"
    finally:
        os.close(dir_fd)
