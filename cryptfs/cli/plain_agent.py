"""Asking the agent without an event loop: for `lock`, of which every tenth of a second counts.

Importing trio takes as long as everything else that `cryptfs lock` does. Only for requests that carry no secret.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import Any

from cryptfs import paths
from cryptfs.errors import AgentUnavailable, CryptfsError, NotPermitted, ProtocolError
from cryptfs.format.agent_msg import AnswerDecoder, Failure, Reply, encode_request

PATIENCE_S = 30.0
_RECV_BYTES = 64 << 10


def ask(verb: str, args: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """One request's result; None if no agent runs.

    Raises `AgentUnavailable` if it does not answer or answers rubbish, `NotPermitted`, `CryptfsError` if it refuses.
    """
    try:
        return _ask(verb, args)
    except (ConnectionError, EOFError):
        # It was ending just then: it never took the request, or locked everything before it could say so.
        pass
    try:
        return _ask(verb, args)
    except (ConnectionError, EOFError) as error:
        raise AgentUnavailable(f"the key agent does not answer: {error}") from None


def _ask(verb: str, args: Mapping[str, Any]) -> Mapping[str, Any] | None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(PATIENCE_S)
        try:
            with paths.socket_address(paths.agent_socket()) as address:
                sock.connect(address)
        except (FileNotFoundError, ConnectionRefusedError):
            return None
        except PermissionError:
            raise NotPermitted(f"{paths.agent_socket()} belongs to another user") from None
        except OSError as error:
            raise AgentUnavailable(f"{paths.agent_socket()}: {error.strerror}") from error
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
