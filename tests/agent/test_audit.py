"""What the agent puts on the record of what clients ask for, and what it refuses when it cannot."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from cryptfs.agent import attempts
from cryptfs.cli.audit_lines import all_lines
from cryptfs.cli.audit_verdict import Outcome, _verify
from cryptfs.errors import AuditUnavailable, ProtocolError, UnsupportedFormat, VolumeLocked, WrongSecret
from cryptfs.format.audit import AuditLine, Touched
from cryptfs.format.volume import parse_volume
from cryptfs.keys.agent_client import AgentClient, open_agent
from cryptfs.keys.edit_requests import ProtectorWish, VolumeWish
from tests.agent.conftest import Program, Served, ServeHere, StartAgent, raw_connection, settled

PROGRAM = os.path.realpath("/proc/self/exe")
FILE, OTHER = b"f" * 16, b"g" * 16


def directory(served: Served) -> str:
    return served.server.audit.directory


def lines(where: str, *verbs: str) -> list[AuditLine]:
    return [shown.line for shown in all_lines(where) if not verbs or shown.line.verb in verbs]


async def create(client: AgentClient) -> tuple[bytes, bytes]:
    data = await client.create(VolumeWish(16384, ProtectorWish("fake", "mine", b"right", {"cost": "low"})))
    return parse_volume(data).volume_id, data


async def verified(client: AgentClient, where: str) -> Outcome:
    return await _verify(client, where, None)


async def test_every_request_is_one_line(serve_here: ServeHere) -> None:
    async with serve_here() as served, open_agent(served.path, role="daemon") as client:
        volume_id, data = await create(client)
        _, _, wrapped = await client.generate(volume_id, FILE, "block", 5)
        await client.unwrap(volume_id, [(FILE, "block", 1, wrapped, 7)])
        await client.kits(volume_id, directory=False, count=2, deks=2)
        with pytest.raises(ProtocolError):
            await client.request("nonsense", {})
        await client.lock(volume_id)
        with pytest.raises(VolumeLocked):
            await client.unwrap(volume_id, [(FILE, "block", 1, wrapped, 7)])
        with pytest.raises(WrongSecret):
            await client.unlock(volume=data, cipher_dir="/c", secret=b"wrong")
        await client.unlock(volume=data, cipher_dir="/c", secret=b"right")
    said = [(line.verb, line.outcome, line.volume_id, line.keys) for line in lines(directory(served))]
    for expected in (
        ("create", "ok", volume_id, 0), ("generate", "ok", volume_id, 5), ("unwrap", "ok", volume_id, 5),
        ("kits", "ok", volume_id, 6), ("nonsense", "protocol", None, 0), ("forget", "ok", volume_id, 0),
        ("lock", "ok", volume_id, 0), ("unwrap", "locked", volume_id, 0), ("unlock", "wrong-secret", volume_id, 0),
        ("unlock", "ok", volume_id, 0), ("end", "ok", None, 0),
    ):  # fmt: skip
        assert expected in said, expected
    [unwrap, refused] = lines(directory(served), "unwrap")
    assert unwrap.files == (Touched(FILE, "block", 5, ((7, 5),)),)
    assert refused.files == unwrap.files
    peer = unwrap.peer
    assert peer is not None
    assert (peer.pid, peer.uid, peer.role) == (os.getpid(), os.geteuid(), "daemon")
    assert peer.exe == PROGRAM
    [wrong] = [line for line in lines(directory(served), "unlock") if line.outcome != "ok"]
    assert "right" not in str(wrong)


async def test_block_ranges_are_exact_when_batched_over_many_files(serve_here: ServeHere) -> None:
    async with serve_here() as served, open_agent(served.path) as client:
        volume_id, _ = await create(client)
        _, _, mine = await client.generate(volume_id, FILE, "block", 10)
        _, _, others = await client.generate(volume_id, OTHER, "attr", 1)
        await client.unwrap(
            volume_id,
            [
                (FILE, "block", 1, mine[:80], 100),
                (FILE, "block", 1, mine[80:160], 102),
                (OTHER, "block", 1, mine[:40], 3),
                (OTHER, "attr", 1, others, 0),
                (FILE, "block", 1, mine[160:200], 1 << 40),
            ],
        )
        [line] = lines(directory(served), "unwrap")
    assert line.files == (
        Touched(FILE, "block", 5, ((100, 4), (1 << 40, 1))),
        Touched(OTHER, "block", 1, ((3, 1),), authentic=False),
        Touched(OTHER, "attr", 1),
    )
    assert line.keys == 6


async def test_the_largest_request_is_recorded(serve_here: ServeHere) -> None:
    async with serve_here() as served, open_agent(served.path) as client:
        volume_id, _ = await create(client)
        _, _, wrapped = await client.generate(volume_id, FILE, "block", 4096)
        await client.unwrap(volume_id, [(FILE, "block", 1, wrapped[i * 40 :][:40], 2 * i) for i in range(4096)])
        [line] = lines(directory(served), "unwrap")
        assert line.files[0].blocks == tuple((2 * i, 1) for i in range(4096))
        ids = [bytes([n % 256, n // 256]) * 8 for n in range(4096)]
        await client.unwrap(volume_id, [(each, "block", 1, wrapped[:40], 0) for each in ids])
        assert len(lines(directory(served), "unwrap")[1].files) == 4096
        assert (await verified(client, directory(served))).exit_code == 0


async def test_a_log_that_cannot_be_written_refuses_what_must_be_on_it(
    serve_here: ServeHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serve_here() as served, open_agent(served.path) as client:
        volume_id, data = await create(client)
        other_id, other = await create(client)
        await client.lock(other_id)
        _, _, wrapped = await client.generate(volume_id, FILE, "block", 1)
        real = os.write

        def full(fd: int, data: bytes) -> int:
            if b"time_ns" in data:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(fd, data)

        monkeypatch.setattr(os, "write", full)
        with pytest.raises(AuditUnavailable, match="No space left"):
            await client.unwrap(volume_id, [(FILE, "block", 1, wrapped, 0)])
        with pytest.raises(AuditUnavailable):
            await client.generate(volume_id, FILE, "block", 1)
        with pytest.raises(AuditUnavailable):
            await client.kits(volume_id, directory=True, count=1, deks=0)
        with pytest.raises(AuditUnavailable):
            await client.unlock(volume=other, cipher_dir="/c", secret=b"right")
        with pytest.raises(AuditUnavailable):
            await client.request("accept", {"volume_id": volume_id, "logs": FILE + bytes(8)})
        states = {volume.volume_id: volume.state for volume in (await client.status()).volumes}
        assert states == {volume_id: "unlocked"}
        assert await client.lock(volume_id), "locking is never refused"
        monkeypatch.setattr(os, "write", real)
        await client.unlock(volume=data, cipher_dir="/c", secret=b"right")
        await client.unwrap(volume_id, [(FILE, "block", 1, wrapped, 0)])
        missed = lines(directory(served), "missed")
        assert missed
        assert sum(int(line.detail["lines"]) for line in missed) >= 6
        outcome = await verified(client, directory(served))
        assert outcome.exit_code == 0, outcome


async def test_the_logs_vouch_for_each_others_ends(serve_here: ServeHere) -> None:
    async with serve_here() as served:
        where = Path(directory(served))
        async with open_agent(served.path) as client:
            volume_id, data = await create(client)
            await client.generate(volume_id, FILE, "block", 1)
            await client.lock(volume_id)
            log = where / volume_id.hex() / "00000001.log"
            kept = log.read_bytes()
            await client.unlock(volume=data, cipher_dir="/c", secret=b"right")
            await client.generate(volume_id, FILE, "block", 1)
            await client.lock(volume_id)
            # Cut at a line's end, while no agent looks: only the agent's own log knows that there was more.
            log.write_bytes(kept)
            await client.unlock(volume=data, cipher_dir="/c", secret=b"right")
            outcome = await verified(client, str(where))
            assert outcome.exit_code == 28
            [of_volume] = [each for each in outcome.verdicts if each.volume_id == volume_id]
            assert any("another one" in text or "cut off" in text for text in of_volume.damage)


async def test_the_agents_own_log_cannot_be_cut_short_unnoticed(serve_here: ServeHere) -> None:
    async with serve_here() as served, open_agent(served.path) as client:
        where = Path(directory(served))
        volume_id, data = await create(client)
        own = where / "agent" / "00000001.log"
        kept = own.read_bytes()
        await client.lock(volume_id)
        with pytest.raises(WrongSecret):
            await client.unlock(volume=data, cipher_dir="/c", secret=b"wrong")
        await client.unlock(volume=data, cipher_dir="/c", secret=b"right")
        assert (await verified(client, str(where))).exit_code == 0
        own.write_bytes(kept)
        outcome = await verified(client, str(where))
        assert any("cut off" in text or "shorter" in text for each in outcome.verdicts for text in each.damage)


async def test_a_volumes_log_that_is_gone_is_missed(serve_here: ServeHere) -> None:
    async with serve_here() as served, open_agent(served.path) as client:
        where = Path(directory(served))
        volume_id, _ = await create(client)
        await client.lock(volume_id)
        (where / volume_id.hex() / "00000001.log").unlink()
        (where / volume_id.hex()).rmdir()
        assert (await verified(client, str(where))).gone == [volume_id.hex()]


def remove(log: Path) -> None:
    log.unlink()


def exchange(log: Path) -> None:
    shutil.copy(log, log.with_suffix(".copy"))
    log.with_suffix(".copy").rename(log)


def remove_all(log: Path) -> None:
    shutil.rmtree(log.parent)


def rename(log: Path) -> None:
    log.rename(log.with_name("aside"))


@pytest.mark.parametrize("harm", [remove, exchange, remove_all, rename])
async def test_keys_are_not_recorded_where_nobody_finds_it(serve_here: ServeHere, harm: Callable[[Path], None]) -> None:
    async with serve_here() as served, open_agent(served.path) as client:
        where = Path(directory(served))
        volume_id, _ = await create(client)
        _, _, wrapped = await client.generate(volume_id, FILE, "block", 3)
        harm(where / volume_id.hex() / "00000001.log")
        if harm is not exchange:  # a copy is no damage as long as it holds all
            assert (await verified(client, str(where))).exit_code == 28, "it is missed before anything else is written"
        for block in range(3):
            await client.unwrap(volume_id, [(FILE, "block", 1, wrapped[40 * block :][:40], block)])
            assert lines(str(where), "unwrap")[-1].files[0].blocks == ((block, 1),)
        assert max(path.name for path in (where / volume_id.hex()).glob("*.log")) == "00000002.log"
        [own, of_volume] = (await verified(client, str(where))).verdicts
        assert not own.damage
        if harm is not exchange:
            assert of_volume.damage == ["file 1: missing"]
        [begin] = [line for line in lines(str(where), "begin") if "previous-gone" in line.detail]
        assert begin.detail["file"] == 2


async def test_a_log_that_is_gone_and_cannot_be_begun_again_refuses_keys(
    serve_here: ServeHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serve_here() as served, open_agent(served.path) as client:
        where = Path(directory(served))
        volume_id, _ = await create(client)
        _, _, wrapped = await client.generate(volume_id, FILE, "block", 1)
        (where / volume_id.hex() / "00000001.log").unlink()

        def full(*_: object, **__: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patched:
            patched.setattr(os, "link", full)
            for _ in range(2):
                with pytest.raises(AuditUnavailable, match="No space left"):
                    await client.unwrap(volume_id, [(FILE, "block", 1, wrapped, 0)])
            [_, of_volume] = (await verified(client, str(where))).verdicts
            assert of_volume.damage == ["file 1, byte 0: it was removed while it was written"]
        await client.unwrap(volume_id, [(FILE, "block", 1, wrapped, 0)])
        assert len(lines(str(where), "unwrap")) == 1


async def test_rubbish_and_refused_connections_are_on_the_record(serve_here: ServeHere) -> None:
    async with serve_here() as served:
        with raw_connection(served.path) as sock:
            sock.send(b"\xff\xff\xff\xff")
            assert await trio.to_thread.run_sync(sock.recv, 1) == b""
        await settled(lambda: served.server.connections == 0)
        [line] = lines(directory(served), "message")
    assert line.outcome == "protocol"


async def wrong(tally: attempts.Attempts) -> None:
    with pytest.raises(WrongSecret):
        async with tally.next(b"v" * 16):
            raise WrongSecret("no")


async def test_wrong_secrets_are_counted_and_wait(serve_here: ServeHere, autojump_clock: Any) -> None:  # noqa: ANN401
    tally = attempts.Attempts()
    began = trio.current_time()
    waited = []
    for _ in range(12):
        await wrong(tally)
        waited.append(trio.current_time() - began)
        began = trio.current_time()
    assert waited == [0, 0, 0, 1, 2, 4, 8, 16, 30, 30, 30, 30]
    async with tally.next(b"w" * 16) as before:
        assert (trio.current_time(), before) == (began, 0), "another volume does not wait"
    async with tally.next(b"v" * 16) as before:
        assert (trio.current_time() - began, before) == (30, 12)
    async with tally.next(b"v" * 16) as before:
        assert before == 0


async def test_many_attempts_at_once_wait_one_after_the_other(autojump_clock: Any) -> None:  # noqa: ANN401
    tally = attempts.Attempts()
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        for _ in range(6):
            nursery.start_soon(wrong, tally)
    assert trio.current_time() - began == 1 + 2 + 4


async def test_volumes_that_are_made_up_do_not_push_a_count_out(autojump_clock: Any) -> None:  # noqa: ANN401
    tally = attempts.Attempts()
    for _ in range(6):
        await wrong(tally)
    for number in range(2 * attempts.VOLUMES_MAX):
        with pytest.raises(UnsupportedFormat):
            async with tally.next(number.to_bytes(16, "big")):
                raise UnsupportedFormat("of a kind that there is not")
    for number in range(attempts.VOLUMES_MAX - 1):
        with pytest.raises(WrongSecret):
            async with tally.next(number.to_bytes(16, "big")):
                raise WrongSecret("no")
    began = trio.current_time()
    await wrong(tally)
    assert trio.current_time() - began == 8
    # There is no room left: whatever else is tried waits together.
    for number in range(4):
        with pytest.raises(WrongSecret):
            async with tally.next(bytes([255, number]) * 8):
                raise WrongSecret("no")
    async with tally.next(b"\xfe" * 16) as before:
        assert before == 4
    await trio.sleep(attempts.QUIET_S)
    async with tally.next(b"\xfe" * 16) as before:
        assert before == 0, "old counts make room"


async def test_a_count_is_not_forgotten_while_somebody_waits(autojump_clock: Any) -> None:  # noqa: ANN401
    tally = attempts.Attempts()
    async with trio.open_nursery() as nursery, tally.next(b"v" * 16):
        nursery.start_soon(wrong, tally)
        await trio.testing.wait_all_tasks_blocked()
    async with tally.next(b"v" * 16) as before:
        assert before == 1


async def kill(program: Program, after_s: float) -> None:
    await trio.sleep(after_s)  # the moment is arbitrary: that is the point
    program.process.send_signal(signal.SIGKILL)


async def test_a_killed_agent_leaves_every_answered_request_on_the_record(
    start_agent: StartAgent, short_tmp: Path
) -> None:
    where = str(short_tmp / "state" / "cryptfs" / "audit")
    answered = 0
    for round_number in range(3):
        program = start_agent()
        with trio.move_on_after(20):
            async with open_agent(program.path) as client:
                data = await client.create(
                    VolumeWish(4096, ProtectorWish("passphrase", "", b"secret", {"cost": "low"}))
                )
                volume_id = parse_volume(data).volume_id

                async with trio.open_nursery() as nursery:
                    nursery.start_soon(kill, program, 0.05 + 0.03 * round_number)
                    try:
                        while True:
                            await client.generate(volume_id, FILE, "block", 1)
                            answered += 1
                    except Exception:  # noqa: BLE001, S110 - it was killed
                        pass
        await trio.to_thread.run_sync(program.process.wait)
    assert answered
    recorded = len(lines(where, "generate"))
    assert answered <= recorded <= answered + 3
    program = start_agent()
    async with open_agent(program.path) as client:
        outcome = await verified(client, where)
    assert outcome.exit_code == 0, outcome
