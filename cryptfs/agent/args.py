"""Checks of a request's arguments: exactly the names the verb has, each of its type and within its bounds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cryptfs.agent.keyring import UnwrapItem
from cryptfs.crypto.wrap import wrapped_bytes
from cryptfs.errors import ProtocolError
from cryptfs.types import ID_BYTES, Purpose

KEYS_MAX = 4096
"""Most keys one request may make or unwrap: what bounds the time other clients wait (about 1 µs a key)."""
KITS_MAX = 256
PATH_MAX_BYTES = 4096
LOGS_MAX = 1024
"""Most logs one request may record or ask about: a few milliseconds for everybody else."""
FILES_MAX = 4096
"""Most files of an audit log that are listed."""
PLAIN_MAX = 4096
VERSION_MAX = (1 << 32) - 1
BLOCK_MAX = (1 << 63) - 1
SEQUENCE_MAX = (1 << 63) - 1

# Nobody may have the agent make or unwrap keys of these: the first is derived, never wrapped; who had one of the second
# could write the audit log; the third is no purpose of a KEK's at all.
_AGENTS_OWN = frozenset({Purpose.VOLUME_MAC, Purpose.LOG_AUDIT, Purpose.SHRED})
_PURPOSES: Mapping[str, Purpose] = {p.value: p for p in Purpose if p not in _AGENTS_OWN}
_WIDTHS = {purpose: wrapped_bytes(purpose) for purpose in Purpose}

Args = Mapping[str, Any]


def expect(args: Args, *names: str) -> None:
    """Raise `ProtocolError` unless `args` has exactly these names."""
    if args.keys() != set(names):
        raise ProtocolError(f"arguments must be: {', '.join(names) or 'none'}")


def get_bytes(args: Args, name: str, least: int, most: int) -> bytes:
    """A bin of `least` to `most` bytes."""
    value = args[name]
    if type(value) is not bytes or not least <= len(value) <= most:
        raise ProtocolError(f"{name} must be a bin of {least} to {most} bytes")
    return value


def get_id(args: Args, name: str) -> bytes:
    """A bin of 16 bytes."""
    return get_bytes(args, name, ID_BYTES, ID_BYTES)


def get_path(args: Args, name: str) -> bytes:
    """A path in the file system's own bytes, without zeros; may be empty where there is none."""
    value = get_bytes(args, name, 0, PATH_MAX_BYTES)
    if b"\0" in value:
        raise ProtocolError(f"{name} must be a path")
    return value


def get_text(args: Args, name: str, most_chars: int) -> str:
    """A str of at most `most_chars` characters."""
    value = args[name]
    if type(value) is not str or len(value) > most_chars:
        raise ProtocolError(f"{name} must be a str of at most {most_chars} characters")
    return value


def get_int(args: Args, name: str, least: int, most: int) -> int:
    """An int in `least` … `most`."""
    value = args[name]
    if type(value) is not int or not least <= value <= most:
        raise ProtocolError(f"{name} must be an int from {least} to {most}")
    return value


def get_bool(args: Args, name: str) -> bool:
    """A bool."""
    value = args[name]
    if type(value) is not bool:
        raise ProtocolError(f"{name} must be a bool")
    return value


def get_packed(args: Args, name: str, width: int) -> bytes:
    """A bin of whole items of `width` bytes each, at most 1024 of them."""
    value = get_bytes(args, name, 0, LOGS_MAX * width)
    if len(value) % width:
        raise ProtocolError(f"{name} must be a whole number of items of {width} bytes")
    return value


def get_sequence(args: Args, name: str) -> int:
    """A sequence number of `state`."""
    return get_int(args, name, 0, SEQUENCE_MAX)


def get_plain_map(args: Args, name: str) -> dict[str, int | str | bytes]:
    """A map of short names to ints, strs and bins of at most 4096 characters or bytes."""
    value = args[name]
    if type(value) is not dict or any(
        type(key) is not str or type(item) not in (int, str, bytes) or (type(item) is not int and len(item) > PLAIN_MAX)
        for key, item in value.items()
    ):
        raise ProtocolError(f"{name} must be a map of plain values")
    return value


def get_purpose(args: Args, name: str) -> Purpose:
    """A purpose that keys are wrapped for."""
    value = args[name]
    purpose = _PURPOSES.get(value) if type(value) is str else None
    if purpose is None:
        raise ProtocolError(f"{name} must be one of {', '.join(_PURPOSES)}")
    return purpose


def get_items(args: Args, name: str) -> list[UnwrapItem]:
    """The items of `unwrap`: ``[id, purpose, kek_version, wrapped, first_block]`` each, at most 4096 keys in all."""
    rows = args[name]
    if type(rows) is not list:
        raise ProtocolError(f"{name} must be an array")
    items: list[UnwrapItem] = []
    keys = 0
    for row in rows:
        if type(row) is not list or len(row) != 5:
            raise ProtocolError("an item must be an array of five")
        log_id, purpose_name, kek_version, wrapped, first_block = row
        purpose = _PURPOSES.get(purpose_name) if type(purpose_name) is str else None
        if (
            purpose is None
            or type(log_id) is not bytes
            or len(log_id) != ID_BYTES
            or type(kek_version) is not int
            or not 0 < kek_version <= VERSION_MAX
            or type(wrapped) is not bytes
            or type(first_block) is not int
            or not 0 <= first_block <= BLOCK_MAX
        ):
            raise ProtocolError("an item must be [id, purpose, kek_version, wrapped, first_block]")
        count, rest = divmod(len(wrapped), _WIDTHS[purpose])
        if rest or not count:
            raise ProtocolError("an item's wrapped keys have a wrong length")
        keys += count
        items.append((log_id, purpose, kek_version, wrapped))
    if keys > KEYS_MAX:
        raise ProtocolError(f"more than {KEYS_MAX} keys in one request")
    return items
