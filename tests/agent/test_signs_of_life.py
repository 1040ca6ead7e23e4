"""What notices an agent that hangs: the daemon's link asks for a sign of life, whether anybody needs a key or not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from cryptfs.errors import AgentUnavailable
from cryptfs.format.agent_msg import encode_reply
from cryptfs.format.policy import NO_POLICY
from cryptfs.keys.agent_connection import PATIENCE_TICKS, TICK_S
from cryptfs.keys.clock import SystemClock
from cryptfs.keys.link import TICK_MIN_S, AgentLink, Mounted, tick_for
from tests.agent.test_client import fake_agent

ID = bytes(16)


def attached(number: int, verb: str) -> bytes:
    result = {"kek_version": 1, "serial": 1, "policy": NO_POLICY.encode()} if verb == "attach" else {}
    return encode_reply(number, result)


def test_four_ticks_are_over_with_the_last_key_and_none_is_shorter_than_a_slow_machine_may_take() -> None:
    assert [tick_for(age) for age in (1, 20, 28, 40, 60, 86400)] == [TICK_MIN_S, 5, 7, TICK_S, TICK_S, TICK_S]
    assert (PATIENCE_TICKS + 2) * tick_for(60) < 60


@pytest.mark.parametrize("silent", [False, True])
async def test_silence_is_noticed_without_any_request(short_tmp: Path, silent: bool) -> None:
    events: list[tuple[str, Mapping[str, Any]]] = []
    said: list[str] = []

    def on_event(kind: str, event: Mapping[str, Any]) -> None:
        events.append((kind, event))

    def answer(number: int, verb: str) -> bytes | None:
        said.append(verb)
        return attached(number, verb)

    def hello(_number: int) -> bool:
        said.append("hello")
        return not (silent and "attach" in said)

    async with fake_agent(short_tmp / "s", answer, hello) as path, trio.open_nursery() as nursery:
        link = AgentLink(nursery, path, Mounted(ID, "/c", "/m", lambda: b"volume"), on_event)
        link.tick_s = 0.05
        began = SystemClock().monotonic()
        await link.attach()
        with trio.move_on_after(1):
            while not any(kind == "gone" for kind, _ in events):  # noqa: ASYNC110 - nothing tells
                await trio.sleep(0.01)
        gone = [event for kind, event in events if kind == "gone"]
        if silent:
            assert len(gone) == 1
            assert began <= gone[0]["heard_at"] <= SystemClock().monotonic() - link.tick_s * PATIENCE_TICKS
            assert not link.connected
        else:
            assert not gone
            assert said.count("hello") >= 5
            assert link.connected
        nursery.cancel_scope.cancel()


async def test_who_waits_to_be_connected_is_interrupted_too_and_nobody_tries_again(short_tmp: Path) -> None:
    async with fake_agent(short_tmp / "s", attached, lambda _: False) as path, trio.open_nursery() as nursery:
        link = AgentLink(nursery, path, Mounted(ID, "/c", "/m", lambda: b"volume"), lambda *_: None)
        refused: list[type[Exception]] = []

        async def ask() -> None:
            try:
                await link.floors([ID])
            except Exception as error:  # noqa: BLE001 - which one is what is looked at
                refused.append(type(error))

        async with trio.open_nursery() as asking:
            for _ in range(3):
                asking.start_soon(ask)
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert not refused
            link.apart = True
            with trio.fail_after(2):
                link.interrupt()
                while len(refused) < 3:  # noqa: ASYNC110 - nothing tells
                    await trio.sleep(0.01)
        with trio.fail_after(1), pytest.raises(AgentUnavailable, match="away"):
            await link.floors([ID])
        nursery.cancel_scope.cancel()
