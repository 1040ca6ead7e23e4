"""What the audit log costs a streaming read: ``python -m scripts.audit_cost [--rounds N] [--mib N]``.

Two volumes of the same content, two agents: one as it is, one whose `Auditor` writes nothing. A file is read in turns
through both mounts, with the page cache dropped and every key forgotten before each (the mount is made anew). Prints
the median of each, and the ratio of the medians.
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
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SILENT = """
from cryptfs.agent import audit
async def open_volume(self, *args): pass
audit.Auditor._write = lambda self, *args: None
audit.Auditor.unlocked = lambda self, *args: None
audit.Auditor.open_volume = open_volume
audit.Auditor.done = lambda self, *args: None
import sys
from cryptfs.agent.__main__ import main
sys.exit(main())
"""


class World:
    """Directories, an agent and a volume of their own."""

    def __init__(self, where: Path, *, silent: bool) -> None:
        for name in ("h", "r", "s"):
            (where / name).mkdir(parents=True, mode=0o700)
        self.env = {
            **os.environ,
            "HOME": str(where / "h"),
            "XDG_RUNTIME_DIR": str(where / "r"),
            "XDG_STATE_HOME": str(where / "s"),
            "CRYPTFS_PASSPHRASE": "a passphrase for a measurement",
            "PYTHONPATH": str(ROOT),
        }
        self.vault, self.mnt = where / "vault", where / "mnt"
        self.mnt.mkdir()
        (where / "r" / "cryptfs").mkdir(mode=0o700)
        program = ["-c", SILENT] if silent else ["-m", "cryptfs.agent"]
        read_fd, write_fd = os.pipe()
        socket = str(where / "r" / "cryptfs" / "agent.sock")
        self.agent = subprocess.Popen(
            [sys.executable, *program, "--socket", socket, "--ready-fd", str(write_fd)],
            env=self.env, pass_fds=[write_fd],
        )  # fmt: skip
        os.close(write_fd)
        with os.fdopen(read_fd) as ready:
            assert ready.readline() == "ready\n"
        self.run("init", "--kdf-cost", "low", str(self.vault))

    def run(self, *words: str) -> None:
        """One `cryptfs` command."""
        subprocess.run([sys.executable, "-m", "cryptfs", *words], env=self.env, check=True)

    def mount(self) -> None:
        """Mount the volume."""
        self.run("mount", str(self.vault), str(self.mnt))

    def umount(self) -> None:
        """Unmount it."""
        self.run("umount", str(self.mnt))

    def read_s(self) -> float:
        """Seconds to read the file once, in pieces of 1 MiB, by a mount that has no key yet."""
        self.mount()
        began = time.perf_counter()
        with (self.mnt / "file").open("rb", buffering=0) as file:
            while file.read(1 << 20):
                pass
        took_s = time.perf_counter() - began
        self.umount()
        return took_s


def main() -> int:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--mib", type=int, default=512)
    options = parser.parse_args()
    where = Path(tempfile.mkdtemp(prefix="cfs-cost-"))
    worlds = [World(where / name, silent=name == "off") for name in ("on", "off")]
    try:
        for world in worlds:
            world.mount()
            with (world.mnt / "file").open("wb") as file:
                for _ in range(options.mib):
                    file.write(os.urandom(1 << 20))
            world.umount()
        times: list[list[float]] = [[], []]
        for number in range(options.rounds):
            order = (0, 1) if number % 2 else (1, 0)
            for which in order:
                times[which].append(worlds[which].read_s())
        on, off = (statistics.median(each) for each in times)
        for name, median_s in (("on", on), ("off", off)):
            print(f"audit {name}: {options.mib / median_s:.0f} MiB/s (median of {options.rounds})")
        print(f"time with the audit log / without: {on / off:.3f}")
    finally:
        for world in worlds:
            world.agent.terminate()
            world.agent.wait()
        shutil.rmtree(where)
    return 0


if __name__ == "__main__":
    sys.exit(main())
