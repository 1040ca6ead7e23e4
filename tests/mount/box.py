"""A volume with everything around it that is its own: directories, environment, agent, daemon, log."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from cryptfs.cli import mounts, processes
from cryptfs.cli.mounts import wait_until
from cryptfs.errors import MountpointUnusable
from cryptfs.format.volume import parse_volume
from tests.processes import processes_with

PASSPHRASE = "correct horse battery staple 7"
TIMEOUT_S = 90.0
ENDING_S = 30.0


@dataclass
class Daemon:
    """A daemon that is a child of the tests."""

    process: subprocess.Popen[bytes]
    stderr: Path
    exit_code: int = 0

    def said(self) -> str:
        return self.stderr.read_text("utf-8", "replace")


@dataclass(frozen=True)
class Box:
    """`vault` is the cipher directory, `clear` the mount point; both, and what their programs keep, lie in `root`."""

    root: Path

    @property
    def vault(self) -> Path:
        return self.root / "vault"

    @property
    def clear(self) -> Path:
        return self.root / "clear"

    @property
    def agent_socket(self) -> Path:
        return self.root / "r" / "cryptfs" / "agent.sock"

    @property
    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if name != "CRYPTFS_PASSPHRASE"}
        own = {"HOME": "h", "XDG_CONFIG_HOME": "c", "XDG_RUNTIME_DIR": "r", "XDG_STATE_HOME": "s"}
        return kept | {name: str(self.root / path) for name, path in own.items()}

    def make(self) -> None:
        """The directories; the volume itself is `init`'s, or copied."""
        for name in ("h", "r", "s", "clear"):
            (self.root / name).mkdir(mode=0o700)

    # commands --------------------------------------------------------------------------------------------------

    def run(
        self, *words: str | Path, code: int | None = 0, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """`cryptfs WORDS`, with the passphrase in its environment; `code` is the exit code it must end with."""
        return self._run(words, code, {"CRYPTFS_PASSPHRASE": PASSPHRASE, **(env or {})})

    def run_without_passphrase(
        self, *words: str | Path, code: int | None = 0, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """The same, and the secret is the caller's to give."""
        return self._run(words, code, env or {})

    def _run(
        self, words: tuple[str | Path, ...], code: int | None, env: Mapping[str, str]
    ) -> subprocess.CompletedProcess[str]:
        ended = subprocess.run(
            [sys.executable, "-m", "cryptfs", *map(str, words)],
            env={**self.environment, **env},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT_S,
            check=False,
            start_new_session=True,
        )
        if code is not None:
            assert ended.returncode == code, f"exit code {ended.returncode}: {ended.stdout}{ended.stderr}"
        assert "Traceback" not in ended.stderr, ended.stderr
        return ended

    def init(self, *options: str) -> None:
        self.run("init", "--kdf-cost", "low", *options, self.vault)

    def mount(self, *options: str, code: int = 0) -> str:
        """What the command said on stderr."""
        return self.run("mount", *options, self.vault, self.clear, code=code).stderr

    def umount(self, limit_s: float = ENDING_S) -> None:
        """Unmount with fusermount3 and wait for the daemon, as `cryptfs umount` does, but without starting Python."""
        with ending(self.daemon_pid, limit_s):
            mounts.unmount(self.clear)

    def remount(self, *options: str) -> None:
        self.umount()
        self.mount(*options)

    def unlock(self) -> None:
        self.run("unlock", self.vault)

    @contextlib.contextmanager
    def daemon(self, agent_socket: Path, *options: str, python: tuple[str, ...] = ()) -> Iterator[Daemon]:
        """A daemon started without `cryptfs mount`, on a volume that is unlocked; `python`: the interpreter's options.

        Unmounted at the end, unless it is already; must end with `Daemon.exit_code`.
        """
        read_fd, write_fd = os.pipe()
        said = self.root / "daemon.log"
        words = [
            *("--cipher-dir", str(self.vault), "--mountpoint", str(self.clear), "--agent-socket", str(agent_socket)),
            *("--ready-fd", str(write_fd), *options),
        ]
        with said.open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, *python, "-m", "cryptfs.daemon", *words],
                env=self.environment, stdin=subprocess.DEVNULL, stderr=log, pass_fds=(write_fd,),
            )  # fmt: skip
        os.close(write_fd)
        with open(read_fd, "rb") as ready:
            line = ready.readline()
        daemon = Daemon(process, said)
        try:
            assert line == b"ready\n", (line, daemon.said())
            yield daemon
            if self.is_mounted:
                self.umount()
            assert process.wait(ENDING_S) == daemon.exit_code, daemon.said()
        finally:
            if process.poll() is None:
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(ENDING_S)
            process.kill()
            process.wait()

    # processes -------------------------------------------------------------------------------------------------

    @property
    def daemon_pid(self) -> int:
        daemon = mounts.daemon_of_mount(self.clear)
        assert daemon is not None, f"no daemon; its log ends:\n{self.log()[-4000:]}"
        return daemon.pid

    def agent_pids(self) -> list[int]:
        return processes_with(b"cryptfs.agent", os.fsencode(self.agent_socket))

    def kill_agent(self, number: int = signal.SIGKILL) -> None:
        [pid] = self.agent_pids()
        with ending(pid):
            os.kill(pid, number)

    def kill_daemon(self, number: int = signal.SIGKILL) -> None:
        pid = self.daemon_pid
        with ending(pid):
            os.kill(pid, number)

    # what there is to see --------------------------------------------------------------------------------------

    @property
    def is_mounted(self) -> bool:
        return mounts.mount_at(self.clear) is not None

    def log(self) -> str:
        """The daemon's log; empty before it has one."""
        volume_id = parse_volume((self.vault / "volume").read_bytes()).volume_id
        path = self.root / "s" / "cryptfs" / "log" / f"{volume_id.hex()}.log"
        return path.read_text("utf-8", "replace") if path.exists() else ""

    def logged(self, *words: str, since: int = 0) -> bool:
        """Whether one line of the log, from byte `since` on, has all of `words`; waits a little for it."""

        def look() -> bool:
            return any(all(word in line for word in words) for line in self.log()[since:].splitlines())

        return wait_until(look, 2)

    # the end ---------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Unmount and end agent and daemon, whatever state a test left them in."""
        if self.is_mounted:
            with contextlib.suppress(AssertionError, MountpointUnusable):
                self.umount()
        if self.is_mounted:
            with contextlib.suppress(AssertionError):
                self.kill_daemon()
            mounts.unmount(self.clear, lazily=True)
        for pid in self.agent_pids():
            with ending(pid):
                os.kill(pid, signal.SIGTERM)


@contextlib.contextmanager
def ending(pid: int, limit_s: float = ENDING_S) -> Iterator[None]:
    """The process ends by what is done inside."""
    with processes.watched(pid) as watch:
        yield
        assert watch.has_ended(limit_s), f"process {pid} has not ended"


@contextlib.contextmanager
def boxed(parent: Path, template: Path | None = None) -> Iterator[Box]:
    """A box of its own, with a copy of the volume `template` if one is given; removed at the end."""
    box = Box(Path(tempfile.mkdtemp(dir=parent, prefix="")))
    box.make()
    if template is not None:
        shutil.copytree(template, box.vault, symlinks=True)
    try:
        yield box
    finally:
        box.close()
        assert not box.is_mounted, "never delete through a mount"
        shutil.rmtree(box.root)
