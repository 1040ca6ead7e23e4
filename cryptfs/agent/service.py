"""What the agent does for each verb of docs/AGENT_PROTOCOL.md; sockets are the server's affair.

Everything here runs on the server's one loop, and only what runs a KDF or touches a freshness record ever awaits (a
thread): between two awaits nobody else sees or changes the keyring. No reply, log line or error text quotes a
secret; a refused request is logged by verb and error code.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, TypeVar

import trio

from cryptfs.agent import args as arg
from cryptfs.agent.args import Args
from cryptfs.agent.attempts import Attempts
from cryptfs.agent.audit import Auditor
from cryptfs.agent.edit_verbs import SECRET_MAX_BYTES, Editing, get_new_protector, get_policy, get_shred_secret
from cryptfs.agent.freshness import Records
from cryptfs.agent.handing_over import in_thread
from cryptfs.agent.keyring import Keyring, UnwrapItem
from cryptfs.agent.limits import Limits
from cryptfs.agent.locking import TIME_MAX_S, Locks, Terms
from cryptfs.agent.policies import Policies, terms_of
from cryptfs.agent.recording import Attachment, Peer, Recording, check_file
from cryptfs.agent.reports import Reports
from cryptfs.agent.reverify import Reverifier
from cryptfs.agent.rotations import Rotations
from cryptfs.agent.shred_places import ShredPlaces
from cryptfs.agent.shred_store import ShredStore
from cryptfs.agent.unlocking import Key, NewVolume, Providers, Unlocked, create_volume, unlock_volume
from cryptfs.crypto.secret import Secret
from cryptfs.crypto.secret_memory import SecretMemory
from cryptfs.errors import (
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
from cryptfs.format.agent_msg import PROTOCOL_VERSION, Request, encode_failure, encode_push, encode_reply
from cryptfs.format.volume import BLOCK_SIZE_MAX, BLOCK_SIZE_MIN, FILE_MAX_BYTES, LABEL_MAX_CHARS, Volume, parse_volume
from cryptfs.ports import Clock, Random
from cryptfs.types import DOMAINS_DIR, ID_BYTES, Purpose

log = logging.getLogger(__name__)

T = TypeVar("T")

KDF_AT_ONCE = 1
"""A KDF may take a gigabyte: one at a time, the others wait."""
ROOTS_AT_ONCE = 8
"""Roots outside that are being waited for."""
ROOT_PATIENCE_S = 60.0
"""How long such a root may take; somebody may have to press a key on it."""

_CODES: tuple[tuple[type[CryptfsError], str], ...] = (
    (VolumeLocked, "locked"),
    (WrongSecret, "wrong-secret"),
    (RolledBack, "rolled-back"),
    (FreshnessUnavailable, "freshness"),
    (AuditUnavailable, "audit"),
    (ShredSecretMissing, "shred-secret"),
    (VolumeDamaged, "damaged"),
    (UnsupportedFormat, "unsupported"),
    (Denied, "denied"),
    (ProtocolError, "protocol"),
    (UsageError, "usage"),
    (BackendUnavailable, "backend"),
    (VolumeBusy, "busy"),
)


_LOG_PURPOSES = frozenset({Purpose.LOG_FILE, Purpose.LOG_DIR})


class Service:
    """The verbs, on one keyring."""

    def __init__(  # noqa: PLR0913 - what the verbs work on
        self, *, providers: Providers, records: Records, audit: Auditor, shred: ShredStore, random: Random,
        clock: Clock, exit_when_empty: bool, hardening: Mapping[str, str], changed: Callable[[], None],
    ) -> None:  # fmt: skip
        """`changed` is called after the set of unlocked volumes may have changed."""
        self._providers = providers
        self._random = random
        self._clock = clock
        self._exit_when_empty = exit_when_empty
        self._changed = changed
        memory = SecretMemory()
        self._hardening = {**hardening, "memfd_secret": memory.why_not or "on"}
        self._keyring = Keyring(random, memory)
        self._records = records
        self._audit = audit
        self._places = ShredPlaces(shred, providers, random)
        self._attempts = Attempts()
        self._attached: dict[bytes, Attachment] = {}
        self._cipher_dirs: dict[bytes, bytes] = {}
        self._kept: set[bytes] = set()
        self.locks = Locks(self._keyring, self._attached, self._forget, clock, self._domains_of)
        self.limits = Limits(audit, clock)
        self.locks.on_begin = self.limits.refuse
        self._reports = Reports(self._attached)
        self._kdf_limit = trio.CapacityLimiter(KDF_AT_ONCE)
        self._root_limit = trio.CapacityLimiter(ROOTS_AT_ONCE)
        self.root_patience_s = ROOT_PATIENCE_S
        self.reverifier = Reverifier(self.locks.begin, self._say_reverified, clock)
        self.policies = Policies(self._attached, self.locks, self.limits, self.reverifier, audit)
        self._started_s = clock.time_ns() // 1_000_000_000
        self.stopping = trio.Event()
        self._editing = Editing(
            keyring=self._keyring, records=records, audit=audit, attached=self._attached, providers=providers,
            places=self._places, random=random, clock=clock, in_thread=self._in_kdf_thread, policies=self.policies,
        )  # fmt: skip
        rotations = Rotations(self._attached)
        self._inline: Mapping[str, Callable[[Args], dict[str, Any]]] = {
            "unwrap": self._unwrap,
            "rewrap": self._rewrap,
            "generate": self._generate,
            "kits": self._kits,
            "keep": self._keep,
            "status": self._status,
            "about": self._about,
            **rotations.inline,
        }
        self._of_peer: Mapping[str, Callable[[Peer, Args], dict[str, Any]]] = {
            "hello": self._hello,
            "detach": self._detach,
            "locked": self._locked,
            "report": self._reports.answered,
            "rotation": rotations.report,
        }
        self._slow: Mapping[str, Callable[[Peer, Args], Awaitable[dict[str, Any]]]] = {
            "create": self._create,
            "unlock": self._unlock,
            "lock": self._lock,
            "lock-path": self._lock_path,
            "stop": self._stop,
            "attach": self._attach,
            "unwrap": self._unwrap_late,
            "reports": self._tell_reports,
            "audit": audit.verb_audit,
            "shred": self._shred_volume,
            **Recording(self._keyring, records, self._attached).verbs,
            **self._editing.verbs,
        }

    @property
    def empty(self) -> bool:
        """Whether no volume is unlocked."""
        return not self._keyring.volume_ids

    def is_slow(self, request: Request) -> bool:
        """Whether `answer_slow` must be awaited for this request rather than `answer` called."""
        if request.verb == "unwrap":
            volume_id = request.args.get("volume_id")
            if type(volume_id) is not bytes or not self._keyring.holds(volume_id):
                return False
            # The first one needs the volume's freshness record, which is on disk yet; others only if there is a limit.
            return self._records.get(volume_id) is None or self._is_limited(volume_id)
        return request.verb in self._slow

    def answer(self, peer: Peer, request: Request) -> bytes:
        """The encoded answer to a request; never raises for anything a request may hold."""
        try:
            if self.locks and not self.locks.serves(request.args.get("volume_id"), peer):
                self._refuse_while_locking(request)
            verb = self._inline.get(request.verb)
            if verb is not None:
                result = verb(request.args)
            elif request.verb in self._of_peer:
                result = self._of_peer[request.verb](peer, request.args)
            else:
                raise ProtocolError("unknown verb")
            self._audit.done(peer, request.verb, request.args, result)
            return encode_reply(request.request_id, result)
        except Exception as error:  # noqa: BLE001 - one request's failure is that request's answer
            return self._refuse(peer, request, error)

    async def answer_slow(self, peer: Peer, request: Request) -> bytes:
        """As `answer`, for verbs that wait for a thread. If cancelled, nothing is held that was not held before."""
        try:
            self._audit.before(peer, request.verb, request.args)
            result = await self._slow[request.verb](peer, request.args)
            self._audit.done(peer, request.verb, request.args, result)
            return encode_reply(request.request_id, result)
        except Exception as error:  # noqa: BLE001 - one request's failure is that request's answer
            return self._refuse(peer, request, error)

    def _refuse(self, peer: Peer, request: Request, error: Exception) -> bytes:
        code, text, answer = _failure(request, error)
        self._audit.refused(peer, request.verb, request.args, code, text)
        return answer

    def rubbish(self, peer: Peer, error: ProtocolError) -> None:
        """The peer broke the protocol; its connection ends."""
        self._audit.event("message", "protocol", peer=peer.audit_json, detail={"message": str(error)})

    def is_attached(self, peer: Peer) -> bool:
        """Whether the connection stands for a daemon."""
        return any(attachment.peer is peer for attachment in self._attached.values())

    def gone(self, peer: Peer) -> None:
        """The connection ended: what it was attached to and did not detach is forgotten, unless it is to be kept."""
        for volume_id in [volume_id for volume_id, at in self._attached.items() if at.peer is peer]:
            log.info("the daemon of volume %s is gone", volume_id.hex())
            self._unattach(volume_id, keep=False)
        self._changed()

    async def close_records(self) -> None:
        """Close the freshness records of volumes that are neither unlocked nor mounted."""
        await self._records.close_but({*self._keyring.volume_ids, *self._attached})

    def forget_all(self) -> None:
        """Wipe every KEK and tell the daemons."""
        for volume_id in self._keyring.volume_ids:
            self._forget(volume_id)

    # ------------------------------------------------------------------------------------------------ verbs

    def _hello(self, peer: Peer, args: Args) -> dict[str, Any]:
        arg.expect(args, "role")
        if args["role"] not in ("cli", "daemon"):
            raise ProtocolError("role must be cli or daemon")
        peer.says_it_is(args["role"])
        return {"version": PROTOCOL_VERSION, "pid": os.getpid(), "started_s": self._started_s}

    async def _create(self, peer: Peer, args: Args) -> dict[str, Any]:
        names = (
            "block_size",
            "kind",
            "wish",
            "label",
            "secret",
            "policy",
            "shred_kind",
            "shred_params",
            "shred_secret",
        )
        arg.expect(args, *names)
        now_s = self._clock.time_ns() // 1_000_000_000
        new = NewVolume(
            block_size=arg.get_int(args, "block_size", BLOCK_SIZE_MIN, BLOCK_SIZE_MAX),
            protector=get_new_protector(args, now_s) if args["kind"] else None,
            created_s=now_s,
            policy=get_policy(args, "policy"),
            shred_kind=arg.get_text(args, "shred_kind", LABEL_MAX_CHARS),
            shred_params=arg.get_plain_map(args, "shred_params"),
        )
        if new.block_size.bit_count() != 1:
            raise ProtocolError("block_size must be a power of two")
        if new.shred_kind and new.protector is None:
            raise UsageError("an ephemeral volume needs no shred secret: its key is never stored")
        given = get_shred_secret(args)
        secret = Secret.of(arg.get_bytes(args, "secret", 1 if new.protector is not None else 0, SECRET_MAX_BYTES))
        volume_id = self._random(ID_BYTES)

        def create() -> Unlocked:
            if not new.shred_kind:
                return create_volume(new, secret, self._providers, self._random, volume_id=volume_id)
            # Durable before the volume is: no volume may need a secret that a crash took.
            shred, params = self._places.make(new.shred_kind, new.shred_params, given, volume_id)
            with shred:
                placed = replace(new, shred_params=params)
                return create_volume(placed, secret, self._providers, self._random, shred, volume_id)

        unlocked = await self._with_secret(secret, create)
        await self._on_record(peer, "create", unlocked, {})
        self._hold(unlocked, b"", Terms())
        return {"volume": unlocked.data}

    async def _unlock(self, peer: Peer, args: Args) -> dict[str, Any]:
        names = ("volume", "cipher_dir", "secret", "for_s", "idle_s", "kind", "protector_id", "shred_secret")
        arg.expect(args, *names)
        for_s, idle_s = _time(args, "for_s"), _time(args, "idle_s")
        data = arg.get_bytes(args, "volume", 0, FILE_MAX_BYTES)
        cipher_dir = arg.get_path(args, "cipher_dir")
        kind = arg.get_text(args, "kind", LABEL_MAX_CHARS)
        protector_id = arg.get_bytes(args, "protector_id", 0, ID_BYTES)
        given = get_shred_secret(args)
        volume = parse_volume(data)
        async with self._attempts.next(volume.volume_id) as failures:
            limit = self._limit_of(volume, kind, protector_id)
            secret = Secret.of(arg.get_bytes(args, "secret", 1, SECRET_MAX_BYTES))
            key = Key(secret, kind, protector_id)

            def unlock() -> Unlocked:
                shred = self._places.find(volume, given)
                with shred or nullcontext():
                    return unlock_volume(data, key, self._providers, shred)

            unlocked = await self._with_secret(secret, unlock, limit)
        terms = Terms(for_s, idle_s)
        counts = terms.before(terms_of(unlocked.volume.policy))
        said: dict[str, str | int | bool] = {"cipher-dir": os.fsdecode(cipher_dir), "failures-before": failures}
        said |= {name: s for name, s in (("for-s", counts.for_s), ("idle-s", counts.idle_s)) if s is not None}
        await self._on_record(peer, "unlock", unlocked, said)
        self._hold(unlocked, cipher_dir, terms)
        return {"volume_id": unlocked.volume.volume_id, "kek_version": unlocked.volume.kek_version}

    async def _with_secret(
        self, secret: Secret, work: Callable[[], Unlocked], limit: trio.CapacityLimiter | None = None
    ) -> Unlocked:
        def with_it() -> Unlocked:
            # Wiped by the thread: if the client leaves, the thread outlives the request.
            with secret:
                return work()

        with trio.move_on_after(float("inf") if limit is None else self.root_patience_s):
            return await in_thread(with_it, Unlocked.discard, limit or self._kdf_limit)
        raise BackendUnavailable(f"the root key's holder has not answered for {self.root_patience_s:.0f} s")

    def _limit_of(self, volume: Volume, kind: str, protector_id: bytes) -> trio.CapacityLimiter | None:
        """Roots outside need little memory and may hang: they do not share the KDFs' one place (None)."""
        kinds = {kind} | {p.kind for p in volume.protectors if p.protector_id == protector_id}
        kinds |= {volume.shred.kind} if volume.shred is not None else set()
        outside = any(kind in self._providers and self._providers[kind].revocable for kind in kinds)
        return self._root_limit if outside else None

    async def _in_kdf_thread(self, work: Callable[[], T]) -> T:
        return await trio.to_thread.run_sync(work, abandon_on_cancel=True, limiter=self._kdf_limit)

    async def _shred_volume(self, peer: Peer, args: Args) -> dict[str, Any]:
        """Destroy the volume's shred secret where that is the agent's to do, and lock the volume."""
        arg.expect(args, "volume", "shred_secret")
        volume = parse_volume(arg.get_bytes(args, "volume", 0, FILE_MAX_BYTES))
        given, volume_id = get_shred_secret(args), volume.volume_id
        if volume_id in self._attached and self._keyring.holds(volume_id):
            raise VolumeBusy("the volume is mounted, and not locked")
        # Before the lock: if we die in between, the secret is gone and so is the agent's memory.
        destroyed = await trio.to_thread.run_sync(self._places.destroy, volume, given, limiter=self._root_limit)
        await self.locks.lock(volume_id, f"process {peer.pid} shreds it")
        return {"destroyed": destroyed}

    async def _on_record(self, peer: Peer, verb: str, unlocked: Unlocked, said: Mapping[str, str | int | bool]) -> None:
        """Open the volume's audit log and say there that it is unlocked; if that fails, it must not be.

        If it is being locked, that comes to its end first: its log is closed with it.
        """
        volume_id = unlocked.volume.volume_id
        try:
            await self.locks.settled(volume_id)
            held = self._keyring.holds(volume_id)
            try:
                await self._audit.open_volume(volume_id, unlocked.volume.kek_version, unlocked.keks)
                self._audit.unlocked(peer, verb, volume_id, said)
            except BaseException:
                if not held:
                    self._audit.close_volume(volume_id, "forget")
                raise
        except BaseException:
            trio.lowlevel.start_thread_soon(unlocked.discard, lambda _outcome: None)  # a root may block
            raise

    def _hold(self, unlocked: Unlocked, cipher_dir: bytes, terms: Terms) -> None:
        volume = unlocked.volume
        self._keyring.hold(volume.volume_id, volume.kek_version, unlocked.keks)
        self._audit.reseal(volume.volume_id, volume.kek_version, self._keyring.keks(volume.volume_id))
        self._cipher_dirs[volume.volume_id] = cipher_dir
        self.locks.held(volume.volume_id, terms)
        self.reverifier.held(volume.volume_id, unlocked.standing, volume.policy.reverify_s)
        self.policies.learn(volume.volume_id, volume.serial, volume.policy)
        log.info("volume %s is unlocked", volume.volume_id.hex())
        attachment = self._attached.get(volume.volume_id)
        if attachment is not None:
            attachment.peer.post(encode_push({"event": "unlocked", "volume_id": volume.volume_id}))
        self._changed()

    async def _lock(self, peer: Peer, args: Args) -> dict[str, Any]:
        arg.expect(args, "volume_id")
        outcome = await self.locks.lock(arg.get_id(args, "volume_id"), f"process {peer.pid} asked for it")
        return {"was_unlocked": outcome.was_unlocked, "unwritten": outcome.unwritten}

    async def _lock_path(self, peer: Peer, args: Args) -> dict[str, Any]:
        arg.expect(args, "path")
        path = arg.get_path(args, "path")
        if not path:
            raise ProtocolError("path must not be empty")
        volume_id = self._volume_at(path)
        if volume_id is None:
            return {"volume_id": None, "was_unlocked": False, "unwritten": 0}
        outcome = await self.locks.lock(volume_id, f"process {peer.pid} asked for it")
        return {"volume_id": volume_id, "was_unlocked": outcome.was_unlocked, "unwritten": outcome.unwritten}

    def _volume_at(self, path: bytes) -> bytes | None:
        """The volume (no domain) mounted on `path`, else the one whose cipher directory it is, as far as we know."""
        for name in ("mountpoint", "cipher_dir"):
            for volume_id, attachment in self._attached.items():
                # A domain's directory may have been renamed since we were told.
                is_sure = name == "cipher_dir" or not _is_domain(attachment.cipher_dir)
                if getattr(attachment, name) == path and is_sure:
                    return volume_id
        return next((volume_id for volume_id, at in self._cipher_dirs.items() if at == path), None)

    def _locked(self, peer: Peer, args: Args) -> dict[str, Any]:
        arg.expect(args, "volume_id", "unwritten")
        self.locks.confirm(peer, arg.get_id(args, "volume_id"), arg.get_int(args, "unwritten", 0, arg.VERSION_MAX))
        return {}

    def _refuse_while_locking(self, request: Request) -> None:
        if request.verb in ("unwrap", "rewrap", "generate", "kits"):
            raise VolumeLocked("the volume is being locked")

    def _forget(self, volume_id: bytes) -> bool:
        if self._keyring.holds(volume_id):
            self._audit.close_volume(volume_id, "forget")
        was_unlocked = self._keyring.forget(volume_id)
        self.locks.forgotten(volume_id)
        self.reverifier.forgotten(volume_id)
        self.policies.forgotten(volume_id)
        cipher_dir = self._cipher_dir(volume_id)
        self._cipher_dirs.pop(volume_id, None)
        attachment = self._attached.get(volume_id)
        for domain_id in self._in(cipher_dir) if was_unlocked and cipher_dir else ():
            self.locks.begin(domain_id, "the volume it is in is locked")
        if was_unlocked:
            log.info("volume %s is locked", volume_id.hex())
            if attachment is not None:
                attachment.peer.post(encode_push({"event": "locked", "volume_id": volume_id}))
            self._changed()
        return was_unlocked

    def _say_reverified(self, volume_id: bytes, outcome: str, why: str, then: str) -> None:
        self._audit.event("reverify", outcome, volume_id=volume_id, detail={"message": why[:200], "then": then})

    def _cipher_dir(self, volume_id: bytes) -> bytes:
        attachment = self._attached.get(volume_id)
        return attachment.cipher_dir if attachment else self._cipher_dirs.get(volume_id, b"")

    def _domains_of(self, volume_id: bytes) -> list[bytes]:
        """Volumes that are unlocked and lie in this one (FORMAT.md §2)."""
        cipher_dir = self._cipher_dir(volume_id)
        return self._in(cipher_dir) if cipher_dir else []

    def _in(self, cipher_dir: bytes) -> list[bytes]:
        domains = os.path.join(cipher_dir, DOMAINS_DIR.encode())
        return [held for held in self._keyring.volume_ids if os.path.dirname(self._cipher_dir(held)) == domains]

    def _about(self, args: Args) -> dict[str, Any]:
        arg.expect(args)
        return {"pid": os.getpid(), "hardening": self._hardening, "audit": self._audit.trouble}

    def _status(self, args: Args) -> dict[str, Any]:
        arg.expect(args)
        volumes = []
        for volume_id in sorted({*self._keyring.volume_ids, *self._attached}):
            attachment = self._attached.get(volume_id)
            volumes.append(
                {
                    "volume_id": volume_id,
                    "cipher_dir": self._cipher_dir(volume_id),
                    "mountpoint": attachment.mountpoint if attachment else None,
                    "state": self._state(volume_id),
                    "locks_in_s": self.locks.locks_in_s(volume_id),
                    "daemon_pid": attachment.peer.pid if attachment else None,
                }
            )
        return {"pid": os.getpid(), "exit_when_empty": self._exit_when_empty, "volumes": volumes}

    def _state(self, volume_id: bytes) -> str:
        if volume_id in self.locks:
            return "locking"
        return "unlocked" if self._keyring.holds(volume_id) else "locked"

    async def _attach(self, peer: Peer, args: Args) -> dict[str, Any]:
        volume_id, attachment = self._attachment(peer, args)
        record = await self._records.opened(volume_id)
        # Once more: while the record was opened, the volume may have been locked or attached to.
        volume_id, attachment = self._attachment(peer, args)
        if attachment.serial < record.seen.serial or attachment.kek_version < record.seen.kek_version:
            raise RolledBack("the volume file is older than this machine has seen it")
        self._attached[volume_id] = attachment
        self._kept.discard(volume_id)
        self.policies.learn(volume_id, attachment.serial, attachment.policy)
        return {"kek_version": attachment.kek_version, **self.policies.told(volume_id)}

    def _attachment(self, peer: Peer, args: Args) -> tuple[bytes, Attachment]:
        arg.expect(args, "volume_id", "cipher_dir", "mountpoint", "volume")
        volume_id = arg.get_id(args, "volume_id")
        cipher_dir, mountpoint = arg.get_path(args, "cipher_dir"), arg.get_path(args, "mountpoint")
        volume = check_file(self._keyring, volume_id, arg.get_bytes(args, "volume", 0, FILE_MAX_BYTES))
        if self._records.would_vanish_under(os.fsdecode(mountpoint)):
            raise Denied(f"a mount on {os.fsdecode(mountpoint)} would hide the key agent's state directory")
        if not self.locks.serves(volume_id, peer):
            raise VolumeLocked("the volume is being locked")
        other = self._attached.get(volume_id)
        if other is not None and other.peer is not peer:
            raise VolumeBusy(f"the volume is mounted already, by process {other.peer.pid}")
        return volume_id, Attachment(peer, cipher_dir, mountpoint, volume.serial, volume.kek_version, volume.policy)

    def _detach(self, peer: Peer, args: Args) -> dict[str, Any]:
        arg.expect(args, "volume_id", "keep")
        volume_id, keep = arg.get_id(args, "volume_id"), arg.get_bool(args, "keep")
        attachment = self._attached.get(volume_id)
        if attachment is None or attachment.peer is not peer:
            raise ProtocolError("this connection is not attached to the volume")
        self._unattach(volume_id, keep=keep)
        return {}

    def _keep(self, args: Args) -> dict[str, Any]:
        arg.expect(args, "volume_id", "keep")
        volume_id, keep = arg.get_id(args, "volume_id"), arg.get_bool(args, "keep")
        attached = volume_id in self._attached
        if keep and attached:
            self._kept.add(volume_id)
        else:
            self._kept.discard(volume_id)
        return {"was_attached": attached}

    def _unattach(self, volume_id: bytes, *, keep: bool) -> None:
        """The volume's daemon is done: forget the KEK, unless it or the user (the verb `keep`) says otherwise."""
        attachment = self._attached.pop(volume_id)
        self._reports.gone(volume_id)
        if (not keep and volume_id not in self._kept) or volume_id in self.locks:
            self._forget(volume_id)
        elif self._keyring.holds(volume_id):
            self._cipher_dirs[volume_id] = attachment.cipher_dir
        self._kept.discard(volume_id)

    def _generate(self, args: Args) -> dict[str, Any]:
        arg.expect(args, "volume_id", "id", "purpose", "count")
        self.locks.used(arg.get_id(args, "volume_id"))
        kek_version, keys, wrapped = self._keyring.generate(
            arg.get_id(args, "volume_id"),
            arg.get_id(args, "id"),
            arg.get_purpose(args, "purpose"),
            arg.get_int(args, "count", 1, arg.KEYS_MAX),
        )
        return {"kek_version": kek_version, "keys": keys, "wrapped": wrapped}

    def _kits(self, args: Args) -> dict[str, Any]:
        arg.expect(args, "volume_id", "directory", "count", "deks")
        volume_id = arg.get_id(args, "volume_id")
        self.locks.used(volume_id)
        count = arg.get_int(args, "count", 1, arg.KITS_MAX)
        deks = arg.get_int(args, "deks", 0, arg.KEYS_MAX // count)
        directory = arg.get_bool(args, "directory")
        kek_version, kits = self._keyring.kits(volume_id, directory=directory, count=count, deks=deks)
        return {"kek_version": kek_version, "kits": kits}

    def _is_limited(self, volume_id: bytes) -> bool:
        return self.limits.must_wait(volume_id) and volume_id not in self.locks

    async def _unwrap_late(self, peer: Peer, args: Args) -> dict[str, Any]:
        arg.expect(args, "volume_id", "items")
        volume_id, items = arg.get_id(args, "volume_id"), arg.get_items(args, "items")
        if not self.locks.serves(volume_id, peer):
            raise VolumeLocked("the volume is being locked")
        self.locks.used(volume_id)
        await self._records.opened(volume_id)
        if self._is_limited(volume_id):
            await self.limits.turn(volume_id, peer, items)
        else:
            self.limits.take(volume_id, items)
        if not self.locks.serves(volume_id, peer):
            raise VolumeLocked("the volume is being locked")
        return self._unwrapped(volume_id, items)

    def _unwrap(self, args: Args) -> dict[str, Any]:
        arg.expect(args, "volume_id", "items")
        volume_id, items = arg.get_id(args, "volume_id"), arg.get_items(args, "items")
        self.limits.take(volume_id, items)
        return self._unwrapped(volume_id, items)

    def _unwrapped(self, volume_id: bytes, items: list[UnwrapItem]) -> dict[str, Any]:
        self.locks.used(volume_id)
        keys = self._keyring.unwrap(volume_id, items)
        record = self._records.get(volume_id)
        if record is None:
            raise VolumeLocked("the volume was locked meanwhile")
        floors = [record.floor(log_id) if purpose in _LOG_PURPOSES else 0 for log_id, purpose, _, _ in items]
        return {"keys": keys, "floors": floors}

    def _rewrap(self, args: Args) -> dict[str, Any]:
        arg.expect(args, "volume_id", "items")
        volume_id, items = arg.get_id(args, "volume_id"), arg.get_items(args, "items")
        self.locks.used(volume_id)
        kek_version, wrapped = self._keyring.rewrap(volume_id, items)
        return {"kek_version": kek_version, "wrapped": wrapped}

    async def _tell_reports(self, _peer: Peer, args: Args) -> dict[str, Any]:
        arg.expect(args)
        reports = await self._reports.ask()
        rows = []
        for volume_id in sorted({*self._keyring.volume_ids, *reports}):
            policy = self.policies.of(volume_id)
            said = None if policy is None else policy.encode()
            rows.append({"volume_id": volume_id, "policy": said, "report": reports.get(volume_id)})
        return {"reports": rows}

    async def _stop(self, peer: Peer, args: Args) -> dict[str, Any]:
        arg.expect(args)
        await self.locks.lock_all(f"process {peer.pid} ends the agent")
        self.stopping.set()
        return {}


def _is_domain(cipher_dir: bytes) -> bool:
    """Whether it is called as a domain's is (FORMAT.md §2)."""
    return os.path.basename(os.path.dirname(cipher_dir)) == DOMAINS_DIR.encode()


def _time(args: Args, name: str) -> int | None:
    return None if args[name] is None else arg.get_int(args, name, 1, TIME_MAX_S)


def _failure(request: Request, error: Exception) -> tuple[str, str, bytes]:
    """(code, text for people, the encoded answer)."""
    for kind, code in _CODES:
        if isinstance(error, kind):
            log.info("%s refused: %s", request.verb[:32], code)
            return code, str(error), encode_failure(request.request_id, code, str(error))
    if isinstance(error, CryptfsError):
        log.warning("%s failed: %s", request.verb, error)
        return "internal", str(error), encode_failure(request.request_id, "internal", str(error))
    # The text of an exception nobody foresaw may quote its arguments; its type and place do not.
    log.error("%s failed: %s", request.verb, type(error).__name__, exc_info=_place_only(error))
    text = f"the agent failed: {type(error).__name__}"
    return "internal", text, encode_failure(request.request_id, "internal", text)


def _place_only(error: Exception) -> tuple[type[RuntimeError], RuntimeError, Any]:
    return (RuntimeError, RuntimeError(type(error).__name__), error.__traceback__)
