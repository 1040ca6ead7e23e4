"""Coverage-guided fuzzing in one process: an input that reaches a new pair of lines is kept and mutated further.

Only the package's own Python is watched; that is where the parsers' decisions are.
"""

from __future__ import annotations

import os
import random
import sys
import time
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import cryptfs
from tests.fuzz.mutate import mutated
from tests.fuzz.targets import Target

_OWN = os.path.dirname(cryptfs.__file__)
SLOWEST_S = 2.0
"""Of processor time, for 64 KiB: far above what any takes, far below what an explosion would."""


@dataclass
class Coverage:
    """Edges between lines, as the tracer sees them."""

    edges: set[tuple[object, int, int]] = field(default_factory=set)
    _now: set[tuple[object, int, int]] = field(default_factory=set)
    _last: int = 0

    def call(self, frame: FrameType, event: str, arg: object) -> Any:  # noqa: ANN401 - sys.settrace's own shape
        if not frame.f_code.co_filename.startswith(_OWN):
            return None
        self._last = 0
        return self._line

    def _line(self, frame: FrameType, event: str, arg: object) -> Any:  # noqa: ANN401 - sys.settrace's own shape
        if event == "line":
            line = frame.f_lineno
            self._now.add((frame.f_code, self._last, line))
            self._last = line
        return self._line

    def grew(self) -> bool:
        """Whether what ran since the last call did something new."""
        new = self._now - self.edges
        self.edges |= new
        self._now.clear()
        return bool(new)


def check(target: Target, data: bytes) -> bool:
    """Whether it was accepted. Fails if it raises what it must not, or takes too long."""
    began = time.process_time()
    try:
        target.parse(data)
        accepted = True
    except target.raises:
        accepted = False
    except BaseException as error:
        error.add_note(f"{target.name}: {data.hex()}")
        raise
    took_s = time.process_time() - began
    assert took_s < SLOWEST_S, f"{target.name}: {took_s:.1f} s for {data[:200].hex()}…"
    return accepted


@dataclass
class Result:
    executions: int
    accepted: int
    corpus: int
    edges: int


def fuzz(target: Target, seed: int, executions: int, *, seconds: float | None = None) -> Result:
    """So many executions, or as many as fit into `seconds`."""
    rng = random.Random(seed)
    corpus, coverage, accepted = list(target.samples), Coverage(), 0
    ends = None if seconds is None else time.monotonic() + seconds
    before = sys.gettrace()
    number = 0
    try:
        for number in range(1, executions + 1):
            fresh = number > len(corpus)
            data = mutated(rng.choice(corpus[-64:] if rng.random() < 0.3 else corpus), target.samples,
                           target.msgpack_at, rng) if fresh else corpus[number - 1]  # fmt: skip
            sys.settrace(coverage.call)
            try:
                accepted += check(target, data)
            finally:
                sys.settrace(before)
            if coverage.grew() and fresh:
                corpus.append(data)
            if ends is not None and not number % 256 and time.monotonic() > ends:
                break
    finally:
        sys.settrace(before)
    return Result(number, accepted, len(corpus), len(coverage.edges))
