"""The agent protocol's bytes: every message survives any cut of the stream; everything else is one exception."""

from __future__ import annotations

import struct

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cryptfs.errors import ProtocolError
from cryptfs.format.agent_codes import CODES
from cryptfs.format.agent_msg import (
    ID_MAX,
    MESSAGE_MAX_BYTES,
    AnswerDecoder,
    Failure,
    Push,
    Reply,
    Request,
    RequestDecoder,
    encode_failure,
    encode_push,
    encode_reply,
    encode_request,
)

leaves = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text(max_size=10) | st.binary(max_size=60)
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
).filter(lambda value: _depth(value) <= 5)
maps = st.dictionaries(st.text(max_size=8), values, max_size=4)
request_ids = st.integers(1, ID_MAX)
requests = st.builds(Request, request_ids, st.text(max_size=32), maps)
answers = st.one_of(
    st.builds(Reply, request_ids, maps),
    st.builds(Failure, request_ids, st.sampled_from(sorted(CODES)), st.text(max_size=40)),
    st.builds(Push, maps),
)


def _depth(value: object) -> int:
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if children is None else 1 + max(map(_depth, children), default=0)


def encode(message: Request | Reply | Failure | Push) -> bytes:
    match message:
        case Request(request_id, verb, args):
            return encode_request(request_id, verb, args)
        case Reply(request_id, result):
            return encode_reply(request_id, result)
        case Failure(request_id, code, text):
            return encode_failure(request_id, code, text)
        case Push(event):
            return encode_push(event)


def cut(data: bytes, sizes: list[int]) -> list[bytes]:
    pieces, start = [], 0
    for size in sizes:
        pieces.append(data[start : start + size])
        start += size
    return [*pieces, data[start:]]


def framed(value: object) -> bytes:
    packed: bytes = msgpack.packb(value)
    return struct.pack(">I", len(packed)) + packed


@given(st.lists(requests, max_size=4), st.lists(st.integers(0, 40), max_size=12))
def test_requests_survive_any_cut(messages: list[Request], sizes: list[int]) -> None:
    decoder = RequestDecoder()
    got = [message for piece in cut(b"".join(map(encode, messages)), sizes) for message in decoder.feed(piece)]
    assert got == messages
    assert decoder.pending_bytes == 0


@given(st.lists(answers, max_size=4), st.lists(st.integers(0, 40), max_size=12))
def test_answers_survive_any_cut(messages: list[Reply | Failure | Push], sizes: list[int]) -> None:
    decoder = AnswerDecoder()
    got = [message for piece in cut(b"".join(map(encode, messages)), sizes) for message in decoder.feed(piece)]
    assert got == messages


@given(st.binary(max_size=120))
@pytest.mark.parametrize("decoder_class", [RequestDecoder, AnswerDecoder])
def test_rubbish_raises_one_exception_or_waits(
    decoder_class: type[RequestDecoder | AnswerDecoder], data: bytes
) -> None:
    decoder = decoder_class()
    try:
        decoder.feed(data)
    except ProtocolError:
        with pytest.raises(ProtocolError):
            decoder.feed(b"")


@given(st.binary(min_size=1, max_size=120))
def test_rubbish_in_a_proper_frame_is_refused(body: bytes) -> None:
    with pytest.raises(ProtocolError):
        RequestDecoder().feed(struct.pack(">I", len(body)) + body)


@pytest.mark.parametrize("length", [0, MESSAGE_MAX_BYTES + 1, 2**32 - 1])
def test_a_length_out_of_bounds_is_refused_before_its_body_comes(length: int) -> None:
    with pytest.raises(ProtocolError, match="allowed"):
        RequestDecoder().feed(struct.pack(">I", length))


def test_the_largest_message_passes_and_one_byte_more_is_not_sent() -> None:
    overhead = len(encode_request(1, "x", {"a": bytes(70_000)})) - 4 - 70_000
    largest = {"a": bytes(MESSAGE_MAX_BYTES - overhead)}
    data = encode_request(1, "x", largest)
    assert len(data) == MESSAGE_MAX_BYTES + 4
    assert RequestDecoder().feed(data) == [Request(1, "x", largest)]
    with pytest.raises(ProtocolError):
        encode_request(1, "x", {"a": bytes(MESSAGE_MAX_BYTES - overhead + 1)})


def _nested(depth: int) -> list[object]:
    value: list[object] = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "message",
    [
        [2, 1, "hello", {}],
        [True, 1, "hello", {}],
        [1, 0, "hello", {}],
        [1, -1, "hello", {}],
        [1, ID_MAX + 1, "hello", {}],
        [1, "1", "hello", {}],
        [1, 1, b"hello", {}],
        [1, 1, "x" * 33, {}],
        [1, 1, "hello", []],
        [1, 1, "hello", None],
        [1, 1, "hello"],
        [1, 1, "hello", {}, 0],
        {"a": 1},
        1,
        [1, 1, "hello", {b"role": 1}],
        [1, 1, "hello", {1: 1}],
        [1, 1, "hello", {"a": 1.5}],
        [1, 1, "hello", {"a": msgpack.ExtType(5, b"x")}],
        [1, 1, "hello", {"a": msgpack.Timestamp(1)}],
        [1, 1, "hello", {"a": [{b"x": 1}]}],
        [1, 1, "hello", {"a": _nested(6)}],
        [1, 1, "hello", {"a": _nested(400)}],
        [1, 1, "hello", {"a": [None] * 8193}],
        [1, 1, "hello", {str(number): 0 for number in range(65)}],
    ],
    ids=lambda message: repr(message)[:40],
)
def test_requests_that_break_the_protocol(message: object) -> None:
    with pytest.raises(ProtocolError):
        RequestDecoder().feed(framed(message))


@pytest.mark.parametrize(
    "message",
    [
        [1, 0, "ok", {}],
        [1, 1, "push", {}],
        [1, 1, "OK", {}],
        [1, 1, "error", {}],
        [1, 1, "error", {"code": "locked"}],
        [1, 1, "error", {"code": "odd", "message": "x"}],
        [1, 1, "error", {"code": "locked", "message": b"x"}],
        [1, 1, "error", {"code": "locked", "message": "x", "more": 1}],
        [1, 0, "error", {"code": "locked", "message": "x"}],
        [1, 1, "hello", {"role": "cli"}],
    ],
    ids=repr,
)
def test_answers_that_break_the_protocol(message: object) -> None:
    with pytest.raises(ProtocolError):
        AnswerDecoder().feed(framed(message))


def test_a_huge_array_claimed_by_a_short_message_is_not_allocated() -> None:
    body = b"\x94\x01\x01\xa1x\x81\xa1a" + b"\xdd\xff\xff\xff\xff" * 50
    with pytest.raises(ProtocolError):
        RequestDecoder().feed(struct.pack(">I", len(body)) + body)


def test_after_a_broken_message_nothing_more_is_taken() -> None:
    decoder = RequestDecoder()
    with pytest.raises(ProtocolError):
        decoder.feed(framed(1))
    with pytest.raises(ProtocolError):
        decoder.feed(encode_request(1, "hello", {}))
    assert decoder.pending_bytes == 0


def test_no_repr_or_error_shows_a_secret() -> None:
    request = Request(1, "unlock", {"secret": b"hunter2"})
    reply = Reply(1, {"keys": [b"hunter2"]})
    assert "hunter2" not in repr(request) + repr(reply) + repr([request, reply])
    spoiled = encode_request(1, "unlock", {"secret": b"hunter2"})[:-1] + b"\xc1"
    with pytest.raises(ProtocolError) as caught:
        RequestDecoder().feed(spoiled[:-8] + b"\xc1" * 8)
    assert "hunter" not in str(caught.value)
    assert caught.value.__cause__ is None
