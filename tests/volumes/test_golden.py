"""Volumes of every format version that was ever released open, whole: with the program and with the reference."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.box import PASSPHRASE, Box, boxed
from tests.reference.trees import Entry, describe, reference_decrypt

HERE = Path(__file__).resolve().parent


@pytest.fixture(params=["v1"])
def golden(request: pytest.FixtureRequest, short_tmp: Path) -> Iterator[tuple[Box, dict[str, Entry]]]:
    """An unpacked golden volume, and what must be in it."""
    with boxed(short_tmp) as box:
        subprocess.run(
            ["tar", "-xpzf", HERE / f"{request.param}.tar.gz", "--no-same-owner", "-C", box.root], check=True
        )
        yield box, json.loads((HERE / f"{request.param}.json").read_text())


def test_the_reference_reads_it(golden: tuple[Box, dict[str, Entry]], tmp_path: Path) -> None:
    box, expected = golden
    run = reference_decrypt(box.vault, tmp_path / "plain", PASSPHRASE.encode())
    assert (run.returncode, run.stderr) == (0, "")
    assert describe(tmp_path / "plain") == expected


@pytest.mark.mount
def test_the_program_reads_it_and_then_writes_to_it(golden: tuple[Box, dict[str, Entry]], fuse: None) -> None:
    box, expected = golden
    box.mount()
    assert describe(box.clear) == expected
    (box.clear / "sub" / "new").write_text("written today")
    with (box.clear / "overwritten").open("r+b") as stream:
        stream.write(b"today")
    box.remount()
    assert (box.clear / "sub" / "new").read_text() == "written today"
    assert (box.clear / "overwritten").read_bytes().startswith(b"today")
    changed = {name for name, entry in describe(box.clear).items() if entry != expected.get(name)}
    assert changed == {"sub", "sub/new", "overwritten"}
