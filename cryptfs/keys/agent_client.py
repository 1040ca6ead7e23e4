"""The client's side of docs/AGENT_PROTOCOL.md, for daemon and command line.

One connection carries any number of requests at a time. A request writes to the socket itself; a short one that is
alone then waits for its answer right there for a moment (`AgentClient.linger`), any other sleeps until the receiver
task wakes it. If the connection is lost, answers rubbish or stops answering, every waiting request raises
`AgentUnavailable` at once and so does every later one: to reconnect, make a new client.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import Any

import trio

from cryptfs.crypto.secret import overwrite
from cryptfs.errors import AgentUnavailable, NotPermitted, ProtocolError
from cryptfs.format.agent_codes import error_of
from cryptfs.format.agent_msg import PROTOCOL_VERSION, Answer, AnswerDecoder, Failure, Push, Reply, encode_request
from cryptfs.keys.agent_answers import (
    AgentStatus,
    Attached,
    Kit,
    LockOutcome,
    VolumeStatus,
    fits,
    get_attached,
    get_bin,
    get_bool,
    get_floors,
    get_int,
    get_kit,
    get_lock_outcome,
    get_volumes,
)
from cryptfs.keys.edit_requests import KDF_PATIENCE_TICKS, VolumeWish
from cryptfs.paths import socket_address
from cryptfs.sending import Sender
from cryptfs.types import DEK_BYTES, ID_BYTES, NAMES_KEY_BYTES, WRAPPED_BYTES, WRAPPED_NAMES_BYTES

__all__ = ["AgentClient", "AgentStatus", "Kit", "LockOutcome", "VolumeStatus", "connect", "open_agent"]

RECV_BYTES = 64 << 10
LINGER_MS = 1
"""Longest time a lone short request holds up the loop for its answer, which takes some 100 µs."""
LINGER_MAX_BYTES = 1024
"""Requests longer than this are not short: sleeping costs them little, and the loop has better things to do."""
LINGERS_IN_A_ROW = 16
"""Requests answered so before other tasks get their turn."""
TICK_S = 10.0
PATIENCE_TICKS = 2
"""A request unanswered for this many ticks means that the agent hangs."""

_UCRED = struct.Struct("iII")


class _Waiting:
    """A request on its way: the task to wake (once it sleeps), and the answer (once there is one)."""

    __slots__ = ("answer", "task", "ticks_left")

    def __init__(self, ticks_left: int) -> None:
        self.task: trio.lowlevel.Task | None = None
        self.answer: Reply | Failure | None = None
        self.ticks_left = ticks_left


class AgentClient:
    """A connection to the agent. Made by `open_agent` or `connect`."""

    def __init__(
        self,
        sock: socket.socket,
        on_push: Callable[[Mapping[str, Any]], None] | None = None,
        *,
        linger: bool = True,
    ) -> None:
        """`sock` is connected, non-blocking and this object's to close; answers come only while `run` is running."""
        self._sock = sock
        self._on_push = on_push
        self.linger = linger
        """Whether a lone short request may hold up the loop for its answer, 1 ms at most; clear it if others wait."""
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self._lingers = 0
        self._received = memoryview(bytearray(RECV_BYTES))
        self._decoder = AnswerDecoder()
        self._waiting: dict[int, _Waiting] = {}
        self._abandoned: set[int] = set()
        self._last_id = 0
        self._sender = Sender(sock, self._cannot_send)
        self._scope = trio.CancelScope()
        self._lost: str | None = None
        self.lost = trio.Event()
        """Set once the connection is of no more use."""

    # ------------------------------------------------------------------------------------------- the connection

    async def run(self) -> None:
        """Receive until the connection is lost or `close` is called; never raises for what the agent does."""
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._sender.serve)
                    nursery.start_soon(self._watch)
                    while self._lost is None:
                        await trio.lowlevel.wait_readable(self._sock)
                        self._receive()
                    nursery.cancel_scope.cancel()
        finally:
            self._lose("the connection to the key agent is closed")
            self._sock.close()

    def close(self) -> None:
        """End the connection; waiting requests raise `AgentUnavailable`."""
        self._lose("the connection to the key agent is closed")

    def _why(self) -> str:
        return self._lost or "the key agent is gone"

    def _lose(self, why: str) -> None:
        if self._lost is not None:
            return
        self._lost = why
        self.lost.set()
        self._sender.drop()
        self._scope.cancel()
        # So that the agent learns it now, whenever `run` comes to closing the descriptor.
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        waiting = list(self._waiting.values())
        self._waiting.clear()
        for entry in waiting:
            _wake(entry)

    def _receive(self) -> bool:
        """Take what the socket holds, without waiting; False if it held nothing."""
        try:
            have = self._sock.recv_into(self._received)
        except BlockingIOError:
            return False
        except OSError as error:
            self._lose(f"the key agent is gone: {error.strerror}")
            return True
        if not have:
            self._lose("the key agent closed the connection")
            return True
        try:
            for answer in self._decoder.feed(self._received[:have]):
                self._take(answer)
        except ProtocolError as error:
            self._lose(f"the key agent sent rubbish: {error}")
        finally:
            # Keys were in it, and the next answer may be shorter.
            self._received[:have] = bytes(have)
        return True

    def _take(self, answer: Answer) -> None:
        if isinstance(answer, Push):
            if answer.event.get("event") == "waiting":
                # Its rate limit holds requests up; that it says so is the sign of life they would be.
                for each in self._waiting.values():
                    each.ticks_left = max(each.ticks_left, PATIENCE_TICKS)
            elif self._on_push is not None:
                self._on_push(answer.event)
            return
        entry = self._waiting.pop(answer.request_id, None)
        if entry is not None:
            entry.answer = answer
            _wake(entry)
        elif answer.request_id in self._abandoned:
            self._abandoned.discard(answer.request_id)
            if isinstance(answer, Reply):
                overwrite(_bytes_in(answer.result))
        else:
            raise ProtocolError("an answer to a request that was never made")

    def _take_time(self) -> None:
        # A blocking wait, short and bounded: going to sleep in trio and being woken there costs a lone request another
        # 40 µs and as much CPU. Looking again and again without blocking is worse: it slows the agent's core.
        self._lingers += 1
        if self._poll.poll(LINGER_MS):
            self._receive()

    def _cannot_send(self, error: OSError) -> None:
        self._lose(f"the key agent is gone: {error.strerror}")

    async def _watch(self) -> None:
        # Ticks instead of a timeout around each request: a request is on the path of every small file's first read.
        while True:
            await trio.sleep(TICK_S)
            for entry in self._waiting.values():
                entry.ticks_left -= 1
            if any(entry.ticks_left < 0 for entry in self._waiting.values()):
                self._lose("the key agent does not answer")

    # --------------------------------------------------------------------------------------------- requests

    async def request(
        self, verb: str, args: Mapping[str, Any], *, patience_ticks: int = PATIENCE_TICKS
    ) -> Mapping[str, Any]:
        """One request and its result.

        Raises what the agent's error code stands for (`VolumeLocked`, `WrongSecret`, `VolumeDamaged`, `RolledBack`,
        `UnsupportedFormat`, `Denied`, `VolumeBusy`, `FreshnessUnavailable`, `AuditUnavailable`, `ProtocolError`), or
        `AgentUnavailable`.
        If cancelled, the answer is dropped when it comes.
        """
        if self._lost is not None:
            raise AgentUnavailable(self._lost)
        self._last_id = request_id = self._last_id + 1
        message = encode_request(request_id, verb, args)
        entry = self._waiting[request_id] = _Waiting(patience_ticks)
        self._sender.send(message)
        if self.linger and len(self._waiting) == 1 and len(message) <= LINGER_MAX_BYTES:
            self._take_time()
            if self._lingers > LINGERS_IN_A_ROW:
                self._lingers = 0
                await trio.lowlevel.checkpoint()
        if self._waiting.get(request_id) is entry:
            entry.task = trio.lowlevel.current_task()

            def abandon(_: object) -> trio.lowlevel.Abort:
                if self._waiting.pop(request_id, None) is not None:
                    self._abandoned.add(request_id)
                return trio.lowlevel.Abort.SUCCEEDED

            await trio.lowlevel.wait_task_rescheduled(abandon)
        answer = entry.answer
        if isinstance(answer, Reply):
            return answer.result
        if isinstance(answer, Failure):
            raise error_of(answer.code, answer.message)
        raise AgentUnavailable(self._why())

    async def hello(self, role: str) -> int:
        """Say who we are (`cli` or `daemon`); the agent's pid."""
        result = await self.request("hello", {"role": role})
        with self.rubbish_is_loss():
            if get_int(result, "version") != PROTOCOL_VERSION:
                raise ProtocolError(f"not protocol version {PROTOCOL_VERSION}")
            return get_int(result, "pid")

    async def create(self, new: VolumeWish) -> bytes:
        """A new volume: the bytes of its whole `volume` file. The agent holds its KEK afterwards."""
        result = await self.request("create", new.args(), patience_ticks=KDF_PATIENCE_TICKS)
        with self.rubbish_is_loss():
            return get_bin(result, "volume")

    async def unlock(
        self,
        *,
        volume: bytes,
        cipher_dir: str,
        secret: bytes | bytearray,
        kind: str = "",
        protector_id: bytes = b"",
        shred_secret: bytes | bytearray = b"",
        for_s: int | None = None,
        idle_s: int | None = None,
    ) -> tuple[bytes, int]:
        """Unlock with a secret: (volume id, KEK version). `volume` is the whole file's bytes.

        The secret is tried on all protectors of `kind`, or of every kind if that is empty; or on the one of an id.
        `shred_secret`: 32 bytes, where the volume has one that the agent does not keep. It is locked again `for_s`
        seconds from now, or when no key was asked for in `idle_s`; None: as its policy says.

        Raises `WrongSecret`; `VolumeDamaged` if the secret is right but the file was changed; `UnsupportedFormat`,
        `ShredSecretMissing`.
        """
        args = {
            "volume": volume,
            "cipher_dir": os.fsencode(cipher_dir),
            "secret": bytes(secret),
            "for_s": for_s,
            "idle_s": idle_s,
            "kind": kind,
            "protector_id": protector_id,
            "shred_secret": bytes(shred_secret),
        }
        result = await self.request("unlock", args, patience_ticks=KDF_PATIENCE_TICKS)
        with self.rubbish_is_loss():
            return get_bin(result, "volume_id", ID_BYTES), get_int(result, "kek_version")

    async def lock(self, volume_id: bytes) -> bool:
        """Have the agent lock the volume, its daemon first; whether it was unlocked."""
        return (await self.lock_told(volume_id)).was_unlocked

    async def lock_told(self, volume_id: bytes) -> LockOutcome:
        """As `lock`, with what the volume's daemon said."""
        result = await self.request("lock", {"volume_id": volume_id})
        with self.rubbish_is_loss():
            return get_lock_outcome(result)

    async def locked(self, volume_id: bytes, unwritten: int) -> None:
        """The daemon's word that it holds no key of the volume any more; the agent drops the KEK.

        `unwritten`: files whose last changes could not be written and wait in memory. Raises `ProtocolError` if nobody
        wants the volume locked.
        """
        await self.request("locked", {"volume_id": volume_id, "unwritten": unwritten})

    def interrupt(self) -> None:
        """Have every request that waits for its answer fail with `VolumeLocked` now; answers that come are dropped."""
        waiting = list(self._waiting.items())
        self._waiting.clear()
        for request_id, entry in waiting:
            self._abandoned.add(request_id)
            entry.answer = Failure(request_id, "locked", "the volume is being locked")
            _wake(entry)

    async def status(self) -> AgentStatus:
        """The agent and its volumes."""
        result = await self.request("status", {})
        with self.rubbish_is_loss():
            return AgentStatus(get_int(result, "pid"), get_bool(result, "exit_when_empty"), get_volumes(result))

    async def attach(self, *, volume_id: bytes, cipher_dir: str, mountpoint: str, volume: bytes) -> Attached:
        """Make this connection the volume's daemon. When the connection ends, the KEK is forgotten.

        Raises `VolumeLocked`, `VolumeDamaged` (the file's MAC does not match), `RolledBack` (an older file than was
        seen), `FreshnessUnavailable`, or `VolumeBusy` (another daemon is attached).
        """
        args = {
            "volume_id": volume_id,
            "cipher_dir": os.fsencode(cipher_dir),
            "mountpoint": os.fsencode(mountpoint),
            "volume": volume,
        }
        result = await self.request("attach", args)
        with self.rubbish_is_loss():
            return get_attached(result)

    async def detach(self, volume_id: bytes, *, keep: bool) -> None:
        """The reverse of `attach`: afterwards the connection's end means nothing; the KEK stays held only if `keep`."""
        await self.request("detach", {"volume_id": volume_id, "keep": keep})

    async def keep(self, volume_id: bytes, *, keep: bool) -> bool:
        """Have the KEK stay when the volume's daemon detaches or is gone, whatever it says; whether one is attached."""
        result = await self.request("keep", {"volume_id": volume_id, "keep": keep})
        with self.rubbish_is_loss():
            return get_bool(result, "was_attached")

    async def generate(self, volume_id: bytes, log_id: bytes, purpose: str, count: int) -> tuple[int, bytes, bytes]:
        """`count` (at most 4096) new keys for one log: (KEK version, keys joined, their wraps joined).

        Raises `VolumeLocked`.
        """
        args = {"volume_id": volume_id, "id": log_id, "purpose": purpose, "count": count}
        result = await self.request("generate", args)
        key_bytes, wrapped_bytes = (
            (NAMES_KEY_BYTES, WRAPPED_NAMES_BYTES) if purpose == "names" else (DEK_BYTES, WRAPPED_BYTES)
        )
        with self.rubbish_is_loss():
            return (
                get_int(result, "kek_version"),
                get_bin(result, "keys", count * key_bytes),
                get_bin(result, "wrapped", count * wrapped_bytes),
            )

    async def kits(self, volume_id: bytes, *, directory: bool, count: int, deks: int) -> tuple[int, list[Kit]]:
        """(KEK version, `count` kits of `deks` DEKs each); at most 256 kits and 4096 DEKs. Raises `VolumeLocked`."""
        args = {"volume_id": volume_id, "directory": directory, "count": count, "deks": deks}
        result = await self.request("kits", args)
        names = (NAMES_KEY_BYTES, WRAPPED_NAMES_BYTES) if directory else (0, 0)
        sizes = (ID_BYTES, DEK_BYTES, WRAPPED_BYTES, *names, deks * DEK_BYTES, deks * WRAPPED_BYTES)
        with self.rubbish_is_loss():
            rows = result.get("kits")
            if not isinstance(rows, list) or len(rows) != count:
                raise ProtocolError("kits is no array of the right length")
            return get_int(result, "kek_version"), [get_kit(row, sizes) for row in rows]

    async def unwrap(
        self, volume_id: bytes, items: Sequence[tuple[bytes, str, int, bytes, int]]
    ) -> tuple[list[bytes | None], list[int]]:
        """The keys of each item ``(id, purpose, KEK version, wraps joined, first block)``, joined; and its floor.

        No keys where any of the item's wraps is not authentic. At most 4096 keys in all. The floor of a log key's item
        is the generation its log must have at least, or `DELETED`; that of any other is 0. Raises `VolumeLocked`,
        `FreshnessUnavailable`.
        """
        result = await self.request("unwrap", {"volume_id": volume_id, "items": items})
        with self.rubbish_is_loss():
            keys = result.get("keys")
            if type(keys) is not list or len(keys) != len(items):
                raise ProtocolError("keys is no array of the right length")
            floors = get_floors(result, len(items))
            for key, item in zip(keys, items, strict=True):
                if key is not None and (type(key) is not bytes or not fits(key, item)):
                    raise ProtocolError("keys of a wrong length")
            return keys, floors

    async def stop(self) -> None:
        """Have the agent forget everything and end."""
        await self.request("stop", {})

    @contextlib.contextmanager
    def rubbish_is_loss(self) -> Iterator[None]:
        """An answer of a wrong shape ends the connection like one that cannot be decoded."""
        try:
            yield
        except ProtocolError as error:
            self._lose(f"the key agent sent rubbish: {error}")
            raise AgentUnavailable(f"the key agent sent rubbish: {error}") from None


@contextlib.asynccontextmanager
async def open_agent(
    socket_path: str,
    *,
    role: str = "cli",
    on_push: Callable[[Mapping[str, Any]], None] | None = None,
    linger: bool = True,
) -> AsyncIterator[AgentClient]:
    """A client for the length of a block. Raises as `connect` does."""
    failure: BaseException | None = None
    async with trio.open_nursery() as nursery:
        # Carried around the nursery, which would wrap it in a group: that a nursery is in here is nobody's business.
        try:
            client = await connect(nursery, socket_path, role=role, on_push=on_push, linger=linger)
            try:
                yield client
            finally:
                client.close()
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - raised again below
            failure = error
    if failure is not None:
        raise failure


async def connect(
    nursery: trio.Nursery,
    socket_path: str,
    *,
    role: str,
    on_push: Callable[[Mapping[str, Any]], None] | None = None,
    linger: bool = True,
) -> AgentClient:
    """Connect, check that the agent is the user's own, say hello; the client's tasks run in `nursery` until `close`.

    `on_push` is called with each event, between two awaits of the loop: it must neither block nor raise. Raises
    `AgentUnavailable` if no agent answers; `NotPermitted` if the socket or the agent is another user's.
    """
    client = AgentClient(_connect(socket_path), on_push, linger=linger)
    nursery.start_soon(client.run)
    try:
        await client.hello(role)
    except BaseException:
        client.close()
        raise
    return client


def _connect(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # A Unix socket connects at once or not at all: only a full backlog would make it wait, and then it refuses.
        sock.settimeout(0)
        with socket_address(path) as address:
            sock.connect(address)
        _, uid, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
        # Whoever listens gets passphrases from us: it must be ourselves, whatever the socket file's owner.
        if uid != os.geteuid():
            raise NotPermitted(f"the key agent at {path} belongs to another user (uid {uid})")
    except PermissionError:
        sock.close()
        raise NotPermitted(f"the key agent's socket {path} belongs to another user") from None
    except OSError as error:
        sock.close()
        raise AgentUnavailable(f"no key agent answers at {path}: {error.strerror}") from None
    except BaseException:
        sock.close()
        raise
    return sock


def _bytes_in(value: object) -> Iterator[bytes]:
    """Everything in a result that may be a key."""
    if isinstance(value, bytes):
        yield value
    elif isinstance(value, dict | list):
        for child in value.values() if isinstance(value, dict) else value:
            yield from _bytes_in(child)


def _wake(entry: _Waiting) -> None:
    if entry.task is not None:
        trio.lowlevel.reschedule(entry.task)
