"""Verifying the audit logs with the agent, which alone has their keys."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cryptfs.cli.audit_lines import log_names
from cryptfs.errors import AuditDamaged, VolumeLocked
from cryptfs.keys.audit_requests import PLACE_BYTES, AuditFile, audit_file, audit_files
from cryptfs.ops.audit_verify import AGENT, FileReport, Place, Verdict, compare, judge
from cryptfs.types import ID_BYTES

if TYPE_CHECKING:
    from cryptfs.keys.agent_client import AgentClient


@dataclass
class Outcome:
    """What came of it. `gone`: volumes whose log the others speak of and that is not there; `locked`: not verified."""

    verdicts: list[Verdict] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    locked: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """0, or that of `AuditDamaged`."""
        return AuditDamaged.exit_code if self.gone or any(verdict.damage for verdict in self.verdicts) else 0

    def name(self, volume_id: bytes) -> str:
        """What a log is called."""
        return "agent" if volume_id == AGENT else f"volume {volume_id.hex()}"

    def as_json(self) -> dict[str, Any]:
        """As docs/CLI_ABI.md lists it."""
        return {
            "result": "changed" if self.exit_code else "intact",
            "logs": [
                {
                    "volume_id": None if verdict.volume_id == AGENT else verdict.volume_id.hex(),
                    "files": verdict.files,
                    "lines": verdict.lines,
                    "damage": verdict.damage,
                    "notes": verdict.notes,
                }
                for verdict in self.verdicts
            ],
            "gone": self.gone,
            "locked": self.locked,
        }


def verify_logs(directory: str, volume_id: bytes | None) -> Outcome:
    """The agent's log and that of one volume (unlocked by now), or of all that are unlocked.

    Raises `AuditUnavailable`, `AgentUnavailable`, `VolumeLocked` (of the volume that was named).
    """
    from cryptfs.cli import key_agent

    async def request(client: AgentClient) -> Outcome:
        return await _verify(client, directory, volume_id)

    return key_agent.ask(request)


async def _verify(client: AgentClient, directory: str, volume_id: bytes | None) -> Outcome:
    outcome = Outcome()
    wanted = [volume_id] if volume_id is not None else await _all_ids(client, directory)
    logs: dict[bytes, list[FileReport]] = {}
    for log_id in [AGENT, *wanted]:
        asked = None if log_id == AGENT else log_id
        try:
            logs[log_id] = [
                _report(await audit_file(client, asked, number)) for number in await audit_files(client, asked)
            ]
        except VolumeLocked:
            if volume_id is not None:
                raise
            outcome.locked.append(log_id.hex())
    verdicts = {log_id: judge(log_id, reports) for log_id, reports in logs.items()}
    for log_id, reports in logs.items():
        if not reports:
            verdicts[log_id].notes.append("it has no log: of an ephemeral volume, everything is in the agent's")
    gone = compare(logs, verdicts)
    outcome.verdicts = list(verdicts.values())
    present = log_names(directory)
    outcome.gone = [name for name in gone if name not in present]
    return outcome


async def _all_ids(client: AgentClient, directory: str) -> list[bytes]:
    """Volumes that have a log, or must have one as they are unlocked."""
    there = {bytes.fromhex(name) for name in log_names(directory) if name != "agent"}
    unlocked = {volume.volume_id for volume in (await client.status()).volumes if volume.state == "unlocked"}
    return sorted(there | unlocked)


def _report(said: AuditFile) -> FileReport:
    places = []
    for at in range(0, len(said.places), PLACE_BYTES):
        row = said.places[at : at + PLACE_BYTES]
        file, line = row[ID_BYTES : ID_BYTES + 4], row[ID_BYTES + 4 : ID_BYTES + 12]
        places.append(
            Place(row[:ID_BYTES], int.from_bytes(file, "big"), int.from_bytes(line, "big"), row[ID_BYTES + 12 :])
        )
    return FileReport(
        said.number, said.size, said.end, said.fault, said.first_line, said.macs, said.begin, said.expired, said.missed,
        tuple(places),
    )  # fmt: skip
