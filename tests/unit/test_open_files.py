"""The table of open files, as another process finds it."""

from __future__ import annotations

import random
from collections import Counter

from cryptfs.fuse.open_files import OpenFiles, read_table


def test_the_table_is_what_is_open_now() -> None:
    rng, files, opens = random.Random(7), OpenFiles(), Counter[int]()
    try:
        for step in range(20_000):
            if opens and rng.random() < 0.48:
                ino = rng.choice(list(opens))
                files.released(ino)
                opens -= Counter([ino])
            else:
                ino = rng.randrange(1, 3000)
                files.opened(ino, writing=bool(step % 3))
                opens[ino] += 1
            if step % 1000 == 0:
                assert sorted(read_table(files.fd)) == sorted(opens) == sorted(ino for ino, _ in files.inos())
        while opens:
            ino = next(iter(opens))
            files.released(ino)
            opens -= Counter([ino])
        assert (read_table(files.fd), files.inos()) == ([], [])
    finally:
        files.close()


def test_what_nobody_writes_comes_first() -> None:
    files = OpenFiles()
    try:
        files.opened(1, writing=True)
        files.opened(2, writing=False)
        files.opened(3, writing=False)
        files.opened(3, writing=True)
        assert files.inos() == [(2, False), (1, True), (3, True)]
        files.released(3)
        assert files.inos()[0] == (2, False)
        files.released(3)
        assert files.inos() == [(2, False), (1, True)]
    finally:
        files.close()
