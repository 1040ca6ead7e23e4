"""Whatever is exchanged for a symlink while the daemon works, it never leads outside the cipher directory."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import trio

from cryptfs.errors import CryptfsError
from cryptfs.store.local import LocalStore
from cryptfs.testing.volumes import SampleVolume
from tests.faults.driver import Driver

DURATION_S = 2.0
SECRET = b"this lies outside " * 300


def describe(top: Path) -> dict[str, tuple[object, ...]]:
    """Everything a daemon that was led here could have changed."""
    out: dict[str, tuple[object, ...]] = {}
    for where, dirs, files in os.walk(top):
        for name in (*dirs, *files, "."):
            path = Path(where, name)
            st = path.lstat()
            content = path.read_bytes() if name in files else b""
            out[str(path)] = (st.st_ino, st.st_mode, st.st_uid, st.st_size, st.st_mtime_ns, st.st_ctime_ns, content)
    return out


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """Where the symlinks lead: a directory that looks like part of a volume, a file that may be overwritten."""
    top = tmp_path / "outside"
    for name in ("dir", "dir/tree", "dir/sidecars", *(f"dir/{n:02x}" for n in range(256))):
        (top / name).mkdir(parents=True)
    for name in ("file", "dir/.dir", "dir/file"):
        (top / name).write_bytes(SECRET)
        (top / name).chmod(0o666)
    return top


class Attacker:
    """A process that begins when told to. One: two would follow each other's links out."""

    def __init__(self, vault: Path, outside: Path) -> None:
        self._program = [sys.executable, str(Path(__file__).with_name("attacker.py")), str(vault), str(outside), "1"]
        self._running: subprocess.Popen[str] | None = None

    def begin(self) -> None:
        self._running = subprocess.Popen(
            self._program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )

    def end(self) -> int:
        """How often it exchanged something. It ends when its standard input does."""
        running, self._running = self._running, None
        if running is None:
            return 0
        swaps = running.communicate(timeout=60)[0]
        assert running.returncode == 0
        return int(swaps)


@pytest.fixture
def attacker(tmp_path: Path, outside: Path) -> Iterator[Attacker]:
    (tmp_path / "vault").mkdir()
    made = Attacker(tmp_path / "vault", outside)
    yield made
    made.end()


async def test_a_racing_attacker(tmp_path: Path, outside: Path, attacker: Attacker) -> None:
    vault = tmp_path / "vault"
    store, sample = LocalStore(vault), SampleVolume(block_size=4096)
    await sample.create(store)
    driver = await Driver.mount(store, sample)
    for above in (b"d0", b"d1", b"d2"):
        await driver.mkdir(above)
        await driver.symlink(b"target", above + b"/link")
    before = describe(outside)
    attacker.begin()
    rng = random.Random(1)
    done = failed = 0
    ends = time.monotonic() + DURATION_S
    while time.monotonic() < ends or (done < 50 and time.monotonic() < ends + 20):
        with trio.fail_after(30):
            ok = await attempt(driver, rng)
        done, failed = done + ok, failed + (not ok)
        if rng.random() < 0.02:
            # From nothing: every directory is opened anew.
            driver.forget_all()
    swaps = attacker.end()
    assert describe(outside) == before
    assert swaps > 100
    assert failed > 5, "the attacker was never noticed: this shows nothing"
    assert done >= 50
    driver.kill()
    store.close_store()


async def attempt(driver: Driver, rng: random.Random) -> bool:
    """One operation; whether it succeeded."""
    above, name = b"d%d" % rng.randrange(3), b"f%d" % rng.randrange(4)
    path, other = above + b"/" + name, b"d%d/f%d" % (rng.randrange(3), rng.randrange(4))
    calls: list[Callable[[], Awaitable[object]]] = [
        lambda: _write(driver, path, rng), lambda: _write(driver, path, rng), lambda: _read(driver, path),
        lambda: driver.rename(path, other), lambda: driver.unlink(path), lambda: driver.mkdir(above + b"/sub"),
        lambda: driver.rmdir(above + b"/sub"), lambda: driver.chmod(path, 0o600), lambda: driver.utime(path, 10**18),
        lambda: driver.link(path, other), lambda: driver.truncate(path, 5000), lambda: driver.listing(above),
        lambda: driver.symlink(b"t", path), lambda: driver.fsyncdir(above), driver.volume.files.settle,
        driver.volume.reaper.flush,
    ]  # fmt: skip
    try:
        await rng.choice(calls)()
    except (OSError, CryptfsError):
        return False
    return True


async def _write(driver: Driver, path: bytes, rng: random.Random) -> None:
    try:
        fh = await driver.open(path)
    except FileNotFoundError:
        fh = await driver.create(path)
    try:
        await driver.write(fh, rng.randrange(9000), b"w" * 5000)
        with suppress(OSError):
            await driver.fsync(fh)
    finally:
        await driver.close(fh)


async def _read(driver: Driver, path: bytes) -> None:
    fh = await driver.open(path, os.O_RDONLY)
    try:
        assert b"outside" not in await driver.read(fh, 0, 1 << 20)
    finally:
        await driver.close(fh)
