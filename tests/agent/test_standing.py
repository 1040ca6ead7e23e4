"""A root key that stays open: from unlock to lock, and never for a client that has left."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path

import pytest
import trio

from cryptfs.agent.handing_over import in_thread
from cryptfs.errors import BackendUnavailable, CryptfsError, Denied, UnsupportedFormat, UsageError, WrongSecret
from cryptfs.format.volume import parse_volume
from cryptfs.keys.agent_client import AgentClient, open_agent
from cryptfs.keys.edit_requests import ProtectorWish, VolumeWish
from cryptfs.testing.roots import FakeProvider, FakeRoot
from cryptfs.types import Buffer
from tests.agent.conftest import Served, ServeHere, settled

SECRET = b"271828"


class Token:
    """Makes a `FakeProvider` one whose roots can be taken back; knows which are open."""

    def __init__(self, provider: FakeProvider) -> None:
        self.open: set[Root] = set()
        self.opened = 0
        self.refuses: CryptfsError | None = None
        self.hangs: threading.Event | None = None
        self._open = provider.open
        provider.counts_wrong_secrets = True
        provider.revocable = True
        provider.open = self.open_root  # type: ignore[method-assign,assignment]

    def open_root(self, params: Mapping[str, int | str | bytes], secret: Buffer) -> Root:
        self.opened += 1
        if self.hangs is not None:
            self.hangs.wait(30)
        root = Root(self._open(params, secret), self)
        self.open.add(root)
        return root


class Root:
    def __init__(self, inner: FakeRoot, token: Token) -> None:
        self._inner = inner
        self._token = token

    def wrap(self, key: Buffer, context: bytes) -> bytes:
        return self._inner.wrap(key, context)

    def unwrap(self, wrapped: bytes, context: bytes) -> bytearray:
        if self._token.refuses is not None:
            raise self._token.refuses
        return self._inner.unwrap(wrapped, context)

    def close(self) -> None:
        self._token.open.discard(self)
        self._inner.close()


async def made(client: AgentClient) -> bytes:
    """The `volume` file of a new, locked volume."""
    data = await client.create(VolumeWish(4096, ProtectorWish("fake", "token", SECRET)))
    await client.lock(parse_volume(data).volume_id)
    return data


async def unlock(client: AgentClient, data: bytes, secret: bytes = SECRET, *, named: bool = True) -> None:
    protector_id = parse_volume(data).protectors[0].protector_id if named else b""
    await client.unlock(volume=data, cipher_dir="/v", secret=secret, kind="fake", protector_id=protector_id)


async def state(client: AgentClient) -> list[str]:
    return [volume.state for volume in (await client.status()).volumes]


def token_of(served: Served) -> Token:
    return Token(served.provider)


async def test_it_is_open_from_unlock_to_lock_only(serve_here: ServeHere) -> None:
    async with serve_here() as served, open_agent(served.path) as client:
        token = token_of(served)
        data = await made(client)
        assert not token.open, "making a volume leaves nothing open"
        await unlock(client, data)
        assert len(token.open) == 1
        await unlock(client, data)
        await settled(lambda: len(token.open) == 1)
        with pytest.raises(WrongSecret):
            await unlock(client, data, b"wrong")
        assert len(token.open) == 1
        await client.lock(parse_volume(data).volume_id)
        await settled(lambda: not token.open)


async def test_a_refusal_locks_the_volume_and_is_on_the_record(serve_here: ServeHere, short_tmp: Path) -> None:
    async with serve_here() as served, open_agent(served.path) as client:
        token = token_of(served)
        data = await made(client)
        await unlock(client, data)
        token.refuses = Denied("the key is destroyed")
        reverifier = served.server._service.volumes.reverifier
        [watched] = reverifier._watched.values()
        watched.due = 0.0
        reverifier._wake.set()
        with trio.fail_after(5):
            while await state(client):  # noqa: ASYNC110 - the agent tells nobody but the daemon
                await trio.sleep(0.01)
        await settled(lambda: not token.open)
    lines = b"".join(path.read_bytes() for path in (short_tmp / "state" / "audit").rglob("*.log"))
    assert b'"verb":"reverify","outcome":"denied"' in lines
    assert b"the key is destroyed" in lines


async def test_a_kind_that_counts_is_asked_by_name_only(serve_here: ServeHere) -> None:
    async with serve_here() as served, open_agent(served.path) as client:
        token = token_of(served)
        data = await made(client)
        before = token.opened
        with pytest.raises(UsageError, match="say which protector"):
            await unlock(client, data, named=False)
        with pytest.raises(UnsupportedFormat):
            await client.unlock(volume=data, cipher_dir="/v", secret=SECRET)
        assert token.opened == before, "the secret was not shown to it"


async def test_a_client_that_leaves_leaves_nothing_open(serve_here: ServeHere) -> None:
    async with serve_here() as served:
        token = token_of(served)
        async with open_agent(served.path) as client:
            data = await made(client)
        token.hangs = threading.Event()
        try:
            before = token.opened
            async with open_agent(served.path) as client:
                with trio.move_on_after(0.2):
                    await unlock(client, data)
            assert token.opened == before + 1
            await settled(lambda: served.server.connections == 0)
        finally:
            token.hangs.set()
        token.hangs = None
        await trio.sleep(0.05)
        await settled(lambda: not token.open)
        async with open_agent(served.path) as client:
            assert await state(client) == []


async def test_a_root_that_hangs_does_not_hold_up_those_that_do_not(serve_here: ServeHere) -> None:
    async with serve_here() as served, open_agent(served.path) as client:
        data = await made(client)
        token = token_of(served)
        token.hangs = threading.Event()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(unlock, client, data)
                await settled(lambda: token.opened == 1)
                assert served.server._service.threads.kdf_limit.borrowed_tokens == 0
                token.hangs.set()
        finally:
            token.hangs.set()
        assert await state(client) == ["unlocked"]


async def test_a_root_that_hangs_is_given_up_and_undone(serve_here: ServeHere) -> None:
    async with serve_here() as served, open_agent(served.path) as client:
        data = await made(client)
        token = token_of(served)
        token.hangs = threading.Event()
        served.server._service.threads.root_patience_s = 0.1
        try:
            with pytest.raises(BackendUnavailable, match="has not answered"):
                await unlock(client, data)
        finally:
            token.hangs.set()
        await settled(lambda: served.server._service.threads.root_limit.borrowed_tokens == 0)
        await settled(lambda: not token.open)
        assert await state(client) == []


async def test_handing_over_what_nobody_waits_for_any_more() -> None:
    limiter, release = trio.CapacityLimiter(1), threading.Event()
    undone: list[str] = []

    def work() -> str:
        release.wait(30)
        return "made"

    with trio.move_on_after(0.05) as scope:
        await in_thread(work, undone.append, limiter)
    assert scope.cancelled_caught
    assert undone == []
    release.set()
    await settled(lambda: undone == ["made"])
    assert await in_thread(work, undone.append, limiter) == "made"
    assert undone == ["made"]

    def fail() -> str:
        raise Denied("no")

    with pytest.raises(Denied):
        await in_thread(fail, undone.append, limiter)
    assert undone == ["made"]
