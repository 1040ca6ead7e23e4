"""The checker finds what it is there to find: each wrong writer is caught, and without its fault nothing is."""

from __future__ import annotations

import pytest

from cryptfs.store.disk_model import Order
from tests.crash.explorer import Explorer, Scene, Wrong
from tests.crash.variants import VARIANTS, Variant
from tests.crash.workload import parse_ops

pytestmark = pytest.mark.usefixtures("machine")

PER_MOMENT = 32


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: f"{variant.wrong.__name__}: {variant.workload}")
async def test_is_caught(variant: Variant) -> None:
    explorer = Explorer(await Scene.make(Order.DIRECTORY, variant.start))
    ops = parse_ops(variant.workload)
    with variant.wrong(), pytest.raises(Wrong) as caught:
        await explorer.explore(ops, per_moment=PER_MOMENT, again=variant.again)
    # What it prints shows it, too.
    with variant.wrong(), pytest.raises(Wrong):
        await explorer.replay(caught.value.case)
    assert await explorer.explore(ops, per_moment=4)
