"""Clients by the thousand, slow ones, silent ones: what they leave behind, and whom they keep waiting."""

from __future__ import annotations

import gc
import logging
import os
import socket
import tracemalloc

import pytest
import trio
import trio.lowlevel

from cryptfs.agent import server
from cryptfs.format.agent_msg import encode_request
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


async def test_requests_twice_or_out_of_order_are_answered(serve_here: ServeHere) -> None:
    async with serve_here() as served:
        with raw_connection(served.path) as sock:
            for number in (9, 3, 3, 1 << 62, 1):
                sock.send(encode_request(number, "status", {}))
                assert await trio.to_thread.run_sync(sock.recv, 1000)
