"""What DEKs brought ahead (`fs/reserve`) cost a writer: ``python -m scripts.reserve_cost [--rounds N] [--mib N]``.

Three volumes, each with an agent and a mount: one as it is, two whose daemons bring nothing ahead; how those two differ
says what the machine's noise is. All are written to in turns, the order turning too; what was written is removed again.
*Sequential*: a new file in pieces of 128 KiB, synced. *Slow*: a new file in pieces of 16 KiB with pauses between them,
as a download or a recording is written; the pauses do not count. *Small*: files of 4 KiB made, written and closed.
Prints ratios of medians to the first one without: of the writer's time, and of what daemon and agent took of the
processor.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from scripts.audit_cost import World

DAEMON = """
import sys
from cryptfs.daemon import guard
guard.install()
from cryptfs.fs.reserve import Reserve
{change}
from cryptfs.daemon.main import main
sys.exit(main(sys.argv[1:]))
"""
WITHOUT = "Reserve.about_to_be_written = lambda self, file: None"
SMALL_FILES, SMALL_BYTES = 500, 4096
SLOW_WRITES, SLOW_BYTES, PAUSE_S = 64, 16384, 0.02


class Side:
    """One of the two: a world of its own, and its daemon."""

    def __init__(self, where: Path, *, reserve: bool) -> None:
        self.world = world = World(where, silent=False)
        world.run("unlock", str(world.vault))
        program = ["-c", DAEMON.format(change="" if reserve else WITHOUT)]
        socket = str(where / "r" / "cryptfs" / "agent.sock")
        read_fd, write_fd = os.pipe()
        words = ["--cipher-dir", str(world.vault), "--mountpoint", str(world.mnt), "--agent-socket", socket]
        self.daemon = subprocess.Popen(
            [sys.executable, *program, *words, "--ready-fd", str(write_fd), "--log-file", str(where / "log")],
            env={name: value for name, value in world.env.items() if name != "CRYPTFS_PASSPHRASE"},
            pass_fds=[write_fd],
        )
        os.close(write_fd)
        with os.fdopen(read_fd) as ready:
            assert ready.readline() == "ready\n"

    def cpu_s(self) -> float:
        """Processor time of daemon and agent so far, all threads (proc(5), schedstat: nanoseconds)."""
        total_ns = 0
        for pid in (self.daemon.pid, self.world.agent.pid):
            for task in Path(f"/proc/{pid}/task").iterdir():
                total_ns += int((task / "schedstat").read_text("ascii").split()[0])
        return total_ns / 1e9

    def close(self) -> None:
        """Unmount, end both processes."""
        subprocess.run(["fusermount3", "-u", str(self.world.mnt)], check=True)
        self.daemon.wait()
        self.world.agent.terminate()
        self.world.agent.wait()


def sequential(mnt: Path, mib: int) -> float:
    """Seconds to write and sync a file."""
    piece = os.urandom(128 << 10)
    fd = os.open(mnt / "file", os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        began = time.perf_counter()
        for _ in range(mib * 8):
            os.write(fd, piece)
        os.fsync(fd)
        return time.perf_counter() - began
    finally:
        os.close(fd)
        os.unlink(mnt / "file")


def slow(mnt: Path, _mib: int) -> float:
    """Seconds in calls that write to a file now and then."""
    piece, took_s = os.urandom(SLOW_BYTES), 0.0
    fd = os.open(mnt / "file", os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        for _ in range(SLOW_WRITES):
            time.sleep(PAUSE_S)
            began = time.perf_counter()
            os.write(fd, piece)
            took_s += time.perf_counter() - began
        began = time.perf_counter()
        os.fsync(fd)
        return took_s + time.perf_counter() - began
    finally:
        os.close(fd)
        os.unlink(mnt / "file")


def small(mnt: Path, _mib: int) -> float:
    """Seconds to make, write and close files."""
    content = os.urandom(SMALL_BYTES)
    began = time.perf_counter()
    for number in range(SMALL_FILES):
        (mnt / f"file{number}").write_bytes(content)
    took_s = time.perf_counter() - began
    for number in range(SMALL_FILES):
        (mnt / f"file{number}").unlink()
    return took_s


SIDES = ["with", "without", "without again"]
KINDS: dict[str, Callable[[Path, int], float]] = {"sequential": sequential, "slow": slow, "small": small}


def main() -> int:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--mib", type=int, default=128)
    parser.add_argument("--only", choices=sorted(KINDS), action="append", help="may be repeated")
    options = parser.parse_args()
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors")
    where = Path(tempfile.mkdtemp(prefix="cfs-cost-"))
    sides = {name: Side(where / name.replace(" ", "-"), reserve=name == "with") for name in SIDES}
    try:
        for kind in options.only or KINDS:
            times: dict[str, list[float]] = {name: [] for name in SIDES}
            cpu: dict[str, list[float]] = {name: [] for name in SIDES}
            for number in range(options.rounds + 1):
                turn = number % len(SIDES)
                for name in SIDES[turn:] + SIDES[:turn]:
                    before_s = sides[name].cpu_s()
                    took_s = KINDS[kind](sides[name].world.mnt, options.mib)
                    if number:  # the first round warms them up
                        times[name].append(took_s)
                        cpu[name].append(sides[name].cpu_s() - before_s)
            base_s, base_cpu_s = statistics.median(times["without"]), statistics.median(cpu["without"])
            for name in SIDES:
                median_s, cpu_s = statistics.median(times[name]), statistics.median(cpu[name])
                print(
                    f"{kind:<10} {name:<13} {median_s:.4f} s, ratio {median_s / base_s:.3f}; "
                    f"processor {cpu_s:.4f} s, ratio {cpu_s / base_cpu_s:.3f}"
                )
    finally:
        for side in sides.values():
            side.close()
        shutil.rmtree(where)
    print(f"load {os.getloadavg()[0]:.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
