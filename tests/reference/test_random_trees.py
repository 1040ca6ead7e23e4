"""The program and the reference read the same volume the same way, whatever was done in it."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mount.box import PASSPHRASE, Box
from tests.reference.trees import describe, reference_decrypt

pytestmark = pytest.mark.mount

CALLS = 200
SIZE_MAX = 100_000


class Doer:
    """Random calls below `top`. What makes no sense at the moment fails with the kernel's errno, and is skipped."""

    def __init__(self, top: Path, rng: random.Random) -> None:
        self.top, self.rng = os.fsencode(top), rng

    def run(self, calls: int) -> int:
        """How many calls succeeded."""
        verbs: list[Callable[[], object]] = [
            self.write, self.write, self.write, self.create, self.truncate, self.mkdir, self.rename, self.rename,
            self.unlink, self.rmdir, self.link, self.symlink, self.mkfifo, self.chmod, self.utime, self.fsync,
        ]  # fmt: skip
        done = 0
        for _ in range(calls):
            try:
                self.rng.choice(verbs)()
                done += 1
            except OSError:
                continue
        return done

    def some_dir(self) -> bytes:
        dirs = [self.top]
        for path, below, _ in os.walk(self.top):
            dirs += [path + b"/" + name for name in below]
        return self.rng.choice(dirs)

    def new_name(self) -> bytes:
        kind = self.rng.randrange(8)
        if kind == 0:
            return self.rng.choice([b"x", b"y"]) * self.rng.randrange(170, 256)
        if kind == 1:
            return bytes(byte or 1 for byte in self.rng.randbytes(12)).replace(b"/", b"-")
        return b"n%d" % self.rng.randrange(25)

    def new(self) -> bytes:
        return self.some_dir() + b"/" + self.new_name()

    def some(self, *, regular: bool = False) -> bytes:
        paths = []
        for path, dirs, files in os.walk(self.top):
            paths += [path + b"/" + name for name in (files if regular else [*dirs, *files])]
        if regular:
            paths = [path for path in paths if os.path.isfile(path) and not os.path.islink(path)]
        if not paths:
            raise FileNotFoundError
        return self.rng.choice(paths)

    def write(self) -> None:
        with open(self.some(regular=True), "r+b") as stream:
            stream.seek(self.rng.randrange(SIZE_MAX))
            stream.write(self.rng.randbytes(self.rng.choice([1, 100, 4096, 20_000])))

    def create(self) -> None:
        with open(self.new(), "xb") as stream:
            stream.write(self.rng.randbytes(self.rng.choice([0, 1, 5000, 16384, 40_000])))

    def truncate(self) -> None:
        os.truncate(self.some(regular=True), self.rng.choice([0, 1, 4096, 16384, self.rng.randrange(SIZE_MAX)]))

    def fsync(self) -> None:
        fd = os.open(self.some(regular=True), os.O_RDWR)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def mkdir(self) -> None:
        os.mkdir(self.new())

    def rename(self) -> None:
        os.rename(self.some(), self.new())

    def unlink(self) -> None:
        os.unlink(self.some())

    def rmdir(self) -> None:
        os.rmdir(self.some())

    def link(self) -> None:
        os.link(self.some(), self.new(), follow_symlinks=False)

    def symlink(self) -> None:
        os.symlink(b"t" * self.rng.choice([1, 30, 2000]), self.new())

    def mkfifo(self) -> None:
        os.mkfifo(self.new())

    def chmod(self) -> None:
        os.chmod(self.some(regular=True), self.rng.choice([0o600, 0o644, 0o4755]))

    def utime(self) -> None:
        os.utime(self.some(), ns=(1, self.rng.randrange(2**60)), follow_symlinks=False)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_random_trees_after_a_clean_unmount(seed: int, box: Box, tmp_path: Path) -> None:
    box.mount()
    doer = Doer(box.clear, random.Random(seed))
    assert doer.run(CALLS) > CALLS // 3
    box.remount()
    assert doer.run(CALLS) > CALLS // 3
    box.remount()
    seen = describe(box.clear)
    box.umount()
    run = reference_decrypt(box.vault, tmp_path / "plain", PASSPHRASE.encode())
    assert (run.returncode, run.stderr) == (0, "")
    assert describe(tmp_path / "plain") == seen


@pytest.mark.slow
@pytest.mark.parametrize("seed", [4])
def test_random_trees_after_the_daemon_was_killed(seed: int, box: Box, tmp_path: Path) -> None:
    """The page cache survives kill -9, so what the reference finds is what the next mount shows."""
    box.mount()
    doer = Doer(box.clear, random.Random(seed))
    doer.run(CALLS)
    box.remount()
    doer.run(CALLS)
    box.kill_daemon()
    run = reference_decrypt(box.vault, tmp_path / "plain", PASSPHRASE.encode())
    assert (run.returncode, run.stderr) == (0, "")
    box.mount()
    assert describe(tmp_path / "plain") == describe(box.clear)
    box.umount()
    again = reference_decrypt(box.vault, tmp_path / "again", PASSPHRASE.encode())
    assert (again.returncode, again.stderr) == (0, "")
    assert describe(tmp_path / "again") == describe(tmp_path / "plain")


def test_a_mounted_volume_is_refused(box: Box, tmp_path: Path) -> None:
    box.mount()
    run = reference_decrypt(box.vault, tmp_path / "plain", PASSPHRASE.encode())
    assert (run.returncode, run.stderr) == (1, "error: the volume is in use\n")
    assert not (tmp_path / "plain").exists()


def test_a_wrong_passphrase_opens_nothing(box: Box, tmp_path: Path) -> None:
    run = reference_decrypt(box.vault, tmp_path / "plain", b"wrong")
    assert (run.returncode, run.stderr) == (1, "error: no protector opens with this passphrase\n")
    assert not (tmp_path / "plain").exists()
