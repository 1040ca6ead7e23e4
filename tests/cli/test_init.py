"""`cryptfs init`: a whole volume or nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from cryptfs.cli.init import _all_or_nothing
from tests.cli.conftest import PASSPHRASE, Cryptfs


def listing(path: Path) -> list[str]:
    return sorted(os.path.relpath(entry, path) for entry in path.rglob("*"))


def test_a_new_directory_becomes_a_locked_volume(cryptfs: Cryptfs) -> None:
    vault = cryptfs.root / "vault"
    ended = cryptfs.run("init", "--kdf-cost", "low", "--block-size", "64K", vault, passphrase=PASSPHRASE)
    assert ended.stdout == ""
    assert vault.stat().st_mode & 0o777 == 0o700
    facts = json.loads(cryptfs.run("info", vault, "--json").stdout)
    assert facts["block_size"] == 65536
    assert facts["format_version"] == 1
    assert facts["protectors"][0]["kind"] == "passphrase"
    assert json.loads(cryptfs.run("status", "--json").stdout) == []


def test_the_cost_of_the_kdf_is_recorded(cryptfs: Cryptfs) -> None:
    params = []
    for cost in ("low", "normal"):
        cryptfs.run("init", "--kdf-cost", cost, cryptfs.root / cost, passphrase=PASSPHRASE)
        params.append(json.loads(cryptfs.run("info", cryptfs.root / cost, "--json").stdout)["protectors"][0]["params"])
    low, normal = params
    assert low["kdf"] == normal["kdf"] == "argon2id"
    assert low["memory_kib"] * low["iterations"] < normal["memory_kib"] * normal["iterations"]
    assert normal["memory_kib"] >= 64 * 1024


def test_an_empty_directory_may_be_there_already(cryptfs: Cryptfs) -> None:
    vault = cryptfs.root / "vault"
    vault.mkdir(mode=0o750)
    cryptfs.run("init", "--kdf-cost", "low", vault, passphrase=PASSPHRASE)
    assert {"volume", "tree", "sidecars", "tmp"} <= set(listing(vault))
    assert vault.stat().st_mode & 0o777 == 0o750


def test_what_is_in_use_is_refused_and_untouched(cryptfs: Cryptfs) -> None:
    work = cryptfs.root / "work"
    full = work / "full"
    (full / "tree").mkdir(parents=True)
    (full / "tree" / "mine").write_text("mine")
    file = work / "file"
    file.touch()
    volume = work / "vault"
    cryptfs.run("init", "--kdf-cost", "low", volume, passphrase=PASSPHRASE)
    before = listing(work)
    for path, why in (
        (full, "is not empty"),
        (file, "is no directory"),
        (volume, "is a volume already"),
        (work / "no" / "parent", "No such file"),
    ):
        ended = cryptfs.run("init", "--kdf-cost", "low", path, code=None, passphrase=PASSPHRASE)
        assert ended.returncode in (2, 19)
        assert why in ended.stderr
    assert listing(work) == before


@pytest.mark.parametrize("words", [["--block-size", "5000"], ["--kdf-cost", "none"], ["--extpass", "true"]])
def test_a_refused_init_makes_nothing(cryptfs: Cryptfs, words: list[str]) -> None:
    cryptfs.run("init", *words, cryptfs.root / "vault", code=2)
    assert not (cryptfs.root / "vault").exists()


def interrupted_after(vault: Path, *names: str) -> None:
    def make_and_fail() -> None:
        with _all_or_nothing(vault):
            for name in names:
                (vault / name).parent.mkdir(parents=True, exist_ok=True)
                (vault / name).mkdir() if name.endswith("/") else (vault / name).touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_and_fail()


def test_a_failure_half_way_leaves_things_as_they_were(tmp_path: Path) -> None:
    new, old = tmp_path / "new", tmp_path / "old"
    old.mkdir()
    for vault in (new, old):
        interrupted_after(vault, "sidecars/00/", "tree/.dir", "volume")
    assert listing(tmp_path) == ["old"]


def test_what_others_put_there_meanwhile_is_not_ours_to_remove(tmp_path: Path) -> None:
    vault = tmp_path / "vault"
    interrupted_after(vault, "volume", "theirs")
    assert listing(tmp_path) == ["vault", "vault/theirs"]


def test_at_a_terminal_the_passphrase_is_rated_and_asked_for_twice(cryptfs: Cryptfs) -> None:
    vault = cryptfs.root / "vault"
    with cryptfs.on_terminal("init", "--kdf-cost", "low", vault) as terminal:
        terminal.expect("New passphrase: ")
        terminal.enter(PASSPHRASE)
        terminal.expect("strength: strong")
        terminal.expect("Again, to be sure: ")
        terminal.enter(PASSPHRASE)
        terminal.expect("is a volume now")
        assert terminal.ended() == 0
        assert "horse" not in terminal.seen
    cryptfs.run("unlock", vault, passphrase=PASSPHRASE)


def test_being_terminated_at_the_prompt_gives_the_terminal_back(cryptfs: Cryptfs) -> None:
    with cryptfs.on_terminal("init", cryptfs.root / "vault") as terminal:
        terminal.expect("New passphrase: ")
        assert not terminal.is_echoing()
        terminal.process.terminate()
        assert terminal.process.wait(30) == 143
        assert terminal.is_echoing()


def test_ctrl_c_at_the_prompt_makes_nothing(cryptfs: Cryptfs) -> None:
    vault = cryptfs.root / "vault"
    with cryptfs.on_terminal("init", vault) as terminal:
        terminal.expect("New passphrase: ")
        terminal.type("\x03")
        terminal.expect("interrupted")
        assert terminal.ended() == 130
    assert not vault.exists()
