"""R7: whichever call of the store fails, the program is told, nothing is lost, and it works on once it is healed."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable, Iterable
from itertools import chain, count

import pytest

from tests.faults.faulty import FULL, Faults
from tests.faults.run import CODES, Run, run_with
from tests.faults.workload import BLOCK, Step, workload


async def test_without_faults() -> None:
    run = await run_with(lambda f: f.fail_every(1 << 30, errno.EIO), 0, cut=True)
    assert run.failed == 0
    assert len(run.done) == len(workload())


async def sweep(ks: Iterable[int], plan: Callable[[Faults, int], None], *, cut_every: int = 4) -> int:
    """Runs with fault number k, for every k until there is no call of that number; how many met a fault."""
    for runs, k in enumerate(ks):
        run = await run_with(lambda f: plan(f, k), k, cut=not k % cut_every)  # noqa: B023
        if not run.faults.hits:
            return runs
    raise AssertionError("more calls than were tried")


PARTS = 8
EDQUOT_PARTS = (0, 3)
"""Nobody tells EDQUOT from ENOSPC but to hand it on: a quarter of the calls will do, every one is in `make torture`."""


@pytest.mark.parametrize(
    ("code", "part"),
    [
        pytest.param(code, part, id=f"{errno.errorcode[code]}-{part}")
        for code in CODES
        for part in (EDQUOT_PARTS if code == errno.EDQUOT else range(PARTS))
    ],
)
async def test_the_kth_call_fails(code: int, part: int) -> None:
    runs = await sweep(count(part + 1, PARTS), lambda f, k: f.fail_once(k, code))
    assert runs > 150 / PARTS


@pytest.mark.parametrize("code", CODES, ids=errno.errorcode.get)
async def test_every_kth_call_fails(code: int) -> None:
    runs = await sweep(chain(range(1, 12), count(12, 13)), lambda f, k: f.fail_every(k, code))
    assert runs > 20


@pytest.mark.parametrize("count_bytes", [1, 700, BLOCK, BLOCK + 1])
async def test_the_disk_is_full_in_the_middle_of_a_write(count_bytes: int) -> None:
    runs = await sweep(count(1), lambda f, k: f.shorten_once(k, count_bytes, errno.ENOSPC))
    assert runs > 40


@pytest.mark.parametrize("count_bytes", [1, BLOCK + 1])
async def test_a_short_write_is_continued(count_bytes: int) -> None:
    for k in range(1, 80, 3):
        run = await run_with(lambda f: f.shorten_once(k, count_bytes, 0), k, cut=False)  # noqa: B023
        assert run.failed == 0


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT], ids=errno.errorcode.get)
async def test_a_disk_that_is_full_until_there_is_room(code: int) -> None:
    """From some moment on nothing grows, but removing works; then there is room again."""
    steps = workload()
    for first in range(0, len(steps), 3):
        run = await Run.start()
        try:
            for step in steps[:first]:
                assert await run.attempt(step) is None
            run.faults.fail_every(1, code, FULL)
            skipped: list[Step] = []
            for step in steps[first:]:
                await run.while_full(step, code, skipped)
            run.faults.heal()
            await run.compare("full")
            for step in skipped:
                assert await run.attempt(step) is None, f"{step.what} fails though there is room"
            await run.finish(random.Random(first))
        except BaseException as error:
            error.add_note(f"first {first}; faults: {run.faults.hits[-8:]}; done: {', '.join(run.done[-6:])}")
            raise


@pytest.mark.torture
@pytest.mark.parametrize("kinds", ["every", "once", "short"])
@pytest.mark.parametrize("code", CODES, ids=errno.errorcode.get)
async def test_every_call_at_every_distance(code: int, kinds: str) -> None:
    plans: dict[str, Callable[[Faults, int], None]] = {
        "every": lambda f, k: f.fail_every(k, code),
        "once": lambda f, k: f.fail_once(k, code),
        "short": lambda f, k: f.shorten_once(k, 1 + k * 97 % 9000, code),
    }
    assert await sweep(count(1), plans[kinds], cut_every=1) > 40
