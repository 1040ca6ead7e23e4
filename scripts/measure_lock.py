"""How long after `cryptfs lock` is called a plaintext can still be read: in the worst company we could think of.

    python -m scripts.measure_lock [--mib 1024] [--rounds 5] [--disk DIR] [--busy N]

A file of that size is in the page cache and mapped by a process that reads from every part of the mapping in turn, also
after some parts were refused; another process reads it so through a descriptor; three write (buffered, synced, mapped),
one reads what is cached of a file beside where one of them writes, and one reads what is not cached through an agent
that answers `unwrap` late. None of them ever pauses. `--busy` adds processes that only use the CPU. Then `lock` is
called. Each reader writes down when it last saw plaintext; clocks are CLOCK_MONOTONIC, which all processes share.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from cryptfs.cli import mounts
from cryptfs.format.agent_msg import RequestDecoder, encode_request

PASSPHRASE = "measure lock 7"
LATE_S = 3.0
"""How late the agent's answers to the waiting reader are: longer than any lock may take."""
COLD_FILES = 512
BESIDE_MIB = 128
READERS = ("mapped", "read", "beside", "waiting")

READER = """
import ctypes, mmap, os, sys, time
path, how, out = sys.argv[1:4]
report = os.open(out, os.O_WRONLY | os.O_CREAT, 0o600)
print("ready", flush=True)
if how == "waiting":
    places = 1 << 30
    def read(number):
        with open(f"{path}/{number}", "rb") as file:
            file.read(1)
else:
    fd = os.open(path, os.O_RDONLY)
    base = (8 << 20) if how == "beside" else 0
    places = (os.fstat(fd).st_size - base) // (4096 * 257)
    if how == "mapped":
        # Through the mapping, but told by an error instead of a signal what cannot be read: so it can go on.
        view = mmap.mmap(fd, 0, flags=mmap.MAP_PRIVATE)
        base = ctypes.addressof(ctypes.c_char.from_buffer(view))
        fd = os.open("/proc/self/mem", os.O_RDONLY)
    def read(number):
        os.pread(fd, 1, base + number % places * 4096 * 257)
number = refused = 0
while refused < places:
    try:
        read(number)
        refused = 0
        os.pwrite(report, b"%d" % time.monotonic_ns(), 0)
    except OSError as error:
        refused += 1
        if how == "waiting":
            break
    number += 1
os.lseek(report, 0, os.SEEK_END)
os.write(report, b" refused %d" % time.monotonic_ns())
"""

WRITER = """
import mmap, os, sys
path, how = sys.argv[1:3]
fd = os.open(path, os.O_RDWR | os.O_CREAT)
os.ftruncate(fd, max(os.fstat(fd).st_size, 8 << 20))
view = mmap.mmap(fd, 8 << 20) if how == "mapped" else None
print("ready", flush=True)
number = 0
try:
    while True:
        number += 1
        at = number * 4096 % (8 << 20)
        if view is not None:
            view[at : at + 4096] = number.to_bytes(4, "big") * 1024
        else:
            os.pwrite(fd, number.to_bytes(4, "big") * 1024, at)
            if how == "synced":
                os.fsync(fd)
except OSError:
    pass
"""

BUSY = """
print("ready", flush=True)
while True:
    pass
"""


def main() -> int:
    """Measure and print one JSON line per round, and one with the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--disk", type=Path, default=None, help="where the volume lies")
    parser.add_argument("--busy", type=int, default=0, help="processes that use the CPU besides")
    options = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="lock-", dir=options.disk))
    lines = []
    try:
        for number in range(options.rounds):
            lines.append(one_round(root / str(number), options.mib, options.busy))
            print(json.dumps(lines[-1]), flush=True)
    finally:
        shutil.rmtree(root)
    print(
        json.dumps({"median": {name: round(statistics.median(line[name] for line in lines), 3) for name in lines[0]}})
    )
    print(json.dumps({"worst": {name: max(line[name] for line in lines) for name in lines[0]}}))
    return 0


class LateAgent:
    """Between daemon and agent: what the daemon asks to have unwrapped is passed on late, once `late` is set."""

    def __init__(self, path: Path, agent: Path) -> None:
        self.late = False
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._agent = agent
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            daemon, _ = self._listener.accept()
            agent = socket.socket(socket.AF_UNIX)
            agent.connect(str(self._agent))
            threading.Thread(target=self._requests, args=(daemon, agent), daemon=True).start()
            threading.Thread(target=self._answers, args=(agent, daemon), daemon=True).start()

    def _requests(self, daemon: socket.socket, agent: socket.socket) -> None:
        decoder = RequestDecoder()
        while data := daemon.recv(1 << 16):
            for request in decoder.feed(data):
                message = encode_request(request.request_id, request.verb, request.args)
                if self.late and request.verb == "unwrap":
                    later = threading.Timer(LATE_S, _send, (agent, message))
                    later.daemon = True
                    later.start()
                else:
                    _send(agent, message)
        agent.shutdown(socket.SHUT_RDWR)

    def _answers(self, agent: socket.socket, daemon: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := agent.recv(1 << 16):
                daemon.sendall(data)
            daemon.shutdown(socket.SHUT_RDWR)


def _send(sock: socket.socket, message: bytes) -> None:
    with contextlib.suppress(OSError):
        sock.sendall(message)


class Place:
    """One round's volume, and how `cryptfs` is run on it."""

    def __init__(self, root: Path) -> None:
        for name in ("", "r", "s", "h", "clear"):
            (root / name).mkdir(mode=0o700, parents=True)
        self.root, self.vault, self.clear = root, root / "vault", root / "clear"
        own = {"HOME": "h", "XDG_RUNTIME_DIR": "r", "XDG_STATE_HOME": "s"}
        self.env = {**os.environ, **{n: str(root / p) for n, p in own.items()}, "CRYPTFS_PASSPHRASE": PASSPHRASE}

    def cryptfs(self, *words: object) -> None:
        """Run a command that must succeed."""
        subprocess.run([sys.executable, "-m", "cryptfs", *map(str, words)], env=self.env, check=True)

    @contextlib.contextmanager
    def mounted(self, agent_socket: Path) -> Iterator[int]:
        """By a daemon that talks to this agent; its pid."""
        read_fd, write_fd = os.pipe()
        words = ["--cipher-dir", self.vault, "--mountpoint", self.clear, "--agent-socket", agent_socket]
        daemon = subprocess.Popen(
            [sys.executable, "-m", "cryptfs.daemon", *map(str, words), "--ready-fd", str(write_fd)],
            env=self.env, stdin=subprocess.DEVNULL, stderr=(self.root / "daemon.log").open("wb"), pass_fds=(write_fd,),
        )  # fmt: skip
        os.close(write_fd)
        with open(read_fd, "rb") as ready:
            assert ready.readline() == b"ready\n", (self.root / "daemon.log").read_text()
        try:
            yield daemon.pid
        finally:
            mounts.unmount(self.clear)
            daemon.wait(60)


def one_round(root: Path, mib: int, busy: int) -> dict[str, float]:
    """Seconds from the call of `lock` to the last plaintext each reader saw, and to the end of the command."""
    place = Place(root)
    clear, cold = place.clear, place.clear / "cold"
    place.cryptfs("init", "--kdf-cost", "low", place.vault)
    place.cryptfs("mount", place.vault, clear)
    chunk = os.urandom(1 << 20)
    for name, count in (("big", mib), ("buffered", BESIDE_MIB)):
        with (clear / name).open("wb") as out:
            for _ in range(count):
                out.write(chunk)
    cold.mkdir()
    for number in range(COLD_FILES):
        # Larger than what is warmed along with a neighbour: each needs the agent for itself.
        (cold / str(number)).write_bytes(bytes(1 << 20))
    place.cryptfs("umount", clear)
    place.cryptfs("unlock", place.vault)
    agent = LateAgent(root / "late.sock", root / "r" / "cryptfs" / "agent.sock")
    with place.mounted(root / "late.sock") as daemon, contextlib.ExitStack() as stack:
        for name in ("big", "buffered"):
            with (clear / name).open("rb") as content:
                while content.read(1 << 20):
                    pass
        children: list[subprocess.Popen[bytes]] = []

        def start(program: str, *words: object) -> subprocess.Popen[bytes]:
            child = subprocess.Popen([sys.executable, "-c", program, *map(str, words)], stdout=subprocess.PIPE)
            stack.callback(child.wait)
            stack.callback(child.kill)
            assert child.stdout is not None
            assert child.stdout.readline() == b"ready\n"
            child.stdout.close()
            return child

        children = [start(READER, clear / "big", how, root / how) for how in ("mapped", "read")]
        children.append(start(READER, clear / "buffered", "beside", root / "beside"))
        for how in ("buffered", "synced", "mapped"):
            start(WRITER, clear / how, how)
        for _ in range(busy):
            start(BUSY)
        agent.late = True
        children.append(start(READER, cold, "waiting", root / "waiting"))
        time.sleep(1)
        load = os.getloadavg()[0]
        called = time.monotonic()
        place.cryptfs("lock", clear)
        returned = time.monotonic()
        for child in children:
            child.wait(30)
        reports = {how: (root / how).read_bytes().split() for how in READERS}
        assert all(report[-2] == b"refused" for report in reports.values()), reports
        del daemon
        line = {f"last_{how}_s": int(reports[how][0]) / 1e9 - called for how in ("mapped", "read", "beside")}
        line["waiting_refused_s"] = int(reports["waiting"][-1]) / 1e9 - called
        line["lock_returned_s"] = returned - called
        return {**{name: round(s, 3) for name, s in line.items()}, "load": round(load, 1)}


if __name__ == "__main__":
    sys.exit(main())
