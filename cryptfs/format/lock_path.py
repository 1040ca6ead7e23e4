"""The request `lock-path` as bytes, for a command that has imported nothing yet: the same as `agent_msg` would write.

`cryptfs lock` sends it before it imports msgpack and what comes with it, which takes longer than all the rest.
"""

from __future__ import annotations

PATH_MAX_BYTES = 4095
"""PATH_MAX without the terminating zero."""


def encode_lock_path(path: bytes) -> bytes:
    """Request 1, verb `lock-path`, of a path of 1 … 4095 bytes: length and msgpack (AGENT_PROTOCOL.md)."""
    size = len(path)
    # msgpack: array of 4, version 1, id 1, a str of 9; a map of 1, a str of 4, a bin with a length of 1 or 2 bytes.
    binary = b"\xc4" + size.to_bytes(1, "big") if size < 256 else b"\xc5" + size.to_bytes(2, "big")
    message = b"\x94\x01\x01\xa9lock-path\x81\xa4path" + binary + path
    return len(message).to_bytes(4, "big") + message
