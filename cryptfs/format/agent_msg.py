"""Messages between agent and client as bytes (docs/AGENT_PROTOCOL.md): framing and msgpack, no sockets.

Rules of this file: it does not know which side it serves; bytes go in, messages come out, or `ProtocolError` is
raised, after which the stream is lost and the connection must be closed. It bounds sizes, nesting and types of what
it decodes; what a verb's arguments must be is checked where the verb is served. Args and results hold keys and
passphrases: no message shows them in its repr, and no error quotes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import msgpack

from cryptfs.errors import ProtocolError
from cryptfs.format.agent_codes import CODES
from cryptfs.types import Buffer

PROTOCOL_VERSION = 1
MESSAGE_MAX_BYTES = 4 << 20
"""Largest msgpack part of a message; the 4-byte length is not counted."""
LENGTH_BYTES = 4
ARRAY_MAX = 8192
"""Most elements of one array: keeps a short message from claiming (and allocating) a huge one."""
MAP_MAX = 64
DEPTH_MAX = 6
"""Arrays and maps inside one another within args or a result."""
ID_MAX = (1 << 63) - 1
VERB_MAX_CHARS = 32
_START_BYTES = 4096
"""Room a message begins with. msgpack's own choice is 256 KiB each time, which the agent's memory fills twice."""

_LEAVES = frozenset({bytes, str, int, bool, type(None)})


@dataclass(frozen=True, slots=True)
class Request:
    """A client's request; `request_id` is positive and chosen by the client."""

    request_id: int
    verb: str
    args: Mapping[str, Any] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Reply:
    """A request's result."""

    request_id: int
    result: Mapping[str, Any] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Failure:
    """A request's failure: `code` is one of `agent_codes.CODES`, `message` is for people and holds no secret."""

    request_id: int
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Push:
    """An event nobody asked for, for example ``{"event": "locked", "volume_id": …}``."""

    event: Mapping[str, Any]


Answer = Reply | Failure | Push

M = TypeVar("M", Request, Answer)


def encode_request(request_id: int, verb: str, args: Mapping[str, Any]) -> bytes:
    """A request as bytes for the socket. Raises `ProtocolError` if it would exceed `MESSAGE_MAX_BYTES`."""
    return _frame([PROTOCOL_VERSION, request_id, verb, args])


def encode_reply(request_id: int, result: Mapping[str, Any]) -> bytes:
    """A result as bytes for the socket. Raises `ProtocolError` if it would exceed `MESSAGE_MAX_BYTES`."""
    return _frame([PROTOCOL_VERSION, request_id, "ok", result])


def encode_failure(request_id: int, code: str, message: str) -> bytes:
    """A failure as bytes for the socket."""
    return _frame([PROTOCOL_VERSION, request_id, "error", {"code": code, "message": message}])


def encode_push(event: Mapping[str, Any]) -> bytes:
    """An event as bytes for the socket."""
    return _frame([PROTOCOL_VERSION, 0, "push", event])


class _Decoder(Generic[M]):
    """Turns a stream of bytes, cut anywhere, into messages. Holds at most one incomplete message.

    Messages hold keys: what was gathered of one is overwritten when it is complete. What is fed is the caller's.
    """

    __slots__ = ("_broken", "_buffer", "_have")

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._have = 0
        self._broken = False

    @property
    def pending_bytes(self) -> int:
        """Bytes of the incomplete message received so far."""
        return self._have

    def feed(self, data: Buffer) -> list[M]:
        """Add received bytes; return the messages they complete, in order.

        Raises `ProtocolError` at the first message that breaks the protocol (messages before it in the same call are
        lost with the connection), and at every call after that.
        """
        if self._broken:
            raise ProtocolError("the stream broke the protocol before")
        try:
            with memoryview(data) as view:
                return self._feed(view)
        except ProtocolError:
            self._broken = True
            self._forget()
            raise

    def _feed(self, data: memoryview) -> list[M]:
        messages: list[M] = []
        at, have = 0, len(data)
        while at < have:
            if not self._have and have - at >= LENGTH_BYTES and have - at >= (whole := _whole_bytes(data[at:])):
                with data[at + LENGTH_BYTES : at + whole] as body:
                    messages.append(self._message(*_unpack(body)))
                at += whole
                continue
            at += self._gather(data[at:])
            if self._have >= LENGTH_BYTES and self._have == _whole_bytes(self._buffer):
                with memoryview(self._buffer) as gathered, gathered[LENGTH_BYTES : self._have] as body:
                    messages.append(self._message(*_unpack(body)))
                self._forget()
        return messages

    def _gather(self, data: memoryview) -> int:
        """Keep what belongs to the message that is incomplete, first its length; how many bytes that were."""
        goal = LENGTH_BYTES if self._have < LENGTH_BYTES else _whole_bytes(self._buffer)
        taken = min(len(data), goal - self._have)
        end = self._have + taken
        if end > len(self._buffer):
            # Not extended in place, which may leave the old place behind as it is.
            old, self._buffer = self._buffer, bytearray(max(end, min(goal, 2 * len(self._buffer))))
            self._buffer[: self._have] = old[: self._have]
            old[:] = bytes(len(old))
        self._buffer[self._have : end] = data[:taken]
        self._have = end
        return taken

    def _forget(self) -> None:
        self._buffer[:] = bytes(len(self._buffer))
        self._buffer, self._have = bytearray(), 0

    def _message(self, message_id: int, kind: str, content: dict[str, Any]) -> M:
        raise NotImplementedError


class RequestDecoder(_Decoder[Request]):
    """What a server receives."""

    __slots__ = ()

    def _message(self, message_id: int, kind: str, content: dict[str, Any]) -> Request:
        if message_id == 0 or len(kind) > VERB_MAX_CHARS:
            raise ProtocolError("a request without a proper id and verb")
        return Request(message_id, kind, content)


class AnswerDecoder(_Decoder[Answer]):
    """What a client receives."""

    __slots__ = ()

    def _message(self, message_id: int, kind: str, content: dict[str, Any]) -> Answer:
        if kind == "ok" and message_id:
            return Reply(message_id, content)
        if kind == "push" and not message_id:
            return Push(content)
        if kind == "error" and message_id and content.keys() == {"code", "message"}:
            code, message = content["code"], content["message"]
            if type(code) is str and code in CODES and type(message) is str:
                return Failure(message_id, code, message)
        raise ProtocolError("an answer that is neither result, error nor push")


def _whole_bytes(start: bytearray | memoryview) -> int:
    """How long the message is that begins with `start`, its length included. Raises `ProtocolError`."""
    length = int.from_bytes(start[:LENGTH_BYTES], "big")
    if not 0 < length <= MESSAGE_MAX_BYTES:
        raise ProtocolError(f"a message of {length} bytes; 1 to {MESSAGE_MAX_BYTES} are allowed")
    return LENGTH_BYTES + length


def _unpack(body: memoryview) -> tuple[int, str, dict[str, Any]]:
    """(id, verb or kind, args or content) of a message without its length."""
    try:
        value = msgpack.unpackb(
            body,
            raw=False,
            strict_map_key=True,
            max_array_len=ARRAY_MAX,
            max_map_len=MAP_MAX,
            max_ext_len=0,
        )
    # msgpack raises its own exceptions, ValueError, RecursionError and UnicodeDecodeError alike; `from None`
    # because an unpacking error may quote the data.
    except Exception:  # noqa: BLE001
        raise ProtocolError("a message that is not msgpack within the limits") from None
    if type(value) is not list or len(value) != 4:
        raise ProtocolError("a message that is no array of four")
    version, message_id, kind, content = value
    if type(version) is not int or version != PROTOCOL_VERSION:
        raise ProtocolError(f"not protocol version {PROTOCOL_VERSION}")
    if type(message_id) is not int or not 0 <= message_id <= ID_MAX or type(kind) is not str:
        raise ProtocolError("a message without a proper id and kind")
    if type(content) is not dict:
        raise ProtocolError("a message whose content is no map")
    _check(content, DEPTH_MAX)
    return message_id, kind, content


def _check(value: Any, depth: int) -> None:  # noqa: ANN401 - whatever msgpack made of the bytes
    """Only None, bool, int, str, bytes, arrays, and maps with str keys, at most `depth` deep."""
    if depth == 0:
        raise ProtocolError(f"a message nested deeper than {DEPTH_MAX}")
    if type(value) is dict:
        for key in value:
            if type(key) is not str:
                raise ProtocolError("a map key that is no string")
        children = value.values()
    else:
        children = value
    for child in children:
        kind = type(child)
        if kind in _LEAVES:
            continue
        if kind is not list and kind is not dict:
            raise ProtocolError("a value of a type the protocol does not have")
        _check(child, depth - 1)


def _frame(message: list[Any]) -> bytes:
    packed: bytes = msgpack.packb(message, use_bin_type=True, buf_size=_START_BYTES)
    if len(packed) > MESSAGE_MAX_BYTES:
        raise ProtocolError(f"a message of {len(packed)} bytes; at most {MESSAGE_MAX_BYTES} are allowed")
    return len(packed).to_bytes(LENGTH_BYTES, "big") + packed
