"""Asking the agent without an event loop: importing trio takes as long as everything else that `cryptfs lock` does.

`ask` is for requests that carry no secret and may be made twice. `tell` makes one once, after a look at who listens.
"""

from __future__ import annotations

import contextlib
import select
import socket
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from cryptfs import paths
from cryptfs.cli import agent_process
from cryptfs.errors import AgentUnavailable, CryptfsError, ProtocolError
from cryptfs.format.agent_codes import error_of
from cryptfs.format.agent_msg import AnswerDecoder, Failure, Reply, encode_request
from cryptfs.keys.agent_answers import get_hello
from cryptfs.keys.agent_socket import connected
from cryptfs.paths import peer_of

T = TypeVar("T")

PATIENCE_S = 30.0
SILENCE_S, SIGN_OF_LIFE_S = 10.0, 5.0
"""After how long without an answer the agent is asked on another connection whether it is alive, and how long it has to
say so: a lock may take its time, an agent that hangs has none to offer."""
ATTEMPTS = 4
"""An agent that is ending hangs up on connections it has, then on those that wait to be accepted, then is gone."""
_RECV_BYTES = 64 << 10
_NO_ANSWER = "the key agent does not answer: "


class NotReached(Exception):
    """No connection to an agent came about: nothing was asked yet."""


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
        raise stranger(str(why))
    try:
        return otherwise if result is None else read(result)
    except ProtocolError as error:
        raise stranger(str(error)) from None


def stranger(why: str) -> AgentUnavailable:
    """The error for when nothing came of asking, by what is at the agent's socket now: another program, or nothing.

    `why` is what went wrong. Raises as `agent_process.reached`.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        if not agent_process.reached(probe):
            return AgentUnavailable(f"{_NO_ANSWER}{why}")
        pid, _ = peer_of(probe)
    why = why.removeprefix(_NO_ANSWER)
    return AgentUnavailable(f"process {pid} listens at {paths.agent_socket()}, but not as a key agent does: {why}")


def answered(sock: socket.socket, read: Callable[[Mapping[str, Any]], T], otherwise: T) -> T:
    """The result of the one request that was sent on `sock`, which is closed; `otherwise` if there is no answer.

    Raises `AgentUnavailable` if the agent hangs.
    """
    with sock:
        try:
            return read(_result(_awaited(sock)))
        except (OSError, EOFError, CryptfsError) as error:
            if isinstance(error, AgentUnavailable) and error.silent_pid:
                raise
            return otherwise


def tell(verb: str, args: Mapping[str, Any], read: Callable[[Mapping[str, Any]], T], *, patience_s: float) -> T:
    """One request's result, as `read` has it, on a `Connection` of its own. Raises as that and its `request`."""
    with contextlib.closing(Connection()) as connection:
        return connection.request(verb, args, read, patience_s=patience_s)


class Connection:
    """To an agent that is the user's own and has answered `hello`.

    Requests may carry a secret and are made once. Raises `NotReached`: nothing was asked yet; `NotPermitted`,
    `AgentUnavailable` (it hangs).
    """

    def __init__(self) -> None:
        try:
            self._sock = connected(paths.agent_socket())
        except AgentUnavailable as error:
            raise NotReached(str(error)) from None
        self._decoder, self._last_id = AnswerDecoder(), 1
        try:
            self._greet()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End it."""
        self._sock.close()

    def request(
        self, verb: str, args: Mapping[str, Any], read: Callable[[Mapping[str, Any]], T], *, patience_s: float
    ) -> T:
        """One request's result, as `read` has it. Raises `AgentUnavailable`, and what a refusal stands for."""
        self._sock.settimeout(patience_s)
        self._last_id += 1
        try:
            self._sock.sendall(encode_request(self._last_id, verb, args))
            answer = _answer(self._sock, self._decoder)
            if isinstance(answer, Reply):
                return read(answer.result)
        except ProtocolError as error:
            raise AgentUnavailable(f"the key agent sent rubbish: {error}") from None
        except TimeoutError:
            raise _silent(self._sock) from None
        except (OSError, EOFError) as error:
            raise AgentUnavailable(f"the key agent is gone: {error}") from None
        raise error_of(answer.code, answer.message)

    def _greet(self) -> None:
        self._sock.settimeout(PATIENCE_S)
        try:
            self._sock.sendall(encode_request(self._last_id, "hello", {"role": "cli"}))
            hello = _answer(self._sock, self._decoder)
            if isinstance(hello, Reply):
                get_hello(hello.result)
        except TimeoutError:
            raise _silent(self._sock) from None
        except (OSError, EOFError, ProtocolError) as error:
            raise NotReached(f"{_NO_ANSWER}{error}") from None
        _result(hello)


def _ask_once(verb: str, args: Mapping[str, Any]) -> Mapping[str, Any] | None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(PATIENCE_S)
        if not agent_process.reached(sock):
            return None
        try:
            sock.sendall(encode_request(1, verb, args))
            answer = _awaited(sock)
        except ConnectionError:
            raise
        except ProtocolError as error:
            raise stranger(str(error)) from None
        except OSError as error:
            raise AgentUnavailable(f"{_NO_ANSWER}{error}") from None
    return _result(answer)


def _result(answer: Reply | Failure) -> Mapping[str, Any]:
    """Raises what a refusal stands for."""
    if isinstance(answer, Failure):
        raise error_of(answer.code, answer.message)
    return answer.result


def _awaited(sock: socket.socket) -> Reply | Failure:
    """The answer, for which the agent may take its time, if it is alive. Raises `AgentUnavailable` if it is not."""
    readable, _, _ = select.select([sock], [], [], SILENCE_S)
    if not readable and not _is_alive():
        raise _silent(sock)
    sock.settimeout(PATIENCE_S)
    return _answer(sock)


def _is_alive() -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(SIGN_OF_LIFE_S)
        try:
            if agent_process.reached(sock):
                sock.sendall(encode_request(1, "hello", {"role": "cli"}))
                _answer(sock)
        except TimeoutError:
            return False
        except (OSError, EOFError, CryptfsError):
            return True  # whatever it is, it is no silence: whoever waits for the answer finds out
    return True


def _silent(sock: socket.socket) -> AgentUnavailable:
    """The error that says which process is at the other end and does not answer."""
    pid, _ = peer_of(sock)
    error = AgentUnavailable(f"the key agent (process {pid}) does not answer")
    error.silent_pid = pid
    return error


def _answer(sock: socket.socket, decoder: AnswerDecoder | None = None) -> Reply | Failure:
    """The next answer; events are nothing to us. `decoder`: the connection's, if more than one is expected on it."""
    decoder = AnswerDecoder() if decoder is None else decoder
    while data := sock.recv(_RECV_BYTES):
        for answer in decoder.feed(data):
            if isinstance(answer, Reply | Failure):
                return answer
    raise EOFError("it hung up")
