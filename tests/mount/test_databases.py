"""SQLite with several writing processes, in both kinds of journal; killed in the middle, too."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from tests.mount.box import Box

pytestmark = [pytest.mark.mount, pytest.mark.slow]

TIMEOUT_S = 120
TRANSACTIONS = 60

WRITER = """
import sqlite3, sys
path, me, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
db = sqlite3.connect(path, timeout=60, isolation_level=None)
db.execute("pragma synchronous = full")
for number in range(count):
    db.execute("begin immediate")
    [total] = db.execute("select total from counter").fetchone()
    db.execute("update counter set total = ?", (total + 1,))
    db.execute("insert into line values (?, ?, ?)", (me, number, "x" * (37 * number % 3000)))
    db.execute("commit")
    print(number, flush=True)
db.close()
"""


def made(path: Path, journal: str) -> None:
    with closing(sqlite3.connect(path)) as db:
        assert db.execute(f"pragma journal_mode = {journal}").fetchone() == (journal,)
        db.execute("create table counter (total integer)")
        db.execute("create table line (writer text, number integer, text text, primary key (writer, number))")
        db.execute("insert into counter values (0)")
        db.commit()


def writers(path: Path, count: int) -> list[subprocess.Popen[bytes]]:
    return [
        subprocess.Popen([sys.executable, "-c", WRITER, path, f"w{n}", str(count)], stdout=subprocess.PIPE)
        for n in range(2)
    ]


def counted(path: Path) -> tuple[int, set[tuple[str, int]]]:
    """The counter, and the lines; fails unless the database is sound and both agree."""
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("pragma integrity_check").fetchall() == [("ok",)]
        [total] = db.execute("select total from counter").fetchone()
        lines = db.execute("select writer, number, text from line").fetchall()
    assert total == len(lines)
    assert all(text == "x" * (37 * number % 3000) for _, number, text in lines)
    return total, {(writer, number) for writer, number, _ in lines}


@pytest.mark.parametrize("journal", ["delete", "truncate", "persist", "wal"])
def test_two_writers(mounted: Box, journal: str) -> None:
    path = mounted.clear / "db"
    made(path, journal)
    started = writers(path, TRANSACTIONS)
    try:
        said = [process.communicate(timeout=TIMEOUT_S)[0] for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    assert [len(lines.splitlines()) for lines in said] == [TRANSACTIONS] * 2
    assert counted(path)[0] == 2 * TRANSACTIONS
    mounted.remount()
    assert counted(path)[0] == 2 * TRANSACTIONS


@pytest.mark.parametrize("journal", ["delete", "wal"])
def test_what_was_committed_outlives_the_daemon(mounted: Box, journal: str) -> None:
    path = mounted.clear / "db"
    made(path, journal)
    started = writers(path, 100_000)
    committed: set[tuple[str, int]] = set()
    try:
        for number, process in enumerate(started):
            assert process.stdout is not None
            while len([each for each in committed if each[0] == f"w{number}"]) < 15:
                committed.add((f"w{number}", int(process.stdout.readline())))
        mounted.kill_daemon()
        for number, process in enumerate(started):
            process.kill()
            rest, _ = process.communicate(timeout=TIMEOUT_S)
            committed |= {(f"w{number}", int(line)) for line in rest.split(b"\n")[:-1]}
    finally:
        for process in started:
            process.kill()
            process.wait()
    mounted.mount()
    assert counted(path)[1] >= committed
