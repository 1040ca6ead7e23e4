"""The demo's own judgement: every kind of difference is seen, and known text is found where it is."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from scripts.demo import compare, search

EARLIER_NS = 1_500_000_000_123_456_789
STARTED_NS = EARLIER_NS + 10**9


def make_tree(root: Path) -> None:
    (root / "directory").mkdir(parents=True)
    for name in ("a", "b", "directory/c"):
        (root / name).write_bytes(name.encode() * 1000)
        os.utime(root / name, ns=(EARLIER_NS, EARLIER_NS))
    os.link(root / "a", root / "directory" / "a-again")
    os.symlink("directory/c", root / "soft")
    os.mkfifo(root / "fifo")


def differences(plain: Path, other: Path, started_ns: int) -> list[str]:
    trees = [compare.read_tree(root, lambda _count: None) for root in (plain, other)]
    return compare.differences(trees[0], trees[1], started_ns)


@pytest.fixture
def trees(tmp_path: Path) -> tuple[Path, Path]:
    for name in ("plain", "other"):
        make_tree(tmp_path / name)
    return tmp_path / "plain", tmp_path / "other"


def test_equal_trees_differ_in_nothing(trees: tuple[Path, Path]) -> None:
    assert differences(*trees, STARTED_NS) == []
    assert compare.read_tree(trees[0], lambda _count: None).count("file") == 4


def rewrite(root: Path) -> None:
    with open(root / "b", "r+b") as file:
        file.write(b"x")
    os.utime(root / "b", ns=(EARLIER_NS, EARLIER_NS))


def relink(root: Path) -> None:
    (root / "directory" / "a-again").unlink()
    shutil.copy2(root / "a", root / "directory" / "a-again")


def retarget(root: Path) -> None:
    (root / "soft").unlink()
    os.symlink("a", root / "soft")


def replace_fifo(root: Path) -> None:
    (root / "fifo").unlink()
    (root / "fifo").touch()


CHANGES: dict[str, Callable[[Path], object]] = {
    "b: content": rewrite,
    "b: size": lambda root: os.truncate(root / "b", 999),
    "b: mode": lambda root: (root / "b").chmod(0o604),
    "b: mtime_ns": lambda root: os.utime(root / "b", ns=(EARLIER_NS, EARLIER_NS + 1)),
    "b: only in the plain copy": lambda root: (root / "b").unlink(),
    "new: only in the volume": lambda root: (root / "new").touch(),
    "soft: content": retarget,
    "directory/a-again: first_name": relink,
    "fifo: kind": replace_fifo,
}


@pytest.mark.parametrize("expected", CHANGES)
def test_a_difference_is_seen(trees: tuple[Path, Path], expected: str) -> None:
    CHANGES[expected](trees[1])
    assert any(line.startswith(expected) for line in differences(*trees, STARTED_NS))


def test_times_set_since_the_start_are_not_compared(trees: tuple[Path, Path]) -> None:
    os.utime(trees[1] / "b", ns=(EARLIER_NS, EARLIER_NS + 1))
    assert differences(*trees, EARLIER_NS) == []


def test_known_names_and_lines_are_found_where_they_are(tmp_path: Path) -> None:
    plain, cipher = tmp_path / "plain", tmp_path / "cipher"
    plain.mkdir()
    cipher.mkdir()
    line = b"    return the_very_line_that_is_looked_for\n"
    (plain / "a_known_module.py").write_bytes(b"import os\n" + line)
    (cipher / "noise").write_bytes(os.urandom(10_000))
    needles = search.collect(plain, tmp_path / "patterns")
    assert search.files_matching(needles, plain) == [str(plain / "a_known_module.py")]
    assert search.files_matching(needles, cipher) == []
    assert search.names_found(needles, cipher) == frozenset()
    (cipher / "leak").write_bytes(os.urandom(100) + line.strip() + os.urandom(100))
    (cipher / "name").write_bytes(b"\0a_known_module.py\0")
    (cipher / "a_known_module.py").touch()
    assert sorted(search.files_matching(needles, cipher)) == [str(cipher / "leak"), str(cipher / "name")]
    assert search.names_found(needles, cipher) == {b"a_known_module.py"}
