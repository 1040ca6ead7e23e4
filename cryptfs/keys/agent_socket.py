"""A socket to the user's own agent, for whoever has an event loop and whoever has none."""

from __future__ import annotations

import socket

from cryptfs.errors import AgentUnavailable, NotPermitted
from cryptfs.paths import connect


def connected(path: str) -> socket.socket:
    """Non-blocking, to the agent that listens at `path` and is the user's own. Raises as `agent_client.connect`."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # A Unix socket connects at once or not at all: only a full backlog would make it wait, and then it refuses.
        sock.settimeout(0)
        connect(sock, path)
    except PermissionError:
        sock.close()
        raise NotPermitted(f"the key agent's socket {path} belongs to another user") from None
    except OSError as error:
        sock.close()
        raise AgentUnavailable(f"no key agent answers at {path}: {error.strerror}") from None
    except BaseException:
        sock.close()
        raise
    return sock
