"""What goes on the record, and where: one line per request that touches keys, per refusal, per event (docs/AUDIT.md).

A volume's lines go to the volume's own log while its KEK is held, as the log's keys are wrapped under it; all others
go to the agent's log. Each of the two says now and then where the other one ends, so that neither can be cut short
unnoticed by whoever has the keys of one only.

Lines are written before the answer is sent. Where that fails, requests that hand out keys or change something are
refused with `AuditUnavailable`; what may never be refused (locking) goes on, and the next line that can be written
says how many are missing.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Protocol

import trio

from cryptfs.agent import args as arg
from cryptfs.agent.args import Args
from cryptfs.agent.audit_check import check_file
from cryptfs.agent.audit_file import Sealing
from cryptfs.agent.audit_log import (
    AGENT_LOG,
    FILE_BYTES,
    FILES_KEPT,
    AuditLog,
    file_numbers,
    local_sealing,
    prepare,
)
from cryptfs.agent.audit_request import Detail, detail_of, files_asked_for, files_of, verb_said, volume_of
from cryptfs.agent.audit_rewrap import rewrap_files
from cryptfs.crypto.secret import Secret
from cryptfs.errors import AuditUnavailable, VolumeLocked
from cryptfs.format.audit import Touched, encode_line
from cryptfs.ports import Clock, Random

log = logging.getLogger(__name__)

SYNC_S = 1.0
"""How much of the record a power cut may cost; a `kill -9` costs nothing."""
MESSAGE_MAX_CHARS = 300

_QUIET = frozenset(
    {
        "hello", "status", "floors", "record", "begin", "locked", "about", "audit", "report", "reports", "rotation",
        "rotation-get", "release",
    }
)  # fmt: skip
"""Verbs that hand out no key and change nothing worth a line; their refusal is one."""
_SELF_TOLD = frozenset({"create", "unlock"})
"""They call `unlocked` before the KEK is held."""
_GUARDED = frozenset({"attach", "generate", "kits", "unwrap", "rewrap", "keep"})
"""Refused if they cannot be recorded."""
_CHANGES = frozenset(
    {
        "accept", "accept-volume", "policy-set", "feature-add", "protector-add", "protector-remove", "protector-change",
        "rotate-kek", "destroy-keks", "commit", "shred", "shred-id",
    }
)  # fmt: skip
"""Recorded before they are done, and again with their outcome."""


class AuditedPeer(Protocol):
    """Who asks."""

    @property
    def audit_json(self) -> str:
        """The line's `peer`."""
        ...


class Auditor:
    """All of the agent's logs. Everything but `open_volume` and `serve` is one stretch without an await."""

    def __init__(
        self, directory: str, random: Random, clock: Clock, *, file_bytes: int = FILE_BYTES,
        files_kept: int = FILES_KEPT,
    ) -> None:  # fmt: skip
        """`directory` (absolute) is made when the first line is written."""
        self.directory = directory
        self._random = random
        self._clock = clock
        self._file_bytes = file_bytes
        self._files_kept = files_kept
        self._agent: AuditLog | None = None
        self._volumes: dict[bytes, AuditLog] = {}
        self._ephemeral: set[bytes] = set()
        """Unlocked volumes without a log of their own."""
        self._opening = trio.Lock()
        self._missed = 0
        self.trouble: str | None = None
        """Why the last line could not be written or synced; None if it could."""

    # requests --------------------------------------------------------------------------------------------------

    def before(self, peer: AuditedPeer, verb: str, args: Mapping[str, Any]) -> None:
        """Call before a request is done. Raises `AuditUnavailable` if it changes something and cannot be recorded."""
        if verb in _CHANGES:
            self._write(volume_of(verb, args, None), verb, "asked", peer.audit_json, files_asked_for(verb, args), {})

    def done(self, peer: AuditedPeer, verb: str, args: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        """Call before a request's result is sent. Raises `AuditUnavailable`: then it must not be."""
        if verb in _QUIET or verb in _SELF_TOLD or (verb == "hold" and not result["was_unlocked"]):
            return
        volume_id = volume_of(verb, args, result)
        files = files_of(verb, args, result)
        try:
            self._write(volume_id, verb, "ok", peer.audit_json, files, detail_of(verb, args))
        except AuditUnavailable:
            if verb in _GUARDED:
                raise

    def refused(self, peer: AuditedPeer, verb: str, args: Mapping[str, Any], code: str, why: str) -> None:
        """Call when a request failed. Never raises: what was refused stays so."""
        detail = {"message": why[:MESSAGE_MAX_CHARS]}
        with suppress(AuditUnavailable):
            self._write(
                volume_of(verb, args, None), verb_said(verb), code, peer.audit_json, files_asked_for(verb, args), detail
            )

    def event(self, verb: str, outcome: str = "ok", *, volume_id: bytes | None = None, peer: str = "null",
              detail: Detail | None = None) -> None:  # fmt: skip
        """Something that is nobody's request. Never raises."""
        with suppress(AuditUnavailable):
            self._write(volume_id, verb, outcome, peer, (), detail or {})

    # volumes ---------------------------------------------------------------------------------------------------

    async def open_volume(self, volume_id: bytes, kek_version: int, keks: Mapping[int, Secret]) -> None:
        """Open the log of a volume that is about to be unlocked. Raises `AuditUnavailable`: it must not be."""
        sealing = Sealing(keks, kek_version, volume_id)
        async with self._opening:
            opened = self._volumes.get(volume_id)
            if opened is not None:
                opened.reseal(sealing)
                return
            directory = os.path.join(self.directory, volume_id.hex())
            try:
                opened = await trio.to_thread.run_sync(self._open, directory, sealing)
            except AuditUnavailable as error:
                self._failed(error)
                raise
            self._volumes[volume_id] = opened

    def opened_without_log(self, volume_id: bytes) -> None:
        """An ephemeral volume is about to be unlocked: its lines go to the agent's log.

        Once its KEK is gone nobody could verify a log of its own, and each mount would leave one for ever.
        """
        self._ephemeral.add(volume_id)

    def reseal(self, volume_id: bytes, kek_version: int, keks: Mapping[int, Secret]) -> None:
        """The volume's KEKs are held elsewhere now."""
        opened = self._volumes.get(volume_id)
        if opened is not None:
            opened.reseal(Sealing(keks, kek_version, volume_id))

    async def rewrap(self, volume_id: bytes, kek_version: int, keks: Mapping[int, Secret]) -> None:
        """The KEKs older than this one are about to be destroyed: keep the volume's log readable.

        Raises `AuditUnavailable`: then they must not be.
        """
        directory = os.path.join(self.directory, volume_id.hex())
        async with self._opening:
            await trio.to_thread.run_sync(rewrap_files, directory, Sealing(keks, kek_version, volume_id))

    def unlocked(self, peer: AuditedPeer, verb: str, volume_id: bytes, detail: Detail) -> None:
        """Record an unlock, with where the agent's log ends. Raises `AuditUnavailable`."""
        number, line, end_mac = self._agent_log().place
        places: Detail = {"agent-file": number, "agent-line": line, "agent-mac": end_mac}
        self._write(volume_id, verb, "ok", peer.audit_json, (), {**detail, **places})

    def close_volume(self, volume_id: bytes, verb: str) -> None:
        """The volume's KEK is about to be forgotten: end its log, and say in the agent's where. Never raises."""
        if volume_id in self._ephemeral:
            self._ephemeral.discard(volume_id)
            self.event(verb, volume_id=volume_id)
        if volume_id not in self._volumes:
            return
        self.event(verb, volume_id=volume_id)
        closed = self._volumes.pop(volume_id)
        number, line, end_mac = closed.place
        self._sync_now(closed)
        closed.close()
        places: Detail = {"volume-file": number, "volume-line": line, "volume-mac": end_mac}
        self.event(verb, volume_id=volume_id, detail=places)

    # life ------------------------------------------------------------------------------------------------------

    async def serve(self) -> None:
        """Make lines durable, once a second, for ever."""
        while True:
            await trio.sleep(SYNC_S)
            for each in [*self._volumes.values(), *([self._agent] if self._agent is not None else [])]:
                if not each.dirty:
                    continue
                try:
                    # Once it has a descriptor of its own it must come to closing it, also if the agent ends just now.
                    with trio.CancelScope(shield=True):
                        await trio.to_thread.run_sync(each.syncing())
                except OSError as error:
                    each.sync_failed()
                    self._failed(AuditUnavailable(f"{each.directory} cannot be synced: {error.strerror}"))

    def close(self) -> None:
        """End every log."""
        for volume_id in [*self._volumes, *self._ephemeral]:
            self.close_volume(volume_id, "forget")
        if self._agent is not None:
            self.event("end", detail={"pid": os.getpid()})
            self._sync_now(self._agent)
            self._agent.close()
            self._agent = None

    # looking ---------------------------------------------------------------------------------------------------

    async def verb_audit(self, _peer: object, args: Args) -> dict[str, Any]:
        """The verb `audit`: a log's file numbers, or what is to be said of one file. Raises `AuditUnavailable`."""
        arg.expect(args, "volume_id", "file")
        volume_id = None if args["volume_id"] is None else arg.get_id(args, "volume_id")
        number = None if args["file"] is None else arg.get_int(args, "file", 1, arg.VERSION_MAX)
        where = AGENT_LOG if volume_id is None else volume_id.hex()
        directory = os.path.join(self.directory, where)
        opened = self._agent_log() if volume_id is None else self._volumes.get(volume_id)
        if number is None:
            try:
                there = await trio.to_thread.run_sync(file_numbers, directory)
            except FileNotFoundError:
                there = []
            except OSError as error:
                raise AuditUnavailable(f"the audit log {directory} cannot be read: {error.strerror}") from error
            if opened is not None and opened.number not in there:
                there = sorted([*there, opened.number])  # removed: what is said of it says so
            return {"files": there[-arg.FILES_MAX :]}
        if opened is None:
            raise VolumeLocked("the volume is locked")
        end = opened.end_of(number)
        return await trio.to_thread.run_sync(check_file, directory, number, opened.sealing, end)

    # inside ----------------------------------------------------------------------------------------------------

    def _open(self, directory: str, sealing: Sealing) -> AuditLog:
        return AuditLog(
            directory, sealing, self._random, self._clock, file_bytes=self._file_bytes, files_kept=self._files_kept
        )

    def _agent_log(self) -> AuditLog:
        if self._agent is None:
            prepare(self.directory)
            try:
                sealing = local_sealing(self.directory, self._random)
            except OSError as error:
                raise AuditUnavailable(f"the audit log {self.directory} cannot be used: {error.strerror}") from error
            self._agent = self._open(os.path.join(self.directory, AGENT_LOG), sealing)
        return self._agent

    def _write(
        self, volume_id: bytes | None, verb: str, outcome: str, peer: str, files: tuple[Touched, ...], detail: Detail
    ) -> None:
        volume = volume_id.hex() if volume_id is not None else None
        try:
            into = self._volumes.get(volume_id) if volume_id is not None else None
            if into is None:
                into = self._agent_log()
            if self._missed:
                gap = {"lines": self._missed}
                into.append(encode_line(self._clock.time_ns(), "missed", "ok", None, "null", (), gap))
                self._missed = 0
            into.append(encode_line(self._clock.time_ns(), verb, outcome, volume, peer, files, detail))
        except AuditUnavailable as error:
            self._missed += 1
            self._failed(error)
            raise
        if self.trouble is not None:
            log.warning("the audit log can be written again")
            self.trouble = None

    def _failed(self, error: AuditUnavailable) -> None:
        if self.trouble is None:
            log.error("%s", error)
        self.trouble = str(error)

    def _sync_now(self, each: AuditLog) -> None:
        try:
            each.syncing()()
        except OSError as error:
            log.error("%s cannot be synced: %s", each.directory, error.strerror)  # noqa: TRY400 - the rest is no news
