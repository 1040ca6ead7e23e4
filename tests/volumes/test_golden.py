"""Volumes of every format version that was ever released open, whole: with the program and with the reference."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.mount.box import PASSPHRASE, Box, boxed
from tests.reference.trees import Entry, describe, reference_decrypt

HERE = Path(__file__).resolve().parent


def unpacked(name: str, short_tmp: Path) -> Iterator[tuple[Box, Any]]:
    with boxed(short_tmp) as box:
        subprocess.run(["tar", "-xpzf", HERE / f"{name}.tar.gz", "--no-same-owner", "-C", box.root], check=True)
        yield box, json.loads((HERE / f"{name}.json").read_text())


@pytest.fixture(params=["v1"])
def golden(request: pytest.FixtureRequest, short_tmp: Path) -> Iterator[tuple[Box, dict[str, Entry]]]:
    """An unpacked golden volume, and what must be in it."""
    yield from unpacked(request.param, short_tmp)


@pytest.fixture(params=["v1-keys"])
def keys(request: pytest.FixtureRequest, short_tmp: Path) -> Iterator[tuple[Box, dict[str, Any]]]:
    """One with protectors of several kinds, shred secrets, rotations and a domain; its secrets lie beside it."""
    yield from unpacked(request.param, short_tmp)


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


WAYS = {"passphrase": (), "keyfile": ("--keyfile", "key"), "recovery": ("--recovery-file", "recovery.txt")}


def without_domain(tree: dict[str, Entry]) -> dict[str, Entry]:
    return {path: entry for path, entry in tree.items() if path.split("/")[0] != "payroll"}


@pytest.mark.parametrize("way", WAYS)
def test_the_reference_reads_it_by_every_protector(keys: tuple[Box, dict[str, Any]], tmp_path: Path, way: str) -> None:
    box, expected = keys
    options = [word if word.startswith("--") else str(box.root / word) for word in WAYS[way]]
    dest = tmp_path / "plain"
    run = reference_decrypt(box.vault, dest, PASSPHRASE.encode(), *options, "--shred-keyfile", box.root / "shred.key")
    assert (run.returncode, expected["domain_id"] in run.stderr + run.stdout) == (0, True), run.stderr
    assert without_domain(describe(dest)) == without_domain(expected["volume"])
    wrong = reference_decrypt(
        box.vault, tmp_path / "none", PASSPHRASE.encode(), *options, "--shred-keyfile", box.root / "domain-shred.key"
    )  # fmt: skip
    assert (wrong.returncode, "shred secret" in wrong.stderr) == (1, True)


def test_the_reference_reads_its_domain(keys: tuple[Box, dict[str, Any]], tmp_path: Path) -> None:
    box, expected = keys
    secrets = ("--keyfile", box.root / "domain.key", "--shred-keyfile", box.root / "domain-shred.key")
    run = reference_decrypt(box.vault / "domains" / expected["domain_id"], tmp_path / "plain", b"", *secrets)
    assert (run.returncode, run.stderr) == (0, "")
    assert describe(tmp_path / "plain") == expected["domain"]


@pytest.mark.mount
def test_the_program_reads_it_and_goes_on_with_its_rotation(keys: tuple[Box, dict[str, Any]], fuse: None) -> None:
    box, expected = keys
    shred = {"CRYPTFS_SHRED_KEYFILE": str(box.root / "shred.key")}
    domain_shred = {"CRYPTFS_SHRED_KEYFILE": str(box.root / "domain-shred.key")}
    for words in (("--keyfile", box.root / "key"), ("--recovery-file", box.root / "recovery.txt")):
        box.run_without_passphrase("unlock", box.vault, *words, env=shred)
        box.run("lock", box.vault)
    box.run("mount", box.vault, box.clear, env=shred)
    box.run_without_passphrase("unlock", box.clear / "payroll", "--keyfile", box.root / "domain.key", env=domain_shred)
    assert describe(box.clear) == expected["volume"]
    box.run(
        *("rotate", box.vault, "--kek", "--destroy-old", "--protector", "golden"),
        *("--keep", f"keyfile={box.root / 'key'}", "--drop-others"),
        env=shred,
    )
    assert json.loads(box.run("policy", box.vault, "--json").stdout)["policy"]["max_age_s"] == 30
    box.umount()
    box.run_without_passphrase("mount", box.vault, box.clear, "--keyfile", box.root / "key", env=shred)
    box.run_without_passphrase("unlock", box.clear / "payroll", "--keyfile", box.root / "domain.key", env=domain_shred)
    assert describe(box.clear) == expected["volume"]
