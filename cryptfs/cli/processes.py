"""Starting agent and daemon: by exec, with an environment made for them, and a pipe on which they say they are ready.

The child gets an allowlist of variables and three descriptors of ours: nothing a passphrase could travel in. It runs in
a session of its own, so a Ctrl-C at the terminal reaches the command only, which then decides.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import cryptfs
from cryptfs.cli.advice import error_for
from cryptfs.errors import CryptfsError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from types import FrameType

_KEPT = frozenset(
    {
        "PATH",
        "HOME",
        "USER",
        "LOGNAME",
        "LANG",
        "LANGUAGE",
        "TMPDIR",
        "TZ",
        "PYTHONHOME",
        "PYTHONPATH",
        "PYTHONUSERBASE",
    }
)
_KEPT_PREFIXES = ("LC_", "XDG_")
_READY_LIMIT_BYTES = 4096
ENDING_S = 5.0
"""How long a child may take to end by itself after it failed, and again after SIGTERM."""


def clean_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """What a child may know of `environment`: where things are, this package too, and which language to speak."""
    kept = {name: value for name, value in environment.items() if name in _KEPT or name.startswith(_KEPT_PREFIXES)}
    package_root = str(Path(cryptfs.__file__).resolve().parent.parent)
    if Path(package_root).name not in ("site-packages", "dist-packages"):
        # Run from a source tree: -P (below) keeps the working directory off the path, so say where the package is.
        kept["PYTHONPATH"] = os.pathsep.join(filter(None, (package_root, kept.get("PYTHONPATH"))))
    return kept


def command_line(module: str, arguments: Sequence[str]) -> list[str]:
    """How `module` is run. -P: never import from the directory the user happens to stand in."""
    return [sys.executable, "-P", "-m", module, *arguments]


@dataclass
class Starting:
    """A child that has not said yet that it is ready."""

    process: subprocess.Popen[bytes]
    ready_fd: int
    go_fd: int = -1
    is_left: bool = False

    def go(self) -> None:
        """Let a child that was started `held` begin."""
        if self.go_fd >= 0:
            with contextlib.suppress(BrokenPipeError):  # it has ended: `wait_ready` finds out
                os.write(self.go_fd, b"g")
            self._close_go()

    def give_up(self) -> None:
        """End a child that was started `held` and is not wanted after all."""
        self._close_go()
        os.close(self.ready_fd)
        self.process.kill()  # it has done nothing yet that would need an end
        self.process.wait()

    def _close_go(self) -> None:
        fd, self.go_fd = self.go_fd, -1
        if fd >= 0:
            os.close(fd)

    def wait_ready(self, timeout_s: float) -> str | None:
        """The line the child wrote, without its newline; "" if it ended without one; None if it took too long."""
        end = time.monotonic() + timeout_s
        said = bytearray()
        try:
            poll = select.poll()
            poll.register(self.ready_fd, select.POLLIN)
            while b"\n" not in said and len(said) < _READY_LIMIT_BYTES:
                if not poll.poll(max(0.0, end - time.monotonic()) * 1000):
                    return None
                part = os.read(self.ready_fd, _READY_LIMIT_BYTES)
                if not part:
                    break
                said += part
        finally:
            os.close(self.ready_fd)
        return said.split(b"\n", 1)[0].decode("utf-8", "replace")

    def end(self) -> int:
        """Make the child end unless it is about to: politely, then not. Its exit code, negative after a signal."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(ENDING_S)
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(ENDING_S)
        self.process.kill()
        return self.process.wait()

    def leave(self) -> None:
        """Let the child outlive this process."""
        self.is_left = True
        self.process.returncode = 0  # or Popen would warn that it is still running


@contextlib.contextmanager
def ended_unless_left(starting: Starting) -> Iterator[None]:
    """Whatever happens inside (an error, Ctrl-C), the child ends with it, unless `leave` was called or it has ended."""
    try:
        yield
    finally:
        if not starting.is_left and starting.process.poll() is None:
            starting.process.terminate()
            starting.end()


def start(
    module: str, arguments: Sequence[str], *, log_file: Path | None, settings: Mapping[str, str] | None = None,
    held: bool = False,
) -> Starting:  # fmt: skip
    """Run `module` with `--ready-fd N` added; its stderr goes to `log_file` (made with mode 0600), or to ours.

    `settings`: variables it gets besides. `held`: with `--go-fd N`, too, on which it waits for `Starting.go` once it is
    loaded; it ends if that never comes.
    """
    read_fd, write_fd = os.pipe()
    wait_fd, go_fd = os.pipe() if held else (-1, -1)
    passed = (write_fd, wait_fd) if held else (write_fd,)
    stderr = None
    try:
        if log_file is not None:
            log_file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            stderr = os.open(log_file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        process = subprocess.Popen(
            command_line(
                module, [*arguments, "--ready-fd", str(write_fd), *(("--go-fd", str(wait_fd)) if held else ())]
            ),
            env=clean_environment(os.environ) | dict(settings or {}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            pass_fds=passed,
            start_new_session=True,
            cwd="/",
        )
    except BaseException:
        os.close(read_fd)
        if held:
            os.close(go_fd)
        raise
    finally:
        for fd in passed:
            os.close(fd)
        if stderr is not None:
            os.close(stderr)
    return Starting(process, read_fd, go_fd)


def reported(line: str, exit_code: int) -> CryptfsError | None:
    """What a child said on its ready pipe as an error: `error: [exit code] message`; None if it said no such thing.

    Without a code in the line, the one the child ended with counts.
    """
    word, _, rest = line.partition(" ")
    if word != "error:" or not rest:
        return None
    code, _, message = rest.partition(" ")
    if code.isdecimal() and message:
        return error_for(int(code), message)
    return error_for(exit_code, rest)


@contextlib.contextmanager
def signals_passed_on(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Hand SIGINT and SIGTERM that reach this command on to `process` instead of dying of them."""

    def pass_on(number: int, _frame: FrameType | None) -> None:
        process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class Watch:
    """A process that need not be our child, held by a descriptor: its number could come to mean another one."""

    fd: int | None

    def has_ended(self, timeout_s: float) -> bool:
        """Whether the process is gone, waiting at most `timeout_s` for it."""
        if self.fd is None:
            return True
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        return bool(poll.poll(timeout_s * 1000))


@contextlib.contextmanager
def watched(pid: int | None) -> Iterator[Watch]:
    """Watch process `pid` by pidfd_open(2); one that is gone (or None) counts as ended."""
    try:
        fd = None if pid is None else os.pidfd_open(pid)
    except ProcessLookupError:
        fd = None
    try:
        yield Watch(fd)
    finally:
        if fd is not None:
            os.close(fd)
