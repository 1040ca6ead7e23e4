"""Every error of the layers below as an errno, in one place; what is not an answer to the program is logged.

| error | errno |
|---|---|
| `OSError` | its own |
| `Damaged` | EIO, one log line with inode, block and reason |
| `AgentUnavailable`, `VolumeLocked`, `Denied` | ENOKEY |
| any other | EIO, one log line with a traceback |
"""

from __future__ import annotations

import errno
import functools
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Protocol, TypeVar

import pyfuse3

from cryptfs.errors import AgentUnavailable, CryptfsError, Damaged, Denied, VolumeLocked
from cryptfs.fuse.gate import Gate

log = logging.getLogger("cryptfs")

F = TypeVar("F", bound=Callable[..., Awaitable[Any]])


def to_errno(error: Exception, what: str, where: object) -> int:
    """The errno for `error`, raised by handler `what` about inode or handle `where`. Logs what has to be logged."""
    if isinstance(error, OSError) and error.errno:
        return error.errno
    if isinstance(error, Damaged):
        log.error("inode %s: %s: %s", where, what, error)
        return errno.EIO
    if isinstance(error, AgentUnavailable | VolumeLocked | Denied):
        return errno.ENOKEY
    if isinstance(error, CryptfsError):
        log.error("inode %s: %s: %s", where, what, error)
        return errno.EIO
    # No exception may leave a handler: pyfuse3 would end the mount.
    log.error("inode %s: %s failed unexpectedly", where, what, exc_info=error)
    return errno.EIO


class Gated(Protocol):
    """An object with handlers."""

    gate: Gate


def answered(handler: F) -> F:
    """Wrap a handler so that only `FUSEError` leaves it."""
    return _wrapped(handler, guarded=False)


def guarded(handler: F) -> F:
    """As `answered`, for a handler that shows or changes what is secret: refused while the gate is closed."""
    return _wrapped(handler, guarded=True)


def _wrapped(handler: F, *, guarded: bool) -> F:
    name = handler.__name__

    @functools.wraps(handler)
    async def wrapper(self: Gated, *args: Any) -> Any:  # noqa: ANN401 - whatever the handler takes and gives
        traffic = self.gate.traffic
        traffic.begun += 1
        try:
            if guarded and self.gate.closed:
                await self.gate.knock()
            return await handler(self, *args)
        except pyfuse3.FUSEError:
            raise
        except Exception as error:  # noqa: BLE001 - see to_errno
            code = to_errno(error, name, args[0] if args else "")
        finally:
            traffic.answered += 1
        # Raised here, outside the except clause: the cause may hold a frame with a key in it.
        raise pyfuse3.FUSEError(code)

    return wrapper  # type: ignore[return-value]
