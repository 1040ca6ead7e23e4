"""Between daemon and agent: counts requests by verb, and on demand answers one as no agent should."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections import Counter
from pathlib import Path
from typing import Self

from cryptfs.format.agent_msg import RequestDecoder

RUBBISH = b"HTTP/1.1 400 Bad Request\r\n\r\n"
OVERSIZED = b"\xff\xff\xff\xff" + bytes(1000)
NOTHING = b""
"""Say nothing and close: the agent died in mid-request."""


class AgentProxy:
    """Listens on `path`, talks to the agent on `agent`. Use as a context manager."""

    def __init__(self, path: Path, agent: Path) -> None:
        self.path = path
        self.agent = agent
        self.requests: Counter[str] = Counter()
        self.misbehave: bytes | None = None
        """What the next `unwrap` or `generate` is answered with instead; the connection is closed after it."""
        self._listener = socket.socket(socket.AF_UNIX)
        self._threads: list[threading.Thread] = []
        self._connections: list[socket.socket] = []

    def __enter__(self) -> Self:
        self._listener.bind(str(self.path))
        self._listener.listen()
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        for sock in (self._listener, *self._connections):
            _shut(sock)
        for thread in self._threads:
            thread.join()

    @property
    def unwraps(self) -> int:
        """Requests for keys in clear so far."""
        return self.requests["unwrap"]

    @property
    def has_misbehaved(self) -> bool:
        """Whether `misbehave` was sent."""
        return self.misbehave is None

    def _start(self, target: object, *args: object) -> None:
        assert callable(target)
        thread = threading.Thread(target=target, args=args)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with self._listener:
            while True:
                try:
                    client, _ = self._listener.accept()
                except OSError:
                    return
                above = socket.socket(socket.AF_UNIX)
                try:
                    above.connect(str(self.agent))
                except OSError:
                    above.close()
                    client.close()
                    continue
                self._connections += [client, above]
                self._start(self._requests, client, above)
                self._start(self._answers, above, client)

    def _requests(self, client: socket.socket, above: socket.socket) -> None:
        decoder = RequestDecoder()
        try:
            while data := client.recv(1 << 16):
                messages = decoder.feed(data)
                self.requests.update(message.verb for message in messages)
                if self.misbehave is not None and {"unwrap", "generate"} & {message.verb for message in messages}:
                    answer, self.misbehave = self.misbehave, None
                    client.sendall(answer)
                    break
                above.sendall(data)
        except OSError:
            pass
        _shut(above)
        _shut(client)
        above.close()

    def _answers(self, above: socket.socket, client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := above.recv(1 << 16):
                client.sendall(data)
        _shut(client)
        client.close()


def _shut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
