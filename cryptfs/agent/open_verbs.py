"""The verbs that unlock: `create` a volume, `unlock` one.

In this order: the KDF (a thread's, the secret wiped there), then the audit log says so, durably, and only then is the
KEK kept. If the client leaves or the log cannot be written, nothing is held that was not held before.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import trio

from cryptfs.agent import args as arg
from cryptfs.agent.args import Args
from cryptfs.agent.attempts import Attempts
from cryptfs.agent.audit import Auditor
from cryptfs.agent.freshness import Records
from cryptfs.agent.locking import TIME_MAX_S, Terms
from cryptfs.agent.policies import terms_of
from cryptfs.agent.recording import Peer
from cryptfs.agent.shred_places import ShredPlaces
from cryptfs.agent.threads import Threads
from cryptfs.agent.unlocking import Key, NewVolume, Providers, Unlocked, create_volume, unlock_volume
from cryptfs.agent.volume_args import SECRET_MAX_BYTES, get_new_protector, get_policy, get_shred_secret
from cryptfs.agent.volumes import Volumes
from cryptfs.crypto.secret import Secret
from cryptfs.errors import ProtocolError, UsageError
from cryptfs.format.volume import BLOCK_SIZE_MAX, BLOCK_SIZE_MIN, FILE_MAX_BYTES, LABEL_MAX_CHARS, parse_volume
from cryptfs.ports import Clock, Random
from cryptfs.types import ID_BYTES


class Opening:
    """`verbs` by name."""

    def __init__(  # noqa: PLR0913 - what the verbs work on
        self, *, volumes: Volumes, audit: Auditor, providers: Providers, places: ShredPlaces, threads: Threads,
        random: Random, clock: Clock, attempts: Attempts, records: Records,
    ) -> None:  # fmt: skip
        self._volumes = volumes
        self._records = records
        self._audit = audit
        self._providers = providers
        self._places = places
        self._threads = threads
        self._random = random
        self._clock = clock
        self._attempts = attempts
        self.verbs: Mapping[str, Callable[[Peer, Args], Awaitable[dict[str, Any]]]] = {
            "create": self._create,
            "unlock": self._unlock,
        }

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
            "while_connected",
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
        given, holder = get_shred_secret(args), _holder(peer, args)
        secret = Secret.of(arg.get_bytes(args, "secret", 1 if new.protector is not None else 0, SECRET_MAX_BYTES))
        volume_id = self._random(ID_BYTES)

        def create() -> Unlocked:
            if not new.shred_kind:
                return create_volume(new, secret, self._providers, self._random, volume_id=volume_id)
            # Durable before the volume is: no volume may need a secret that a crash took.
            shred, params = self._places.make(new.shred_kind, new.shred_params, given, volume_id)
            try:
                with shred:
                    placed = replace(new, shred_params=params)
                    return create_volume(placed, secret, self._providers, self._random, shred, volume_id)
            except BaseException:
                self._places.destroy_kept(volume_id)
                raise

        unlocked = await self._threads.open_with(secret, create)
        try:
            await self._on_record(peer, "create", unlocked, {})
        except BaseException:
            if new.shred_kind:
                with trio.CancelScope(shield=True):
                    await self._threads.ask_root(lambda: self._places.destroy_kept(volume_id))
            raise
        if unlocked.volume.ephemeral:
            self._records.only_in_memory(volume_id)
        self._volumes.hold(unlocked, b"", Terms(), holder)
        return {"volume": unlocked.data}

    async def _unlock(self, peer: Peer, args: Args) -> dict[str, Any]:
        names = ("volume", "cipher_dir", "secret", "for_s", "idle_s", "kind", "protector_id", "shred_secret")
        arg.expect(args, *names, "while_connected")
        for_s, idle_s = _time(args, "for_s"), _time(args, "idle_s")
        data = arg.get_bytes(args, "volume", 0, FILE_MAX_BYTES)
        cipher_dir = arg.get_path(args, "cipher_dir")
        kind = arg.get_text(args, "kind", LABEL_MAX_CHARS)
        protector_id = arg.get_bytes(args, "protector_id", 0, ID_BYTES)
        given, holder = get_shred_secret(args), _holder(peer, args)
        volume = parse_volume(data)
        async with self._attempts.next(volume.volume_id) as failures:
            limit = self._threads.limit_of(volume, kind, protector_id)
            secret = Secret.of(arg.get_bytes(args, "secret", 1, SECRET_MAX_BYTES))
            key = Key(secret, kind, protector_id)

            def unlock() -> Unlocked:
                shred = self._places.find(volume, given)
                with shred or nullcontext():
                    return unlock_volume(data, key, self._providers, shred)

            unlocked = await self._threads.open_with(secret, unlock, limit)
        terms = Terms(for_s, idle_s)
        counts = terms.before(terms_of(unlocked.volume.policy))
        said: dict[str, str | int | bool] = {"cipher-dir": os.fsdecode(cipher_dir), "failures-before": failures}
        said |= {name: s for name, s in (("for-s", counts.for_s), ("idle-s", counts.idle_s)) if s is not None}
        await self._on_record(peer, "unlock", unlocked, said)
        self._volumes.hold(unlocked, cipher_dir, terms, holder)
        return {"volume_id": unlocked.volume.volume_id, "kek_version": unlocked.volume.kek_version}

    async def _on_record(self, peer: Peer, verb: str, unlocked: Unlocked, said: Mapping[str, str | int | bool]) -> None:
        """Open the volume's audit log and say there that it is unlocked; if that fails, it must not be.

        If it is being locked, that comes to its end first: its log is closed with it.
        """
        volume_id = unlocked.volume.volume_id
        try:
            await self._volumes.locks.settled(volume_id)
            held = self._volumes.keyring.holds(volume_id)
            try:
                if unlocked.volume.ephemeral:
                    self._audit.opened_without_log(volume_id)
                else:
                    await self._audit.open_volume(volume_id, unlocked.volume.kek_version, unlocked.keks)
                self._audit.unlocked(peer, verb, volume_id, said)
            except BaseException:
                if not held:
                    self._audit.close_volume(volume_id, "forget")
                raise
        except BaseException:
            trio.lowlevel.start_thread_soon(unlocked.discard, lambda _outcome: None)  # a root may block
            raise


def _holder(peer: Peer, args: Args) -> Peer | None:
    """Whose connection the KEK is held for; None: whoever ends, it stays."""
    return peer if arg.get_bool(args, "while_connected") else None


def _time(args: Args, name: str) -> int | None:
    return None if args[name] is None else arg.get_int(args, name, 1, TIME_MAX_S)
