"""The shapes of the agent's answers, checked before anything of them is used: the agent is not trusted to be right."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cryptfs.errors import ProtocolError
from cryptfs.types import DELETED, ID_BYTES, WRAPPED_BYTES, WRAPPED_NAMES_BYTES

Kit = tuple[bytes, bytes, bytes, bytes, bytes, bytes, bytes]
"""(id, log key, its wrap, names key, its wrap, DEKs joined, their wraps joined); names empty for files"""


@dataclass(frozen=True, slots=True)
class VolumeStatus:
    """One volume the agent holds or that is mounted; `state` is "unlocked", "locking" or "locked".

    `locks_in_s`: seconds until it is locked if no key is asked for; None: never.
    """

    volume_id: bytes
    cipher_dir: str
    mountpoint: str | None
    state: str
    daemon_pid: int | None
    locks_in_s: int | None = None


@dataclass(frozen=True, slots=True)
class LockOutcome:
    """How a lock ended.

    `unwritten`: files whose last changes could not be written and wait in the daemon; None: it said nothing in time.
    """

    was_unlocked: bool
    unwritten: int | None


@dataclass(frozen=True, slots=True)
class AgentStatus:
    """The agent and its volumes."""

    pid: int
    exit_when_empty: bool
    volumes: tuple[VolumeStatus, ...]


def fits(keys: bytes, item: tuple[bytes, str, int, bytes, int]) -> bool:
    """Whether `keys` are as long as those behind the item's wraps (RFC 3394: 8 bytes more each)."""
    wide = item[1] == "names"
    width = WRAPPED_NAMES_BYTES if wide else WRAPPED_BYTES
    return len(keys) == len(item[3]) - 8 * (len(item[3]) // width)


def get_int(result: Mapping[str, Any], name: str) -> int:
    """An int. Raises `ProtocolError` for anything else."""
    value = result.get(name)
    if type(value) is not int:
        raise ProtocolError(f"{name} is no int")
    return value


def get_bool(result: Mapping[str, Any], name: str) -> bool:
    """A bool. Raises `ProtocolError` for anything else."""
    value = result.get(name)
    if type(value) is not bool:
        raise ProtocolError(f"{name} is no bool")
    return value


def get_bin(result: Mapping[str, Any], name: str, size: int | None = None) -> bytes:
    """A bin, of `size` bytes if given. Raises `ProtocolError` for anything else."""
    value = result.get(name)
    if type(value) is not bytes or (size is not None and len(value) != size):
        raise ProtocolError(f"{name} is no bin of the right size")
    return value


def get_floors(result: Mapping[str, Any], count: int) -> list[int]:
    """`count` generations, or `DELETED`. Raises `ProtocolError` for anything else."""
    floors = result.get("floors")
    if type(floors) is not list or len(floors) != count or any(type(n) is not int or n < DELETED for n in floors):
        raise ProtocolError("floors is no array of generations of the right length")
    return floors


def get_rewrapped(result: Mapping[str, Any], items: Sequence[tuple[bytes, str, int, bytes, int]]) -> list[bytes | None]:
    """One answer per item, as long as its wraps, or None. Raises `ProtocolError` for anything else."""
    wrapped = result.get("wrapped")
    if type(wrapped) is not list or len(wrapped) != len(items):
        raise ProtocolError("wrapped is no array of the right length")
    for joined, item in zip(wrapped, items, strict=True):
        if joined is not None and (type(joined) is not bytes or len(joined) != len(item[3])):
            raise ProtocolError("wrapped keys of a wrong length")
    return wrapped


def get_kit(row: object, sizes: tuple[int, ...]) -> Kit:
    """A kit whose parts have `sizes` bytes. Raises `ProtocolError` for anything else."""
    if type(row) is not list or len(row) != len(sizes):
        raise ProtocolError("a kit is no array of seven")
    if any(type(part) is not bytes or len(part) != size for part, size in zip(row, sizes, strict=True)):
        raise ProtocolError("a kit's part has a wrong size")
    return (row[0], row[1], row[2], row[3], row[4], row[5], row[6])


def get_lock_outcome(result: Mapping[str, Any]) -> LockOutcome:
    """The result of `lock`. Raises `ProtocolError` for anything else."""
    unwritten = None if result.get("unwritten") is None else get_int(result, "unwritten")
    return LockOutcome(get_bool(result, "was_unlocked"), unwritten)


def get_volumes(result: Mapping[str, Any]) -> tuple[VolumeStatus, ...]:
    """The volumes of `status`. Raises `ProtocolError` for anything else."""
    rows = result.get("volumes")
    if not isinstance(rows, list):
        raise ProtocolError("volumes is no array")
    return tuple(map(get_volume_status, rows))


def get_volume_status(row: object) -> VolumeStatus:
    """One volume of `status`. Raises `ProtocolError` for anything else."""
    if not isinstance(row, dict):
        raise ProtocolError("a volume is no map")
    mountpoint, daemon_pid, state = row.get("mountpoint"), row.get("daemon_pid"), row.get("state")
    if not (mountpoint is None or type(mountpoint) is bytes) or not (daemon_pid is None or type(daemon_pid) is int):
        raise ProtocolError("a volume's mountpoint or daemon_pid has a wrong type")
    if state not in ("locked", "locking", "unlocked"):
        raise ProtocolError("a volume's state is none of the three")
    return VolumeStatus(
        volume_id=get_bin(row, "volume_id", ID_BYTES),
        cipher_dir=os.fsdecode(get_bin(row, "cipher_dir")),
        mountpoint=None if mountpoint is None else os.fsdecode(mountpoint),
        state=state,
        daemon_pid=daemon_pid,
        locks_in_s=None if row.get("locks_in_s") is None else get_int(row, "locks_in_s"),
    )
