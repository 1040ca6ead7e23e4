"""The error codes of docs/AGENT_PROTOCOL.md: which error goes under which, and comes out at the client."""

from __future__ import annotations

from collections.abc import Mapping

from cryptfs.errors import (
    AgentUnavailable,
    AuditUnavailable,
    BackendUnavailable,
    CryptfsError,
    Denied,
    FreshnessUnavailable,
    ProtocolError,
    RolledBack,
    ShredSecretMissing,
    UnsupportedFormat,
    UsageError,
    VolumeBusy,
    VolumeDamaged,
    VolumeLocked,
    WrongSecret,
)

ERRORS: Mapping[str, type[CryptfsError]] = {
    "locked": VolumeLocked,
    "wrong-secret": WrongSecret,
    # Before `VolumeDamaged`, of which it is one.
    "rolled-back": RolledBack,
    "freshness": FreshnessUnavailable,
    "audit": AuditUnavailable,
    "shred-secret": ShredSecretMissing,
    "damaged": VolumeDamaged,
    "unsupported": UnsupportedFormat,
    "denied": Denied,
    "protocol": ProtocolError,
    "usage": UsageError,
    "backend": BackendUnavailable,
    "busy": VolumeBusy,
}
INTERNAL = "internal"
"""Anything else, which went wrong inside the agent."""
CODES = frozenset({*ERRORS, INTERNAL})
"""The error codes of version 1."""


def code_of(error: Exception) -> str:
    """The code that says what `error` is."""
    return next((code for code, kind in ERRORS.items() if isinstance(error, kind)), INTERNAL)


def error_of(code: str, message: str) -> CryptfsError:
    """What a failure is to whoever asked; `AgentUnavailable` for one inside the agent. `code`: one of `CODES`."""
    return ERRORS.get(code, AgentUnavailable)(message)
