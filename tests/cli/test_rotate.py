"""`rotate` of a volume that is not mounted, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import PASSPHRASE, Cryptfs


def shown(cryptfs: Cryptfs, vault: Path) -> dict[str, Any]:
    status: dict[str, Any] = json.loads(cryptfs.run("rotate", vault, "--status", "--json").stdout)
    return status


def test_a_new_key_and_the_old_one_destroyed(cryptfs: Cryptfs, vault: Path) -> None:
    old = (vault / "volume").read_bytes()
    cryptfs.run("rotate", vault, "--kek", passphrase=PASSPHRASE)
    assert shown(cryptfs, vault) == {
        "kek_version": 2, "older_versions": [1], "mounted": False, "state": None, "done": None, "total": None,
        "failed": None, "left": None, "message": None, "failed_ids": [],
    }  # fmt: skip
    assert "goes on" in cryptfs.run("rotate", vault, "--status").stdout
    assert cryptfs.status() == [], "it is left locked, as it was"
    # The one before was finished: this call is about another one.
    cryptfs.run("rotate", vault, "--kek", "--destroy-old", passphrase=PASSPHRASE)
    assert (shown(cryptfs, vault)["kek_version"], shown(cryptfs, vault)["older_versions"]) == (3, [])
    cryptfs.run("check", vault, "--deep", passphrase=PASSPHRASE)
    now = (vault / "volume").read_bytes()
    (vault / "volume").write_bytes(old)
    cryptfs.run("check", vault, code=25, passphrase=PASSPHRASE)
    (vault / "volume").write_bytes(now)
    cryptfs.run("unlock", vault, passphrase=PASSPHRASE)
    cryptfs.run("rotate", vault, "--kek", passphrase=PASSPHRASE)
    assert [volume["state"] for volume in cryptfs.status()] == ["unlocked"], "it is left unlocked, as it was"
    cryptfs.run("rotate", vault, "--destroy-old")
    assert (shown(cryptfs, vault)["kek_version"], shown(cryptfs, vault)["older_versions"]) == (4, [])
    cryptfs.run("lock", vault)


def test_a_wrong_passphrase_changes_nothing(cryptfs: Cryptfs, vault: Path) -> None:
    before = (vault / "volume").read_bytes()
    cryptfs.run("rotate", vault, "--kek", passphrase="wrong", code=13)
    cryptfs.run("unlock", vault, passphrase=PASSPHRASE)
    cryptfs.run("rotate", vault, "--kek", passphrase="wrong", code=13)
    assert (vault / "volume").read_bytes() == before
    assert "no terminal" in cryptfs.run("rotate", vault, "--kek", code=2).stderr
    assert (vault / "volume").read_bytes() == before
    cryptfs.run("lock", vault)


@pytest.mark.parametrize(
    "words",
    [
        (), ("--kek", "--status"), ("--kek", "--cancel"), ("--status", "--cancel"), ("--kek", "--json"),
        ("--kek", "--background", "--destroy-old"),
    ],
)  # fmt: skip
def test_options_that_make_no_sense(cryptfs: Cryptfs, vault: Path, words: tuple[str, ...]) -> None:
    cryptfs.run("rotate", vault, *words, code=2, passphrase=PASSPHRASE)
    assert shown(cryptfs, vault)["kek_version"] == 1


def test_what_takes_a_mount(cryptfs: Cryptfs, vault: Path) -> None:
    assert "not mounted" in cryptfs.run("rotate", vault, "--cancel", code=2).stderr
    assert "not mounted" in cryptfs.run("rotate", vault, "--kek", "--background", passphrase=PASSPHRASE, code=2).stderr
    assert shown(cryptfs, vault)["kek_version"] == 1


def test_no_volume(cryptfs: Cryptfs, tmp_path: Path) -> None:
    cryptfs.run("rotate", tmp_path, "--kek", passphrase=PASSPHRASE, code=10)
    cryptfs.run("rotate", tmp_path, "--status", code=10)


def test_damage_keeps_the_old_key_until_it_is_given_up(cryptfs: Cryptfs, vault: Path) -> None:
    log = vault / "tree" / ".dir"
    raw = bytearray(log.read_bytes())
    raw[160 + 130] ^= 1
    log.write_bytes(raw)
    ended = cryptfs.run("rotate", vault, "--kek", "--destroy-old", passphrase=PASSPHRASE, code=21)
    assert "still need an older key" in ended.stderr
    assert shown(cryptfs, vault)["older_versions"] == [1]
    assert log.read_bytes() == raw
    ended = cryptfs.run("rotate", vault, "--destroy-old", "--lose-what-failed", passphrase=PASSPHRASE)
    assert shown(cryptfs, vault)["older_versions"] == []
