"""Calls of the store that fail while a volume is mounted, settled after a crash, or left."""

from __future__ import annotations

import errno
import random
from itertools import count

import pytest

from cryptfs.errors import CryptfsError
from cryptfs.store.memory import MemoryStore
from tests.faults.driver import Driver
from tests.faults.faulty import Faults
from tests.faults.run import CODES, Run
from tests.faults.workload import workload


@pytest.mark.parametrize("code", CODES, ids=errno.errorcode.get)
async def test_mounting(code: int) -> None:
    run = await Run.start()
    assert await run.driver.unmount()
    failures = 0
    for k in count(1):
        run.faults.fail_once(k, code)
        try:
            run.driver = await Driver.mount(run.store, run.driver.sample)
        except (OSError, CryptfsError):
            failures += 1
            assert run.store.open_descriptors() == 0
            run.faults.heal()
            run.driver = await Driver.mount(run.store, run.driver.sample)
        run.faults.heal()
        if not run.faults.hits:
            break
        await run.compare(f"after mounting failed at {run.faults.hits}")
        assert await run.driver.unmount()
    assert failures > 3
    assert await run.driver.unmount()


@pytest.mark.parametrize("code", CODES, ids=errno.errorcode.get)
async def test_leaving(code: int) -> None:
    """It says whether it was clean; what was acknowledged is there either way."""
    steps = workload()
    rng = random.Random(code)
    unclean = 0
    for upto in (13, 24, 32, len(steps)):
        for k in count(1, 3):
            run = await Run.start()
            for step in steps[:upto]:
                assert await run.attempt(step) is None
            for fh in run.handles.values():
                await run.driver.close(fh)
            run.faults.fail_once(k, code)
            clean = await run.driver.unmount()
            run.faults.heal()
            assert run.store.open_descriptors() == 0
            if clean:
                await run.check_left(clean=True)
            else:
                unclean += 1
                for survivor in (run.store.killed(), *run.store.crash_states(rng, 2)):
                    await _opens(run, survivor)
            run.store.close_store()
            if not run.faults.hits:
                break
    assert unclean > 5


async def _opens(run: Run, survivor: MemoryStore) -> None:
    driver = await Driver.mount(survivor, run.driver.sample)
    run.model.check_after_crash(await driver.snapshot())
    assert await driver.unmount()
    survivor.close_store()


@pytest.mark.parametrize("code", CODES, ids=errno.errorcode.get)
async def test_settling_after_a_crash(code: int) -> None:
    """What a crash left reads the same whether settling it fails half-way or not."""
    run = await Run.start()
    steps = workload()
    rng = random.Random(code)
    hits = 0
    for upto in (9, 21, 41, len(steps)):
        for step in steps[len(run.done) : upto]:
            assert await run.attempt(step) is None
        for crashed in (run.store.killed(), *run.store.crash_states(rng, 3)):
            plain = await Driver.mount(crashed.killed(), run.driver.sample)
            expected = await plain.snapshot()
            plain.kill()
            for k in count(1 + rng.randrange(7), 7):
                survivor = crashed.killed()
                if not await _settles(survivor, run, expected, k, code):
                    break
                hits += 1
            crashed.close_store()
    run.driver.kill()
    run.store.close_store()
    assert hits > 50


async def _settles(store: MemoryStore, run: Run, expected: dict[bytes, bytes | None], k: int, code: int) -> bool:
    """Whether the k-th call failed (there was one)."""
    driver = await Driver.mount(store, run.driver.sample)
    faults = Faults(store)
    faults.fail_once(k, code)
    try:
        try:
            found = await driver.snapshot()
        except OSError as error:
            if not faults.hits or error.errno != code:
                raise
            found = await driver.snapshot()
        faults.heal()
        assert found == expected
        assert await driver.unmount()
        driver = await Driver.mount(store, run.driver.sample)
        assert await driver.snapshot() == expected
        assert await driver.unmount()
        assert store.open_descriptors() == 0
    except BaseException as error:
        error.add_note(f"k = {k}, {faults.hits}")
        raise
    store.close_store()
    return bool(faults.hits)
