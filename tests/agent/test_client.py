"""The client against agents that are away, die, hang, or send rubbish: every request ends, and with the right error."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from cryptfs.errors import AgentUnavailable, CryptfsError, ProtocolError, VolumeLocked
from cryptfs.format.agent_msg import RequestDecoder, encode_failure, encode_push, encode_reply
from cryptfs.keys import agent_connection
from cryptfs.keys.agent_client import AgentClient, connect, open_agent

HELLO = {"version": 1, "pid": 7, "started_s": 0}
Answer = Callable[[int, str], bytes | None]
"""(request id, verb) -> what the fake sends; None: nothing, and it hangs up."""


@contextlib.asynccontextmanager
async def fake_agent(
    path: Path, answer: Answer, says_hello: Callable[[int], bool] = lambda _: True
) -> AsyncIterator[str]:
    """A listener at `path` that says hello properly and everything else as `answer` says.

    `says_hello`, by request id: else nothing is said to a hello.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as plain:
        plain.bind(str(path))
        plain.listen()
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(plain.dup()))

        async def serve(stream: trio.SocketStream) -> None:
            decoder = RequestDecoder()
            async with stream:
                async for data in stream:
                    for request in decoder.feed(bytes(data)):
                        if request.verb == "hello":
                            reply = encode_reply(request.request_id, HELLO) if says_hello(request.request_id) else b""
                        elif (said := answer(request.request_id, request.verb)) is None:
                            return
                        else:
                            reply = said
                        if reply:
                            await stream.send_all(reply)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, serve, [listener])
            yield str(path)
            nursery.cancel_scope.cancel()


async def test_no_agent_at_all(short_tmp: Path) -> None:
    with pytest.raises(AgentUnavailable, match="No such file"):
        async with open_agent(str(short_tmp / "agent.sock")):
            pass


async def test_the_socket_of_a_dead_agent(short_tmp: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(str(short_tmp / "agent.sock"))
    with pytest.raises(AgentUnavailable, match="refused"):
        async with open_agent(str(short_tmp / "agent.sock")):
            pass


@pytest.mark.parametrize(
    ("said", "match"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n", "rubbish"),
        (b"\xff" * 8, "rubbish"),
        (b"\x00\x00\x00\x02\xc1\xc1", "rubbish"),
        (encode_reply(2, {}), "rubbish"),
        (encode_reply(2, {"pid": "7", "exit_when_empty": False, "volumes": []}), "rubbish"),
        (encode_reply(2, {"pid": 7, "exit_when_empty": False, "volumes": [1]}), "rubbish"),
        (encode_reply(99, {}), "rubbish"),
        (encode_reply(2, {"pid": 7, "exit_when_empty": 0, "volumes": []}), "rubbish"),
        (None, "closed"),
    ],
)
async def test_rubbish_and_hanging_up_end_every_request(short_tmp: Path, said: bytes | None, match: str) -> None:
    errors: list[CryptfsError] = []

    def answer(_: int, verb: str) -> bytes | None:
        return said if verb == "status" else b""

    async with fake_agent(short_tmp / "s", answer) as path, open_agent(path) as client:

        async def wait_for_ever() -> None:
            try:
                await client.request("silence", {})
            except AgentUnavailable as error:
                errors.append(error)

        async def ask() -> None:
            with pytest.raises(AgentUnavailable, match=match):
                await client.status()

        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask)
                await trio.testing.wait_all_tasks_blocked()
                if not client.lost.is_set():
                    nursery.start_soon(wait_for_ever)
                await client.lost.wait()
            with pytest.raises(AgentUnavailable, match=match):
                await client.request("more", {})
    assert all(match in str(error) for error in errors)


@pytest.mark.parametrize(
    "result",
    [
        {},
        {"keys": None},
        {"keys": []},
        {"keys": ["text"]},
        {"keys": [b"short"]},
        {"keys": [bytes(33)]},
        {"keys": [bytes(32), bytes(32)]},
    ],
)
async def test_keys_of_a_wrong_shape_never_reach_the_caller(short_tmp: Path, result: dict[str, Any]) -> None:
    async with fake_agent(short_tmp / "s", lambda number, _: encode_reply(number, result)) as path:
        with trio.fail_after(5), pytest.raises(AgentUnavailable, match="rubbish"):
            async with open_agent(path) as client:
                await client.unwrap(bytes(16), [(bytes(16), "block", 1, bytes(40), 0)])


async def test_short_kits_and_generated_keys_never_reach_the_caller(short_tmp: Path) -> None:
    kit = [bytes(16), bytes(32), bytes(40), b"", b"", bytes(32), bytes(39)]
    result = {"kek_version": 1, "keys": bytes(31), "wrapped": bytes(40), "kits": [kit]}
    async with fake_agent(short_tmp / "s", lambda number, _: encode_reply(number, result)) as path:
        async with open_agent(path) as client:
            with pytest.raises(AgentUnavailable, match="rubbish"):
                await client.generate(bytes(16), bytes(16), "block", 1)
        async with open_agent(path) as client:
            with pytest.raises(AgentUnavailable, match="rubbish"):
                await client.kits(bytes(16), directory=False, count=1, deks=1)


async def test_another_protocol_version_is_refused(short_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(HELLO, "version", 2)
    async with fake_agent(short_tmp / "s", lambda *_: b"") as path:
        with pytest.raises(AgentUnavailable, match="version"):
            async with open_agent(path):
                pass


async def test_answers_out_of_order_find_their_requests(short_tmp: Path) -> None:
    held: list[int] = []

    def answer(number: int, _: str) -> bytes:
        held.append(number)
        return b"".join(encode_reply(one, {"n": one}) for one in reversed(held)) if len(held) == 5 else b""

    async with fake_agent(short_tmp / "s", answer) as path, open_agent(path) as client:
        got: list[int] = []

        async def ask() -> None:
            got.append((await client.request("x", {}))["n"])

        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                for _ in range(5):
                    nursery.start_soon(ask)
        assert sorted(got) == [2, 3, 4, 5, 6]


async def test_a_cancelled_request_costs_nothing_but_its_answer(short_tmp: Path) -> None:
    late: list[int] = []

    def answer(number: int, verb: str) -> bytes:
        if verb == "slow":
            late.append(number)
            return b""
        return encode_reply(late.pop(), {}) + encode_reply(number, {"fine": True})

    async with fake_agent(short_tmp / "s", answer) as path, open_agent(path) as client:
        with trio.move_on_after(0.05) as scope:
            await client.request("slow", {})
        assert scope.cancelled_caught
        assert await client.request("quick", {}) == {"fine": True}
        assert not client._waiting
        assert not client._abandoned


async def test_error_codes_become_exceptions_and_the_connection_lives(short_tmp: Path) -> None:
    codes = iter(["locked", "protocol", "internal"])

    def answer(number: int, _: str) -> bytes:
        return encode_failure(number, next(codes), "because")

    async with fake_agent(short_tmp / "s", answer) as path, open_agent(path) as client:
        for error in (VolumeLocked, ProtocolError, AgentUnavailable):
            with pytest.raises(error, match="because"):
                await client.request("x", {})
        assert not client.lost.is_set()


async def test_pushes_arrive_between_answers_and_without_any(short_tmp: Path) -> None:
    events: list[Mapping[str, Any]] = []

    def answer(number: int, _: str) -> bytes:
        push = encode_push({"event": "locked", "volume_id": b"v"})
        return push + encode_reply(number, {}) + push

    async with fake_agent(short_tmp / "s", answer) as path, open_agent(path, on_push=events.append) as client:
        await client.request("x", {})
        with trio.fail_after(5):
            while len(events) < 2:  # noqa: ASYNC110 - the second may be in the next read
                await trio.sleep(0.005)
        assert events == [{"event": "locked", "volume_id": b"v"}] * 2


async def test_an_agent_that_hangs_is_given_up(short_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_connection, "TICK_S", 0.02)
    async with fake_agent(short_tmp / "s", lambda *_: b"") as path, open_agent(path) as client:
        with trio.fail_after(5), pytest.raises(AgentUnavailable, match="does not answer"):
            await client.status()


async def test_a_patient_request_outlasts_an_impatient_ones_limit(
    short_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent_connection, "TICK_S", 0.01)
    async with fake_agent(short_tmp / "s", lambda *_: b"") as path, open_agent(path) as client:
        with trio.move_on_after(0.15) as scope:
            await client.request("unlock", {}, patience_ticks=1000)
        assert scope.cancelled_caught


async def test_a_large_request_to_a_slow_reader_is_sent_whole(short_tmp: Path) -> None:
    here, there = socket.socketpair()
    here.settimeout(0)
    there.settimeout(20)
    client = AgentClient(here)
    args = {"volume": bytes(3 << 20)}

    def read_all() -> None:
        decoder = RequestDecoder()
        while not (requests := decoder.feed(there.recv(1 << 16))):
            pass
        assert requests[0].args == args
        there.sendall(encode_reply(requests[0].request_id, {"got": True}))

    with there:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.run)
            nursery.start_soon(trio.to_thread.run_sync, read_all)
            assert await client.request("unlock", args) == {"got": True}
            client.close()


async def test_close_ends_what_waits_and_leaves_no_descriptor(short_tmp: Path) -> None:
    async with fake_agent(short_tmp / "s", lambda *_: b"") as path:
        before = len(os.listdir("/proc/self/fd"))
        async with trio.open_nursery() as nursery:
            client = await connect(nursery, path, role="daemon")

            async def ask() -> None:
                with pytest.raises(AgentUnavailable, match="closed"):
                    await client.status()

            nursery.start_soon(ask)
            await trio.testing.wait_all_tasks_blocked()
            client.close()
            client.close()
        with trio.fail_after(5):
            while len(os.listdir("/proc/self/fd")) > before:  # noqa: ASYNC110 - the fake's end closes in its own time
                await trio.sleep(0.005)


async def test_errors_come_out_of_the_block_as_they_are(short_tmp: Path) -> None:
    async with fake_agent(short_tmp / "s", lambda number, _: encode_failure(number, "locked", "x")) as path:
        with pytest.raises(VolumeLocked):
            async with open_agent(path) as client:
                await client.request("x", {})
        with pytest.raises(KeyError):
            async with open_agent(path):
                raise KeyError
        with trio.move_on_after(0.02) as scope:
            async with open_agent(path):
                await trio.sleep_forever()
        assert scope.cancelled_caught
