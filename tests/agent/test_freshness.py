"""The agent's record of what this machine has seen: on disk, over the socket, and what it refuses."""

from __future__ import annotations

import os
import sqlite3
import stat
from pathlib import Path

import pytest

from cryptfs.agent import freshness
from cryptfs.agent.freshness import Changes, Record, Seen
from cryptfs.agent.places import covering_mount
from cryptfs.crypto.wrap import volume_mac
from cryptfs.errors import Denied, FreshnessUnavailable, RolledBack, VolumeBusy, VolumeDamaged, VolumeLocked
from cryptfs.format.volume import parse_volume
from cryptfs.keys.agent_client import AgentClient, open_agent
from cryptfs.keys.volume_requests import VolumeRequests
from cryptfs.types import DELETED
from tests.agent.conftest import ServeHere, settled
from tests.agent.test_server import attach, create

VOLUME_ID = b"v" * 16
A, B = b"a" * 16, b"b" * 16
TOP = (1 << 64) - 1


def gen(number: int) -> bytes:
    return number.to_bytes(8, "big")


def change(record: Record, changes: Changes, now_s: int = 1000) -> None:
    record.write(changes, now_s)
    record.hold(changes, now_s)


@pytest.fixture
def directory(tmp_path: Path) -> str:
    return str(tmp_path / "state" / "fresh")


# the database ----------------------------------------------------------------------------------------------------


def test_floors_only_rise_and_outlive_the_agent(directory: str) -> None:
    record = Record.open(directory, VOLUME_ID)
    assert record.first_sight
    change(record, Changes([(A, gen(5)), (B, gen(TOP))], seen=Seen(1, 2, 3)))
    change(record, Changes([(A, gen(4))]))
    assert (record.floor(A), record.floor(B), record.floor(b"c" * 16)) == (5, TOP, 0)
    record.close()
    again = Record.open(directory, VOLUME_ID)
    assert not again.first_sight
    assert again.seen == Seen(1, 2, 3)
    assert (again.floor(A), again.floor(B)) == (5, TOP)
    assert again.newest_epoch() == TOP >> 40
    again.close()


def test_nobody_else_may_read_it(directory: str) -> None:
    record = Record.open(directory, VOLUME_ID)
    change(record, Changes([(A, gen(5))]))
    for name in os.listdir(directory):
        assert stat.S_IMODE(os.stat(os.path.join(directory, name)).st_mode) == 0o600, name
    record.close()
    assert stat.S_IMODE(os.stat(directory).st_mode) == 0o700
    os.chmod(directory, 0o750)
    with pytest.raises(FreshnessUnavailable, match="open to other users"):
        Record.open(directory, VOLUME_ID)


def test_tombstones(directory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    record = Record.open(directory, VOLUME_ID)
    change(record, Changes([(A, gen(5))]))
    change(record, Changes(gone=[A, B]), now_s=1000)
    # Only what was known is remembered; and the dead stay dead.
    assert (record.floor(A), record.floor(B)) == (DELETED, 0)
    change(record, Changes([(A, gen(9))]))
    assert record.floor(A) == DELETED
    change(record, Changes([(A, gen(2))], exactly=True))
    assert record.floor(A) == 2
    change(record, Changes(gone=[A]), now_s=1000)
    change(record, Changes([(B, gen(1))]))
    change(record, Changes(gone=[B]), now_s=1000 + freshness.TOMBSTONE_AGE_S)
    assert record.floor(A) == DELETED
    change(record, Changes(gone=[b"x" * 16]), now_s=1001 + freshness.TOMBSTONE_AGE_S)
    assert (record.floor(A), record.floor(B)) == (0, DELETED)
    # Beyond a number the oldest go.
    monkeypatch.setattr(freshness, "TOMBSTONES_MAX", 20)
    ids = [b"%016d" % number for number in range(40)]
    now_s = 2000 + freshness.TOMBSTONE_AGE_S
    for number, log_id in enumerate(ids):
        change(record, Changes([(log_id, gen(1))]))
        change(record, Changes(gone=[log_id]), now_s=now_s + number)
    dead = [record.floor(log_id) == DELETED for log_id in ids]
    assert 15 <= sum(dead) <= 20
    assert dead == sorted(dead)
    record.close()
    again = Record.open(directory, VOLUME_ID)
    assert [again.floor(log_id) == DELETED for log_id in ids] == dead
    again.close()


@pytest.mark.parametrize("damage", ["empty", "cut", "rubbish", "flipped", "other", "schema", "symlink", "unreadable"])
def test_a_record_that_is_damaged_is_never_taken_for_an_empty_one(directory: str, damage: str) -> None:
    record = Record.open(directory, VOLUME_ID)
    change(record, Changes([(os.urandom(16), gen(5)) for _ in range(2000)]))
    record.close()
    path = Path(record.path)
    raw = path.read_bytes()
    if damage == "empty":
        path.write_bytes(b"")
    elif damage == "cut":
        path.write_bytes(raw[: len(raw) // 2])
    elif damage == "rubbish":
        path.write_bytes(b"not a database at all" * 500)
    elif damage == "flipped":
        path.write_bytes(raw[:4200] + bytes(4000) + raw[8200:])
    elif damage == "other":
        path.rename(path.with_name(f"{(b'w' * 16).hex()}.sqlite"))
    elif damage == "schema":
        with sqlite3.connect(path) as database:
            database.execute("PRAGMA user_version = 2")
        database.close()
    elif damage == "symlink":
        path.rename(path.with_name("elsewhere"))
        path.symlink_to("elsewhere")
    else:
        path.unlink()
        path.mkdir()
    with pytest.raises(FreshnessUnavailable, match="freshness record"):
        Record.open(directory, b"w" * 16 if damage == "other" else VOLUME_ID)


def test_a_creation_that_was_cut_short_leaves_nothing(directory: str) -> None:
    os.makedirs(directory, mode=0o700)
    os.chmod(os.path.dirname(directory), 0o700)
    Path(directory, f"{VOLUME_ID.hex()}.sqlite.new").write_bytes(b"half")
    record = Record.open(directory, VOLUME_ID)
    assert record.first_sight
    record.close()
    assert os.listdir(directory) == [f"{VOLUME_ID.hex()}.sqlite"]


def test_only_one_agent_has_it(directory: str) -> None:
    record = Record.open(directory, VOLUME_ID)
    with pytest.raises(VolumeBusy, match="another key agent"):
        Record.open(directory, VOLUME_ID)
    record.close()
    Record.open(directory, VOLUME_ID).close()


def test_a_change_that_cannot_be_written_is_no_change(directory: str) -> None:
    record = Record.open(directory, VOLUME_ID)
    change(record, Changes([(A, gen(5))]))
    record._disk.execute("PRAGMA max_page_count = 8")
    many = Changes([(os.urandom(16), gen(7)) for _ in range(5000)])
    with pytest.raises(FreshnessUnavailable, match="full"):
        record.write(many, 0)
    record._disk.execute("PRAGMA max_page_count = 100000")
    change(record, Changes([(B, gen(6))]))
    record.close()
    again = Record.open(directory, VOLUME_ID)
    assert (again.floor(A), again.floor(B), again.floor(many.logs[0][0])) == (5, 6, 0)
    again.close()


# where it may lie ------------------------------------------------------------------------------------------------


def test_places(tmp_path: Path) -> None:
    clear = tmp_path / "clear"
    (tmp_path / "plain").mkdir()
    (tmp_path / "link").symlink_to("clear/below")
    (tmp_path / "loop").symlink_to("loop")
    mounts = frozenset({str(clear)})
    assert covering_mount(str(clear / "state" / "cryptfs"), mounts) == str(clear)
    assert covering_mount(str(clear), mounts) == str(clear)
    assert covering_mount(str(tmp_path / "link" / "x"), mounts) == str(clear)
    assert covering_mount(str(tmp_path / "plain" / ".." / "clear"), mounts) == str(clear)
    for outside in ("plain/x", "clearer", "loop/x", "missing/x"):
        assert covering_mount(str(tmp_path / outside), mounts) is None
    assert covering_mount("/", mounts) is None


async def test_a_mount_over_the_state_directory_is_denied(serve_here: ServeHere, short_tmp: Path) -> None:
    async with serve_here() as served, open_agent(served.path) as client:
        volume_id, data = await create(client)
        for mountpoint in (short_tmp, short_tmp / "state", short_tmp / "state" / "fresh"):
            with pytest.raises(Denied, match="state directory"):
                await client.attach(
                    volume_id=volume_id, cipher_dir="/c", mountpoint=str(mountpoint), volume=data
                )  # fmt: skip
        await client.attach(volume_id=volume_id, cipher_dir="/c", mountpoint=str(short_tmp / "sta"), volume=data)


# verbs -----------------------------------------------------------------------------------------------------------


async def floor_by_unwrap(client: AgentClient, volume_id: bytes, log_id: bytes, purpose: str = "log-file") -> int:
    _, _, wrapped = await client.generate(volume_id, log_id, purpose, 1)
    keys, floors = await client.unwrap(volume_id, [(log_id, purpose, 1, wrapped, 0)])
    assert keys[0] is not None
    return floors[0]


async def test_floors_come_with_the_keys_of_logs(serve_here: ServeHere) -> None:
    async with serve_here() as served, open_agent(served.path) as client:
        volume_id, data = await create(client)
        requests = VolumeRequests.over(client, volume_id)
        assert await floor_by_unwrap(client, volume_id, A) == 0
        await attach(client, volume_id, data)
        assert await requests.begin(2) is True
        await requests.record({A: 7, B: 8}, [], 3)
        assert await floor_by_unwrap(client, volume_id, A) == 7
        assert await floor_by_unwrap(client, volume_id, B, "log-dir") == 8
        assert await floor_by_unwrap(client, volume_id, A, "block") == 0
        await requests.record({A: 6}, [B], None)
        assert await requests.floors([A, B, bytes(16)]) == [7, DELETED, 0]
        assert await requests.begin(3) is False
        with pytest.raises(RolledBack, match="an older state of the volume than this machine has seen"):
            await requests.begin(2)


async def test_more_than_fits_one_request(serve_here: ServeHere) -> None:
    async with serve_here() as served, open_agent(served.path) as client:
        volume_id, _ = await create(client)
        requests = VolumeRequests.over(client, volume_id)
        ids = [b"%016d" % number for number in range(2500)]
        await requests.record(dict.fromkeys(ids, 3), ids[:1200], 1)
        assert await requests.floors(ids) == [DELETED] * 1200 + [3] * 1300


async def test_what_was_seen_outlives_the_agent(serve_here: ServeHere) -> None:
    async with serve_here() as served, open_agent(served.path) as client:
        volume_id, data = await create(client)
        await attach(client, volume_id, data)
        await VolumeRequests.over(client, volume_id).record({A: 7}, [], 5)
    async with serve_here() as served, open_agent(served.path) as client:
        with pytest.raises(VolumeLocked):
            await VolumeRequests.over(client, volume_id).begin(5)
        await client.unlock(volume=data, cipher_dir="/c", secret=b"right")
        requests = VolumeRequests.over(client, volume_id)
        assert await floor_by_unwrap(client, volume_id, A) == 7
        with pytest.raises(RolledBack):
            await requests.begin(4)


async def test_an_older_volume_file(serve_here: ServeHere) -> None:
    """It still unlocks, which takes its passphrase; nothing is mounted with it."""
    async with serve_here() as served, open_agent(served.path) as client:
        volume_id, old = await create(client)
        newer = _with_serial(served.server._service.volumes.keyring._held[volume_id].keks[1].view(), old, 2)
        requests = VolumeRequests.over(client, volume_id)
        async with open_agent(served.path, role="daemon") as daemon:
            await attach(daemon, volume_id, newer)
            await requests.record({}, [], 1)
            await daemon.detach(volume_id, keep=True)
        async with open_agent(served.path, role="daemon") as daemon:
            with pytest.raises(RolledBack, match="volume file is older"):
                await attach(daemon, volume_id, old)
            with pytest.raises(VolumeDamaged):
                await attach(daemon, volume_id, old)
            # On the owner's word it is right again.
            assert await requests.accept_volume(old, 1) == (1, 0)
            await attach(daemon, volume_id, old)


def _with_serial(kek: memoryview, data: bytes, serial: int) -> bytes:
    from dataclasses import replace

    from cryptfs.format.volume import encode_volume

    volume = replace(parse_volume(data), serial=serial)
    signed = encode_volume(volume)
    return signed + volume_mac(kek, volume.volume_id, volume.kek_version, signed)


async def test_accepting(serve_here: ServeHere, caplog: pytest.LogCaptureFixture) -> None:
    async with serve_here() as served, open_agent(served.path) as client:
        volume_id, data = await create(client)
        requests = VolumeRequests.over(client, volume_id)
        await requests.record({A: 7 << 40, B: 8}, [B], 9)
        await requests.accept({A: 5, B: 6})
        assert await requests.floors([A, B]) == [5, 6]
        assert f"log {A.hex()} accepted at generation 5, seen {7 << 40}" in caplog.text
        assert f"log {B.hex()} accepted at generation 6, seen deleted" in caplog.text
        await requests.record({A: 7 << 40}, [], None)
        async with open_agent(served.path, role="daemon") as daemon:
            await attach(daemon, volume_id, data)
            with pytest.raises(VolumeBusy):
                await requests.accept_volume(data, 3)
            await daemon.detach(volume_id, keep=True)
        assert await requests.accept_volume(data, 3) == (9, 7)
        assert await requests.floors([A, B]) == [0, 0]
        assert await requests.begin(3) is False
        await client.lock(volume_id)
        with pytest.raises(VolumeLocked):
            await requests.accept({A: 1})
        with pytest.raises(VolumeLocked):
            await requests.accept_volume(data, 3)


async def test_a_damaged_record_keeps_the_volume_shut(serve_here: ServeHere, short_tmp: Path) -> None:
    async with serve_here() as served, open_agent(served.path) as client:
        volume_id, data = await create(client)
        path = short_tmp / "state" / "fresh" / f"{volume_id.hex()}.sqlite"
        path.parent.mkdir(mode=0o700, parents=True)
        path.parent.parent.chmod(0o700)
        path.write_bytes(b"")
        _, _, wrapped = await client.generate(volume_id, A, "log-file", 1)
        for _ in range(2):
            with pytest.raises(FreshnessUnavailable):
                await attach(client, volume_id, data)
            with pytest.raises(FreshnessUnavailable):
                await client.unwrap(volume_id, [(A, "log-file", 1, wrapped, 0)])
        path.unlink()
        await attach(client, volume_id, data)
        assert await floor_by_unwrap(client, volume_id, A) == 0


async def test_records_are_closed_with_their_volumes(serve_here: ServeHere, short_tmp: Path) -> None:
    async with serve_here() as served, open_agent(served.path) as client:
        volume_id, _ = await create(client)
        requests = VolumeRequests.over(client, volume_id)
        await requests.record({A: 7}, [], 1)
        await client.lock(volume_id)
        records = served.server._service._records
        await settled(lambda: records.get(volume_id) is None and not records._busy.locked())
        record = Record.open(str(short_tmp / "state" / "fresh"), volume_id)
        assert record.floor(A) == 7
        record.close()
