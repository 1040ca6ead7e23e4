"""The operations that workloads are made of, and the workloads of one, two and three of them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

from tests.crash.workload import Op, parse_ops

OPS = parse_ops(
    # making and writing
    "create n; create d/n; touch n; create L; overwrite a; append a; append b; grow d/c; cut a; cut d/c; empty b;"
    "empty a; stretch b; overwrite n; append n; cut n;"
    # names
    "rename a x; rename a b; rename b a; rename a d/c; rename d/c a; rename d/c x; rename n a; rename n d/c;"
    "rename d e;"
    "rename d e/d; rename a e/x; rename a m/x; rename n m/n; rename a L; exchange a b; exchange a d/c; exchange d e;"
    "exchange n a; link a l; link a d/l; link n d/l; link d/c m/l; unlink a; unlink d/c; unlink n; unlink l;"
    "mkdir m; mkdir e/m; mkdir m/k; create m/n; rmdir e; rmdir m; symlink t; symlink d/t; unlink t; rename t d/t;"
    # syncs
    "fsync a; fsync b; fsync d/c; fsync n; fsync d/n; fsync x; fsync m/n; fsync m/x; fdatasync a; fdatasync n; fsync L;"
    "fsyncdir /; fsyncdir d; fsyncdir e; fsyncdir m;"
    # what happens by itself
    "compact a; compact d/c; compact n; compact /; compact d; settle; reap; rotate; rewrite; remount"
)


def singles() -> Iterator[tuple[Op, ...]]:
    for op in OPS:
        yield (op,)


def pairs() -> Iterator[tuple[Op, ...]]:
    yield from itertools.product(OPS, repeat=2)


def triples(rng: random.Random) -> Iterator[tuple[Op, ...]]:
    """Without end."""
    while True:
        yield tuple(rng.choices(OPS, k=3))
