"""Clients by the thousand, slow ones, silent ones: what they leave behind, and whom they keep waiting."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import socket
import threading
import time
import tracemalloc
from typing import Any

import pytest
import trio
import trio.lowlevel

from cryptfs.agent import server
from cryptfs.format.agent_msg import AnswerDecoder, Failure, Reply, encode_request
from cryptfs.format.volume import parse_volume
from cryptfs.keys.agent_client import open_agent
from cryptfs.keys.edit_requests import ProtectorWish, VolumeWish
from tests.agent.conftest import Served, ServeHere, raw_connection, settled

MESSAGES = [
    b"",
    b"\0",
    b"\xff\xff\xff\xff",
    b"\0\0\0\x05\xc1\xc1\xc1\xc1\xc1",
    encode_request(1, "status", {}),
    encode_request(1, "status", {}) * 3,
    encode_request(1, "status", {})[:-2],
    encode_request(1, "unwrap", {"volume_id": bytes(16), "items": []}),
    encode_request(7, "detach", {"volume_id": bytes(16), "keep": True}),
    encode_request(1, "no", {"x": [[[[[1]]]]]}),
]


async def come_and_go(served: Served, count: int) -> None:
    """So many clients, each of which says something and vanishes, with answers unread or not."""
    for number in range(count):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.setblocking(False)
            while True:
                try:
                    sock.connect(served.path)
                    break
                except BlockingIOError:
                    await trio.lowlevel.checkpoint()
            sock.send(MESSAGES[number % len(MESSAGES)])
            if number % 3 == 0:
                await trio.lowlevel.checkpoint()
    await settled(lambda: served.server.connections == 0)


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


async def vanish(serve_here: ServeHere, count: int) -> None:
    async with serve_here() as served:
        # Once round: every list and buffer that grows with the first clients has its size.
        await come_and_go(served, max(200, count // 2))
        gc.collect()
        before = open_descriptors()
        tasks = trio.lowlevel.current_statistics().tasks_living
        tracemalloc.start()
        try:
            held, _ = tracemalloc.get_traced_memory()
            await come_and_go(served, count)
            gc.collect()
            grown = tracemalloc.get_traced_memory()[0] - held
        finally:
            tracemalloc.stop()
        assert open_descriptors() == before
        assert trio.lowlevel.current_statistics().tasks_living == tasks
        assert grown < 200_000, f"{grown} bytes"
        async with open_agent(served.path) as client:
            await client.status()


@pytest.fixture
def unlogged(caplog: pytest.LogCaptureFixture) -> None:
    """The test's own memory of what was logged would grow."""
    caplog.set_level(logging.CRITICAL, logger="cryptfs")


async def test_clients_that_come_and_vanish_leave_nothing(serve_here: ServeHere, unlogged: None) -> None:
    await vanish(serve_here, 500)


@pytest.mark.torture
async def test_ten_thousand_clients_that_come_and_vanish_leave_nothing(serve_here: ServeHere, unlogged: None) -> None:
    await vanish(serve_here, 10_000)


async def test_a_client_that_never_finishes_its_request_is_hung_up_on(
    serve_here: ServeHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "REQUEST_S", 0.2)
    async with serve_here() as served:
        with raw_connection(served.path) as sock:
            message = encode_request(1, "status", {})
            sock.send(message)
            assert await trio.to_thread.run_sync(sock.recv, 1000)
            sock.send(message[:5])
            with trio.fail_after(10):
                assert await trio.to_thread.run_sync(sock.recv, 1000) == b""


async def test_idle_connections_make_room_for_new_ones(serve_here: ServeHere) -> None:
    async with serve_here() as served, open_agent(served.path, role="daemon") as daemon:
        data = await daemon.create(VolumeWish(4096, ProtectorWish("fake", "", b"x", {"cost": "low"})))
        volume_id = parse_volume(data).volume_id
        await daemon.attach(volume_id=volume_id, cipher_dir="/c", mountpoint="/m", volume=data)
        silent = []
        try:
            for _ in range(server.CONNECTIONS_MAX + 20):
                sock = socket.socket(socket.AF_UNIX)
                silent.append(sock)
                sock.connect(served.path)
                await trio.lowlevel.checkpoint()
            await settled(lambda: served.server.connections == server.CONNECTIONS_MAX)
            async with open_agent(served.path) as client:
                [volume] = (await client.status()).volumes
            assert volume.daemon_pid == os.getpid(), "a daemon is never hung up on"
            await daemon.generate(volume_id, bytes(16), "block", 1)
        finally:
            for sock in silent:
                sock.close()


async def test_a_flood_of_connections_holds_up_no_request(serve_here: ServeHere) -> None:
    """Every one that is let in is followed by the next: the backlog is never empty."""
    stop = threading.Event()

    def flood(path: str) -> None:
        end_s = time.monotonic() + 15  # also if the agent does nothing else any more
        while not stop.is_set() and time.monotonic() < end_s:
            socks = []
            for _ in range(40):
                sock = socket.socket(socket.AF_UNIX)
                sock.setblocking(False)
                socks.append(sock)
                with contextlib.suppress(OSError):
                    sock.connect(path)
            for sock in socks:
                sock.close()

    answered = 0
    async with serve_here() as served, trio.open_nursery() as nursery:
        with raw_connection(served.path) as sock:
            nursery.start_soon(trio.to_thread.run_sync, flood, served.path)
            try:
                with trio.fail_after(10):
                    while answered < 20:
                        sock.send(encode_request(1, "lock", {"volume_id": bytes(16)}))
                        assert await trio.to_thread.run_sync(sock.recv, 1000), "it was hung up on"
                        answered += 1
            finally:
                stop.set()


async def test_a_request_that_was_sent_is_answered_before_its_connection_makes_room(serve_here: ServeHere) -> None:
    async with serve_here() as served:
        with raw_connection(served.path) as first, contextlib.ExitStack() as others:
            await settled(lambda: served.server.connections == 1)
            for number in range(server.CONNECTIONS_MAX - 1):
                others.enter_context(raw_connection(served.path))
                await settled(lambda number=number: served.server.connections == number + 2)  # type: ignore[misc]
            # In one stretch, so the agent finds the request and the newcomer at the same moment.
            others.enter_context(raw_connection(served.path))
            first.send(encode_request(7, "status", {}))
            assert await trio.to_thread.run_sync(first.recv, 1000), "it was the one idle longest, until it asked"


def said(data: bytes) -> list[tuple[int, str]]:
    """(request id, code or ``ok``) of what was answered, in order; pushes are left out."""
    out = []
    for answer in AnswerDecoder().feed(data):
        if isinstance(answer, Reply):
            out.append((answer.request_id, "ok"))
        elif isinstance(answer, Failure):
            out.append((answer.request_id, answer.code))
    return out


def answers(sock: socket.socket, count: int) -> list[tuple[int, str]]:
    data = b""
    while len(said(data)) < count:
        part = sock.recv(65536)
        assert part
        data += part
    return said(data)


FIRST = ProtectorWish("fake", "", b"right", {"cost": "low"})


async def test_requests_replayed_or_out_of_order_change_nothing_they_should_not(serve_here: ServeHere) -> None:
    async with serve_here(lock_deadline_s=20) as served, open_agent(served.path) as client:
        data = await client.create(VolumeWish(4096, FIRST))
        volume_id = parse_volume(data).volume_id
        attach = {"volume_id": volume_id, "cipher_dir": b"/c", "mountpoint": b"/m", "volume": data}
        detach = {"volume_id": volume_id, "keep": True}
        locked = {"volume_id": volume_id, "unwritten": 0}
        generate = {"volume_id": volume_id, "id": bytes(16), "purpose": "block", "count": 1}

        async def one(sock: socket.socket, number: int, verb: str, args: dict[str, Any]) -> tuple[int, str]:
            sock.send(encode_request(number, verb, args))
            [answer] = await trio.to_thread.run_sync(answers, sock, 1)
            return answer

        with raw_connection(served.path) as daemon, raw_connection(served.path) as stranger:
            assert await one(daemon, 1, "detach", detach) == (1, "protocol"), "before attach"
            assert await one(daemon, 1, "locked", locked) == (1, "protocol"), "nothing is being locked"
            assert await one(daemon, 9, "attach", attach) == (9, "ok")
            assert await one(daemon, 9, "attach", attach) == (9, "ok"), "the same once more, with an id that was used"
            assert await one(stranger, 9, "attach", attach) == (9, "busy"), "the same from another connection"
            assert await one(stranger, 1 << 62, "detach", detach) == (1 << 62, "protocol")
            assert await one(stranger, 1, "locked", locked) == (1, "protocol")
            assert await one(daemon, 3, "locked", locked) == (3, "protocol"), "it was not asked to lock"
            assert await one(stranger, 2, "generate", generate) == (2, "ok")
            [volume] = (await client.status()).volumes
            assert (volume.state, volume.mountpoint) == ("unlocked", "/m")
            # Many at once, all of one id: each is answered, and each answer is to that id.
            daemon.send(encode_request(4, "generate", generate) * 20 + encode_request(4, "attach", attach) * 5)
            assert await trio.to_thread.run_sync(answers, daemon, 25) == [(4, "ok")] * 25
            assert await one(daemon, 5, "detach", detach) == (5, "ok")
            assert await one(daemon, 5, "detach", detach) == (5, "protocol"), "twice"
            assert await one(stranger, 6, "attach", attach) == (6, "ok"), "it is free now"
            assert await one(stranger, 7, "lock", {"volume_id": bytes(16)}) == (7, "ok")
            stranger.send(encode_request(8, "lock", {"volume_id": volume_id}))
            with trio.fail_after(10):
                while (await client.status()).volumes[0].state != "locking":  # noqa: ASYNC110 - the agent's to say
                    await trio.sleep(0.01)
            stranger.send(encode_request(8, "locked", locked) * 2)
            ended = await trio.to_thread.run_sync(answers, stranger, 3)
            assert sorted(ended) == [(8, "ok"), (8, "ok"), (8, "protocol")], "the second word comes too late"
            assert await one(stranger, 8, "locked", locked) == (8, "protocol"), "the word counts once"
            assert await one(daemon, 6, "generate", generate) == (6, "locked")
        await client.unlock(volume=data, cipher_dir="/c", secret=b"right")


async def test_a_client_that_never_reads_its_answers_costs_nobody_else(serve_here: ServeHere) -> None:
    async with serve_here() as served, open_agent(served.path) as client:
        data = await client.create(VolumeWish(4096, FIRST))
        volume_id = parse_volume(data).volume_id
        args = {"volume_id": volume_id, "id": bytes(16), "purpose": "block", "count": 4096}
        request = encode_request(1, "generate", args)
        with raw_connection(served.path) as deaf:
            deaf.setblocking(False)
            sent = 0
            with trio.fail_after(20):
                while sent < 10_000:
                    try:
                        sent += deaf.send(request * 50) // len(request)
                    except BlockingIOError:
                        break  # it is not read any more
                    await trio.sleep(0.01)
            assert sent < 10_000, "requests are taken from who reads no answers"
            assert await client.generate(volume_id, bytes(16), "block", 1)
        await settled(lambda: served.server.connections == 1)
