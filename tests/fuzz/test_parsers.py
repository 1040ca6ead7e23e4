"""Hostile input: whatever the bytes, a parser returns or raises its one exception, in bounded time and memory."""

from __future__ import annotations

import os
import random
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.guided import check, fuzz
from tests.fuzz.mutate import HUGE, mutated
from tests.fuzz.targets import TARGETS, Target

EXECUTIONS = int(os.environ.get("CRYPTFS_FUZZ_EXECUTIONS", "1000000"))
PACKER_BYTES = 300_000
"""What msgpack allocates to encode anything, which is how a payload is checked to be canonical."""
every_target = pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)


@every_target
def test_samples_are_accepted(target: Target) -> None:
    for sample in target.samples:
        assert check(target, sample)


@every_target
@settings(max_examples=1500)
@given(data=st.data())
def test_anything_is_parsed_or_refused(target: Target, data: st.DataObject) -> None:
    sample = data.draw(st.sampled_from(target.samples))
    rng = data.draw(st.randoms(use_true_random=False))
    check(target, mutated(sample, target.samples, target.msgpack_at, rng))


@every_target
@given(data=st.binary(max_size=400))
def test_noise_is_refused(target: Target, data: bytes) -> None:
    check(target, data)


@every_target
def test_memory_is_bounded_by_the_input(target: Target) -> None:
    """A short message that claims to be long allocates nothing of what it claims."""
    rng = random.Random(1)
    start = target.msgpack_at or 0
    inputs = [sample[:start] + huge + sample[start:] for sample in target.samples for huge in HUGE]
    inputs += [mutated(rng.choice(target.samples), target.samples, target.msgpack_at, rng) for _ in range(150)]
    tracemalloc.start()
    try:
        for data in inputs:
            tracemalloc.reset_peak()
            before, _ = tracemalloc.get_traced_memory()
            check(target, data)
            _, peak = tracemalloc.get_traced_memory()
            assert peak - before < PACKER_BYTES + 100 * len(data), data[:200].hex()
    finally:
        tracemalloc.stop()


@every_target
def test_guided_by_coverage(target: Target) -> None:
    result = fuzz(target, seed=1, executions=2000)
    assert result.executions == 2000
    assert result.accepted
    assert result.corpus > len(target.samples) or target.name in {"sealed name", "state", "data header"}


@pytest.mark.torture
@every_target
def test_a_million_guided_by_coverage(target: Target) -> None:
    result = fuzz(target, seed=random.SystemRandom().getrandbits(32), executions=EXECUTIONS)
    assert result.executions == EXECUTIONS
