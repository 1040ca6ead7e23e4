"""What a policy costs a reader, and what counting costs: ``python -m scripts.policy_cost [--rounds N] [--mib N]``.

One volume, one file, mounted anew with each policy in turns. *Cold*: the first read, by a mount that has no key.
*Warm*: the second, the kernel's pages dropped in between, so the daemon is asked for every block again. *Random*: then
4 KiB each from all over the file, its pages dropped again. Prints medians and their ratios to the default policy's.
Then the cache's hot path with its counter and without it, in this process.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import os
import random
import shutil
import statistics
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import trio

from cryptfs.keys.cache import KeyCache
from cryptfs.keys.policy import CachePolicy
from cryptfs.testing.clock import FakeClock
from cryptfs.testing.keys import FakeKek, FakeUpstream
from cryptfs.types import WRAPPED_BYTES, Purpose
from scripts.audit_cost import World

POLICIES: dict[str, tuple[str, ...]] = {
    "default": (),
    "--max-uses 1": ("--max-uses", "1"),
    "--no-cache": ("--no-cache",),
    "--max-age 1": ("--max-age", "1"),
}
READS, PIECE_BYTES = 1000, 4096
KEYS, CALLS = 64, 200
COUNTER = "self.statistics.hits += len(out)"


def read_s(path: Path) -> float:
    """Seconds to read the file once, in pieces of 1 MiB; its pages are dropped afterwards."""
    fd = os.open(path, os.O_RDONLY)
    try:
        began = time.perf_counter()
        while os.read(fd, 1 << 20):
            pass
        took_s = time.perf_counter() - began
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
    return took_s


def random_s(path: Path, size_bytes: int) -> float:
    """Seconds for one read of 4 KiB, over `READS` of them; the kernel reads nothing ahead."""
    offsets = random.Random(1)
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        began = time.perf_counter()
        for _ in range(READS):
            os.pread(fd, PIECE_BYTES, offsets.randrange(size_bytes // PIECE_BYTES) * PIECE_BYTES)
        took_s = time.perf_counter() - began
    finally:
        os.close(fd)
    return took_s / READS


def measure_reads(world: World, rounds: int, mib: int) -> None:
    """Each policy in turns, the order turning too."""
    world.mount()
    with (world.mnt / "file").open("wb") as file:
        for _ in range(mib):
            file.write(os.urandom(1 << 20))
    world.umount()
    cold: dict[str, list[float]] = {name: [] for name in POLICIES}
    warm: dict[str, list[float]] = {name: [] for name in POLICIES}
    scattered: dict[str, list[float]] = {name: [] for name in POLICIES}
    names = list(POLICIES)
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            world.run("mount", *POLICIES[name], str(world.vault), str(world.mnt))
            cold[name].append(read_s(world.mnt / "file"))
            warm[name].append(read_s(world.mnt / "file"))
            scattered[name].append(random_s(world.mnt / "file", mib << 20))
            world.umount()
    for kind, times in (("cold", cold), ("warm", warm)):
        base = statistics.median(times["default"])
        for name in POLICIES:
            median_s = statistics.median(times[name])
            print(f"{kind} {name:<13} {mib / median_s:7.0f} MiB/s  time / default's: {median_s / base:.2f}")
    base = statistics.median(scattered["default"])
    for name in POLICIES:
        median_s = statistics.median(scattered[name])
        print(f"random {name:<13} {median_s * 1e6:7.0f} us a read  time / default's: {median_s / base:.2f}")


async def measure_counting(rounds: int) -> None:
    """`peek_all` of a full cache, as it is and without the counter."""
    kek = FakeKek(b"V" * 16, os.urandom)
    cache = KeyCache(FakeUpstream(kek), CachePolicy(), FakeClock())
    fresh = await cache.generate(b"L" * 16, Purpose.BLOCK, KEYS)
    wraps = list(fresh.wrapped)
    assert all(len(wrapped) == WRAPPED_BYTES for wrapped in wraps)

    # The same source but for its last counter.
    source = textwrap.dedent(inspect.getsource(KeyCache.peek_all))
    assert source.count(COUNTER) == 1
    namespace = dict(vars(sys.modules[KeyCache.__module__]))
    exec(source.replace(COUNTER, ""), namespace)  # noqa: S102 - our own
    uncounted = functools.partial(namespace["peek_all"], cache, wraps)
    counted = functools.partial(KeyCache.peek_all, cache, wraps)

    def batch_s(call: Callable[[], object]) -> float:
        began = time.perf_counter()
        for _ in range(CALLS):
            call()
        return (time.perf_counter() - began) / CALLS

    times: dict[str, list[float]] = {"counted": [], "uncounted": []}
    for number in range(rounds):
        for which, call in (("counted", counted), ("uncounted", uncounted))[:: 1 if number % 2 else -1]:
            times[which].append(batch_s(call))
    on, off = (statistics.median(each) for each in times.values())
    print(f"peek_all of {KEYS} keys: {on * 1e6:.2f} us counted, {off * 1e6:.2f} us not: {on / off:.3f}")


def main() -> int:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--mib", type=int, default=256)
    options = parser.parse_args()
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors")
    where = Path(tempfile.mkdtemp(prefix="cfs-cost-"))
    world = World(where / "w", silent=False)
    try:
        measure_reads(world, options.rounds, options.mib)
    finally:
        world.agent.terminate()
        world.agent.wait()
        shutil.rmtree(where)
    trio.run(measure_counting, 100 * options.rounds)
    print(f"load {os.getloadavg()[0]:.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
