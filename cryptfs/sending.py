"""Bytes on their way out of a non-blocking socket, for both ends of the agent's protocol."""

from __future__ import annotations

import socket
from collections.abc import Callable

import trio


class Sender:
    """Sends what the socket takes at once and queues the rest, which `serve` sends when it can."""

    __slots__ = ("_all_sent", "_failed", "_sock", "_unsent", "_wake")

    def __init__(self, sock: socket.socket, failed: Callable[[OSError], None]) -> None:
        """`sock` stays the caller's. `failed` is called when it can send no more; it must not raise."""
        self._sock = sock
        self._failed = failed
        self._unsent = bytearray()
        self._wake = trio.Event()
        self._all_sent = trio.Event()

    @property
    def unsent(self) -> int:
        """Bytes that wait."""
        return len(self._unsent)

    def send(self, message: bytes) -> None:
        """Send or queue; never blocks and never raises."""
        if not self._unsent:
            try:
                sent = self._sock.send(message)
            except BlockingIOError:
                sent = 0
            except OSError as error:
                self._failed(error)
                return
            if sent == len(message):
                return
            message = message[sent:]
            self._all_sent = trio.Event()
            self._wake.set()
        self._unsent += message

    def drop(self) -> None:
        """Forget what waits."""
        self._unsent.clear()

    async def sent(self) -> None:
        """Wait until nothing waits."""
        if self._unsent:
            await self._all_sent.wait()

    async def serve(self) -> None:
        """Send what is queued, until the socket fails."""
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            while self._unsent:
                await trio.lowlevel.wait_writable(self._sock)
                try:
                    sent = self._sock.send(self._unsent)
                except BlockingIOError:
                    continue
                except OSError as error:
                    self._failed(error)
                    return
                del self._unsent[:sent]
            self._all_sent.set()
