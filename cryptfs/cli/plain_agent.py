"""Asking the agent without an event loop: for `lock`, of which every tenth of a second counts.

Importing trio takes as long as everything else that `cryptfs lock` does. Only for requests that carry no secret.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from cryptfs.cli import agent_process
from cryptfs.errors import AgentUnavailable, CryptfsError, ProtocolError
from cryptfs.format.agent_msg import AnswerDecoder, Failure, Reply, encode_request

T = TypeVar("T")

PATIENCE_S = 30.0
ATTEMPTS = 4
"""An agent that is ending hangs up on connections it has, then on those that wait to be accepted, then is gone."""
_RECV_BYTES = 64 << 10


def ask(verb: str, args: Mapping[str, Any], read: Callable[[Mapping[str, Any]], T], otherwise: T) -> T:
    """One request's result, as `read` has it; `otherwise` if no agent runs.

    Raises `AgentUnavailable` if it does not answer or answers rubbish (`read` raises `ProtocolError`), `NotPermitted`,
    `CryptfsError` if it refuses.
    """
    why: Exception | None = None
    for _attempt in range(ATTEMPTS):
        try:
            result = _ask_once(verb, args)
            break
        except (ConnectionError, EOFError) as error:
            # It was ending just then: it never took the request, or locked everything before it could say so.
            why = error
    else:
        raise AgentUnavailable(f"the key agent does not answer: {why}")
    try:
        return otherwise if result is None else read(result)
    except ProtocolError as error:
        raise AgentUnavailable(f"the key agent sent rubbish: {error}") from None


def answered(sock: socket.socket, read: Callable[[Mapping[str, Any]], T], otherwise: T) -> T:
    """The result of the one request that was sent on `sock`, which is closed; `otherwise` if there is no answer."""
    with sock:
        sock.settimeout(PATIENCE_S)
        try:
            return read(_answer(sock))
        except (OSError, EOFError, CryptfsError):
            return otherwise


def _ask_once(verb: str, args: Mapping[str, Any]) -> Mapping[str, Any] | None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(PATIENCE_S)
        if not agent_process.reached(sock):
            return None
        try:
            sock.sendall(encode_request(1, verb, args))
            return _answer(sock)
        except ConnectionError:
            raise
        except (OSError, ProtocolError) as error:
            raise AgentUnavailable(f"the key agent does not answer: {error}") from None


def _answer(sock: socket.socket) -> Mapping[str, Any]:
    decoder = AnswerDecoder()
    while data := sock.recv(_RECV_BYTES):
        for answer in decoder.feed(data):
            if isinstance(answer, Reply):
                return answer.result
            if isinstance(answer, Failure):
                raise CryptfsError(answer.message)
    raise EOFError("it hung up")
