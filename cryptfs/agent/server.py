"""The agent's one loop: connections in, requests to the service, answers out.

Each connection is one task; it answers most requests on the spot, between a `recv` and the next, so a round trip
costs one wake-up. A peer that is slow, silent or sends rubbish holds up nobody but itself: reads stop while its
answers wait, an incomplete message is bounded by the protocol, and rubbish ends the connection.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import trio

from cryptfs.agent.audit import Auditor
from cryptfs.agent.freshness import Records
from cryptfs.agent.listen import listening
from cryptfs.agent.peers import credentials, describe, exe_of
from cryptfs.agent.service import Service
from cryptfs.agent.shred_store import ShredStore
from cryptfs.agent.unlocking import Providers
from cryptfs.errors import ProtocolError
from cryptfs.format.agent_msg import Request, RequestDecoder
from cryptfs.format.audit import PeerLine
from cryptfs.ports import Clock, Random
from cryptfs.sending import Sender

log = logging.getLogger(__name__)

CONNECTIONS_MAX = 128
SLOW_PER_CONNECTION_MAX = 64
"""Requests that wait for a thread: a KDF's, or that of the freshness records."""
UNWRAPS_PER_CONNECTION_MAX = 1024
"""Unwraps that wait because there is a limit of them: more than a daemon has requests of its kernel and reads ahead."""
REQUEST_S = 30.0
"""How long a client may take to send one request."""
RECV_BYTES = 64 << 10
UNSENT_MAX_BYTES = 16 << 20
"""Answers and pushes a peer has not read; beyond it the connection ends."""
BURST = 16
"""Requests of one connection answered before others get their turn."""
STARTUP_GRACE_S = 10.0
EMPTY_GRACE_S = 0.5
EMFILE_PAUSE_S = 0.1


@dataclass(frozen=True, slots=True)
class Around:
    """What the agent's process is like: how to find out which program a peer runs, and what protects it."""

    exe_of: Callable[[int], str | None] = exe_of
    hardening: Mapping[str, str] = field(default_factory=dict)
    """By measure, ``on`` or why not."""


class Server:
    """Serves one socket until told to stop, a signal comes, or (if asked for) nothing is left to do."""

    def __init__(
        self,
        *,
        providers: Providers,
        state_dir: str,
        random: Random,
        clock: Clock,
        around: Around | None = None,
        exit_when_empty: bool = False,
        startup_grace_s: float = STARTUP_GRACE_S,
        empty_grace_s: float = EMPTY_GRACE_S,
    ) -> None:
        """`state_dir` (absolute) is where what must outlive the agent is kept; made when first needed.

        `exit_when_empty`: end once no volume is unlocked, no connection is open and no count of wrong secrets is young,
        after the grace times.
        """
        self.audit = Auditor(os.path.join(state_dir, "audit"), random, clock)
        self._service = Service(
            providers=providers,
            audit=self.audit,
            shred=ShredStore(os.path.join(state_dir, "shred")),
            records=Records(os.path.join(state_dir, "fresh"), clock),
            random=random,
            clock=clock,
            exit_when_empty=exit_when_empty,
            hardening=(around or Around()).hardening,
            changed=self._on_change,
        )
        self._exe_of = (around or Around()).exe_of
        self.locks = self._service.volumes.locks
        self.policies = self._service.volumes.policies
        self._exit_when_empty = exit_when_empty
        self._startup_grace_s = startup_grace_s
        self._empty_grace_s = empty_grace_s
        self._connections: set[Connection] = set()
        self._changed = trio.Event()

    @property
    def connections(self) -> int:
        """Connections open now."""
        return len(self._connections)

    async def serve(self, path: str, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Listen at `path`; started once clients can connect. At the end keys are wiped and the socket removed.

        Raises `AlreadyServed`, `NotPermitted` or `CryptfsError` if the socket cannot be had (see `listen.listening`).
        """
        with listening(path) as listener:
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._accept, listener)
                    nursery.start_soon(self._close_records)
                    nursery.start_soon(self.audit.serve)
                    nursery.start_soon(self._service.volumes.serve)
                    if self._exit_when_empty:
                        nursery.start_soon(self._wait_empty)
                    task_status.started()
                    await self._service.stopping.wait()
                    nursery.cancel_scope.cancel()
            finally:
                self._service.volumes.forget_all()
                with trio.CancelScope(shield=True):
                    await self._service.close_records()
                self.audit.close()

    async def stop_on_signals(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """End the server at SIGTERM, SIGINT or SIGHUP, once every volume is locked; at the second one at once."""
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
            async with trio.open_nursery() as nursery:
                task_status.started()
                ending = False
                async for number in signals:
                    log.info("%s: ending", signal.Signals(number).name)
                    if ending:
                        break
                    ending = True
                    nursery.start_soon(self._lock_and_stop)
                nursery.cancel_scope.cancel()
        self._service.stopping.set()

    async def _lock_and_stop(self) -> None:
        await self.locks.lock_all("the agent ends")
        self._service.stopping.set()

    def _on_change(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def _close_records(self) -> None:
        while True:
            changed = self._changed
            await self._service.close_records()
            await changed.wait()

    @property
    def _empty(self) -> bool:
        return not self._connections and self._service.empty

    async def _wait_empty(self) -> None:
        grace_s = self._startup_grace_s
        while True:
            if not self._empty:
                await self._changed.wait()
                grace_s = self._empty_grace_s
                continue
            # Or waiting half a second would begin the count of wrong secrets anew.
            with trio.move_on_after(max(grace_s, self._service.counts_for_s)) as scope:
                await self._changed.wait()
            if scope.cancelled_caught and self._empty:
                log.info("no volume is unlocked and nobody is connected: ending")
                self._service.stopping.set()
                return
            grace_s = self._empty_grace_s

    async def _accept(self, listener: socket.socket) -> None:
        async with trio.open_nursery() as nursery:
            while True:
                try:
                    sock, _ = listener.accept()
                except BlockingIOError:
                    await trio.lowlevel.wait_readable(listener)
                    continue
                except OSError as error:
                    # ECONNABORTED, or no descriptors left: waiting lets others close theirs.
                    log.warning("accept: %s", error.strerror)
                    await trio.sleep(EMFILE_PAUSE_S)
                    continue
                self._admit(sock, nursery)
                # However many more wait: what those who are in have sent is answered between any two.
                await trio.lowlevel.checkpoint()

    def _admit(self, sock: socket.socket, nursery: trio.Nursery) -> None:
        pid, uid = credentials(sock)
        if uid != os.geteuid():
            log.warning("refused a connection from uid %d, process %d", uid, pid)
            self.audit.event("connect", "denied", peer=describe(sock, pid, uid, self._exe_of).encode())
            sock.close()
        elif len(self._connections) >= CONNECTIONS_MAX and not self._make_room():
            log.warning("refused a connection from process %d: %d are open", pid, CONNECTIONS_MAX)
            self.audit.event("connect", "busy", peer=describe(sock, pid, uid, self._exe_of).encode())
            sock.close()
        else:
            sock.settimeout(0)
            connection = Connection(sock, describe(sock, pid, uid, self._exe_of), self._service)
            self._connections.add(connection)
            self._on_change()
            nursery.start_soon(self._run, connection)

    def _make_room(self) -> bool:
        """Hang up on the connection that has been idle longest and keeps no volume unlocked; False if there is none."""
        idle = sorted(
            (since, number, connection)
            for number, connection in enumerate(self._connections)
            if (since := connection.idle_since) is not None and not self._service.must_stay(connection)
        )
        # Only those that are looked at: it takes a system call each.
        connection = next((each for _, _, each in idle if not each.has_unread), None)
        if connection is None:
            return False
        log.warning("process %d: its idle connection makes room for a new one", connection.pid)
        connection.hang_up()
        # Its place is free at once: it is closed when its task runs.
        self._connections.discard(connection)
        return True

    async def _run(self, connection: Connection) -> None:
        try:
            await connection.run()
        except Exception as error:  # noqa: BLE001 - a fault met in one connection must not end the others'
            log.error("a connection failed: %s", type(error).__name__)  # noqa: TRY400 - its text may quote data
        finally:
            connection.close()
            self._connections.discard(connection)
            self._service.gone(connection)
            self._on_change()


class Connection:
    """One client: its socket, what it has sent of an incomplete request, what it has not read yet."""

    def __init__(self, sock: socket.socket, peer: PeerLine, service: Service) -> None:
        """`sock` is connected and non-blocking, and this object's to close."""
        self.pid = peer.pid
        self._peer = peer
        self.audit_json = peer.encode()
        self._sock = sock
        self._service = service
        self._decoder = RequestDecoder()
        self._sender = Sender(sock, lambda _: self.hang_up())
        self._heard_at = trio.current_time()
        self._slow = 0
        self._unwraps = 0
        self._scope = trio.CancelScope()

    async def run(self) -> None:
        """Serve until the peer is gone or broke the protocol."""
        with self._scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._sender.serve)
                await self._receive(nursery)
                nursery.cancel_scope.cancel()

    def says_it_is(self, role: str) -> None:
        """What the peer calls itself."""
        self._peer = replace(self._peer, role=role)
        self.audit_json = self._peer.encode()

    def close(self) -> None:
        """Close the socket; what was not read is dropped."""
        self._sock.close()

    def post(self, message: bytes) -> None:
        """Send what the socket takes now; queue the rest. Ends the connection if the peer lets too much pile up."""
        if self._sender.unsent and self._sender.unsent + len(message) > UNSENT_MAX_BYTES:
            log.warning("process %d does not read its answers: connection ended", self.pid)
            self.hang_up()
        else:
            self._sender.send(message)

    def hang_up(self) -> None:
        """End the connection."""
        self._scope.cancel()

    @property
    def idle_since(self) -> float | None:
        """Since when nothing is under way here (trio's clock); None while something is."""
        return None if self._slow or self._unwraps or self._sender.unsent else self._heard_at

    @property
    def has_unread(self) -> bool:
        """Whether the peer has sent what was not looked at yet: it is not idle."""
        try:
            return bool(self._sock.recv(1, socket.MSG_PEEK))
        except OSError:
            return False

    async def _readable(self) -> bool:
        """Wait for more; False if the peer began a request and does not go on with it."""
        if not self._decoder.pending_bytes:
            await trio.lowlevel.wait_readable(self._sock)
            return True
        with trio.move_on_at(self._heard_at + REQUEST_S):
            await trio.lowlevel.wait_readable(self._sock)
            return True
        log.warning("process %d did not finish its request within %g s: connection ended", self.pid, REQUEST_S)
        return False

    async def _receive(self, nursery: trio.Nursery) -> None:
        answered = 0
        while True:
            try:
                data = self._sock.recv(RECV_BYTES)
            except BlockingIOError:
                if not await self._readable():
                    return
                answered = 0
                continue
            except OSError:
                return
            if not data:
                return
            if not self._decoder.pending_bytes:
                self._heard_at = trio.current_time()
            try:
                messages = self._decoder.feed(data)
            except ProtocolError as error:
                log.warning("process %d: %s: connection ended", self.pid, error)
                self._service.rubbish(self, error)
                return
            for request in messages:
                self._handle(request, nursery)
                answered += 1
                # No more requests from a peer that does not read its answers.
                await self._sender.sent()
                if answered % BURST == 0:
                    await trio.lowlevel.checkpoint()

    def _handle(self, request: Request, nursery: trio.Nursery) -> None:
        if not self._service.is_slow(request):
            self.post(self._service.answer(self, request))
        elif request.verb == "unwrap" and self._unwraps < UNWRAPS_PER_CONNECTION_MAX:
            self._unwraps += 1
            nursery.start_soon(self._handle_unwrap, request)
        elif request.verb != "unwrap" and self._slow < SLOW_PER_CONNECTION_MAX:
            self._slow += 1
            nursery.start_soon(self._handle_slow, request)
        else:
            self.post(self._service.busy(self, request))

    async def _handle_slow(self, request: Request) -> None:
        try:
            self.post(await self._service.answer_slow(self, request))
        finally:
            self._slow -= 1

    async def _handle_unwrap(self, request: Request) -> None:
        try:
            self.post(await self._service.answer_slow(self, request))
        finally:
            self._unwraps -= 1
