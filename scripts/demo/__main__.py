"""`make demo`: real programs at work in a volume, and every byte compared with a plain copy made outside.

Ends with 0 only if every check held. Mounts, agent and temporary directories are gone afterwards, also after Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sqlite3
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from scripts.demo import compare, search, source, workload
from scripts.demo.progress import Progress
from scripts.driver import CommandFailed, Volume, clean_up_on_signals, temporary_base, temporary_volume

PASSPHRASE = "correct horse battery staple, said the demo"
WRONG_PASSPHRASE = "correct horse battery stable, said the demo"
EXIT_WRONG_SECRET = 13
DAEMON_END_S = 10.0
SHOWN_DIFFERENCES = 20
OUTPUT_COLUMNS = 120
"""Where the output is no terminal."""


@dataclass(slots=True)
class Demo:
    """The parts of the demo in order; `rows` and `failures` fill up as they run."""

    volume: Volume
    plain: Path
    source: source.Source
    progress: Progress
    started_ns: int = field(default_factory=time.time_ns)
    rows: list[tuple[str, str, str]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def run(self) -> None:
        """Everything; what fails a check is noted in `failures`, what makes going on pointless is raised."""
        said_plain = self.work_in("plain copy", self.plain)
        self.progress.heading("The same in a volume, under a passphrase")
        with self.progress.step("volume", "cryptfs init, cryptfs mount"):
            self.volume.create(PASSPHRASE)
            self.volume.mount(PASSPHRASE)
        said_volume = self.work_in("volume", self.volume.mountpoint)
        for step in workload.STEPS:
            same = said_plain[step.title] == said_volume[step.title]
            self.check(step.title, "same output" if same else "OUTPUT DIFFERS", same, self.took("volume", step.title))
        self.unmount_and_lock_out()
        # A mounted volume deletes sidecars of what is gone while others look at them.
        self.look_at_ciphertext()
        self.mount_again_and_compare()

    def check(self, what: str, result: str, passed: bool, seconds: float | None = None) -> None:  # noqa: FBT001
        """One row of the summary."""
        self.rows.append((what, result, "" if seconds is None else f"{seconds:.1f}"))
        if not passed:
            self.failures.append(f"{what}: {result}")

    def took(self, where: str, title: str) -> float:
        """Seconds of a step that has run."""
        return self.progress.seconds[where, title]

    def work_in(self, where: str, root: Path) -> dict[str, str]:
        """Runs every step of the workload in `root`; returns what each said."""
        said = {}
        for step in workload.STEPS:
            with self.progress.step(where, step.title):
                said[step.title] = step.run(root, self.source)
        return said

    def look_at_ciphertext(self) -> None:
        """Shows the cipher directory and searches it; the same search must find the plain copy's files."""
        self.progress.heading("What the disk sees")
        os.sync()
        for line in search.glimpse(self.volume.cipher_dir, 4):
            self.progress.line(line)
        needles = search.collect(self.plain, self.volume.base / "patterns")
        with self.progress.step("search", "known names and content"):
            control = len(search.files_matching(needles, self.plain))
            leaked_files = search.files_matching(needles, self.volume.cipher_dir)
            leaked_names = search.names_found(needles, self.volume.cipher_dir)
        self.progress.line(f"grep finds them in {control:,} files of the plain copy")
        for leaked in [*leaked_files, *map(os.fsdecode, leaked_names)][:SHOWN_DIFFERENCES]:
            self.progress.line(f"FOUND: {leaked}")
        found = len(leaked_files) + len(leaked_names)
        self.check(
            "search the cipher directory",
            f"{found or 'none'} of {len(needles.names):,} names, {found or 'no'} content; {control:,} hits in plain",
            not found and control > len(needles.names) // 4,
            self.took("search", "known names and content"),
        )

    def unmount_and_lock_out(self) -> None:
        """Unmounts; afterwards nothing is readable, no process is left, and a wrong passphrase opens nothing."""
        self.progress.heading("Unmounted")
        pids = [int(volume["daemon_pid"]) for volume in self.volume.status() if volume["daemon_pid"]]
        with self.progress.step("volume", "cryptfs umount"):
            self.volume.umount()
        left = os.listdir(self.volume.mountpoint)
        self.check(
            "after umount: the mount point", f"{len(left)} entries", not left, self.took("volume", "cryptfs umount")
        )
        deadline = time.monotonic() + DAEMON_END_S
        while any(os.path.exists(f"/proc/{pid}/exe") for pid in pids) and time.monotonic() < deadline:
            time.sleep(0.05)
        alive = [pid for pid in pids if os.path.exists(f"/proc/{pid}/exe")]
        unlocked = [volume for volume in self.volume.status() if volume["state"] != "locked"]
        gone = len(pids) == 1 and not alive and not unlocked
        self.check("after umount: daemon and key", "gone" if gone else f"daemon {alive or pids}, {unlocked}", gone)
        refused = self.volume.cryptfs(
            "mount",
            self.volume.cipher_dir,
            self.volume.mountpoint,
            passphrase=WRONG_PASSPHRASE,
            expect=range(256),
        )
        for line in refused.stderr.splitlines():
            self.progress.line(line)
        right = refused.returncode == EXIT_WRONG_SECRET and not self.volume.is_mounted()
        self.check(
            "mount with a wrong passphrase",
            f"refused, exit code {refused.returncode}" if right else "NOT REFUSED",
            right,
        )

    def mount_again_and_compare(self) -> None:
        """Mounts again and compares every entry with the plain copy."""
        self.progress.heading("Mounted again")
        with self.progress.step("volume", "cryptfs mount"):
            self.volume.mount(PASSPHRASE)
        with self.progress.step("plain copy", "read and hash everything") as advance:
            plain = compare.read_tree(self.plain, advance)
        with self.progress.step("volume", "read and hash everything") as advance:
            mounted = compare.read_tree(self.volume.mountpoint, advance)
        found = compare.differences(plain, mounted, self.started_ns)
        for line in found[:SHOWN_DIFFERENCES]:
            self.progress.line(line)
        kinds = ", ".join(f"{plain.count(kind):,} {kind}" for kind in ("file", "directory", "symlink", "other"))
        self.check(
            "compare with the plain copy",
            f"{len(found)} DIFFERENCES" if found else f"identical: {kinds}; {plain.file_bytes:,} bytes",
            not found,
            self.took("volume", "read and hash everything"),
        )
        with self.progress.step("volume", "git fsck, cryptfs umount"):
            workload.git(self.volume.mountpoint, "fsck", "--strict", "--no-progress")
            self.volume.umount()


def main() -> int:
    """Runs the demo in a temporary directory; returns the exit code."""
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--dir", type=Path, help="parent of the temporary directory (default: the system's)")
    arguments = parser.parse_args()
    clean_up_on_signals()
    progress = Progress(Console(highlight=False, width=None if sys.stdout.isatty() else OUTPUT_COLUMNS))
    began = time.monotonic()
    try:
        with progress.step("source", "fetch a real source tree"):
            chosen = source.fetch()
        with temporary_base("cryptfs-demo-", arguments.dir) as base, temporary_volume(base) as volume:
            progress.heading(f"{chosen.title}, in a plain directory")
            plain = base / "plain"
            plain.mkdir()
            demo = Demo(volume, plain, chosen, progress)
            demo.run()
            shutil.rmtree(plain)
    except (CommandFailed, OSError, sqlite3.Error) as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130
    progress.summary(demo.rows)
    for failed in demo.failures:
        print(f"error: {failed}", file=sys.stderr)
    print(f"demo: {'FAILED' if demo.failures else 'everything held'}, {time.monotonic() - began:.0f} s")
    return 1 if demo.failures else 0


if __name__ == "__main__":
    sys.exit(main())
