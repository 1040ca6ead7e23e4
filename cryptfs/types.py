"""Names for the bytes and numbers that travel between layers. Imports nothing of cryptfs."""

from __future__ import annotations

import enum
from typing import NewType

Buffer = bytes | bytearray | memoryview
"""Anything the primitives and the store read bytes from."""

VolumeId = NewType("VolumeId", bytes)
"""16 random bytes."""

LogId = NewType("LogId", bytes)
"""16 random bytes: the id of a file, symlink or directory, and of its sealed log."""

BlockIndex = NewType("BlockIndex", int)
Generation = NewType("Generation", int)
"""u64: mount epoch << 40 | counter."""

ID_BYTES = 16
DEK_BYTES = 32
WRAPPED_BYTES = 40
"""A 32-byte key under AES key wrap (RFC 3394)."""
NAMES_KEY_BYTES = 64
WRAPPED_NAMES_BYTES = 72
TAG_BYTES = 16

EPOCH_SHIFT = 40
EPOCH_MAX = (1 << 24) - 1


DELETED = -1
"""In place of the generation a log must have at least: it was deleted, and must not be there at all."""


def epoch_of(generation: int) -> int:
    """The mount epoch a generation was made in."""
    return generation >> EPOCH_SHIFT


DOMAINS_DIR = "domains"
"""Where the cipher directories of a volume's domains lie, each under its volume id in hexadecimal (FORMAT.md §2)."""
DOMAIN_ASIDE = ".aside"
"""Ends such a name while the domain is made or removed."""
DOMAIN_SHREDDED = "shredded"
"""An empty file in its cipher directory that says it was: so there is nothing in it that anybody could want to keep."""
DOMAIN_XATTR = b"system.cryptfs.domain"
"""Of a domain's place in a mount: its volume id in hexadecimal. Setting it makes an empty directory that place."""


class Purpose(enum.StrEnum):
    """What a wrapped key is for: part of HKDF's info, so no key can pose as one of another kind (FORMAT.md §1)."""

    BLOCK = "block"
    ATTR = "attr"
    LOG_FILE = "log-file"
    LOG_DIR = "log-dir"
    LOG_AUDIT = "log-audit"
    NAMES = "names"
    VOLUME = "volume"
    STATE = "state"
    VOLUME_MAC = "volume-mac"
    SHRED = "shred"


class Kind(enum.IntEnum):
    """What an entry is (FORMAT.md §6)."""

    FILE = 1
    DIR = 2
    SYMLINK = 3
    FIFO = 4
    SOCKET = 5
    CHAR = 6
    BLOCK = 7
