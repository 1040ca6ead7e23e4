"""A volume's policy in the agent: when it counts, who is told, what is on the record; and what daemons report."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import trio

from cryptfs.agent import reports
from cryptfs.agent.server import Server
from cryptfs.cli.audit_lines import all_lines
from cryptfs.errors import ProtocolError, UsageError
from cryptfs.format.policy import Policy
from cryptfs.keys import edit_requests as edits
from cryptfs.keys.agent_answers import Report, get_reports
from cryptfs.keys.agent_client import AgentClient, open_agent
from cryptfs.testing.clock import FakeClock
from cryptfs.testing.roots import FakeProvider
from tests.agent.conftest import ServeHere, settled
from tests.agent.test_edit_verbs import created

CACHE = {
    "hits": 5, "misses": 4, "unwraps": 3, "expiries": 2, "evictions": 1, "round_trips": 7, "entries": 9,
}  # fmt: skip
OBEYED = {"caching": 1, "max_age_ms": 500, "max_entries": 2048, "max_uses": None}
Events = list[Mapping[str, Any]]


async def commit(client: AgentClient, volume_id: bytes, data: bytes, **policy: int) -> bytes:
    changed = await edits.set_policy(client, volume_id, data, policy)
    await edits.commit(client, volume_id, changed)
    return changed


async def attach(client: AgentClient, volume_id: bytes, data: bytes) -> Policy:
    return (await client.attach(volume_id=volume_id, cipher_dir="/c", mountpoint="/m", volume=data)).policy


# policies --------------------------------------------------------------------------------------------------------


async def test_a_change_counts_when_it_is_committed_and_the_daemon_is_told(serve_here: ServeHere) -> None:
    events: Events = []
    async with serve_here() as served, open_agent(served.path) as client:
        volume_id, data = await created(client, policy={"max_uses": 9})
        async with open_agent(served.path, role="daemon", on_push=events.append) as daemon:
            assert await attach(daemon, volume_id, data) == Policy(max_uses=9)
            edited = await edits.set_policy(client, volume_id, data, {"max_age_s": 5})
            await daemon.status()
            assert events == []
            await edits.commit(client, volume_id, edited)
            await settled(lambda: len(events) == 2)
            assert events[1] == {"event": "policy", "volume_id": volume_id, "serial": 2, "policy": {"max_age_s": 5}}
            # Told again when it shows the file, and nothing is pushed for what does not change anything.
            assert await attach(daemon, volume_id, edited) == Policy(max_age_s=5)
            await edits.commit(client, volume_id, edited)
            await daemon.status()
            assert [event["event"] for event in events] == ["changed", "policy", "changed"]


@pytest.mark.parametrize(
    "bad",
    [{"max_age_s": 0}, {"max_age_s": 604801}, {"max_entries": 1023}, {"max_uses": 0}, {"caching": 2}, {"idle_s": 0},
     {"unwraps_per_s": 0}, {"reverify_s": 0}, {"for_s": 1 << 40}, {"colour": 1}],
)  # fmt: skip
async def test_what_is_out_of_bounds_changes_nothing(serve_here: ServeHere, bad: dict[str, int]) -> None:
    events: Events = []
    async with serve_here() as served, open_agent(served.path) as client:
        volume_id, data = await created(client, policy={"max_uses": 9})
        async with open_agent(served.path, role="daemon", on_push=events.append) as daemon:
            await attach(daemon, volume_id, data)
            with pytest.raises(UsageError):
                await edits.set_policy(client, volume_id, data, {"max_age_s": 5, **bad})
            assert await attach(daemon, volume_id, data) == Policy(max_uses=9)
            assert events == []


async def test_a_change_is_on_the_record_with_what_was_before(serve_here: ServeHere) -> None:
    async with serve_here() as served, open_agent(served.path) as client:
        volume_id, data = await created(client, policy={"max_uses": 9})
        data = await commit(client, volume_id, data, max_age_s=5, unwraps_per_s=100)
        await commit(client, volume_id, data)
    told = [
        line for line in (shown.line for shown in all_lines(served.server.audit.directory)) if line.verb == "policy"
    ]
    assert [line.volume_id for line in told] == [volume_id, volume_id]
    changes = [(json.loads(str(line.detail["before"])), json.loads(str(line.detail["after"]))) for line in told]
    assert changes == [
        ({"max_uses": 9}, {"max_age_s": 5, "unwraps_per_s": 100}),
        ({"max_age_s": 5, "unwraps_per_s": 100}, {}),
    ]


async def test_an_older_file_does_not_bring_the_older_policy_back(serve_here: ServeHere) -> None:
    async with serve_here() as served, open_agent(served.path) as client:
        volume_id, data = await created(client)
        await commit(client, volume_id, data, max_age_s=5)
        served.server.policies.learn(volume_id, 0, Policy())
        assert served.server.policies.of(volume_id) == Policy(max_age_s=5)
        await client.lock(volume_id)
        assert served.server.policies.of(volume_id) is None


async def test_times_of_the_policy_count_at_once_and_those_of_unlock_go_before_them(short_tmp: Path) -> None:
    clock, provider = FakeClock(), FakeProvider()
    server = Server(providers={provider.kind: provider}, state_dir=str(short_tmp / "s"), random=os.urandom, clock=clock)
    path = str(short_tmp / "a.sock")
    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve, path)
        async with open_agent(path) as client:
            volume_id, data = await created(client, policy={"for_s": 1000})
            assert server.locks.locks_in_s(volume_id) == 1000
            clock.advance(100)
            assert server.locks.locks_in_s(volume_id) == 900
            data = await commit(client, volume_id, data, idle_s=50)
            assert server.locks.locks_in_s(volume_id) == 50
            clock.advance(40)
            await client.generate(volume_id, b"f" * 16, "block", 1)
            assert server.locks.locks_in_s(volume_id) == 50
            data = await commit(client, volume_id, data, for_s=1000)
            assert server.locks.locks_in_s(volume_id) == 860
            data = await commit(client, volume_id, data)
            assert server.locks.locks_in_s(volume_id) is None
            await client.lock(volume_id)
            await client.unlock(volume=data, cipher_dir="/c", secret=b"one", idle_s=30)
            data = await commit(client, volume_id, data, idle_s=10, for_s=20)
            assert server.locks.locks_in_s(volume_id) == 20
            clock.advance(21)
            await settled(lambda: server.policies.of(volume_id) is None)
        nursery.cancel_scope.cancel()


# reports ---------------------------------------------------------------------------------------------------------


async def ask(client: AgentClient) -> Mapping[bytes, Any]:
    reports = get_reports(await client.request("reports", {}))
    return {volume_id: report for volume_id, (_, report) in reports.items()}


class Reporter:
    """A daemon that answers what it is asked, as `cryptfs.daemon` does."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.nursery = nursery
        self.asked = 0
        self.client: AgentClient | None = None
        self.answers = True

    def on_push(self, event: Mapping[str, Any]) -> None:
        if event["event"] == "report":
            self.asked += 1
            if self.answers:
                self.nursery.start_soon(self.report, event["volume_id"])

    async def report(self, volume_id: bytes, **more: object) -> None:
        assert self.client is not None
        report = {"volume_id": volume_id, "cache": CACHE, "policy": OBEYED, "overridden": ["max_age_s"]}
        await self.client.request("report", report | more)


async def test_daemons_are_asked_for_their_reports(serve_here: ServeHere) -> None:
    async with serve_here() as served, open_agent(served.path) as client, trio.open_nursery() as nursery:
        assert await ask(client) == {}
        volume_id, data = await created(client, policy={"max_uses": 9})
        [row] = (await client.request("reports", {}))["reports"]
        assert row == {"volume_id": volume_id, "policy": {"max_uses": 9}, "report": None}
        reporter = Reporter(nursery)
        async with open_agent(served.path, role="daemon", on_push=reporter.on_push) as daemon:
            reporter.client = daemon
            await attach(daemon, volume_id, data)
            assert await ask(client) == {volume_id: Report(CACHE, OBEYED, ("max_age_s",))}
            await client.lock(volume_id)
            [row] = (await client.request("reports", {}))["reports"]
            assert row["policy"] is None, "it is locked"
            assert row["report"]["cache"] == CACHE, "its daemon is there"


async def test_who_asks_at_the_same_time_shares_the_answer(serve_here: ServeHere) -> None:
    async with serve_here() as served, open_agent(served.path) as client, trio.open_nursery() as nursery:
        volume_id, data = await created(client)
        reporter = Reporter(nursery)
        reporter.answers = False
        async with open_agent(served.path, role="daemon", on_push=reporter.on_push) as daemon:
            reporter.client = daemon
            await attach(daemon, volume_id, data)
            got: list[Mapping[bytes, Any]] = []

            async def one() -> None:
                got.append(await ask(client))

            async with trio.open_nursery() as inner:
                for _ in range(3):
                    inner.start_soon(one)
                await settled(lambda: reporter.asked == 1)
                await client.status()
                await reporter.report(volume_id)
            assert got == [{volume_id: Report(CACHE, OBEYED, ("max_age_s",))}] * 3
            assert reporter.asked == 1


async def test_a_daemon_that_does_not_answer_costs_a_moment_and_has_no_report(
    serve_here: ServeHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reports, "REPORT_S", 0.1)
    async with serve_here() as served, open_agent(served.path) as client, trio.open_nursery() as nursery:
        volume_id, data = await created(client)
        reporter = Reporter(nursery)
        reporter.answers = False
        async with open_agent(served.path, role="daemon", on_push=reporter.on_push) as daemon:
            reporter.client = daemon
            await attach(daemon, volume_id, data)
            with trio.fail_after(5):
                assert await ask(client) == {volume_id: None}
            # An answer that comes too late is for nobody; the next one who asks gets a new one.
            await reporter.report(volume_id)
            reporter.answers = True
            assert (await ask(client))[volume_id] is not None
            assert reporter.asked == 2


async def test_a_daemon_that_leaves_is_not_waited_for(serve_here: ServeHere, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reports, "REPORT_S", 1000)
    async with serve_here() as served, open_agent(served.path) as client, trio.open_nursery() as nursery:
        volume_id, data = await created(client)
        reporter = Reporter(nursery)
        reporter.answers = False
        got: list[Mapping[bytes, Any]] = []

        async def one() -> None:
            got.append(await ask(client))

        async with open_agent(served.path, role="daemon", on_push=reporter.on_push) as daemon:
            await attach(daemon, volume_id, data)
            nursery.start_soon(one)
            await settled(lambda: reporter.asked == 1)
        await settled(lambda: got == [{volume_id: None}])


@pytest.mark.parametrize(
    "bad",
    [
        {"cache": {}}, {"cache": {**CACHE, "more": 1}}, {"cache": {**CACHE, "hits": -1}},
        {"cache": {**CACHE, "hits": "5"}},
        {"policy": {}}, {"policy": {**OBEYED, "max_age_ms": None}}, {"policy": {**OBEYED, "max_uses": "many"}},
        {"overridden": None}, {"overridden": [1]}, {"overridden": ["colour"]}, {"overridden": [[]]},
        {"volume_id": b"W" * 16}, {"volume_id": b""}, {"more": 1},
    ],
)  # fmt: skip
async def test_rubbish_is_no_report(serve_here: ServeHere, bad: dict[str, object]) -> None:
    async with serve_here() as served, open_agent(served.path) as client, trio.open_nursery() as nursery:
        volume_id, data = await created(client)
        reporter = Reporter(nursery)
        async with open_agent(served.path, role="daemon", on_push=reporter.on_push) as daemon:
            reporter.client = daemon
            await attach(daemon, volume_id, data)
            with pytest.raises(ProtocolError):
                await reporter.report(volume_id, **bad) if "volume_id" not in bad else await daemon.request(
                    "report", {"volume_id": volume_id, "cache": CACHE, "policy": OBEYED, "overridden": []} | bad
                )


async def test_a_report_is_the_attached_daemons_alone(serve_here: ServeHere) -> None:
    async with serve_here() as served, open_agent(served.path) as client, trio.open_nursery() as nursery:
        volume_id, data = await created(client)
        async with open_agent(served.path, role="daemon") as daemon:
            await attach(daemon, volume_id, data)
            stranger = Reporter(nursery)
            stranger.client = client
            with pytest.raises(ProtocolError):
                await stranger.report(volume_id)
