"""How long after `cryptfs lock` is called a plaintext can still be read: in the worst company we could think of.

    python -m scripts.measure_lock [--mib 1024] [--rounds 3] [--disk DIR]

A file of that size is in the page cache and mapped by a process that reads from every part of the mapping in turn;
another process reads it through a descriptor; others write (buffered, synced, mapped) and one reads what is not cached
through an agent that answers late. Then `lock` is called. Each reader writes down when it last saw plaintext; clocks
are CLOCK_MONOTONIC, which all processes share.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cryptfs.cli import mounts

PASSPHRASE = "measure lock 7"
PAGE = 4096

READER = """
import mmap, os, signal, sys, time
path, how, out = sys.argv[1:4]
fd = os.open(path, os.O_RDONLY)
size = os.fstat(fd).st_size
view = mmap.mmap(fd, 0, prot=mmap.PROT_READ) if how == "mapped" else None
report = os.open(out, os.O_WRONLY | os.O_CREAT, 0o600)
step = 4096 * 257
at = 0
print("ready", flush=True)
while True:
    try:
        byte = view[at] if view is not None else os.pread(fd, 1, at)[0]
    except OSError as error:
        os.write(report, b" refused %d" % error.errno)
        break
    os.pwrite(report, b"%d" % time.monotonic_ns(), 0)
    os.lseek(report, 0, os.SEEK_END)
    at = (at + step) % size
"""

WRITER = """
import mmap, os, sys
path, how = sys.argv[1:3]
fd = os.open(path, os.O_RDWR | os.O_CREAT)
os.ftruncate(fd, 8 << 20)
view = mmap.mmap(fd, 0) if how == "mapped" else None
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


def main() -> int:
    """Measure and print one JSON line per round."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--disk", type=Path, default=None, help="where the volume lies")
    options = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="lock-", dir=options.disk))
    try:
        worst = max(one_round(root / str(number), options.mib) for number in range(options.rounds))
    finally:
        shutil.rmtree(root)
    print(json.dumps({"worst_s": round(worst, 3)}))
    return 0


def one_round(root: Path, mib: int) -> float:
    """Seconds from the call of `lock` to the last plaintext seen."""
    for name in ("", "r", "s", "h", "clear"):
        (root / name).mkdir(mode=0o700, parents=True)
    vault, clear = root / "vault", root / "clear"
    own = {"HOME": "h", "XDG_RUNTIME_DIR": "r", "XDG_STATE_HOME": "s"}
    env = {**os.environ, **{name: str(root / path) for name, path in own.items()}, "CRYPTFS_PASSPHRASE": PASSPHRASE}

    def cryptfs(*words: object) -> None:
        subprocess.run([sys.executable, "-m", "cryptfs", *map(str, words)], env=env, check=True)

    cryptfs("init", "--kdf-cost", "low", vault)
    cryptfs("mount", vault, clear)
    children: list[subprocess.Popen[bytes]] = []
    try:
        big = clear / "big"
        with big.open("wb") as out:
            chunk = os.urandom(1 << 20)
            for _ in range(mib):
                out.write(chunk)
        os.sync()
        with big.open("rb") as content:
            while content.read(1 << 20):
                pass

        def start(program: str, *words: object) -> None:
            child = subprocess.Popen([sys.executable, "-c", program, *map(str, words)], stdout=subprocess.PIPE)
            children.append(child)
            assert child.stdout is not None
            assert child.stdout.readline() == b"ready\n"

        for how in ("mapped", "read"):
            start(READER, big, how, root / how)
        for how in ("buffered", "synced", "mapped"):
            start(WRITER, clear / how, how)
        time.sleep(1)
        called = time.monotonic()
        cryptfs("lock", clear)
        returned = time.monotonic()
        for child in children[:2]:
            child.wait(30)
        seen = {how: int((root / how).read_bytes().split()[0]) / 1e9 - called for how in ("mapped", "read")}
        ends = {"mapped": children[0].returncode, "read": (root / "read").read_bytes().split()[1:]}
        assert ends["mapped"] == -signal.SIGBUS, ends
        line = {f"last_{how}_s": round(s, 3) for how, s in seen.items()}
        print(json.dumps({**line, "lock_returned_s": round(returned - called, 3)}), flush=True)
        return max(seen.values())
    finally:
        for child in children:
            child.kill()
            child.wait()
        daemon = mounts.daemon_of_mount(clear)
        cryptfs("umount", clear)
        assert daemon is not None


if __name__ == "__main__":
    sys.exit(main())
