"""One connection to the agent: requests out, answers in, whatever they ask (docs/AGENT_PROTOCOL.md).

It carries any number of requests at a time. A request writes to the socket itself; a short one that is alone then waits
for its answer right there for a moment (`AgentConnection.linger`), any other sleeps until the receiver task wakes it.
If the connection is lost, answers rubbish or stops answering, every waiting request raises `AgentUnavailable` at once
and so does every later one: to reconnect, make a new one.
"""

from __future__ import annotations

import contextlib
import select
import socket
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import trio

from cryptfs.crypto.secret import overwrite
from cryptfs.errors import AgentUnavailable, ProtocolError
from cryptfs.format.agent_codes import error_of
from cryptfs.format.agent_msg import Answer, AnswerDecoder, Failure, Push, Reply, encode_request
from cryptfs.keys.clock import SystemClock
from cryptfs.paths import peer_of
from cryptfs.sending import Sender

RECV_BYTES = 64 << 10
LINGER_MS = 1
"""Longest time a lone short request holds up the loop for its answer, which takes some 100 µs."""
LINGER_MAX_BYTES = 1024
"""Requests longer than this are not short: sleeping costs them little, and the loop has better things to do."""
LINGERS_IN_A_ROW = 16
"""Requests answered so before other tasks get their turn."""
TICK_S = 10.0
PATIENCE_TICKS = 2
"""A request unanswered for this many ticks means that the agent hangs.

Ticks are counted by this process's loop: time in which it does not run itself (a suspended or overloaded machine, a
stopped process) is no silence of the agent's.
"""


class _Waiting:
    """A request on its way: the task to wake (once it sleeps), and the answer (once there is one)."""

    __slots__ = ("answer", "task", "ticks_left")

    def __init__(self, ticks_left: int) -> None:
        self.task: trio.lowlevel.Task | None = None
        self.answer: Reply | Failure | None = None
        self.ticks_left = ticks_left


class AgentConnection:
    """Over a socket of `agent_socket.connected`; `run` must be running."""

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
        self._silent_pid = 0
        self.lost = trio.Event()
        """Set once the connection is of no more use."""
        self.tick_s = TICK_S
        """Seconds, read anew for each tick; see `PATIENCE_TICKS`."""
        self._monotonic = SystemClock().monotonic
        self.heard_at = self._monotonic()
        """When anything came from the agent last, on the clock keys age by: no key that it gave is younger."""

    # the connection --------------------------------------------------------------------------------------------

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

    @property
    def hangs(self) -> bool:
        """Whether the connection was given up because the agent is there and does not answer."""
        return self._silent_pid != 0

    def _unavailable(self) -> AgentUnavailable:
        error = AgentUnavailable(self._lost or "the key agent is gone")
        error.silent_pid = self._silent_pid
        return error

    def _give_up(self) -> None:
        """The agent is there and does not answer."""
        pid, _ = peer_of(self._sock)
        self._silent_pid = pid
        self._lose(f"the key agent (process {pid}) does not answer")

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
        self.heard_at = self._monotonic()
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
            await trio.sleep(self.tick_s)
            for entry in self._waiting.values():
                entry.ticks_left -= 1
            if any(entry.ticks_left < 0 for entry in self._waiting.values()):
                self._give_up()

    # requests --------------------------------------------------------------------------------------------------

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
            raise self._unavailable()
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
        raise self._unavailable()

    def interrupt(self) -> None:
        """Have every request that waits for its answer fail with `VolumeLocked` now; answers that come are dropped."""
        waiting = list(self._waiting.items())
        self._waiting.clear()
        for request_id, entry in waiting:
            self._abandoned.add(request_id)
            entry.answer = Failure(request_id, "locked", "the volume is being locked")
            _wake(entry)

    @contextlib.contextmanager
    def rubbish_is_loss(self) -> Iterator[None]:
        """An answer of a wrong shape ends the connection like one that cannot be decoded."""
        try:
            yield
        except ProtocolError as error:
            self._lose(f"the key agent sent rubbish: {error}")
            raise AgentUnavailable(f"the key agent sent rubbish: {error}") from None


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
