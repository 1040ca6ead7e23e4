"""What the filesystem relies on in a `DekProvider`: every test runs on the cache and on the fake."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cryptfs.errors import AgentUnavailable, CryptfsError, Damaged, VolumeLocked
from cryptfs.keys.cache import KeyCache
from cryptfs.keys.policy import CachePolicy
from cryptfs.ports import DekProvider, FreshKeys, KeyRun
from cryptfs.testing.clock import FakeClock
from cryptfs.testing.fleeting import expiring
from cryptfs.testing.keys import FakeDekProvider, FakeKek, FakeUpstream
from cryptfs.testing.randomness import SeededRandom
from cryptfs.types import DEK_BYTES, NAMES_KEY_BYTES, WRAPPED_BYTES, WRAPPED_NAMES_BYTES, Purpose

LOG_ID = b"L" * 16
MAX_AGE_S = 60.0


class Provider:
    """A provider under test and the levers behind it."""

    def __init__(self, kind: str) -> None:
        self.clock = FakeClock()
        self.kek = FakeKek(b"V" * 16, SeededRandom(5))
        self.keys: DekProvider
        self.fail: Callable[[CryptfsError | None], None]
        self.wipe: Callable[[], None]
        if kind == "fake":
            fake = FakeDekProvider(self.kek, self.clock, MAX_AGE_S)
            self.keys, self.wipe = fake, fake.wipe
            self.fail = lambda error: setattr(fake, "failure", error)
        else:
            upstream = FakeUpstream(self.kek)
            cache = KeyCache(upstream, CachePolicy(max_age_s=MAX_AGE_S), self.clock)
            self.keys, self.wipe = cache, cache.wipe
            self.fail = lambda error: setattr(upstream, "failure", error)

    def known(self, purpose: Purpose = Purpose.BLOCK, log_id: bytes = LOG_ID) -> tuple[bytes, bytes]:
        """(key, wrapped) of a key made elsewhere."""
        return self.kek.fresh(log_id, purpose, 1)


@pytest.fixture(params=["fake", "cache"])
def provider(request: pytest.FixtureRequest) -> Provider:
    return Provider(request.param)


async def test_unwrap_gives_keys_in_order_for_every_run(provider: Provider) -> None:
    pairs = [provider.known() for _ in range(3)]
    names_key, names_wrapped = provider.known(Purpose.NAMES)
    runs = [
        KeyRun(LOG_ID, Purpose.BLOCK, 1, [w for _, w in pairs], 7),
        KeyRun(LOG_ID, Purpose.NAMES, 1, (names_wrapped,)),
        KeyRun(LOG_ID, Purpose.BLOCK, 1, [pairs[1][1]], 8),
    ]
    for _ in range(2):
        got = await provider.keys.unwrap(runs)
        assert [[bytes(v) for v in run] for run in got] == [[k for k, _ in pairs], [names_key], [pairs[1][0]]]


async def test_peek_knows_what_was_unwrapped_and_nothing_else(provider: Provider) -> None:
    key, wrapped = provider.known()
    assert provider.keys.peek(wrapped) is None
    await provider.keys.unwrap([KeyRun(LOG_ID, Purpose.BLOCK, 1, (wrapped,))])
    assert bytes(provider.keys.peek(wrapped) or b"") == key
    assert provider.keys.peek(provider.known()[1]) is None


async def test_warming_brings_what_unwraps_and_is_silent_about_the_rest(provider: Provider) -> None:
    key, wrapped = provider.known()
    foreign = provider.known(log_id=b"M" * 16)[1]
    runs = [KeyRun(LOG_ID, Purpose.BLOCK, 1, (foreign,)), KeyRun(LOG_ID, Purpose.BLOCK, 1, (wrapped,))]
    provider.fail(AgentUnavailable("gone"))
    await provider.keys.warm(runs)
    assert provider.keys.peek(wrapped) is None
    provider.fail(None)
    await provider.keys.warm(runs)
    assert bytes(provider.keys.peek(wrapped) or b"") == key
    assert provider.keys.peek(foreign) is None


@pytest.mark.parametrize("wrong", ["log", "purpose", "version", "bit"])
async def test_a_wrap_is_good_for_its_own_log_and_purpose_only(provider: Provider, wrong: str) -> None:
    key, wrapped = provider.known()
    run = KeyRun(
        b"M" * 16 if wrong == "log" else LOG_ID,
        Purpose.ATTR if wrong == "purpose" else Purpose.BLOCK,
        2 if wrong == "version" else 1,
        (bytes([wrapped[0] ^ 1]) + wrapped[1:] if wrong == "bit" else wrapped,),
    )
    with pytest.raises(Damaged) as caught:
        await provider.keys.unwrap([run])
    assert caught.value.reason == "wrap"
    ((view,),) = await provider.keys.unwrap([KeyRun(LOG_ID, Purpose.BLOCK, 1, (wrapped,))])
    assert bytes(view) == key


@pytest.mark.parametrize("purpose", list(Purpose))
async def test_generated_keys_are_new_and_can_be_unwrapped(provider: Provider, purpose: Purpose) -> None:
    made = [await provider.keys.generate(LOG_ID, purpose, 3) for _ in range(2)]
    clear = [bytes(key) for fresh in made for key in fresh.keys]
    wraps = [w for fresh in made for w in fresh.wrapped]
    names = purpose is Purpose.NAMES
    assert {len(key) for key in clear} == {NAMES_KEY_BYTES if names else DEK_BYTES}
    assert {len(w) for w in wraps} == {WRAPPED_NAMES_BYTES if names else WRAPPED_BYTES}
    assert len(set(clear)) == len(set(wraps)) == 6
    provider.wipe()
    got = await provider.keys.unwrap([KeyRun(LOG_ID, purpose, made[0].kek_version, wraps)])
    assert [bytes(v) for v in got[0]] == clear


async def test_a_kit_has_what_a_new_file_needs(provider: Provider) -> None:
    kits = [await provider.keys.make_kit(directory=False) for _ in range(20)]
    assert len({kit.log_id for kit in kits}) == 20
    for kit in kits:
        assert (kit.names_key, kit.names_wrapped) == (None, None)
        assert kit.deks is not None
        assert kit.deks.kek_version == kit.kek_version
        assert bytes(provider.keys.peek(kit.log_wrapped) or b"") == bytes(kit.log_key)
        for key, wrapped in zip(kit.deks.keys, kit.deks.wrapped, strict=True):
            assert bytes(provider.keys.peek(wrapped) or b"") == bytes(key)
    clear = [[bytes(kit.log_key), *map(bytes, kit.deks.keys)] for kit in kits if kit.deks]
    provider.wipe()
    for kit, (log_key, *deks) in zip(kits, clear, strict=True):
        assert kit.deks is not None
        got = await provider.keys.unwrap(
            [
                KeyRun(kit.log_id, Purpose.LOG_FILE, kit.kek_version, (kit.log_wrapped,)),
                KeyRun(kit.log_id, Purpose.BLOCK, kit.kek_version, kit.deks.wrapped),
            ]
        )
        assert [[bytes(v) for v in run] for run in got] == [[log_key], deks]


async def test_a_kit_has_what_a_new_directory_needs(provider: Provider) -> None:
    kit = await provider.keys.make_kit(directory=True)
    other = await provider.keys.make_kit(directory=True)
    assert kit.log_id != other.log_id
    assert kit.deks is None
    assert kit.names_key is not None
    assert kit.names_wrapped is not None
    log_key, names_key = bytes(kit.log_key), bytes(kit.names_key)
    provider.wipe()
    got = await provider.keys.unwrap(
        [
            KeyRun(kit.log_id, Purpose.LOG_DIR, kit.kek_version, (kit.log_wrapped,)),
            KeyRun(kit.log_id, Purpose.NAMES, kit.kek_version, (kit.names_wrapped,)),
        ]
    )
    assert [[bytes(v) for v in run] for run in got] == [[log_key], [names_key]]


async def test_no_kit_is_taken_twice(provider: Provider) -> None:
    seen = {(await provider.keys.make_kit(directory=False)).log_id}
    for _ in range(100):
        kit = provider.keys.take_kit()
        if kit is not None:
            assert kit.log_id not in seen
            seen.add(kit.log_id)


async def test_when_their_time_is_up_keys_are_overwritten_and_stocks_say_so(provider: Provider) -> None:
    _, wrapped = provider.known()
    ((view,),) = await provider.keys.unwrap([KeyRun(LOG_ID, Purpose.BLOCK, 1, (wrapped,))])
    fresh: FreshKeys = await provider.keys.generate(LOG_ID, Purpose.BLOCK, 2)
    provider.clock.advance(MAX_AGE_S - 1)
    assert provider.keys.peek(wrapped) is not None
    assert not fresh.wiped
    provider.clock.advance(1)
    assert provider.keys.peek(wrapped) is None
    assert provider.keys.peek(fresh.wrapped[0]) is None
    assert not any(view)
    assert not any(any(key) for key in fresh.keys)
    assert fresh.wiped


async def test_all_keys_of_one_call_are_good_together_also_if_none_lives_as_long_as_a_round_trip(
    provider: Provider,
) -> None:
    pairs = [provider.known() for _ in range(6)]
    key_runs = [KeyRun(LOG_ID, Purpose.BLOCK, 1, [w for _, w in pairs[at : at + 2]], at) for at in (0, 2, 4)]
    with expiring(lambda: provider.clock.advance(MAX_AGE_S)):
        for _ in range(3):
            # Some are known, and expire while the others are asked for.
            await provider.keys.unwrap([key_runs[1]])
            got = await provider.keys.unwrap(key_runs)
            assert [bytes(view) for run in got for view in run] == [key for key, _ in pairs]
            fresh = await provider.keys.generate(LOG_ID, Purpose.BLOCK, 2)
            assert not fresh.wiped
            assert all(any(key) for key in fresh.keys)
            kit = await provider.keys.make_kit(directory=True)
            assert any(kit.log_key)


@pytest.mark.parametrize("error", [AgentUnavailable("gone"), VolumeLocked("locked")])
async def test_what_needs_the_agent_fails_while_it_is_away(provider: Provider, error: CryptfsError) -> None:
    key, wrapped = provider.known()
    run = KeyRun(LOG_ID, Purpose.BLOCK, 1, (wrapped,))
    provider.fail(error)
    for _ in range(2):
        with pytest.raises(type(error)):
            await provider.keys.unwrap([run])
        with pytest.raises(type(error)):
            await provider.keys.generate(LOG_ID, Purpose.BLOCK, 1)
        with pytest.raises(type(error)):
            await provider.keys.make_kit(directory=False)
        with pytest.raises(type(error)):
            await provider.keys.make_kit(directory=True)
    provider.fail(None)
    assert [[bytes(v)] for (v,) in await provider.keys.unwrap([run])] == [[key]]
    provider.fail(error)
    assert bytes(provider.keys.peek(wrapped) or b"") == key
    assert [[bytes(v)] for (v,) in await provider.keys.unwrap([run])] == [[key]]
    provider.clock.advance(MAX_AGE_S)
    with pytest.raises(type(error)):
        await provider.keys.unwrap([run])


async def test_rewrapped_keys_are_the_same_under_the_newest_kek(provider: Provider) -> None:
    blocks = [provider.known() for _ in range(5000)]
    names_key, names_wrapped = provider.known(Purpose.NAMES)
    runs = [
        KeyRun(LOG_ID, Purpose.BLOCK, 1, [w for _, w in blocks], 3),
        KeyRun(LOG_ID, Purpose.NAMES, 1, (names_wrapped,)),
    ]
    version = provider.kek.rotate()
    got = await provider.keys.rewrap(runs)
    assert (got.kek_version, len(got.wrapped)) == (version, 2)
    provider.kek.destroy_older()
    wraps = [got.wrapped[0][at : at + WRAPPED_BYTES] for at in range(0, len(got.wrapped[0]), WRAPPED_BYTES)]
    found = await provider.keys.unwrap(
        [
            KeyRun(LOG_ID, Purpose.BLOCK, version, wraps[:100], 3),
            KeyRun(LOG_ID, Purpose.NAMES, version, (got.wrapped[1],)),
            KeyRun(LOG_ID, Purpose.BLOCK, version, wraps[-100:], 3),
        ]
    )
    assert [[bytes(v) for v in run] for run in found] == [
        [k for k, _ in blocks[:100]], [names_key], [k for k, _ in blocks[-100:]],
    ]  # fmt: skip


async def test_only_what_unwraps_is_rewrapped(provider: Provider) -> None:
    good, foreign = provider.known()[1], provider.known(log_id=b"M" * 16)[1]
    provider.kek.rotate()
    runs = [KeyRun(LOG_ID, Purpose.BLOCK, 1, (good,)), KeyRun(LOG_ID, Purpose.BLOCK, 1, (good, foreign), 9)]
    with pytest.raises(Damaged) as caught:
        await provider.keys.rewrap(runs)
    assert caught.value.reason == "wrap"
    provider.fail(VolumeLocked("locked"))
    with pytest.raises(VolumeLocked):
        await provider.keys.rewrap(runs[:1])
    provider.fail(None)


async def test_after_a_renewal_nothing_old_is_handed_out(provider: Provider) -> None:
    stock = await provider.keys.generate(LOG_ID, Purpose.BLOCK, 3)
    await provider.keys.make_kit(directory=False)
    version = provider.kek.rotate()
    before = stock.wiped
    provider.keys.renew(version)
    assert (before, stock.wiped) == (False, True)
    assert (await provider.keys.generate(LOG_ID, Purpose.BLOCK, 1)).kek_version == version
    for _ in range(20):
        kit = provider.keys.take_kit() or await provider.keys.make_kit(directory=False)
        assert kit.kek_version == version
        assert kit.deks is not None
        assert (kit.deks.kek_version, kit.deks.wiped) == (version, False)
