"""`cryptfs shred`: what it refuses, and that whatever it refuses is as it was."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from cryptfs import paths
from cryptfs.ops.info import read_volume
from tests.cli.conftest import PASSPHRASE, Cryptfs
from tests.softhsm import SoftHsm

NO_VOLUME, DAMAGED, LOST, USAGE = 10, 11, 29, 2
VARIABLE = "CRYPTFS_SHRED_KEYFILE"


def made(cryptfs: Cryptfs, path: Path, *options: str | Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    cryptfs.run("init", "--kdf-cost", "low", *options, path, passphrase=PASSPHRASE)
    return path


def opens(cryptfs: Cryptfs, path: Path, keyfile: Path | None = None, code: int = 0) -> None:
    cryptfs.run("unlock", path, passphrase=PASSPHRASE, code=code, env={VARIABLE: str(keyfile)} if keyfile else None)
    if code == 0:
        cryptfs.run("lock", path)


def domain_of(vault: Path, domain: Path) -> Path:
    """A volume put where a domain lies (FORMAT.md, section 2)."""
    place = vault / "domains" / read_volume(domain).volume_id.hex()
    place.parent.mkdir(exist_ok=True)
    return domain.rename(place)


def kept(volume_id: bytes) -> Path:
    """Where the agent keeps a shred secret."""
    return Path(os.environ["XDG_STATE_HOME"]) / "cryptfs" / "shred" / volume_id.hex()


def test_another_volumes_key_file_is_not_destroyed(cryptfs: Cryptfs) -> None:
    keys = [cryptfs.root / "key1", cryptfs.root / "key2"]
    vaults = [made(cryptfs, cryptfs.root / f"vault{n}", "--shred-keyfile", key) for n, key in enumerate(keys)]
    said = cryptfs.run("shred", "--yes", vaults[0], code=LOST, env={VARIABLE: str(keys[1])}).stderr
    assert "not the volume's shred secret" in said
    for vault in vaults:
        opens(cryptfs, vault)


def test_a_lost_key_file_is_no_success(cryptfs: Cryptfs) -> None:
    key, elsewhere = cryptfs.root / "key", cryptfs.root / "elsewhere"
    vault = made(cryptfs, cryptfs.root / "vault", "--shred-keyfile", key)
    copy = Path(shutil.copytree(vault, cryptfs.root / "copy"))
    key.rename(elsewhere)
    said = cryptfs.run("shred", "--yes", vault, code=LOST).stderr
    assert str(key) in said
    assert "--without-secret" in said
    opens(cryptfs, vault, elsewhere)
    assert "can still open" in cryptfs.run("shred", "--yes", "--without-secret", vault).stderr
    assert elsewhere.exists()
    opens(cryptfs, vault, elsewhere, NO_VOLUME)
    opens(cryptfs, copy, elsewhere)


def test_a_secret_the_agent_has_lost_is_no_success(cryptfs: Cryptfs) -> None:
    vault = made(cryptfs, cryptfs.root / "vault", "--shred-secret")
    secret = kept(read_volume(vault).volume_id)
    moved = secret.rename(cryptfs.root / "moved")
    cryptfs.run("shred", "--yes", vault, code=LOST)
    moved.rename(secret)
    opens(cryptfs, vault)
    cryptfs.run("shred", "--yes", vault)
    assert not secret.exists()


@pytest.mark.parametrize("whole", [True, False])
def test_a_name_is_to_be_typed_even_for_the_directory_one_is_in(
    cryptfs: Cryptfs, vault: Path, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = vault if whole else domain_of(vault, made(cryptfs, cryptfs.root / "inner"))
    monkeypatch.chdir(at)
    for answer in ("", ".", "another"):
        with cryptfs.on_terminal("shred", ".") as terminal:
            terminal.expect(f"({at.name})")
            terminal.enter(answer)
            assert terminal.ended() == USAGE, terminal.seen
        opens(cryptfs, at)
    with cryptfs.on_terminal("shred", ".") as terminal:
        terminal.expect(f"({at.name})")
        terminal.enter(at.name)
        assert terminal.ended() == 0, terminal.seen
    opens(cryptfs, at, code=NO_VOLUME)


@pytest.mark.parametrize("harm", ["shredded", "damaged"])
def test_a_volume_with_a_domain_that_cannot_be_read(cryptfs: Cryptfs, vault: Path, harm: str) -> None:
    inner = domain_of(vault, made(cryptfs, cryptfs.root / "inner", "--shred-secret"))
    other = domain_of(vault, made(cryptfs, cryptfs.root / "other"))
    secret = kept(read_volume(inner).volume_id)
    copy = Path(shutil.copytree(inner, cryptfs.root / "copy"))
    if harm == "shredded":
        cryptfs.run("shred", "--yes", inner)
    else:
        (inner / "volume").write_bytes(b"what is this")
        assert "--id" in cryptfs.run("shred", "--yes", inner, code=DAMAGED).stderr
        assert secret.exists()
    assert str(inner) in cryptfs.run("shred", "--yes", vault).stderr
    assert not secret.exists()
    opens(cryptfs, copy, code=LOST)
    for each in (vault, other):
        opens(cryptfs, each, code=NO_VOLUME)


def test_nothing_is_destroyed_if_one_of_several_cannot_be(cryptfs: Cryptfs, vault: Path) -> None:
    whole = domain_of(vault, made(cryptfs, cryptfs.root / "whole", "--shred-secret"))
    key = cryptfs.root / "key"
    without = domain_of(vault, made(cryptfs, cryptfs.root / "without", "--shred-keyfile", key))
    moved = key.rename(cryptfs.root / "moved")
    cryptfs.run("shred", "--yes", vault, code=LOST)
    for each in (vault, whole):
        opens(cryptfs, each)
    opens(cryptfs, without, moved)


def test_what_the_root_keys_holder_refuses_leaves_no_secret(cryptfs: Cryptfs, token: SoftHsm) -> None:
    new = cryptfs.root / "new"
    cryptfs.run("init", new, "--shred-secret", "--token", "card", code=13, env={"CRYPTFS_PIN": "000000"})
    assert not new.exists()
    assert shred_secrets() == []


@pytest.mark.mount
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system")
def test_a_volume_that_was_never_made_leaves_no_secret(cryptfs: Cryptfs) -> None:
    new = cryptfs.root / "new"
    words = ("init", "--shred-secret", "--kdf-cost", "low", new)
    new.mkdir(0o700)
    # No room for the directories of sidecars.
    subprocess.run(["mount", "-t", "tmpfs", "-o", "nr_inodes=100,mode=700", "none", new], check=True)
    try:
        cryptfs.run(*words, passphrase=PASSPHRASE, code=19)
        assert os.listdir(new) == []
    finally:
        subprocess.run(["umount", new], check=True)
    assert shred_secrets() == []
    assert cryptfs.status() == []
    cryptfs.run(*words, passphrase=PASSPHRASE)
    assert len(shred_secrets()) == 1


def shred_secrets() -> list[str]:
    """What the agent keeps."""
    where = Path(paths.state_dir(), "shred")
    return os.listdir(where) if where.is_dir() else []


def test_by_its_id_alone(cryptfs: Cryptfs) -> None:
    vault = made(cryptfs, cryptfs.root / "vault", "--shred-secret")
    volume_id = read_volume(vault).volume_id
    with cryptfs.on_terminal("shred", "--id", volume_id.hex()) as terminal:
        terminal.expect("first 8 digits")
        terminal.enter("")
        assert terminal.ended() == USAGE
    opens(cryptfs, vault)
    cryptfs.run("shred", "--yes", "--id", volume_id.hex())
    opens(cryptfs, vault, code=LOST)
    cryptfs.run("shred", "--yes", "--id", volume_id.hex(), code=LOST)
    for wrong in ("", "12", volume_id.hex()[:-1], "../" * 10):
        cryptfs.run("shred", "--yes", "--id", wrong, code=USAGE)
    cryptfs.run("shred", "--yes", code=USAGE)
    cryptfs.run("shred", "--yes", "--id", volume_id.hex(), vault, code=USAGE)


def test_a_protector_is_not_made_with_another_shred_secret(cryptfs: Cryptfs) -> None:
    keys = [cryptfs.root / "key1", cryptfs.root / "key2"]
    vault, _ = (made(cryptfs, cryptfs.root / f"vault{n}", "--shred-keyfile", key) for n, key in enumerate(keys))
    before = (vault / "volume").read_bytes()
    opens(cryptfs, vault)
    cryptfs.run("unlock", vault, passphrase=PASSPHRASE)
    passfile = cryptfs.root / "new"
    passfile.write_text("new passphrase 8")
    passfile.chmod(0o600)
    for verb in (("change", vault, "passphrase"), ("add", vault, "--label", "second")):
        cryptfs.run(
            "protector", *verb, "--new-passfile", passfile, passphrase=PASSPHRASE, code=LOST,
            env={VARIABLE: str(keys[1])},
        )  # fmt: skip
    assert (vault / "volume").read_bytes() == before
    cryptfs.run("lock", vault)
    opens(cryptfs, vault)
