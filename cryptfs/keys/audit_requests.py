"""The agent's verbs `audit` and `about`: what it says of its audit logs and of itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cryptfs.errors import ProtocolError
from cryptfs.keys.agent_answers import get_bin, get_int
from cryptfs.keys.agent_client import AgentClient
from cryptfs.types import ID_BYTES

PLACE_BYTES = ID_BYTES + 4 + 8 + 8
AUDIT_PATIENCE_TICKS = 12


@dataclass(frozen=True, slots=True)
class AuditFile:
    """As `ops.audit_verify.FileReport`; `places` are still joined."""

    number: int
    size: int
    end: int
    fault: str | None
    first_line: int
    macs: bytes
    begin: dict[str, str | int | bool]
    expired: int
    missed: int
    places: bytes


@dataclass(frozen=True, slots=True)
class About:
    """The agent's process. `hardening`: by measure, ``on`` or why not; `audit_trouble`: why its log is not written."""

    pid: int
    hardening: dict[str, str]
    audit_trouble: str | None


async def about_agent(client: AgentClient) -> About:
    """The verb `about`."""
    result = await client.request("about", {})
    with client.rubbish_is_loss():
        hardening, trouble = result.get("hardening"), result.get("audit")
        if not isinstance(hardening, dict) or any(type(state) is not str for state in hardening.values()):
            raise ProtocolError("hardening is no map of words")
        if not (trouble is None or type(trouble) is str):
            raise ProtocolError("audit is no text")
        return About(get_int(result, "pid"), hardening, trouble)


async def audit_files(client: AgentClient, volume_id: bytes | None) -> list[int]:
    """The numbers of the files of a volume's log, or of the agent's own. Raises `AuditUnavailable`."""
    result = await client.request("audit", {"volume_id": volume_id, "file": None})
    with client.rubbish_is_loss():
        numbers = result.get("files")
        if type(numbers) is not list or any(type(number) is not int for number in numbers):
            raise ProtocolError("files is no array of numbers")
        return numbers


async def audit_file(client: AgentClient, volume_id: bytes | None, number: int) -> AuditFile:
    """One file's report. Raises `AuditUnavailable`, `VolumeLocked`."""
    args = {"volume_id": volume_id, "file": number}
    result = await client.request("audit", args, patience_ticks=AUDIT_PATIENCE_TICKS)
    with client.rubbish_is_loss():
        fault, begin = result.get("fault"), result.get("begin")
        if not (fault is None or type(fault) is str) or not isinstance(begin, dict):
            raise ProtocolError("a report without a proper fault or beginning")
        places = get_bin(result, "places")
        if len(places) % PLACE_BYTES:
            raise ProtocolError("a report with half a place")
        return AuditFile(
            number, get_int(result, "size"), get_int(result, "end"), fault, get_int(result, "first_line"),
            get_bin(result, "macs"), _plain(begin), get_int(result, "expired"), get_int(result, "missed"), places,
        )  # fmt: skip


def _plain(begin: dict[str, Any]) -> dict[str, str | int | bool]:
    if any(type(value) not in (str, int, bool) for value in begin.values()):
        raise ProtocolError("a beginning with a strange value")
    return begin
