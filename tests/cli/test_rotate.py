"""`rotate` of a volume that is not mounted, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import PASSPHRASE, Cryptfs
from tests.softhsm import PIN, SoftHsm


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


def test_the_volume_file_of_another_is_not_rotated(cryptfs: Cryptfs, vault: Path) -> None:
    other = cryptfs.root / "other"
    cryptfs.run("init", "--kdf-cost", "low", other, passphrase="another horse 8")
    mine, others = (vault / "volume").read_bytes(), (other / "volume").read_bytes()
    (vault / "volume").write_bytes(others)
    for words in (("--kek",), ("--kek", "--destroy-old")):
        cryptfs.run("rotate", vault, *words, passphrase="another horse 8", code=11)
        assert (vault / "volume").read_bytes() == others
    assert cryptfs.status() == []
    (vault / "volume").write_bytes(mine)
    cryptfs.run("check", vault, passphrase=PASSPHRASE)
    cryptfs.run("check", other, passphrase="another horse 8")


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


# several protectors -------------------------------------------------------------------------------------------------


def of_four_kinds(cryptfs: Cryptfs, vault: Path) -> dict[str, Path]:
    """The vault with three more protectors; where the secret of each is."""
    files = {name: cryptfs.root / name for name in ("second", "stick", "paper")}
    files["second"].write_bytes(b"another passphrase\n")
    files["second"].chmod(0o600)
    add = ("protector", "add", vault, "--label")
    cryptfs.run(*add, "second", "--new-passfile", files["second"], "--kdf-cost", "low", passphrase=PASSPHRASE)
    cryptfs.run(*add, "st=ick", "--new-keyfile", files["stick"], passphrase=PASSPHRASE)
    cryptfs.run(*add, "paper", "--kind", "recovery", "--out", files["paper"], passphrase=PASSPHRASE)
    return files


def labels(cryptfs: Cryptfs, vault: Path) -> list[str]:
    return [row["label"] for row in json.loads(cryptfs.run("protector", "list", vault, "--json").stdout)]


def test_all_protectors_are_carried_over_without_a_terminal(cryptfs: Cryptfs, vault: Path) -> None:
    files = of_four_kinds(cryptfs, vault)
    keep = ("--keep", f"second={files['second']}", "--keep", f"st=ick={files['stick']}")
    before = (vault / "volume").read_bytes()
    said = cryptfs.run("rotate", vault, "--kek", *keep, passphrase=PASSPHRASE, code=2).stderr
    assert "'paper' (recovery)" in said
    assert "'second'" not in said
    assert (vault / "volume").read_bytes() == before
    paper = ("--keep", f"paper={files['paper']}")
    cryptfs.run("rotate", vault, "--kek", *keep, *paper, "--destroy-old", passphrase=PASSPHRASE)
    assert labels(cryptfs, vault) == ["passphrase", "second", "st=ick", "paper"]
    for words in (("--protector", "second", "--passfile", files["second"]), ("--keyfile", files["stick"]),
                  ("--recovery-file", files["paper"])):  # fmt: skip
        cryptfs.run("unlock", vault, *words)
        cryptfs.run("lock", vault)
    cryptfs.run("unlock", vault, passphrase=PASSPHRASE)
    # Unlocked as well, and by another one: each is checked.
    others = ("--keep", "passphrase=/dev/fd/0")
    cryptfs.run("rotate", vault, "--kek", "--keyfile", files["stick"], *others, "--drop-others", code=2)
    cryptfs.run("rotate", vault, "--kek", "--keyfile", files["stick"], *keep[:2], "--drop-others")
    assert labels(cryptfs, vault) == ["second", "st=ick"]
    cryptfs.run("lock", vault)


def test_a_token_is_carried_over_by_its_pin(cryptfs: Cryptfs, vault: Path, token: SoftHsm) -> None:
    pin, wrong, first = (cryptfs.root / name for name in ("pin", "wrong pin", "first"))
    for path, secret in ((pin, PIN), (wrong, "000000"), (first, PASSPHRASE)):
        path.write_text(secret + "\n")
        path.chmod(0o600)
    cryptfs.run(
        "protector", "add", vault, "--kind", "pkcs11", "--token", "card", "--label", "card", passphrase=PASSPHRASE,
        env={"CRYPTFS_NEW_PIN": PIN},
    )  # fmt: skip
    before = (vault / "volume").read_bytes()
    said = cryptfs.run("rotate", vault, "--kek", "--keep", f"card={wrong}", passphrase=PASSPHRASE, code=13).stderr
    assert "wrong PIN" in said
    assert (vault / "volume").read_bytes() == before
    cryptfs.run("rotate", vault, "--kek", "--destroy-old", "--keep", f"card={pin}", passphrase=PASSPHRASE)
    assert (shown(cryptfs, vault)["kek_version"], shown(cryptfs, vault)["older_versions"]) == (2, [])
    # The other way round: opened by the token, which stays open meanwhile, and the passphrase from a file.
    with_pin = {"CRYPTFS_PIN": PIN}
    cryptfs.run("rotate", vault, "--kek", "--destroy-old", "--keep", f"passphrase={first}", env=with_pin)
    assert labels(cryptfs, vault) == ["passphrase", "card"]
    for env in (with_pin, {"CRYPTFS_PASSPHRASE": PASSPHRASE}):
        cryptfs.run("unlock", vault, env=env)
        # A PIN from a descriptor, of a token that is in use or not.
        with pin.open("rb") as file:
            keep = ("--keep", f"card=/dev/fd/{file.fileno()}")
            cryptfs.run("rotate", vault, "--kek", *keep, passphrase=PASSPHRASE, pass_fds=(file.fileno(),))
        cryptfs.run("lock", vault)
    assert labels(cryptfs, vault) == ["passphrase", "card"]
    cryptfs.run("unlock", vault, env=with_pin)
    cryptfs.run("rotate", vault, "--destroy-old")
    assert (shown(cryptfs, vault)["kek_version"], shown(cryptfs, vault)["older_versions"]) == (5, [])
    cryptfs.run("lock", vault)
    token.delete_token("card")
    said = cryptfs.run("rotate", vault, "--kek", "--keep", f"card={pin}", passphrase=PASSPHRASE, code=30).stderr
    assert "is not there" in said
    assert shown(cryptfs, vault)["kek_version"] == 5


def test_what_keep_refuses(cryptfs: Cryptfs, vault: Path) -> None:
    files = of_four_kinds(cryptfs, vault)
    before = (vault / "volume").read_bytes()
    wrong = cryptfs.root / "wrong"
    wrong.write_bytes(b"not it")
    wrong.chmod(0o600)
    for keep, code, text in (
        (["second=" + str(wrong)], 13, "second"),
        (["paper=" + str(wrong)], 2, "no recovery key"),
        (["second=" + str(cryptfs.root / "not there")], 2, "cannot read"),
        (["nobody=" + str(wrong)], 2, "no protector 'nobody'"),
        (["st=ick"], 2, "--keep st=ick=FILE"),
        (["second"], 2, "no terminal"),
        (["second=" + str(files["second"]), f"second={files['second']}"], 2, "twice"),
        (["passphrase=" + str(files["second"]), f"second={files['second']}"], 13, ""),
    ):
        words = [word for each in keep for word in ("--keep", each)]
        said = cryptfs.run("rotate", vault, "--kek", *words, "--drop-others", passphrase=PASSPHRASE, code=code).stderr
        assert text in said
        assert (vault / "volume").read_bytes() == before
    two = ("--protector", "passphrase", "--keep", f"passphrase={files['second']}")
    assert "two secrets" in cryptfs.run("rotate", vault, "--kek", *two, passphrase=PASSPHRASE, code=2).stderr
    cryptfs.run("rotate", vault, "--destroy-old", "--keep", "second", passphrase=PASSPHRASE, code=2)
    assert (vault / "volume").read_bytes() == before
