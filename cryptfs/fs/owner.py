"""A user and a group as they are written on a command line."""

from __future__ import annotations

from cryptfs.errors import UsageError

_ID_END = 2**32 - 1
"""The largest 32-bit number means "leave it" to chown(2)."""


def owner_of(text: str | None) -> tuple[int, int] | None:
    """(uid, gid) from "UID:GID"; None if there is none. Raises `UsageError`."""
    if text is None:
        return None
    words = text.split(":")
    if len(words) != 2 or not all(word.isascii() and word.isdecimal() and int(word) < _ID_END for word in words):
        raise UsageError(f"not UID:GID (two numbers below {_ID_END}): {text}")
    return int(words[0]), int(words[1])
