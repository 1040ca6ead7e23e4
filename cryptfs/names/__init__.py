"""Names: the name a program uses <-> the sealed name in `.dir` <-> the name in `tree/` (FORMAT.md §6)."""

from __future__ import annotations

import base64

from cryptfs.crypto.mac import sha256

NAME_MAX_BYTES = 255
SHORT_SEALED_MAX_BYTES = 191
"""base64url of 191 bytes is 255 long; sealing adds 16, so names of up to 175 bytes stay short."""

DIR_LOG = b".dir"
DIR_LOG_NEW = b".dir.new"

_TO_URL = bytes.maketrans(b"+/", b"-_")


def tree_name(sealed: bytes) -> bytes:
    """A sealed name's name in `tree/`, at most 255 bytes, never starting with a dot."""
    if len(sealed) <= SHORT_SEALED_MAX_BYTES:
        return base64.b64encode(sealed).translate(_TO_URL).rstrip(b"=")
    return b"~" + base64.b64encode(sha256(sealed)).translate(_TO_URL).rstrip(b"=")


def is_long(sealed: bytes) -> bool:
    """Whether only `.dir` holds the sealed name."""
    return len(sealed) > SHORT_SEALED_MAX_BYTES


def sealed_from_tree(name: bytes) -> bytes | None:
    """The sealed name behind a short name in `tree/`; None if it is long or none of ours."""
    if name.startswith((b"~", b".")):
        return None
    try:
        sealed = base64.b64decode(name + b"=" * (-len(name) % 4), altchars=b"-_", validate=True)
    except ValueError:
        return None
    return sealed if tree_name(sealed) == name else None
