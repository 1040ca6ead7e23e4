"""How far a rotation is: told by the daemon, asked by anybody, and the owner's words to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from cryptfs.errors import ProtocolError, VolumeBusy
from cryptfs.keys.agent_client import AgentClient, open_agent
from cryptfs.keys.rotation_requests import IDS_MAX, Known, Report, get_known
from tests.agent.conftest import ServeHere, settled
from tests.agent.test_server import attach, create

REPORT = Report(2, "running", done=3, total=10, failed=1, left=0, message="", ids=(b"i" * 16, b"j" * 16))


async def told(client: AgentClient, volume_id: bytes, report: Report) -> None:
    await client.request("rotation", report.args(volume_id))


async def known(client: AgentClient, volume_id: bytes) -> Known:
    return get_known(await client.request("rotation-get", {"volume_id": volume_id}))


async def test_a_report_lives_as_long_as_its_daemon(serve_here: ServeHere) -> None:
    async with serve_here() as served, open_agent(served.path) as cli:
        volume_id, data = await create(cli)
        assert await known(cli, volume_id) == Known(attached=False, report=None)
        with pytest.raises(ProtocolError):
            await told(cli, volume_id, REPORT)
        async with open_agent(served.path, role="daemon") as daemon:
            await attach(daemon, volume_id, data)
            assert await known(cli, volume_id) == Known(attached=True, report=None)
            await told(daemon, volume_id, REPORT)
            assert await known(cli, volume_id) == Known(attached=True, report=REPORT)
            with pytest.raises(ProtocolError):
                await told(cli, volume_id, REPORT)
            await daemon.detach(volume_id, keep=True)
            assert await known(cli, volume_id) == Known(attached=False, report=None)
        async with open_agent(served.path, role="daemon") as daemon:
            await attach(daemon, volume_id, data)
            assert await known(cli, volume_id) == Known(attached=True, report=None)


async def test_the_owners_words_reach_the_daemon(serve_here: ServeHere) -> None:
    events: list[Mapping[str, Any]] = []
    async with serve_here() as served, open_agent(served.path) as cli:
        volume_id, data = await create(cli)
        for verb in ("rotate-start", "rotate-cancel"):
            assert await cli.request(verb, {"volume_id": volume_id}) == {"was_attached": False}
        async with open_agent(served.path, role="daemon", on_push=events.append) as daemon:
            await attach(daemon, volume_id, data)
            assert await cli.request("rotate-start", {"volume_id": volume_id}) == {"was_attached": True}
            await told(daemon, volume_id, REPORT)
            with pytest.raises(VolumeBusy):
                await cli.request("rotate-start", {"volume_id": volume_id})
            assert await cli.request("rotate-cancel", {"volume_id": volume_id}) == {"was_attached": True}
            await told(daemon, volume_id, replace(REPORT, state="cancelled"))
            assert await cli.request("rotate-start", {"volume_id": volume_id}) == {"was_attached": True}
            # Whoever waits for it must not take the old report for the new one's.
            assert (await known(cli, volume_id)).report is None
            await settled(lambda: len(events) == 3)
            assert [event["event"] for event in events] == ["rotate-start", "rotate-cancel", "rotate-start"]
            await daemon.detach(volume_id, keep=False)


@pytest.mark.parametrize(
    "wrong",
    [{"state": "odd"}, {"done": -1}, {"kek_version": 0}, {"message": "x" * 301}, {"ids": b"odd"}, {"left": None}],
)
async def test_a_wrong_report_is_refused(serve_here: ServeHere, wrong: dict[str, object]) -> None:
    async with serve_here() as served, open_agent(served.path, role="daemon") as daemon:
        volume_id, data = await create(daemon)
        await attach(daemon, volume_id, data)
        with pytest.raises(ProtocolError):
            await daemon.request("rotation", REPORT.args(volume_id) | wrong)
        assert (await known(daemon, volume_id)).report is None
        await daemon.detach(volume_id, keep=False)


def test_a_report_is_cut_to_what_may_be_sent() -> None:
    args = replace(REPORT, message="x" * 1000, ids=(b"i" * 16,) * (IDS_MAX + 9)).args(b"v" * 16)
    assert len(args["message"]) == 300
    assert len(args["ids"]) == 16 * IDS_MAX


@pytest.mark.parametrize("wrong", [{"state": 1}, {"message": None}, {"done": "1"}, {"ids": ""}])
def test_a_wrong_answer_is_none(wrong: dict[str, object]) -> None:
    said = {name: value for name, value in REPORT.args(b"").items() if name != "volume_id"}
    assert get_known({"attached": True, "report": said}).report == REPORT
    with pytest.raises(ProtocolError):
        get_known({"attached": True, "report": said | wrong})
