"""What the agent can say of one file of an audit log, as it alone has the keys: which lines are right, and their MACs.

Whether the files belong together is judged by whoever asks (`ops.audit_verify`).
"""

from __future__ import annotations

import os
from typing import Any

from cryptfs.agent.audit_file import Reading, Sealing, key_beside, read_frames, read_whole
from cryptfs.agent.audit_log import file_name
from cryptfs.errors import AuditUnavailable, Damaged, VolumeLocked
from cryptfs.format.audit import AuditLine, decode_line
from cryptfs.format.log import HEADER_BYTES, decode_header
from cryptfs.types import ID_BYTES

MAC_SHORT_BYTES = 8
"""How much of each MAC is told: enough that no other line has it, and useless for writing one."""


def check_file(directory: str, number: int, sealing: Sealing, end: int | None) -> dict[str, Any]:
    """A file's report, as the verb `audit` sends it. Blocks: some 100 ms for a full file.

    `end`: where a file that is being written ended when this was asked for. Raises `AuditUnavailable`, `VolumeLocked`
    (its KEKs were wiped meanwhile).
    """
    path = os.path.join(directory, file_name(number))
    try:
        raw = read_whole(path)
    except FileNotFoundError as error:
        if end is None:
            raise AuditUnavailable(f"{path}: {error.strerror}") from error
        return {**_Report().said, "size": 0, "end": 0, "fault": "gone"}
    except OSError as error:
        raise AuditUnavailable(f"{path}: {error.strerror}") from error
    except Damaged:
        raw = b""
    size = len(raw)
    if end is not None:
        raw = raw[:end]
    report = _Report()
    reading = Reading()
    try:
        header = decode_header(raw[:HEADER_BYTES])
        key = sealing.key_of(header) or key_beside(path, header, sealing)
    except Damaged:
        key = None
    except OSError as error:
        raise AuditUnavailable(f"{path}: {error.strerror}") from error
    except ValueError:
        raise VolumeLocked("the volume was locked meanwhile") from None
    if key is None:
        reading.fault = "header"
    else:
        with key:
            for each in read_frames(raw, key.view(), reading):
                report.take(each.line, each.mac, each.generation)
    if end is not None and size < end and reading.fault in (None, "torn"):
        reading.fault = "cut"
    return {**report.said, "size": size, "end": reading.end, "fault": reading.fault}


class _Report:
    def __init__(self) -> None:
        self.first_line = 0
        self.macs = bytearray()
        self.begin: dict[str, str | int | bool] = {}
        self.expired = 0
        self.missed = 0
        self.places = bytearray()
        """Where lines say that other logs end: volume id (zeros: the agent's), u32 file, u64 line, 8 bytes of MAC."""

    @property
    def said(self) -> dict[str, Any]:
        """What the verb's answer says of the file's lines."""
        return {
            "first_line": self.first_line,
            "macs": bytes(self.macs),
            "begin": self.begin,
            "expired": self.expired,
            "missed": self.missed,
            "places": bytes(self.places),
        }

    def take(self, data: bytes, mac: bytes, generation: int) -> None:
        self.macs += mac[:MAC_SHORT_BYTES]
        if not self.first_line:
            self.first_line = generation
        if generation != self.first_line and b'"detail"' not in data:
            return
        try:
            line = decode_line(data)
        except Damaged:
            return  # authentic all the same: a later version may write lines this one does not know
        detail = line.detail
        if generation == self.first_line and line.verb == "begin":
            self.begin = dict(detail)
        elif line.verb == "expire":
            self.expired = max(self.expired, _int(detail.get("up-to-file")))
        elif line.verb == "missed":
            self.missed += _int(detail.get("lines"))
        else:
            self._take_places(line)

    def _take_places(self, line: AuditLine) -> None:
        for prefix, volume_id in (("agent", bytes(ID_BYTES)), ("volume", line.volume_id)):
            mac = line.detail.get(f"{prefix}-mac")
            if type(mac) is str and volume_id is not None:
                number = _int(line.detail.get(f"{prefix}-file"))
                generation = _int(line.detail.get(f"{prefix}-line"))
                self.places += volume_id + number.to_bytes(4, "big") + generation.to_bytes(8, "big")
                self.places += bytes.fromhex(mac)[:MAC_SHORT_BYTES]


def _int(value: object) -> int:
    return value if type(value) is int else 0
