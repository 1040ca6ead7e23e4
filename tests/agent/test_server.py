"""The agent over a real socket: its verbs, who gets what when volumes are locked or daemons go, and bad peers."""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.lowlevel

from cryptfs.agent import attempts
from cryptfs.agent.listen import AlreadyServed
from cryptfs.errors import (
    AgentUnavailable,
    NotPermitted,
    ProtocolError,
    UnsupportedFormat,
    UsageError,
    VolumeBusy,
    VolumeDamaged,
    VolumeLocked,
    WrongSecret,
)
from cryptfs.format.agent_msg import MESSAGE_MAX_BYTES, encode_request
from cryptfs.format.volume import parse_volume
from cryptfs.keys.agent_client import AgentClient, VolumeStatus, open_agent
from cryptfs.keys.edit_requests import ProtectorWish, VolumeWish
from tests.agent.conftest import Served, ServeHere, raw_connection, settled

LOG_ID = b"f" * 16


async def create(client: AgentClient, secret: bytes = b"right") -> tuple[bytes, bytes]:
    """(volume id, the volume file) of a new volume, unlocked."""
    data = await client.create(VolumeWish(16384, ProtectorWish("fake", "mine", secret, {"cost": "low"})))
    return parse_volume(data).volume_id, data


async def attach(client: AgentClient, volume_id: bytes, data: bytes) -> int:
    return (await client.attach(volume_id=volume_id, cipher_dir="/c", mountpoint="/m", volume=data)).kek_version


async def test_a_volume_through_its_life(serve_here: ServeHere) -> None:
    async with serve_here() as served, open_agent(served.path) as client:
        volume_id, data = await create(client)
        assert await client.lock(volume_id) is True
        assert await client.lock(volume_id) is False
        with pytest.raises(VolumeLocked):
            await client.generate(volume_id, LOG_ID, "block", 1)
        with pytest.raises(WrongSecret):
            await client.unlock(volume=data, cipher_dir="/c", secret=b"wrong")
        assert await client.unlock(volume=data, cipher_dir="/c", secret=b"right") == (volume_id, 1)
        version, keys, wrapped = await client.generate(volume_id, LOG_ID, "block", 3)
        assert (version, len(keys), len(wrapped)) == (1, 96, 120)
        items = [(LOG_ID, "block", 1, wrapped, 7), (LOG_ID, "attr", 1, wrapped, 0)]
        assert await client.unwrap(volume_id, items) == ([keys, None], [0, 0])
        version, [kit] = await client.kits(volume_id, directory=True, count=1, deks=0)
        assert (version, [len(part) for part in kit]) == (1, [16, 32, 40, 64, 72, 0, 0])
        _, kits = await client.kits(volume_id, directory=False, count=2, deks=3)
        assert [len(part) for part in kits[1]] == [16, 32, 40, 0, 0, 96, 120]


async def test_unlock_of_an_edited_file_is_damaged(serve_here: ServeHere) -> None:
    async with serve_here() as served, open_agent(served.path) as client:
        volume_id, data = await create(client)
        await client.lock(volume_id)
        edited = data.replace(b"mine", b"mina")
        with pytest.raises(VolumeDamaged):
            await client.unlock(volume=edited, cipher_dir="/c", secret=b"right")
        with pytest.raises(WrongSecret):
            await client.unlock(volume=edited, cipher_dir="/c", secret=b"wrong")
        with pytest.raises(VolumeDamaged):
            await client.unlock(volume=b"rubbish", cipher_dir="/c", secret=b"right")
        with pytest.raises(UnsupportedFormat):
            await client.unlock(volume=data[:9] + b"\2" + data[10:], cipher_dir="/c", secret=b"right")
        assert (await client.status()).volumes == ()


async def test_a_wrong_secret_leaves_an_unlocked_volume_unlocked(serve_here: ServeHere) -> None:
    async with serve_here() as served, open_agent(served.path) as client:
        volume_id, data = await create(client)
        with pytest.raises(WrongSecret):
            await client.unlock(volume=data, cipher_dir="/c", secret=b"wrong")
        await client.generate(volume_id, LOG_ID, "block", 1)


async def test_a_root_holder_that_fails_is_told_as_such(serve_here: ServeHere) -> None:
    async with serve_here() as served, open_agent(served.path) as client:
        _, data = await create(client)
        served.provider.failure = AgentUnavailable("the KMS does not answer")
        with pytest.raises(AgentUnavailable, match="the KMS does not answer"):
            await client.unlock(volume=data, cipher_dir="/c", secret=b"right")
        await client.status()


async def test_status_names_volumes_and_their_daemons(serve_here: ServeHere) -> None:
    async with serve_here() as served, open_agent(served.path) as client:
        odd = os.fsdecode(b"/c/\xff\n")
        volume_id, data = await create(client)
        await client.unlock(volume=data, cipher_dir=odd, secret=b"right")
        status = await client.status()
        assert (status.pid, status.exit_when_empty) == (os.getpid(), False)
        assert status.volumes == (VolumeStatus(volume_id, odd, None, "unlocked", None),)
        async with open_agent(served.path, role="daemon") as daemon:
            await attach(daemon, volume_id, data)
            assert (await client.status()).volumes == (VolumeStatus(volume_id, "/c", "/m", "unlocked", os.getpid()),)
            await client.lock(volume_id)
            assert (await client.status()).volumes == (VolumeStatus(volume_id, "/c", "/m", "locked", os.getpid()),)
            await daemon.detach(volume_id, keep=True)
            assert (await client.status()).volumes == ()


async def test_when_an_attached_daemon_is_gone_its_kek_is_forgotten(serve_here: ServeHere) -> None:
    async with serve_here() as served, open_agent(served.path) as client:
        volume_id, data = await create(client)
        other_id, _ = await create(client)
        async with open_agent(served.path, role="daemon") as daemon:
            assert await attach(daemon, volume_id, data) == 1
        await settled(lambda: served.server.connections == 1)
        assert [volume.volume_id for volume in (await client.status()).volumes] == [other_id]
        with pytest.raises(VolumeLocked):
            await client.generate(volume_id, LOG_ID, "block", 1)


@pytest.mark.parametrize("keep", [True, False])
async def test_detach_keeps_the_kek_only_if_asked(serve_here: ServeHere, keep: bool) -> None:
    async with serve_here() as served, open_agent(served.path) as client:
        volume_id, data = await create(client)
        async with open_agent(served.path, role="daemon") as daemon:
            await attach(daemon, volume_id, data)
            await daemon.detach(volume_id, keep=keep)
        await settled(lambda: served.server.connections == 1)
        unlocked = [(volume.volume_id, volume.cipher_dir) for volume in (await client.status()).volumes]
        assert unlocked == ([(volume_id, "/c")] if keep else [])


async def test_keep_from_another_connection_outlives_the_daemon(serve_here: ServeHere) -> None:
    async with serve_here() as served, open_agent(served.path) as client:
        volume_id, data = await create(client)
        assert await client.keep(volume_id, keep=True) is False
        async with open_agent(served.path, role="daemon") as daemon:
            await attach(daemon, volume_id, data)
            assert await client.keep(volume_id, keep=True) is True
        await settled(lambda: served.server.connections == 1)
        assert [volume.state for volume in (await client.status()).volumes] == ["unlocked"]
        async with open_agent(served.path, role="daemon") as daemon:
            await attach(daemon, volume_id, data)
            await client.keep(volume_id, keep=True)
            await client.keep(volume_id, keep=False)
        await settled(lambda: served.server.connections == 1)
        assert (await client.status()).volumes == ()


async def test_attach_is_for_one_daemon_an_authentic_file_and_an_unlocked_volume(serve_here: ServeHere) -> None:
    async with serve_here() as served, open_agent(served.path) as one, open_agent(served.path) as two:
        volume_id, data = await create(one)
        other_id, other = await create(one)
        with pytest.raises(VolumeDamaged):
            await attach(one, volume_id, data.replace(b"mine", b"mina"))
        with pytest.raises(VolumeDamaged):
            await attach(one, volume_id, other)
        await attach(one, volume_id, data)
        await attach(one, volume_id, data)
        with pytest.raises(VolumeBusy, match=str(os.getpid())):
            await attach(two, volume_id, data)
        with pytest.raises(ProtocolError):
            await two.detach(volume_id, keep=True)
        await attach(two, other_id, other)
        await one.detach(volume_id, keep=True)
        await attach(two, volume_id, data)
        await two.lock(volume_id)
        with pytest.raises(VolumeLocked):
            await attach(one, volume_id, data)


async def test_lock_is_pushed_to_the_daemon_which_may_go_on_after_unlock(serve_here: ServeHere) -> None:
    events: list[Mapping[str, Any]] = []
    async with serve_here() as served, open_agent(served.path) as client:
        volume_id, data = await create(client)
        async with open_agent(served.path, role="daemon", on_push=events.append) as daemon:
            await attach(daemon, volume_id, data)
            await client.lock(volume_id)
            await settled(lambda: len(events) == 2)
            assert events == [
                {"event": "locking", "volume_id": volume_id, "deadline_ms": 200},
                {"event": "locked", "volume_id": volume_id},
            ]
            with pytest.raises(VolumeLocked):
                await daemon.generate(volume_id, LOG_ID, "block", 1)
            await client.unlock(volume=data, cipher_dir="/c", secret=b"right")
            await settled(lambda: len(events) == 3)
            assert events[2] == {"event": "unlocked", "volume_id": volume_id}
            await daemon.generate(volume_id, LOG_ID, "block", 1)
            await client.lock(volume_id)
            await settled(lambda: len(events) == 5)
        await settled(lambda: served.server.connections == 1)


async def test_stop_forgets_tells_and_ends(serve_here: ServeHere) -> None:
    events: list[Mapping[str, Any]] = []
    async with serve_here() as served, open_agent(served.path, on_push=events.append) as client:
        volume_id, data = await create(client)
        await attach(client, volume_id, data)
        await client.stop()
        with trio.fail_after(5):
            await served.ended.wait()
            await client.lost.wait()
        assert [event["event"] for event in events] == ["locking", "locked"]
        assert not served.socket_exists
        with pytest.raises(AgentUnavailable):
            await client.status()


CREATE: dict[str, Any] = {
    "block_size": 4096,
    "kind": "fake",
    "wish": {"cost": "low"},
    "label": "",
    "secret": b"x",
    "policy": {},
    "shred_kind": "",
    "shred_params": {},
    "shred_secret": b"",
    "while_connected": False,
}
UNLOCK: dict[str, Any] = {
    "volume": b"",
    "cipher_dir": b"/c",
    "secret": b"x",
    "for_s": None,
    "idle_s": None,
    "kind": "",
    "protector_id": b"",
    "shred_secret": b"",
    "while_connected": False,
}
BAD_ARGS: list[tuple[str, dict[str, Any]]] = [
    ("no-such-verb", {}),
    ("hello", {}),
    ("hello", {"role": "root"}),
    ("status", {"x": 1}),
    ("lock", {"volume_id": b"short"}),
    ("lock", {"volume_id": "v" * 16}),
    ("create", CREATE | {"block_size": 5000}),
    ("create", CREATE | {"secret": b""}),
    ("create", CREATE | {"secret": "text"}),
    ("create", CREATE | {"label": "x" * 201}),
    ("create", CREATE | {"wish": {"cost": []}}),
    ("create", CREATE | {"policy": []}),
    ("create", CREATE | {"policy": {"for_s": "1"}}),
    ("create", CREATE | {"shred_secret": "text"}),
    ("create", CREATE | {"shred_kind": "keyfile", "shred_secret": b"short"}),
    ("unlock", UNLOCK | {"cipher_dir": "/text"}),
    ("unlock", UNLOCK | {"cipher_dir": b"/a\0b"}),
    ("unlock", UNLOCK | {"for_s": 0}),
    ("unlock", UNLOCK | {"idle_s": 1 << 40}),
    ("unlock", UNLOCK | {"kind": b"fake"}),
    ("unlock", UNLOCK | {"protector_id": bytes(17)}),
    ("unlock", UNLOCK | {"shred_secret": None}),
    ("unlock", UNLOCK | {"while_connected": 1}),
    ("create", CREATE | {"while_connected": None}),
    ("hold", {"volume_id": bytes(16)}),
    ("hold", {"volume_id": bytes(15), "while_connected": True}),
    ("release", {"volume_id": None}),
    ("shred", {"volume": "", "shred_secret": b""}),
    ("shred-check", {"volume": "", "shred_secret": b""}),
    ("shred-id", {"volume_id": b"v"}),
    ("policy-set", {"volume_id": b"v" * 16, "volume": b""}),
    ("feature-add", {"volume_id": b"v" * 16, "volume": b""}),
    ("rotate-kek", {"volume_id": b"v" * 16, "volume": b"", "carried": [[b"p" * 16, "x"]], "shred_secret": b""}),
    ("rotate-kek", {"volume_id": b"v" * 16, "volume": b"", "carried": [[b"p" * 16, b"x"]] * 2, "shred_secret": b""}),
    ("protector-remove", {"volume_id": b"v" * 16, "volume": b"", "protector_id": b"p"}),
    ("locked", {"volume_id": b"v" * 16, "unwritten": 0}),
    ("generate", {"volume_id": b"v" * 16, "id": LOG_ID, "purpose": "block", "count": 0}),
    ("generate", {"volume_id": b"v" * 16, "id": LOG_ID, "purpose": "block", "count": 4097}),
    ("generate", {"volume_id": b"v" * 16, "id": LOG_ID, "purpose": "block", "count": True}),
    ("generate", {"volume_id": b"v" * 16, "id": LOG_ID, "purpose": "volume-mac", "count": 1}),
    ("generate", {"volume_id": b"v" * 16, "id": LOG_ID, "purpose": ["block"], "count": 1}),
    ("kits", {"volume_id": b"v" * 16, "directory": 1, "count": 1, "deks": 0}),
    ("kits", {"volume_id": b"v" * 16, "directory": False, "count": 257, "deks": 0}),
    ("kits", {"volume_id": b"v" * 16, "directory": False, "count": 256, "deks": 17}),
    ("unwrap", {"volume_id": b"v" * 16, "items": {}}),
    ("unwrap", {"volume_id": b"v" * 16, "items": [1]}),
    ("unwrap", {"volume_id": b"v" * 16, "items": [[LOG_ID, "block", 1, b""]]}),
    ("unwrap", {"volume_id": b"v" * 16, "items": [[LOG_ID, "block", 1, b"", 0]]}),
    ("unwrap", {"volume_id": b"v" * 16, "items": [[LOG_ID, "block", 1, bytes(41), 0]]}),
    ("unwrap", {"volume_id": b"v" * 16, "items": [[LOG_ID, "block", 0, bytes(40), 0]]}),
    ("unwrap", {"volume_id": b"v" * 16, "items": [[LOG_ID, "block", 1, bytes(40), -1]]}),
    ("unwrap", {"volume_id": b"v" * 16, "items": [[b"f", "block", 1, bytes(40), 0]]}),
    ("unwrap", {"volume_id": b"v" * 16, "items": [[LOG_ID, "volume-mac", 1, bytes(40), 0]]}),
    ("unwrap", {"volume_id": b"v" * 16, "items": [[LOG_ID, [], 1, bytes(40), 0]]}),
    ("unwrap", {"volume_id": b"v" * 16, "items": [[LOG_ID, "block", 1, bytes(40 * 4097), 0]]}),
]


async def test_wrong_arguments_are_an_error_and_the_connection_lives(serve_here: ServeHere) -> None:
    async with serve_here() as served, open_agent(served.path) as client:
        for verb, args in BAD_ARGS:
            with pytest.raises(ProtocolError):
                await client.request(verb, args)
        with pytest.raises(UsageError):
            await client.request("create", CREATE | {"wish": {"cost": "free"}})
        assert (await client.status()).volumes == ()


async def test_the_largest_batches(serve_here: ServeHere) -> None:
    async with serve_here() as served, open_agent(served.path) as client:
        volume_id, _ = await create(client)
        _, keys, wrapped = await client.generate(volume_id, LOG_ID, "block", 4096)
        assert await client.unwrap(volume_id, [(LOG_ID, "block", 1, wrapped, 0)]) == ([keys], [0])
        one_by_one = [(LOG_ID, "block", 1, wrapped[i : i + 40], i) for i in range(0, len(wrapped), 40)]
        got, _ = await client.unwrap(volume_id, one_by_one)
        assert got == [keys[i : i + 32] for i in range(0, len(keys), 32)]
        _, kits = await client.kits(volume_id, directory=False, count=256, deks=16)
        assert len({kit[0] for kit in kits}) == 256


async def test_a_client_that_leaves_during_unlock_leaves_nothing_held(
    serve_here: ServeHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serve_here() as served:
        async with open_agent(served.path) as client:
            volume_id, data = await create(client)
            await client.lock(volume_id)
        await settled(lambda: served.server.connections == 0)
        began, go_on = trio.Event(), threading.Event()

        def slow_open(params: object, secret: object) -> object:
            trio.from_thread.run_sync(began.set)
            assert go_on.wait(20)
            return real_open(params, secret)  # type: ignore[arg-type]

        real_open = served.provider.open
        monkeypatch.setattr(served.provider, "open", slow_open)
        with raw_connection(served.path) as sock:
            args = UNLOCK | {"volume": data, "secret": b"right"}
            sock.send(encode_request(1, "unlock", args))
            with trio.fail_after(20):
                await began.wait()
        await settled(lambda: served.server.connections == 0)
        go_on.set()
        async with open_agent(served.path) as client:
            # Behind the one that was given up: when this is answered, that one is over.
            assert (await client.unlock(volume=data, cipher_dir="/c", secret=b"right"))[0] == volume_id
            await client.lock(volume_id)
            assert (await client.status()).volumes == ()


async def test_others_are_served_during_a_kdf(serve_here: ServeHere, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serve_here() as served, open_agent(served.path) as one, open_agent(served.path) as two:
        _, data = await create(one)
        began, go_on = trio.Event(), threading.Event()

        def slow_open(params: object, secret: object) -> object:
            trio.from_thread.run_sync(began.set)
            assert go_on.wait(20)
            return real_open(params, secret)  # type: ignore[arg-type]

        real_open = served.provider.open
        monkeypatch.setattr(served.provider, "open", slow_open)
        async with trio.open_nursery() as nursery:

            async def unlock() -> None:
                await one.unlock(volume=data, cipher_dir="/c", secret=b"right")

            nursery.start_soon(unlock)
            await began.wait()
            with trio.fail_after(5):
                await two.status()
                await one.status()
            go_on.set()


@pytest.mark.parametrize(
    "rubbish",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        struct.pack(">I", MESSAGE_MAX_BYTES + 1),
        struct.pack(">I", 0),
        struct.pack(">I", 5) + b"\xc1" * 5,
        encode_request(1, "status", {}) + b"\xff" * 9,
    ],
    ids=["http", "oversized", "empty", "no msgpack", "after a good one"],
)
async def test_rubbish_ends_that_connection_only(serve_here: ServeHere, rubbish: bytes) -> None:
    async with serve_here() as served, open_agent(served.path) as client:
        with raw_connection(served.path) as sock:
            sock.sendall(rubbish)
            assert await trio.to_thread.run_sync(sock.recv, 65536) == b""
        assert served.server.connections == 1
        await client.status()


async def test_half_a_message_then_silence_or_close(serve_here: ServeHere) -> None:
    half = encode_request(1, "status", {})[:-3]
    async with serve_here() as served, open_agent(served.path) as client:
        with raw_connection(served.path) as sock:
            sock.sendall(half)
            await settled(lambda: served.server.connections == 2)
            await client.status()
        await settled(lambda: served.server.connections == 1)
        await client.status()


async def test_a_peer_that_never_reads_holds_up_nobody_and_is_not_read_either(serve_here: ServeHere) -> None:
    async with serve_here() as served, open_agent(served.path) as client:
        volume_id, _ = await create(client)
        flood = b"".join(
            encode_request(
                number, "generate", {"volume_id": volume_id, "id": LOG_ID, "purpose": "block", "count": 4096}
            )
            for number in range(1, 400)
        )
        with raw_connection(served.path) as sock:
            sock.settimeout(0)
            sent = 0
            for _ in range(200):
                try:
                    sent += sock.send(flood[sent:])
                except BlockingIOError:
                    break
                await trio.lowlevel.checkpoint()
            with trio.fail_after(5):
                await client.status()
            [connection] = [each for each in served.server._connections if each._sender.unsent]
            assert connection._sender.unsent < 1 << 20
        await settled(lambda: served.server.connections == 1)


async def test_answers_to_a_slow_reader_arrive_whole(serve_here: ServeHere) -> None:
    async with serve_here() as served, open_agent(served.path) as client:
        volume_id, _ = await create(client)
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(client.generate, volume_id, LOG_ID, "block", 4096)
            nursery.start_soon(client.status)


async def test_vanishing_clients_leave_nothing_behind(serve_here: ServeHere) -> None:
    async with serve_here() as served, open_agent(served.path) as client:
        await client.status()
        fds = len(os.listdir("/proc/self/fd"))
        tasks = trio.lowlevel.current_statistics().tasks_living
        for number in range(200):
            with raw_connection(served.path) as sock:
                if number % 3:
                    sock.sendall(encode_request(1, "status", {})[: 5 * number])
            if number % 20 == 0:
                # Nineteen have vanished by the time they are accepted.
                await trio.sleep(0.05)
        await settled(lambda: served.server.connections == 1)
        await settled(lambda: len(os.listdir("/proc/self/fd")) == fds)
        await client.status()
        await settled(lambda: trio.lowlevel.current_statistics().tasks_living == tasks)


async def test_connections_beyond_the_limit_are_refused_if_none_is_idle(
    serve_here: ServeHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cryptfs.agent.server.CONNECTIONS_MAX", 3)
    monkeypatch.setattr("cryptfs.agent.server.Connection.idle_since", None)
    async with serve_here() as served:
        async with open_agent(served.path), open_agent(served.path), open_agent(served.path):
            with pytest.raises(AgentUnavailable):
                async with open_agent(served.path):
                    pass
        await settled(lambda: served.server.connections == 0)
        async with open_agent(served.path) as client:
            await client.status()


async def test_exit_when_empty_waits_for_the_last_volume_and_connection(serve_here: ServeHere) -> None:
    async with serve_here(empty=True, startup_grace_s=5) as served:
        async with open_agent(served.path) as client:
            volume_id, _ = await create(client)
            assert (await client.status()).exit_when_empty
        await settled(lambda: served.server.connections == 0)
        await trio.sleep(0.15)
        assert not served.ended.is_set(), "a volume is unlocked"
        async with open_agent(served.path) as client:
            await client.lock(volume_id)
            await trio.sleep(0.15)
            assert not served.ended.is_set(), "a client is connected"
        with trio.fail_after(3):
            await served.ended.wait()
        assert not served.socket_exists


async def test_exit_when_empty_ends_if_nobody_ever_comes(serve_here: ServeHere) -> None:
    async with serve_here(empty=True, startup_grace_s=0.05) as served:
        with trio.fail_after(3):
            await served.ended.wait()


async def test_exit_when_empty_does_not_begin_the_count_of_wrong_secrets_anew(
    serve_here: ServeHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempts, "QUIET_S", 1.0)
    async with serve_here(empty=True, startup_grace_s=5) as served:
        async with open_agent(served.path) as client:
            volume_id, volume = await create(client)
            await client.lock(volume_id)
            with pytest.raises(WrongSecret):
                await client.unlock(volume=volume, cipher_dir="/c", secret=b"wrong")
        await settled(lambda: served.server.connections == 0)
        await trio.sleep(0.15)
        assert not served.ended.is_set()
        async with open_agent(served.path) as client:
            assert not (await client.status()).exit_when_empty
        with trio.fail_after(3):
            await served.ended.wait()


async def test_a_right_secret_lets_it_end_at_once(serve_here: ServeHere) -> None:
    async with serve_here(empty=True, startup_grace_s=5) as served:
        async with open_agent(served.path) as client:
            volume_id, volume = await create(client)
            await client.lock(volume_id)
            with pytest.raises(WrongSecret):
                await client.unlock(volume=volume, cipher_dir="/c", secret=b"wrong")
            await client.unlock(volume=volume, cipher_dir="/c", secret=b"right")
            await client.lock(volume_id)
            assert (await client.status()).exit_when_empty
        with trio.fail_after(3):
            await served.ended.wait()


async def test_an_ordinary_agent_stays(serve_here: ServeHere) -> None:
    async with serve_here() as served:
        async with open_agent(served.path) as client:
            await client.status()
        await settled(lambda: served.server.connections == 0)
        await trio.sleep(0.15)
        assert not served.ended.is_set()


async def test_socket_and_directory_are_the_owners_alone(serve_here: ServeHere) -> None:
    async with serve_here() as served:
        assert os.stat(served.path).st_mode & 0o7777 == 0o600
        assert os.stat(os.path.dirname(served.path)).st_mode & 0o7777 == 0o700


async def _serve_again(served: Served) -> None:
    await served.server.serve(served.path)


async def test_a_second_agent_is_refused_and_the_first_lives_on(serve_here: ServeHere) -> None:
    async with serve_here() as served, open_agent(served.path) as client:
        with pytest.raises(AlreadyServed):
            await _serve_again(served)
        await client.status()
        assert served.socket_exists


async def test_a_dead_agents_socket_is_taken_over(serve_here: ServeHere, short_tmp: Path) -> None:
    (short_tmp / "run").mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(str(short_tmp / "run" / "agent.sock"))
    async with serve_here() as served, open_agent(served.path) as client:
        await client.status()


async def test_another_programs_socket_is_left_alone(serve_here: ServeHere, short_tmp: Path) -> None:
    (short_tmp / "run").mkdir(mode=0o700)
    path = short_tmp / "run" / "agent.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
        other.bind(str(path))
        other.listen()
        with pytest.RaisesGroup(pytest.RaisesExc(AlreadyServed)):
            async with serve_here():
                pass
        assert path.is_socket()


async def test_a_file_in_the_sockets_place_is_left_alone(serve_here: ServeHere, short_tmp: Path) -> None:
    (short_tmp / "run").mkdir(mode=0o700)
    path = short_tmp / "run" / "agent.sock"
    path.write_text("mine")
    with pytest.RaisesGroup(pytest.RaisesExc(NotPermitted, match="no socket")):
        async with serve_here():
            pass
    assert path.read_text() == "mine"


async def test_a_directory_open_to_others_is_refused(serve_here: ServeHere, short_tmp: Path) -> None:
    (short_tmp / "run").mkdir()
    (short_tmp / "run").chmod(0o755)
    with pytest.RaisesGroup(pytest.RaisesExc(NotPermitted, match="0755")):
        async with serve_here():
            pass
