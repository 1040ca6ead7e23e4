"""R2: thousands of changes to a cipher directory, one or two at a time; never is anything but the truth served."""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
import trio

from cryptfs.errors import VolumeDamaged
from cryptfs.store.local import LocalStore
from tests.faults.driver import Driver
from tests.tamper.mutations import MUTATIONS, ROLLBACKS, Harm, Mutation, NotHere
from tests.tamper.oracle import Inspector, Said, judge
from tests.tamper.vault import Vault, build

SINGLE_EACH = 34
PAIRS = 1000
HANG_S = 30.0


@pytest.fixture(scope="module")
def vault(tmp_path_factory: pytest.TempPathFactory) -> Vault:
    return build(tmp_path_factory.mktemp("tamper"))


@contextmanager
def listening() -> Iterator[Said]:
    said, log = Said(), logging.getLogger("cryptfs")
    log.addHandler(said)
    yield said
    log.removeHandler(said)


async def inspect(vault: Vault, harm: Harm) -> list[str]:
    """What is wrong with a volume after `harm`."""
    store = LocalStore(vault.root)
    try:
        with trio.fail_after(HANG_S), listening() as said:
            try:
                driver = await Driver.mount(store, vault.sample, read_only=True)
            except (VolumeDamaged, OSError) as refused:
                return [] if harm.whole else [f"the volume does not open: {refused!r}"]
            verdict = await Inspector(driver, vault, said).look()
            assert await driver.unmount()
            unexpected = [line for line in said.lines if "unexpectedly" in line]
            return judge(verdict, harm) + unexpected
    finally:
        store.close_store()


async def after(vault: Vault, changes: list[Mutation], rng: random.Random) -> tuple[Harm, list[str]]:
    """Make the changes, look, put everything right again."""
    harm = Harm("")
    try:
        try:
            for change in changes:
                harm += change(vault, rng)
        except OSError as error:  # after the first, the second may find nothing to change
            raise NotHere from error
        return harm, await inspect(vault, harm)
    finally:
        vault.restore()


async def test_untouched(vault: Vault) -> None:
    assert len(vault.places) > 20
    assert not await inspect(vault, Harm("nothing"))


async def many(vault: Vault, names: list[list[str]], seed: int) -> Counter[str]:
    """One run per list of names; how often each could be made."""
    table = MUTATIONS | ROLLBACKS
    made: Counter[str] = Counter()
    failures: list[str] = []
    for number, which in enumerate(names):
        rng = random.Random(f"{seed}.{number}")
        try:
            harm, wrong = await after(vault, [table[name] for name in which], rng)
        except NotHere:
            continue
        made.update(which)
        if wrong:
            failures.append(f"{seed}.{number} {which}: {harm.what}: {wrong[:4]}")
    assert not failures, f"{len(failures)} of {len(names)}:\n" + "\n".join(failures[:20])
    assert not await inspect(vault, Harm("nothing")), "not put right again"
    return made


@pytest.mark.parametrize("name", sorted(MUTATIONS))
async def test_one_change(vault: Vault, name: str) -> None:
    made = await many(vault, [[name]] * SINGLE_EACH, seed=1)
    assert made[name] > SINGLE_EACH // 6


@pytest.mark.parametrize("part", range(4))
async def test_two_changes(vault: Vault, part: int) -> None:
    rng = random.Random(part)
    names = sorted(MUTATIONS)
    made = await many(vault, [rng.choices(names, k=2) for _ in range(PAIRS // 4)], seed=100 + part)
    assert made.total() > PAIRS // 4


@pytest.mark.parametrize("name", sorted(ROLLBACKS))
async def test_a_complete_older_state(vault: Vault, name: str) -> None:
    """Only the record outside the cipher directory tells it from the newest."""
    made = await many(vault, [[name]] * SINGLE_EACH, seed=2)
    assert made[name] > SINGLE_EACH // 6


async def test_two_changes_one_of_which_is_a_rollback(vault: Vault) -> None:
    rng = random.Random(7)
    names = [[rng.choice(sorted(ROLLBACKS)), rng.choice(sorted(MUTATIONS))] for _ in range(PAIRS // 4)]
    made = await many(vault, names, seed=200)
    assert made.total() > PAIRS // 4


async def test_without_that_record_the_older_state_is_served_and_this_oracle_sees_it(vault: Vault) -> None:
    record, vault.sample.freshness = vault.sample.freshness, None
    assert record is not None
    try:
        for name in sorted(ROLLBACKS):
            with pytest.raises(AssertionError, match="of 34"):
                await many(vault, [[name]] * SINGLE_EACH, seed=2)
    finally:
        vault.sample.freshness = record


@pytest.mark.parametrize("part", range(3))
async def test_changes_while_it_is_mounted(vault: Vault, part: int) -> None:
    """What is open or known by then goes on being right; what is looked up anew is right or damaged."""
    rng = random.Random(part)
    names = sorted(MUTATIONS.keys() | ROLLBACKS.keys())
    seen = 0
    for number in range(80):
        which = rng.sample(names, 1 + number % 2)
        seen += await mounted_meanwhile(vault, which, random.Random(f"mounted.{part}.{number}"))
    assert seen > 40
    assert not await inspect(vault, Harm("nothing")), "not put right again"


async def mounted_meanwhile(vault: Vault, which: list[str], rng: random.Random) -> bool:
    """Whether the changes could be made."""
    store = LocalStore(vault.root)
    table = MUTATIONS | ROLLBACKS
    try:
        with trio.fail_after(HANG_S), listening() as said:
            driver = await Driver.mount(store, vault.sample, read_only=True)
            # A part of the tree is known before; the root's directory stays open.
            await driver.look(rng.choice(sorted(vault.places)))
            harm = Harm("")
            with suppress(NotHere, OSError):
                for name in which:
                    harm += table[name](vault, rng)
            verdict = await Inspector(driver, vault, said).look()
            await driver.unmount()
            wrong = judge(verdict, harm) + [line for line in said.lines if "unexpectedly" in line]
            assert not wrong, f"{which}: {harm.what}: {wrong[:4]}"
            return bool(harm.what)
    finally:
        store.close_store()
        vault.restore()
