"""Crash states of the real code: every operation, every pair of them, a sample of three; cut at every store call.

At least 10,000 different survivors are opened, read to their end and judged; a part of them is then used and crashed
again, in the middle of recovery too. `make torture` goes on with other seeds for as long as it may
(`tests/torture/test_crash_states.py`). Everything here is repeatable: a failure prints the seed and a command.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable

import pytest

from cryptfs.store.disk_model import Order
from tests.crash.alphabet import pairs, singles, triples
from tests.crash.explorer import STARTS, Case, Explorer, Scene, Step, Wrong
from tests.crash.workload import Op, parse_ops

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("machine")]

SEED = 1
HOLD = parse_ops("hold")
SHARES = (0, 3, 1, 0, 3, 2, 0, 3, 4, 0, 3, 5, 0, 3, 1, 0, 3)
"""Whose turn it is: the first and the fourth cost the least per state."""
SCENES = list(itertools.product((Order.DIRECTORY, Order.JOURNAL), STARTS))


async def explore(
    order: Order, start: str, workloads: Iterable[tuple[Op, ...]], *, per_moment: int, again: int
) -> Explorer:
    """All of them; what is wrong is made small before it is raised."""
    explorer = Explorer(await Scene.make(order, start), SEED)
    for ops in workloads:
        try:
            await explorer.explore(ops, per_moment=per_moment, again=again)
        except Wrong as wrong:
            raise await explorer.smaller(wrong) from None
    return explorer


@pytest.mark.parametrize(("order", "start"), SCENES)
async def test_one_operation(order: Order, start: str) -> None:
    again = int(order is Order.DIRECTORY)
    explorer = await explore(order, start, singles(), per_moment=2 - again, again=again)
    assert explorer.workloads >= 40
    assert explorer.states >= 150


@pytest.mark.parametrize("part", range(len(SCENES)))
async def test_two_operations(part: int) -> None:
    """Every pair in one of the scenes, a part of them on files held open, a part with a second crash."""
    order, start = SCENES[part]
    mine = [(n, ops) for n, ops in enumerate(pairs()) if SHARES[n % len(SHARES)] == part]
    states = 0
    for again in (0, 1):
        chosen = [HOLD * (n % 3 == 0) + ops for n, ops in mine if (n % 16 == 1) == bool(again)]
        explorer = await explore(order, start, chosen, per_moment=1, again=again)
        states += explorer.states
    assert states >= 900


@pytest.mark.parametrize(("order", "start"), SCENES)
async def test_three_operations(order: Order, start: str) -> None:
    workloads = itertools.islice(triples(random.Random(f"{SEED} {order} {start}")), 30)
    explorer = await explore(order, start, workloads, per_moment=1, again=1)
    assert explorer.states >= 20


async def test_a_case_in_words_is_the_same_case() -> None:
    steps = (Step(parse_ops("rename a L; fsync L"), 3, frozenset({(0, 1), (7, -1)})), Step(parse_ops("settle"), 0))
    case = Case(Order.JOURNAL, "old", 5, steps)
    assert Case.parse(str(case)) == case


async def test_a_case_can_be_done_again() -> None:
    explorer = Explorer(await Scene.make(Order.DIRECTORY, "old"), SEED)
    case = Case.parse("directory old 1 | overwrite a; fsync a @3 lost 261:-1 | append a @4 killed")
    await explorer.replay(case)


FOUND = (
    "journal old 4002 | mkdir m; rmdir m @6 lost 277:1",
    "directory killed 4001 | hold; mkdir m; rmdir m @6 lost 0:2",
)
"""Survivors that long runs once found wrong."""


@pytest.mark.parametrize("text", FOUND)
async def test_what_was_found_once_is_right_now(text: str) -> None:
    case = Case.parse(text)
    await Explorer(await Scene.make(case.order, case.start), case.seed).replay(case)
