"""The shapes of the agent's answers, checked before anything of them is used: the agent is not trusted to be right."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cryptfs.errors import ProtocolError, UnsupportedFormat, VolumeDamaged
from cryptfs.format.agent_msg import PROTOCOL_VERSION
from cryptfs.format.policy import Policy, parse_policy
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


@dataclass(frozen=True, slots=True)
class Attached:
    """What a daemon is told when it attaches: `serial` is that of the `volume` file the policy is from."""

    kek_version: int
    serial: int
    policy: Policy


@dataclass(frozen=True, slots=True)
class Report:
    """What a mount's daemon says of its cache.

    `cache`: its counters, and `entries` now. `policy`: what it obeys (`caching` 0 or 1, `max_age_ms`, `max_entries`,
    `max_uses`), the policy's fields in `overridden` on the word of the mount's options.
    """

    cache: Mapping[str, int]
    policy: Mapping[str, int | None]
    overridden: tuple[str, ...]


CACHE_COUNTERS = ("hits", "misses", "unwraps", "expiries", "evictions", "round_trips", "entries")
CACHE_POLICY = ("caching", "max_age_ms", "max_entries", "max_uses")


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


def get_hello(result: Mapping[str, Any]) -> int:
    """The agent's pid. Raises `ProtocolError` if it speaks another version, or for anything else."""
    if get_int(result, "version") != PROTOCOL_VERSION:
        raise ProtocolError(f"not protocol version {PROTOCOL_VERSION}")
    return get_int(result, "pid")


def get_status(result: Mapping[str, Any]) -> AgentStatus:
    """The result of `status`. Raises `ProtocolError` for anything else."""
    return AgentStatus(get_int(result, "pid"), get_bool(result, "exit_when_empty"), get_volumes(result))


def get_unlocked(result: Mapping[str, Any]) -> tuple[bytes, int]:
    """The result of `unlock`: volume id and KEK version. Raises `ProtocolError` for anything else."""
    return get_bin(result, "volume_id", ID_BYTES), get_int(result, "kek_version")


def get_lock_outcome(result: Mapping[str, Any]) -> LockOutcome:
    """The result of `lock`. Raises `ProtocolError` for anything else."""
    unwritten = None if result.get("unwritten") is None else get_int(result, "unwritten")
    return LockOutcome(get_bool(result, "was_unlocked"), unwritten)


def get_located_lock(result: Mapping[str, Any]) -> tuple[bytes | None, LockOutcome]:
    """The result of `lock-path`: which volume was meant, None if none. Raises `ProtocolError` for anything else."""
    volume_id = None if result.get("volume_id") is None else get_bin(result, "volume_id", ID_BYTES)
    return volume_id, get_lock_outcome(result)


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


def get_policy(result: Mapping[str, Any]) -> Policy:
    """A policy. Raises `ProtocolError` for anything else."""
    try:
        return parse_policy(result.get("policy"))
    except (UnsupportedFormat, VolumeDamaged) as error:
        raise ProtocolError(f"policy: {error}") from None


def get_attached(result: Mapping[str, Any]) -> Attached:
    """The result of `attach`. Raises `ProtocolError` for anything else."""
    return Attached(get_int(result, "kek_version"), get_int(result, "serial"), get_policy(result))


def get_reports(result: Mapping[str, Any]) -> Mapping[bytes, tuple[Policy | None, Report | None]]:
    """The result of `reports`, by volume: its policy, None if it is locked; its daemon's report, None without answer.

    Raises `ProtocolError` for anything else.
    """
    rows = result.get("reports")
    if not isinstance(rows, list) or any(type(row) is not dict for row in rows):
        raise ProtocolError("reports is no array of maps")
    return {
        get_bin(row, "volume_id", ID_BYTES): (
            None if row.get("policy") is None else get_policy(row),
            None if row.get("report") is None else _report(row["report"]),
        )
        for row in rows
    }


def _report(row: object) -> Report:
    if not isinstance(row, dict):
        raise ProtocolError("a report is no map")
    cache, policy, overridden = row.get("cache"), row.get("policy"), row.get("overridden")
    if type(cache) is not dict or type(policy) is not dict or type(overridden) is not list:
        raise ProtocolError("a report lacks a part")
    if any(type(cache.get(name)) is not int for name in CACHE_COUNTERS):
        raise ProtocolError("a report lacks a counter")
    if any(type(policy.get(name)) not in (int, type(None)) for name in CACHE_POLICY):
        raise ProtocolError("a report lacks a part of the policy")
    return Report(cache, policy, tuple(overridden))
