"""Drives the `cryptfs` command on a volume of its own, with its own runtime and state directories.

Only the command line is used: what works here works for a person who types it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

COMMAND_TIMEOUT_S = 900


def cryptfs_command() -> list[str]:
    """The command installed beside this interpreter, else the module."""
    beside = Path(sys.executable).with_name("cryptfs")
    return [str(beside)] if beside.exists() else [sys.executable, "-m", "cryptfs"]


class CommandFailed(Exception):
    """A program ended otherwise than expected; the text holds its arguments, exit code and stderr."""


def run(
    arguments: Sequence[str | Path],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    expect: Sequence[int] = (0,),
    pass_fds: Sequence[int] = (),
) -> subprocess.CompletedProcess[str]:
    """Runs a program to its end; raises `CommandFailed` unless it ends with one of `expect`."""
    words = [str(word) for word in arguments]
    try:
        done = subprocess.run(
            words,
            cwd=cwd,
            env=env,
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=COMMAND_TIMEOUT_S,
            pass_fds=pass_fds,
        )
    except subprocess.TimeoutExpired as late:
        raise CommandFailed(f"{' '.join(words)}: no answer within {COMMAND_TIMEOUT_S} s") from late
    if done.returncode not in expect:
        raise CommandFailed(f"{' '.join(words)}: exit code {done.returncode}\n{(done.stderr or done.stdout).strip()}")
    return done


@dataclass(frozen=True, slots=True)
class Volume:
    """One volume below `base`: the cipher directory, its mount point, and the environment its programs run in."""

    base: Path

    @property
    def cipher_dir(self) -> Path:
        """Where the ciphertext lies."""
        return self.base / "cipher"

    @property
    def mountpoint(self) -> Path:
        """Where the plaintext is seen."""
        return self.base / "mnt"

    @property
    def env(self) -> dict[str, str]:
        """The environment with HOME and the XDG directories below `base`, and without a passphrase."""
        kept = {name: value for name, value in os.environ.items() if name != "CRYPTFS_PASSPHRASE"}
        own = {"HOME": "home", "XDG_RUNTIME_DIR": "run", "XDG_STATE_HOME": "state"}
        return kept | {name: str(self.base / value) for name, value in own.items()} | {"LC_ALL": "C.UTF-8"}

    def cryptfs(
        self, *arguments: str | Path, passphrase: str | None = None, expect: Sequence[int] = (0,)
    ) -> subprocess.CompletedProcess[str]:
        """Runs one `cryptfs` command, handing the passphrase over a pipe."""
        words = [*cryptfs_command(), *arguments]
        if passphrase is None:
            return run(words, env=self.env, expect=expect)
        read_end, write_end = os.pipe()
        try:
            with os.fdopen(write_end, "w") as pipe:
                pipe.write(passphrase)
            return run([*words, "--passfd", str(read_end)], env=self.env, expect=expect, pass_fds=[read_end])
        finally:
            os.close(read_end)

    def create(self, passphrase: str, *options: str) -> None:
        """`cryptfs init`."""
        for name in ("home", "run", "state", "mnt"):
            (self.base / name).mkdir(mode=0o700, exist_ok=True)
        self.cryptfs("init", self.cipher_dir, *options, passphrase=passphrase)

    def mount(self, passphrase: str, *options: str) -> None:
        """`cryptfs mount`."""
        self.cryptfs("mount", self.cipher_dir, self.mountpoint, *options, passphrase=passphrase)

    def umount(self) -> None:
        """`cryptfs umount`."""
        self.cryptfs("umount", self.mountpoint)

    def status(self) -> list[dict[str, Any]]:
        """`cryptfs status --json`."""
        volumes: list[dict[str, Any]] = json.loads(self.cryptfs("status", "--json").stdout)
        return volumes

    def is_mounted(self) -> bool:
        """Whether something is mounted there; true for a mount whose daemon is dead, too."""
        try:
            return self.mountpoint.is_mount()
        except OSError:
            return True

    def clean_up(self) -> None:
        """Unmounts and stops the agent, by force if need be; never raises `CommandFailed`."""
        if self.is_mounted():
            with contextlib.suppress(CommandFailed):
                self.umount()
        if self.is_mounted():
            with contextlib.suppress(CommandFailed):
                run(["fusermount3", "-u", "-z", self.mountpoint])
        with contextlib.suppress(CommandFailed):
            self.cryptfs("agent", "stop")


@contextlib.contextmanager
def temporary_base(prefix: str, parent: Path | None = None) -> Iterator[Path]:
    """A directory that is removed afterwards, unless something is still mounted in it."""
    base = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    try:
        yield base
    finally:
        if any(f" {base}/" in line for line in Path("/proc/self/mountinfo").read_text("utf-8").splitlines()):
            print(f"error: something is still mounted below {base}; it was left as it is", file=sys.stderr)
        else:
            shutil.rmtree(base, ignore_errors=True)


def shielded(clean_up: Callable[[], None]) -> None:
    """Runs a clean-up that a second Ctrl-C or SIGTERM cannot cut short."""
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    previous = [signal.signal(number, signal.SIG_IGN) for number in signals]
    try:
        clean_up()
    finally:
        for number, handler in zip(signals, previous, strict=True):
            signal.signal(number, handler)


@contextlib.contextmanager
def temporary_volume(base: Path) -> Iterator[Volume]:
    """A volume that is unmounted, and its agent stopped, whatever happens inside; not yet created."""
    volume = Volume(base)
    try:
        yield volume
    finally:
        shielded(volume.clean_up)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def clean_up_on_signals() -> None:
    """Makes SIGTERM and SIGHUP run the clean-up that Ctrl-C runs."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
