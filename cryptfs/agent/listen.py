"""The agent's socket: made so that only its owner can reach it, and taken over only from an agent that is dead.

A lock file beside the socket (flock(2), so it dies with its holder) decides who may replace it: without one, two
agents starting together could each remove the other's fresh socket.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import stat
from collections.abc import Iterator

from cryptfs.errors import CryptfsError, NotPermitted
from cryptfs.paths import private_dir, socket_address

BACKLOG = 64


class AlreadyServed(CryptfsError):
    """Another agent serves this socket."""


@contextlib.contextmanager
def listening(path: str) -> Iterator[socket.socket]:
    """A non-blocking listening Unix socket at `path`, mode 0600, in a directory of mode 0700; removed at the end.

    Raises `AlreadyServed` if someone answers there; `NotPermitted` if the directory or what lies at `path` is not ours
    to use; `CryptfsError` if the socket cannot be made.
    """
    private_dir(os.path.dirname(os.path.abspath(path)))
    with _lock(path + ".lock"), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        _remove_stale(path)
        # The umask, not a chmod afterwards: there must be no moment at which others can connect.
        umask = os.umask(0o177)
        try:
            with socket_address(path) as address:
                sock.bind(address)
        except OSError as error:
            raise CryptfsError(f"cannot make the agent's socket {path}: {error.strerror}") from error
        finally:
            os.umask(umask)
        made = os.lstat(path)
        try:
            sock.settimeout(0)
            sock.listen(BACKLOG)
            yield sock
        finally:
            with contextlib.suppress(FileNotFoundError):
                found = os.lstat(path)
                if (found.st_dev, found.st_ino) == (made.st_dev, made.st_ino):
                    os.unlink(path)


@contextlib.contextmanager
def _lock(path: str) -> Iterator[None]:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise NotPermitted(f"cannot open the agent's lock file {path}: {error.strerror}") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise AlreadyServed("another agent is running already") from None
    else:
        yield
    finally:
        # The file stays: removing it would let a third agent lock a new one while a second waits on the old.
        os.close(fd)


def _remove_stale(path: str) -> None:
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return
    if found.st_uid != os.geteuid():
        raise NotPermitted(f"{path} belongs to another user (uid {found.st_uid})")
    if not stat.S_ISSOCK(found.st_mode):
        raise NotPermitted(f"{path} is there and is no socket; it is left alone")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe, socket_address(path) as address:
        probe.settimeout(0)
        try:
            probe.connect(address)
        except ConnectionRefusedError:
            os.unlink(path)
        except BlockingIOError:
            raise AlreadyServed(f"another program serves {path}, and does not answer") from None
        except OSError as error:
            raise NotPermitted(f"{path} cannot be tried: {error.strerror}") from error
        else:
            raise AlreadyServed(f"another program serves {path}")
