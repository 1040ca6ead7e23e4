"""How fast everything is rewritten under another KEK, and how much slower reading and writing are meanwhile.

    python -m scripts.measure_rotation [--rounds 7] [--files 3000] [--alone 3] [--disk DIR]

One mount. First whole rotations with nobody else there (`--alone` of them): logs per second. Then rounds in which
everything is measured twice, in turns: with the rotation at work and with it cancelled. So what else the machine does
falls on both. Prints a JSON object: seconds (medians), their ratio, logs rewritten per second beside all of it, and
the load.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

PASSPHRASE = "measure rotation 7"
MIB = 1 << 20
LARGE_BYTES, WRITTEN_BYTES = 64 * MIB, 16 * MIB
SMALL, SYNCS = 100, 30
WAIT_S = 60


class Volume:
    """A mounted one in `root`."""

    def __init__(self, root: Path) -> None:
        self.vault, self.clear = root / "vault", root / "clear"
        self.environment = {**os.environ, "CRYPTFS_PASSPHRASE": PASSPHRASE}
        for name, variable in (("h", "HOME"), ("r", "XDG_RUNTIME_DIR"), ("s", "XDG_STATE_HOME")):
            (root / name).mkdir(mode=0o700)
            self.environment[variable] = str(root / name)
        self.clear.mkdir()

    def run(self, *words: str | Path) -> str:
        """`cryptfs WORDS`; what it printed."""
        command = [sys.executable, "-m", "cryptfs", *map(str, words)]
        return subprocess.run(command, env=self.environment, check=True, capture_output=True, text=True).stdout

    def status(self) -> dict[str, object]:
        """The rotation's."""
        shown: dict[str, object] = json.loads(self.run("rotate", self.vault, "--status", "--json"))
        return shown

    def wait_for(self, *states: str) -> str:
        """Until the rotation is in one of them."""
        end = time.monotonic() + WAIT_S
        while time.monotonic() < end:
            state = str(self.status()["state"])
            if state in states:
                return state
            time.sleep(0.1)
        raise TimeoutError(f"the rotation did not become {' or '.join(states)}")

    def rotating(self) -> None:
        """Have it at work, past its first look; one that is done is followed by another."""
        if self.status()["state"] != "running":
            self.run("rotate", self.vault, "--kek", "--background")
            self.wait_for("running", "done")
        before = now = self.status()
        while now["state"] == "running" and now["done"] == before["done"]:
            now = self.status()
        if now["state"] == "done":
            self.run("rotate", self.vault, "--destroy-old")
            self.rotating()

    def alone(self) -> float:
        """A whole rotation of a mount that nobody uses: logs per second."""
        began = time.monotonic()
        self.run("rotate", self.vault, "--kek", "--destroy-old")
        return float(str(self.status()["done"])) / (time.monotonic() - began)

    def quiet(self) -> None:
        """Have it cancelled, or at its end."""
        self.run("rotate", self.vault, "--cancel")
        self.wait_for("cancelled", "done")


def cold(path: Path) -> None:
    """Read a file that nobody has cached."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        while os.read(fd, MIB):
            pass
    finally:
        os.close(fd)


def read_large(top: Path) -> None:
    """A large file, cold."""
    cold(top / "large")


def read_small(top: Path) -> None:
    """Small files, cold."""
    for number in range(SMALL):
        cold(top / "small" / str(number))


def write_large(top: Path) -> None:
    """A large file, written anew and synced."""
    with (top / "written").open("wb", buffering=0) as out:
        for _ in range(WRITTEN_BYTES // MIB):
            out.write(bytes(MIB))
        os.fsync(out.fileno())


def write_synced(top: Path) -> None:
    """One block after the other, each synced."""
    with (top / "large").open("r+b", buffering=0) as out:
        for number in range(SYNCS):
            os.pwrite(out.fileno(), os.urandom(4096), number * 3 * 65536)
            os.fsync(out.fileno())


WORK: tuple[Callable[[Path], None], ...] = (read_large, read_small, write_large, write_synced)


def timed(work: Callable[[Path], None], top: Path) -> float:
    """Seconds."""
    began = time.monotonic()
    work(top)
    return time.monotonic() - began


def measure(volume: Volume, rounds: int) -> dict[str, object]:
    """Medians and ratios, by kind of work."""
    done, beside_s = 0, 0.0
    found: dict[bool, dict[str, list[float]]] = {at: {work.__name__: [] for work in WORK} for at in (True, False)}
    load = [os.getloadavg()[0]]
    for number in range(rounds):
        for at_work in (True, False) if number % 2 else (False, True):
            while True:
                volume.rotating() if at_work else volume.quiet()
                before = volume.status()
                took = [timed(work, volume.clear) for work in WORK]
                after = volume.status()
                if not at_work or after["state"] == "running":
                    break
                # It came to its end meanwhile.
            for work, took_s in zip(WORK, took, strict=True):
                found[at_work][work.__name__].append(took_s)
            if at_work:
                done += int(str(after["done"])) - int(str(before["done"]))
                beside_s += sum(took)
        load.append(os.getloadavg()[0])
    out: dict[str, object] = {"rounds": rounds, "load": [round(min(load), 1), round(max(load), 1)]}
    out["logs_per_s_beside"] = round(done / beside_s, 1)
    for work in WORK:
        rotating, quiet = (statistics.median(found[at][work.__name__]) for at in (True, False))
        out[work.__name__] = {
            "rotating_s": round(rotating, 4), "quiet_s": round(quiet, 4), "ratio": round(rotating / quiet, 2),
        }  # fmt: skip
    return out


def main() -> int:
    """Everything in a temporary directory, removed afterwards."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--files", type=int, default=3000, help="to be rewritten")
    parser.add_argument("--alone", type=int, default=3, help="rotations with nobody else there")
    parser.add_argument("--disk", type=Path, help="where to make the volume")
    args = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="cfs-", dir=args.disk))
    volume = Volume(root)
    try:
        volume.run("init", "--kdf-cost", "low", volume.vault)
        volume.run("mount", volume.vault, volume.clear)
        try:
            (volume.clear / "small").mkdir()
            for number in range(args.files):
                (volume.clear / "small" / str(number)).write_bytes(os.urandom(5000))
            (volume.clear / "large").write_bytes(os.urandom(LARGE_BYTES))
            alone = sorted(volume.alone() for _ in range(args.alone))
            out: dict[str, object] = {"logs_per_s_alone": [round(each, 1) for each in alone]}
            if args.rounds:
                volume.run("rotate", volume.vault, "--kek", "--background")
                out |= measure(volume, args.rounds)
            sys.stdout.write(json.dumps(out, indent=2) + "\n")
        finally:
            volume.run("umount", volume.clear)
    finally:
        shutil.rmtree(root)
    return 0


if __name__ == "__main__":
    sys.exit(main())
