"""Whatever a client sends as a request: one answer, never ``internal``, and of every refusal one line that is right."""

from __future__ import annotations

import random
import socket
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from cryptfs.agent import attempts, reports
from cryptfs.agent.audit_file import Reading, read_frames
from cryptfs.cli.audit_verdict import _verify
from cryptfs.format.agent_msg import AnswerDecoder, Failure, Push, Reply, encode_request
from cryptfs.format.audit import AuditLine, decode_line
from cryptfs.format.policy import BOUNDS
from cryptfs.format.volume import Volume, parse_volume
from cryptfs.keys.agent_client import open_agent
from cryptfs.keys.edit_requests import ProtectorWish, VolumeWish
from cryptfs.roots.absent import AbsentProvider
from cryptfs.roots.keyfile import KeyfileProvider
from cryptfs.roots.passphrase import PassphraseProvider
from cryptfs.roots.recovery import RecoveryProvider
from tests.agent.conftest import ServeHere, raw_connection

VERBS: dict[str, tuple[str, ...]] = {
    "hello": ("role",),
    "create": (
        "block_size", "kind", "wish", "label", "secret", "policy", "shred_kind", "shred_params", "shred_secret",
        "while_connected",
    ),
    "unlock": (
        "volume", "cipher_dir", "secret", "for_s", "idle_s", "kind", "protector_id", "shred_secret", "while_connected",
    ),
    "hold": ("volume_id", "while_connected"),
    "release": ("volume_id",),
    "lock": ("volume_id",),
    "lock-path": ("path",),
    "locked": ("volume_id", "unwritten"),
    "status": (),
    "about": (),
    "reports": (),
    "report": ("volume_id", "cache", "policy", "overridden"),
    "attach": ("volume_id", "cipher_dir", "mountpoint", "volume"),
    "detach": ("volume_id", "keep"),
    "keep": ("volume_id", "keep"),
    "generate": ("volume_id", "id", "purpose", "count"),
    "kits": ("volume_id", "directory", "count", "deks"),
    "unwrap": ("volume_id", "items"),
    "rewrap": ("volume_id", "items"),
    "begin": ("volume_id", "state_sequence"),
    "floors": ("volume_id", "ids"),
    "record": ("volume_id", "logs", "gone", "state_sequence"),
    "accept": ("volume_id", "logs"),
    "accept-volume": ("volume_id", "volume", "state_sequence"),
    "audit": ("volume_id", "file"),
    "feature-add": ("volume_id", "volume", "feature"),
    "policy-set": ("volume_id", "volume", "policy"),
    "protector-add": ("volume_id", "volume", "kind", "wish", "label", "secret", "shred_secret"),
    "protector-change": ("volume_id", "volume", "protector_id", "kind", "wish", "label", "secret", "shred_secret"),
    "protector-remove": ("volume_id", "volume", "protector_id"),
    "rotate-kek": ("volume_id", "volume", "carried", "shred_secret"),
    "destroy-keks": ("volume_id", "volume"),
    "rotation": ("volume_id", "kek_version", "state", "done", "total", "failed", "left", "message", "ids"),
    "rotation-get": ("volume_id",),
    "rotate-start": ("volume_id",),
    "rotate-cancel": ("volume_id",),
    "commit": ("volume_id", "volume"),
    "shred": ("volume", "shred_secret"),
    "no-such-verb": ("x",),
    'quoted"\n': (),
    "-": (),
}  # fmt: skip
"""All but `stop`, and some that are none."""

HOSTILE: list[Any] = [
    None, True, 0, -1, 1 << 31, (1 << 63) - 1, (1 << 64) - 1, -(1 << 63), b"", b"x" * 16, b"\xff\0" * 9, "", "x",
    'ü\n"}',
    "x" * 16, [], {}, [1, [2, [3]]], {"a": {"b": 1}}, [{}], [[]], [None], {"": None}, b"\0" * 70_000, "x" * 70_000,
]  # fmt: skip
ITEM = [b"i" * 16, "block", 1, b"w" * 40, 0]


class Clients:
    """Requests made at random around one volume: mostly with arguments of the right types, often with one that is not.

    `choose` has the seed, so a failure is had again by running the test again.
    """

    def __init__(self, choose: random.Random, data: bytes, volume: Volume) -> None:
        self.choose = choose
        self.data = data
        self.volume = volume
        pick, some = choose.choice, choose.randbytes
        protector_id = volume.protectors[0].protector_id
        self.likely: dict[str, Callable[[], Any]] = {
            "role": lambda: pick(["cli", "daemon", "guest"]),
            "volume_id": lambda: volume.volume_id if choose.random() < 0.8 else some(16),
            "volume": self.file,
            "items": lambda: [self.item() for _ in range(choose.randrange(4))],
            "cipher_dir": lambda: pick([b"/c", b"", b"/\xff", b"/c\0", b"/" * 5000]),
            "mountpoint": lambda: pick([b"/m", b"/\xfe\n", b"/"]),
            "path": lambda: pick([b"/c", b"/m", b"", b"/" * 5000]),
            "id": lambda: some(16),
            "purpose": lambda: pick(["block", "attr", "names", "log-file", "log-dir", "log-audit", "volume", 'bl"ock']),
            "count": lambda: pick([1, 2, 0, 4096, 4097]),
            "deks": lambda: pick([0, 1, 16, 5000]),
            "directory": lambda: choose.random() < 0.5,
            "keep": lambda: choose.random() < 0.5,
            "while_connected": lambda: choose.random() < 0.5,
            "ids": lambda: some(16 * choose.randrange(4)),
            "logs": lambda: some(24 * choose.randrange(4)),
            "gone": lambda: some(16 * choose.randrange(3)),
            "state_sequence": lambda: pick([None, 0, 1, 2]),
            "secret": lambda: pick([b"right", b"wrong", b"x"]),
            "shred_secret": lambda: pick([b"", b"s" * 32]),
            "kind": lambda: pick(["", "fake", "fake", "keyfile", "recovery", "passphrase", "pkcs11", "none"]),
            "wish": lambda: pick(
                [{"cost": "low"}, {"cost": "low"}, {"cost": "x"}, {"cost": 1}, {"module": b"", "token": ""}]
            ),
            "label": lambda: pick(["", "a", "\n", "ü" * 200, "x" * 201]),
            "policy": self.policy,
            "shred_kind": lambda: pick(["", "agent", "keyfile", "pkcs11", "none"]),
            "shred_params": lambda: pick([{}, {"path": b"/k"}, {"wrapped": 1}]),
            "protector_id": lambda: pick([protector_id, b"", some(16)]),
            "carried": lambda: pick([[], [[protector_id, b"right"]], [[protector_id, b"no"]], [[protector_id, ""]]]),
            "block_size": lambda: pick([4096, 5000, 1 << 40]),
            "for_s": lambda: pick([None, 1_000_000, 0]),
            "idle_s": lambda: pick([None, 1_000_000, -1]),
            "file": lambda: pick([None, 1, 2, 1 << 32]),
            "feature": lambda: pick(["domains", "none"]),
            "cache": lambda: dict.fromkeys(reports.COUNTERS, 1),
            "overridden": lambda: pick([[], ["max_age_s"], [["max_age_s"]]]),
            "kek_version": lambda: pick([1, 0]),
            "state": lambda: pick(["running", "done", "none", ["running"]]),
            "message": lambda: pick(["", "so it is", "x" * 301]),
        }

    def file(self) -> bytes:
        at = self.choose.randrange(len(self.data))
        return self.choose.choice([
            self.data, self.data, self.data, self.data[:at], self.choose.randbytes(60),
            self.data[:at] + self.choose.randbytes(1) + self.data[at + 1 :],
        ])  # fmt: skip

    def item(self) -> list[Any]:
        item = list(ITEM)
        if self.choose.random() < 0.5:
            item[self.choose.randrange(5)] = self.choose.choice(HOSTILE)
        return item

    def policy(self) -> dict[str, Any]:
        name = self.choose.choice(list(BOUNDS))
        least, most = BOUNDS[name]
        values: list[dict[str, Any]] = [
            {},
            {name: least},
            {name: most},
            {name: most + 1},
            {name: None},
            {name: "x"},
            {"x": 1},
            {"x" * 9000: 1},
        ]
        return self.choose.choice(values)

    def request(self) -> tuple[str, dict[str, Any]]:
        verb = self.choose.choice(list(VERBS))
        args: dict[str, Any] = {}
        for name in VERBS[verb]:
            dice = self.choose.random()
            if dice < 0.03:
                continue
            is_likely = dice < 0.88 and name in self.likely
            args[name] = self.likely[name]() if is_likely else self.choose.choice(HOSTILE)
        if self.choose.random() < 0.03:
            args['extra"'] = self.choose.choice(HOSTILE)
        return verb, args


class Talk:
    """A connection on which requests are sent one after the other."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._decoder = AnswerDecoder()

    def ask(self, number: int, verb: str, args: dict[str, Any]) -> Reply | Failure:
        """Blocks."""
        self._sock.sendall(encode_request(number, verb, args))
        while True:
            data = self._sock.recv(1 << 20)
            assert data, f"hung up on: {verb} {args}"
            for answer in self._decoder.feed(data):
                if not isinstance(answer, Push):
                    assert answer.request_id == number
                    return answer


def every_line(directory: Path) -> list[AuditLine]:
    """All lines of all logs; fails if one cannot be read, which a reader would pass over."""
    found: list[AuditLine] = []
    for path in sorted(directory.glob("*/*.log")):
        reading = Reading()
        for frame in read_frames(path.read_bytes(), None, reading):
            assert frame.line.count(b"\n") == 1, "grep would show a line that nobody wrote"
            found.append(decode_line(frame.line))
        assert reading.fault is None, path
    return found


def bytes_below(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob("*/*.log"))


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits long for a wrong secret, or for a daemon that says nothing."""
    monkeypatch.setattr(attempts, "DELAY_MAX_S", 0.001)
    monkeypatch.setattr(reports, "REPORT_S", 0.01)


FAKE = ProtectorWish("fake", "mine", b"right", {"cost": "low"})
SEEDS = range(4)
REQUESTS = 300


@pytest.mark.parametrize("seed", SEEDS)
async def test_any_request_is_answered_and_every_refusal_is_on_the_record(
    serve_here: ServeHere, hasty: None, seed: int
) -> None:
    choose = random.Random(seed)
    said: Counter[tuple[str, str]] = Counter()
    more = [
        KeyfileProvider(choose.randbytes), RecoveryProvider(choose.randbytes), PassphraseProvider(choose.randbytes),
        AbsentProvider("pkcs11", "there is none here"),
    ]  # fmt: skip
    async with serve_here(more=more, lock_deadline_s=0.02) as served, open_agent(served.path) as client:
        data = await client.create(VolumeWish(4096, FAKE))
        with raw_connection(served.path) as sock:
            talk, clients = Talk(sock), Clients(choose, data, parse_volume(data))
            for number in range(1, REQUESTS + 1):
                if number % 8 == 0:
                    await client.unlock(volume=data, cipher_dir="/c", secret=b"right")
                verb, args = clients.request()
                answer = await trio.to_thread.run_sync(talk.ask, number, verb, args)
                if isinstance(answer, Failure):
                    assert answer.code != "internal", f"{verb} {args}: {answer.message}"
                    said[verb if verb.isascii() and verb[0].islower() and verb[-1].islower() else "unknown",
                         answer.code] += 1  # fmt: skip
        await client.unlock(volume=data, cipher_dir="/c", secret=b"right")
        where = Path(served.server.audit.directory)
        outcome = await _verify(client, str(where), None)
        assert outcome.exit_code == 0, outcome
        refused = [line for line in every_line(where) if line.outcome not in ("ok", "asked") and line.peer]
        assert Counter((line.verb, line.outcome) for line in refused) == said
    assert len({code for _, code in said}) >= 5, "too few kinds of refusal to say anything"


def big(text: str) -> list[Any]:
    return [[b"i" * 16, text, 1, b"", 0]]


@pytest.mark.parametrize(
    ("verb", "args"),
    [
        ("unwrap", {"items": big("b" * 3_000_000)}),
        ("rewrap", {"items": big("b" * 3_000_000)}),
        ("accept", {"logs": b"l" * (24 * 90_000)}),
        ("accept", {"logs": "x" * 24}),
        ("accept", {"logs": None}),
        ("accept", {}),
        ("unwrap", {"items": [["x" * 16, "block", 1, b"a" * 40, 0]]}),
        ("unwrap", {"items": [[b"x" * 16, "blöck", 1, b"a" * 40, 0]]}),
        ("unwrap", {"items": [[b"x" * 16, 'bl"ock', 1, b"a" * 40, 0]]}),
        ("unwrap", {"items": [[b"x" * 16, 'block"}]}\n{"time_ns":1}\n', 1, b"a" * 40, 0]]}),
        ("generate", {"id": b"x" * 16, "purpose": 'a"\n', "count": 1}),
        ("generate", {"id": b"x" * 16, "purpose": "block", "count": 'a"\n'}),
        ("policy-set", {"volume": b"", "policy": {'x"\n\x01' * 300_000: 1}}),
        ("attach", {"cipher_dir": b"/c", "mountpoint": b"/\xff\n", "volume": b""}),
        ("rotation", {"state": [], "kek_version": 1, "done": 0, "total": 0, "failed": 0, "left": 0, "message": "",
                      "ids": b""}),
    ],
)  # fmt: skip
async def test_no_request_poisons_the_log(serve_here: ServeHere, verb: str, args: dict[str, Any]) -> None:
    async with serve_here() as served, open_agent(served.path, role="daemon") as client:
        data = await client.create(VolumeWish(4096, FAKE))
        volume_id = parse_volume(data).volume_id
        with raw_connection(served.path) as sock:
            talk = Talk(sock)
            shown = {"volume_id": volume_id, "cipher_dir": b"/c", "mountpoint": b"/m", "volume": data}
            assert isinstance(await trio.to_thread.run_sync(talk.ask, 3, "attach", shown), Reply)
            for number, target in ((1, volume_id), (2, b"n" * 16)):
                asked = {"volume_id": target, **args}
                answer = await trio.to_thread.run_sync(talk.ask, number, verb, asked)
                assert isinstance(answer, Failure)
                assert answer.code in ("protocol", "usage", "locked", "damaged"), answer
        where = Path(served.server.audit.directory)
        outcome = await _verify(client, str(where), None)
        assert outcome.exit_code == 0, outcome
        refused = [line for line in every_line(where) if line.verb == verb and line.outcome not in ("ok", "asked")]
        assert [line.volume_id for line in sorted(refused, key=lambda line: line.volume_id == b"n" * 16)] == [
            volume_id, b"n" * 16,
        ]  # fmt: skip
    assert bytes_below(where) < 20_000
