"""`make bench`: times cryptfs, gocryptfs and the plain directory in one run, in turns, and prints medians and ratios.

All three lie on the same file system and take turns within every round (cryptfs gocryptfs plain, cryptfs ...), so that
whatever else the machine does meets all of them. A ratio above 1 says that cryptfs is faster.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import os
import platform
import shutil
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from scripts.bench.targets import Cryptfs, Gocryptfs, Plain, Target
from scripts.bench.workloads import WORKLOADS, Round, Sizes, Workload
from scripts.demo import source
from scripts.driver import CommandFailed, clean_up_on_signals, run, shielded, temporary_base

OUTPUT_COLUMNS = 120
"""Where the output is no terminal."""

Times = dict[str, dict[str, list[float]]]
"""timing -> target -> seconds of every round"""


def measure(
    targets: Sequence[Target], workloads: Sequence[Workload], sizes: Sizes, rounds: int, archive: Path, console: Console
) -> Times:
    """Runs every workload `rounds` times on every target, in turns."""
    times: Times = {timing: {target.name: [] for target in targets} for load in workloads for timing in load.timings}
    for workload in workloads:
        for number in range(rounds):
            for target in targets:
                console.print(f"{workload.name}, round {number + 1} of {rounds}: {target.name}", style="dim")
                turn = Round(target, sizes, archive)
                turn.place.mkdir()
                workload.run(turn)
                shutil.rmtree(turn.place)
                for timing, seconds in turn.seconds.items():
                    times[timing][target.name].append(seconds)
    return times


def report(times: Times) -> list[dict[str, Any]]:
    """Per timing: the median of every target in seconds, and how much faster cryptfs is than each of the others."""
    rows = []
    for timing, by_target in times.items():
        medians = {name: statistics.median(seconds) for name, seconds in by_target.items()}
        ratios = {name: medians[name] / medians["cryptfs"] for name in medians if name != "cryptfs"}
        rows.append({"timing": timing, "median_s": medians, "speed_ratio": ratios, "all_s": by_target})
    return rows


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """The closing table."""
    table = Table(title="median seconds; a ratio above 1 says that cryptfs is faster", title_justify="left")
    table.add_column("what", no_wrap=True)
    names = list(rows[0]["median_s"])
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    others = [name for name in names if name != "cryptfs"]
    for name in others:
        table.add_column(f"vs {name}", justify="right", no_wrap=True)
    for row in rows:
        medians = [f"{row['median_s'][name]:.3f}" for name in names]
        table.add_row(row["timing"], *medians, *(f"{row['speed_ratio'][name]:.2f}" for name in others))
    console.print(table)


def surroundings(block_size: int | None, sizes: Sizes, rounds: int) -> dict[str, Any]:
    """What the numbers depend on."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    return {
        "cpu": model,
        "cpus": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "gocryptfs": run(["gocryptfs", "-version"]).stdout.split(";")[0].strip(),
        "cold": "drop_caches" if os.access("/proc/sys/vm/drop_caches", os.W_OK) else "remount + fadvise",
        "block_size": block_size or "default",
        "rounds": rounds,
        "sequential_mib": sizes.sequential_bytes >> 20,
        "small_files": sizes.small_files,
    }


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="make bench ARGS=", description=__doc__)
    parser.add_argument("--rounds", type=int, help="turns per target (default 5; 1 with --quick)")
    parser.add_argument("--only", action="append", choices=[load.name for load in WORKLOADS], help="these workloads")
    parser.add_argument("--quick", action="store_true", help="an eighth of the work")
    parser.add_argument("--block-size", type=int, help="of the cryptfs volume, in bytes")
    parser.add_argument("--dir", type=Path, help="parent of the temporary directory (default: the system's)")
    parser.add_argument("--json", type=Path, help="also write every number to this file")
    return parser.parse_args()


def main() -> int:
    """Measures; returns the exit code."""
    chosen = arguments()
    clean_up_on_signals()
    console = Console(highlight=False, width=None if sys.stdout.isatty() else OUTPUT_COLUMNS)
    sizes = Sizes.quick() if chosen.quick else Sizes()
    rounds = chosen.rounds or (1 if chosen.quick else 5)
    workloads = [load for load in WORKLOADS if not chosen.only or load.name in chosen.only]
    try:
        around = surroundings(chosen.block_size, sizes, rounds)
        console.print(", ".join(f"{name}: {value}" for name, value in around.items()))
        with temporary_base("cryptfs-bench-", chosen.dir) as base, contextlib.ExitStack() as stack:
            archive = base / "source.tar"  # unpacked once, so that no target is timed for gzip
            with gzip.open(source.fetch().archive) as packed, open(archive, "wb") as tar:
                shutil.copyfileobj(packed, tar)
            targets: list[Target] = [Cryptfs(base, chosen.block_size), Gocryptfs(base), Plain(base)]
            for target in targets:
                stack.callback(shielded, target.stop)
                target.start()
            rows = report(measure(targets, workloads, sizes, rounds, archive, console))
    except CommandFailed as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130
    show(rows, console)
    if chosen.json:
        chosen.json.write_text(json.dumps({"surroundings": around, "rows": rows}, indent=2) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
