"""`cryptfs check` and `cryptfs export` as a user runs them, on a volume that is mounted and on one that is not."""

from __future__ import annotations

import json
import os
import random
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.mount.box import Box
from tests.processes import processes_with

pytestmark = pytest.mark.mount


def report(box: Box, *words: str, code: int = 0) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(box.run("check", "--json", *words, box.vault, code=code).stdout)
    return document


def data_files(box: Box) -> list[Path]:
    return [path for path in (box.vault / "tree").rglob("*") if path.is_file() and path.name != ".dir"]


@pytest.fixture
def filled(box: Box) -> Box:
    """Unmounted and locked, with one file of 100 000 bytes and one directory with a small file."""
    box.mount()
    (box.clear / "file").write_bytes(bytes(range(256)) * 391)
    (box.clear / "dir").mkdir()
    (box.clear / "dir" / "small").write_text("hello")
    box.umount()
    return box


def test_clean_damaged_repaired(filled: Box, tmp_path: Path) -> None:
    box = filled
    found = report(box, "--deep")
    assert (found["result"], found["files"], found["directories"], found["mounted"]) == ("clean", 2, 2, False)
    assert found["findings"] == []
    assert processes_with(b"cryptfs.agent", os.fsencode(box.agent_socket)) == [] or not box.run("status").stdout

    large = max(data_files(box), key=lambda path: path.stat().st_size)
    raw = bytearray(large.read_bytes())
    raw[64 + 20_000] ^= 1
    large.write_bytes(raw)
    assert report(box)["result"] == "clean"
    [finding] = report(box, "--deep", code=21)["findings"]
    assert (finding["path"], finding["what"], finding["blocks"]) == ("/file", "blocks", [[1, 1]])
    assert "damage: /file: blocks: tag: blocks 1\n" in box.run("check", "--deep", box.vault, code=21).stdout

    stopped = box.run("export", box.vault, "/", tmp_path / "one", code=21)
    assert "tag: /file" in stopped.stderr
    past = box.run("export", "--skip-damaged", box.vault, "/", tmp_path / "two", code=21)
    assert "/file: tag: bytes 16384-32767 could not be read and are zeros" in past.stderr
    assert (tmp_path / "two" / "dir" / "small").read_text() == "hello"
    assert (tmp_path / "two" / "file").read_bytes()[32768:] == (bytes(range(256)) * 391)[32768:]

    fixed = report(box, "--deep", "--repair", code=24)
    [finding] = fixed["findings"]
    assert finding["lost"] == [[16384, 16384]]
    assert finding["moved_to"] == fixed["quarantine"] + "/file"
    assert report(box, "--deep", "--repair")["result"] == "clean"
    box.mount()
    assert not (box.clear / "file").exists()
    content = (box.clear / finding["moved_to"][1:]).read_bytes()
    assert content == (bytes(range(256)) * 391)[:16384] + bytes(16384) + (bytes(range(256)) * 391)[32768:]


def test_in_a_mounted_volume(filled: Box, tmp_path: Path) -> None:
    box = filled
    box.mount()
    with (box.clear / "growing").open("wb", buffering=0) as file:
        file.write(bytes(70_000))
        found = report(box, "--deep")
        assert (found["result"], found["mounted"], found["busy"], found["findings"]) == ("clean", True, [], [])
        assert found["files"] == 3
        box.run("export", box.vault, "/dir", tmp_path / "dir")
        assert (tmp_path / "dir" / "small").read_text() == "hello"
    assert "mounted" in box.run("check", "--repair", box.vault, code=14).stderr
    (box.vault / "tree" / "note").write_text("in the wrong place")
    [finding] = report(box, code=21)["findings"]
    assert (finding["what"], finding["path"]) == ("stray", "/note")
    # The mount has its key still, and goes on.
    assert (box.clear / "dir" / "small").read_text() == "hello"
    (box.clear / "after").write_text("x")


def test_the_key_stays_where_it_was(filled: Box) -> None:
    box = filled
    box.unlock()
    box.run("check", box.vault, env={"CRYPTFS_PASSPHRASE": ""})
    assert json.loads(box.run("status", "--json").stdout)[0]["state"] == "unlocked"
    box.run("lock", box.vault)
    report(box)
    assert json.loads(box.run("status", "--json").stdout) == []


def test_refusals(filled: Box, tmp_path: Path) -> None:
    box = filled
    box.run("check", tmp_path, code=10)
    box.run("export", box.vault, "/none", tmp_path / "x", code=2)
    box.run("export", box.vault, "/", box.vault / "x", code=2)
    box.run("check", box.vault, code=13, env={"CRYPTFS_PASSPHRASE": "wrong"})


def test_a_volume_that_is_written_to_meanwhile_is_not_damaged(box: Box) -> None:
    box.mount()
    stop = threading.Event()
    failures: list[OSError] = []

    def write() -> None:
        rng, top, number = random.Random(3), box.clear, 0
        with (top / "log").open("ab", buffering=0) as log:
            while not stop.is_set():
                number += 1
                directory = top / f"d{rng.randrange(3)}"
                try:
                    directory.mkdir(exist_ok=True)
                    (directory / "new").write_bytes(rng.randbytes(20_000))
                    (directory / "new").rename(directory / f"f{rng.randrange(4)}")
                    log.write(rng.randbytes(3000))
                    with (top / "over").open("r+b" if number > 1 else "wb") as over:
                        over.seek(rng.randrange(60_000))
                        over.write(rng.randbytes(9000))
                        over.truncate(rng.randrange(1, 70_000))
                    (top / f"s{number}").symlink_to("x" * rng.randrange(1, 50))
                    (top / f"s{max(1, number - 3)}").unlink(missing_ok=True)
                    if number % 5 == 0:
                        shutil.rmtree(directory)
                except OSError as error:
                    failures.append(error)
                    return

    writer = threading.Thread(target=write)
    writer.start()
    try:
        found = [report(box, "--deep") for _ in range(2)]
    finally:
        stop.set()
        writer.join()
    assert failures == []
    assert [each["result"] for each in found] == ["clean"] * 2
    assert report(box, "--deep")["busy"] == []
    box.umount()
    assert report(box, "--deep")["findings"] == []
