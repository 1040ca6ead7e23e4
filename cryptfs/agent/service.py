"""What the agent does for each verb of docs/AGENT_PROTOCOL.md; sockets are the server's affair.

Each room of verbs is a module: `open_verbs`, `lock_verbs`, `attach_verbs`, `key_verbs`, `edit_verbs`, `recording`,
`rotations`, `reports`. Here is which verb is whose, and what is the same for all: who is served, what is logged, what
is answered.

Everything here runs on the server's one loop: between two awaits nobody else sees or changes the keyring. Which verb
awaits what, and what it looks at again then, is in docs/CONCURRENCY.md, "The agent". No reply, log line or error text
quotes a secret; a refused request is logged by verb and error code.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import trio

from cryptfs.agent import args as arg
from cryptfs.agent.args import Args
from cryptfs.agent.attach_verbs import Attaching
from cryptfs.agent.attempts import Attempts
from cryptfs.agent.audit import Auditor
from cryptfs.agent.edit_verbs import Editing
from cryptfs.agent.failures import failure
from cryptfs.agent.freshness import Records
from cryptfs.agent.key_verbs import Keys
from cryptfs.agent.keyring import Keyring
from cryptfs.agent.lock_verbs import Locking
from cryptfs.agent.open_verbs import Opening
from cryptfs.agent.recording import Peer, Recording
from cryptfs.agent.reports import Reports
from cryptfs.agent.rotations import Rotations
from cryptfs.agent.shred_places import ShredPlaces
from cryptfs.agent.shred_store import ShredStore
from cryptfs.agent.threads import Threads
from cryptfs.agent.unlocking import Providers
from cryptfs.agent.volumes import Volumes
from cryptfs.crypto.secret_memory import SecretMemory
from cryptfs.errors import ProtocolError, VolumeBusy, VolumeLocked
from cryptfs.format.agent_msg import PROTOCOL_VERSION, Request, encode_reply
from cryptfs.ports import Clock, Random


class Service:
    """The verbs, on one keyring."""

    def __init__(  # noqa: PLR0913 - what the verbs work on
        self, *, providers: Providers, records: Records, audit: Auditor, shred: ShredStore, random: Random,
        clock: Clock, exit_when_empty: bool, hardening: Mapping[str, str], changed: Callable[[], None],
    ) -> None:  # fmt: skip
        """`changed` is called after the set of unlocked volumes may have changed."""
        self._exit_when_empty = exit_when_empty
        memory = SecretMemory()
        self._hardening = {**hardening, "memfd_secret": memory.why_not or "on"}
        self._records = records
        self._audit = audit
        self._started_s = clock.time_ns() // 1_000_000_000
        self.stopping = trio.Event()
        self.volumes = volumes = Volumes(Keyring(random, memory), audit, clock, changed)
        self.threads = threads = Threads(providers)
        self._reports = Reports(volumes.attached)
        self._attaching = Attaching(volumes, records, self._reports)
        self._keys = Keys(volumes, records)
        self._attempts = attempts = Attempts()
        places = ShredPlaces(shred, providers, random)
        locking = Locking(volumes, places, threads, self.stopping)
        opening = Opening(
            volumes=volumes, audit=audit, providers=providers, places=places, threads=threads, random=random,
            clock=clock, attempts=attempts, records=records,
        )  # fmt: skip
        editing = Editing(
            keyring=volumes.keyring, records=records, audit=audit, attached=volumes.attached, providers=providers,
            places=places, random=random, clock=clock, in_thread=threads.run_kdf, policies=volumes.policies,
            attempts=attempts, cipher_dir=volumes.cipher_dir,
        )  # fmt: skip
        recording = Recording(volumes.keyring, records, volumes.attached)
        rotations = Rotations(volumes.attached)
        self._inline: Mapping[str, Callable[[Args], dict[str, Any]]] = {
            "keep": self._attaching.keep,
            "status": self._status,
            "about": self._about,
            **self._keys.inline,
            **rotations.inline,
        }
        self._of_peer: Mapping[str, Callable[[Peer, Args], dict[str, Any]]] = {
            "hello": self._hello,
            "detach": self._attaching.detach,
            "locked": locking.locked,
            "report": self._reports.answered,
            "rotation": rotations.report,
            **volumes.holders.of_peer,
        }
        self._slow: Mapping[str, Callable[[Peer, Args], Awaitable[dict[str, Any]]]] = {
            "attach": self._attaching.attach,
            "unwrap": self._keys.unwrap_late,
            "reports": self._tell_reports,
            "audit": audit.verb_audit,
            **volumes.holders.slow,
            **opening.verbs,
            **locking.verbs,
            **recording.verbs,
            **editing.verbs,
        }

    @property
    def empty(self) -> bool:
        """Whether no volume is unlocked."""
        return not self.volumes.keyring.volume_ids

    @property
    def counts_for_s(self) -> float:
        """Seconds for which a count of wrong secrets is still too young to be lost."""
        return self._attempts.young_for_s

    def is_slow(self, request: Request) -> bool:
        """Whether `answer_slow` must be awaited for this request rather than `answer` called."""
        if request.verb == "unwrap":
            return self._keys.must_wait(request.args)
        return request.verb in self._slow

    def answer(self, peer: Peer, request: Request) -> bytes:
        """The encoded answer to a request; never raises for anything a request may hold."""
        try:
            if self.volumes.locks and not self.volumes.locks.serves(request.args.get("volume_id"), peer):
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
        code, text, answer = failure(request, error)
        self._audit.refused(peer, request.verb, request.args, code, text)
        return answer

    def _refuse_while_locking(self, request: Request) -> None:
        if request.verb in self._keys.inline:
            raise VolumeLocked("the volume is being locked")

    def busy(self, peer: Peer, request: Request) -> bytes:
        """The encoded answer to one of too many requests that wait at once on the peer's connection."""
        return self._refuse(peer, request, VolumeBusy("too many requests of this kind at once"))

    def rubbish(self, peer: Peer, error: ProtocolError) -> None:
        """The peer broke the protocol; its connection ends."""
        self._audit.event("message", "protocol", peer=peer.audit_json, detail={"message": str(error)})

    def must_stay(self, peer: Peer) -> bool:
        """Whether a volume might be locked if this connection ended."""
        return self._attaching.is_attached(peer) or self.volumes.holders.holds_any(peer)

    def gone(self, peer: Peer) -> None:
        """The connection ended: what it was attached to and did not detach, or was unlocked for it alone, is locked."""
        self._attaching.gone(peer)
        self.volumes.holders.gone(peer)

    async def close_records(self) -> None:
        """Close the freshness records of volumes that are neither unlocked nor mounted."""
        await self._records.close_but(self.volumes.known)

    # the agent itself ------------------------------------------------------------------------------------------

    def _hello(self, peer: Peer, args: Args) -> dict[str, Any]:
        arg.expect(args, "role")
        if args["role"] not in ("cli", "daemon"):
            raise ProtocolError("role must be cli or daemon")
        peer.says_it_is(args["role"])
        return {"version": PROTOCOL_VERSION, "pid": os.getpid(), "started_s": self._started_s}

    def _about(self, args: Args) -> dict[str, Any]:
        arg.expect(args)
        return {"pid": os.getpid(), "hardening": self._hardening, "audit": self._audit.trouble}

    def _status(self, args: Args) -> dict[str, Any]:
        arg.expect(args)
        volumes = []
        for volume_id in sorted(self.volumes.known):
            attachment = self.volumes.attached.get(volume_id)
            volumes.append(
                {
                    "volume_id": volume_id,
                    "cipher_dir": self.volumes.cipher_dir(volume_id),
                    "mountpoint": attachment.mountpoint if attachment else None,
                    "state": self.volumes.state(volume_id),
                    "locks_in_s": self.volumes.locks.locks_in_s(volume_id),
                    "daemon_pid": attachment.peer.pid if attachment else None,
                }
            )
        ends = self._exit_when_empty and not self.counts_for_s
        return {"pid": os.getpid(), "exit_when_empty": ends, "volumes": volumes}

    async def _tell_reports(self, _peer: Peer, args: Args) -> dict[str, Any]:
        arg.expect(args)
        reports = await self._reports.ask()
        rows = []
        for volume_id in sorted({*self.volumes.keyring.volume_ids, *reports}):
            policy = self.volumes.policies.of(volume_id)
            said = None if policy is None else policy.encode()
            rows.append({"volume_id": volume_id, "policy": said, "report": reports.get(volume_id)})
        return {"reports": rows}
