"""`cryptfs protector` and opening a volume by each kind, on the real program."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from cryptfs.format.recovery_key import from_text, to_text
from tests.cli.conftest import PASSPHRASE, Cryptfs, agent_toml
from tests.softhsm import MODULE, PIN, SoftHsm

NEW = "another passphrase 8"


def protectors(cryptfs: Cryptfs, vault: Path) -> dict[str, dict[str, Any]]:
    rows = json.loads(cryptfs.run("protector", "list", vault, "--json").stdout)
    return {row["label"]: row for row in rows}


def opens(
    cryptfs: Cryptfs, vault: Path, *options: str | Path, code: int = 0, passphrase: str | None = None,
    env: Mapping[str, str] | None = None,
) -> str:  # fmt: skip
    """Unlock and lock again; what was said."""
    ended = cryptfs.run("unlock", vault, *options, code=code, passphrase=passphrase, env=env)
    if code == 0:
        cryptfs.run("lock", vault)
    return ended.stderr


def add(
    cryptfs: Cryptfs, vault: Path, *options: str | Path, code: int = 0, env: Mapping[str, str] | None = None
) -> str:
    return cryptfs.run("protector", "add", vault, *options, code=code, passphrase=PASSPHRASE, env=env).stderr


def test_a_second_passphrase_and_the_first_one_goes(cryptfs: Cryptfs, vault: Path) -> None:
    env = {"CRYPTFS_NEW_PASSPHRASE": NEW}
    add(cryptfs, vault, "--kind", "passphrase", "--label", "second", "--kdf-cost", "low", env=env)
    assert cryptfs.status() == []
    assert set(protectors(cryptfs, vault)) == {"passphrase", "second"}
    opens(cryptfs, vault, passphrase=PASSPHRASE)
    opens(cryptfs, vault, passphrase=NEW)
    opens(cryptfs, vault, "--protector", "second", passphrase=PASSPHRASE, code=13)
    said = cryptfs.run("protector", "remove", vault, "passphrase", "--yes", passphrase=NEW).stderr
    assert "rotate --kek --destroy-old" in said
    assert set(protectors(cryptfs, vault)) == {"second"}
    opens(cryptfs, vault, passphrase=PASSPHRASE, code=13)
    opens(cryptfs, vault, passphrase=NEW)


def test_a_changed_passphrase(cryptfs: Cryptfs, vault: Path) -> None:
    before = protectors(cryptfs, vault)["passphrase"]
    words = ["protector", "change", str(vault), "passphrase", "--kdf-cost", "low"]
    said = cryptfs.run(*words, passphrase=PASSPHRASE, env={"CRYPTFS_NEW_PASSPHRASE": NEW}).stderr
    assert "the old secret still opens every old copy" in said
    after = protectors(cryptfs, vault)["passphrase"]
    assert after["id"] == before["id"]
    assert after["params"]["salt"] != before["params"]["salt"]
    opens(cryptfs, vault, passphrase=PASSPHRASE, code=13)
    opens(cryptfs, vault, passphrase=NEW)


def test_a_key_file_that_is_made(cryptfs: Cryptfs, vault: Path) -> None:
    keyfile = cryptfs.root / "key"
    assert add(cryptfs, vault, "--new-keyfile", keyfile) == ""
    assert keyfile.stat().st_size == 64
    assert stat.S_IMODE(keyfile.stat().st_mode) == 0o600
    opens(cryptfs, vault, "--keyfile", keyfile)
    shutil.copyfile(keyfile, cryptfs.root / "copy")
    said = opens(cryptfs, vault, "--keyfile", cryptfs.root / "copy")
    assert "other users may open" in said
    content = bytearray(keyfile.read_bytes())
    content[-1] ^= 1
    keyfile.write_bytes(content)
    assert "unchanged?" in opens(cryptfs, vault, "--keyfile", keyfile, code=13)
    keyfile.write_bytes(content[:31])
    assert "32 to 65536 bytes" in opens(cryptfs, vault, "--keyfile", keyfile, code=2)
    assert "No such file" in opens(cryptfs, vault, "--keyfile", cryptfs.root / "none", code=2)


def test_a_key_file_and_a_recovery_key_are_changed(cryptfs: Cryptfs, vault: Path) -> None:
    old, new, paper = cryptfs.root / "old", cryptfs.root / "new", cryptfs.root / "paper"
    add(cryptfs, vault, "--new-keyfile", old)
    cryptfs.run("protector", "change", vault, "keyfile", "--new-keyfile", new, "--label", "stick", "--keyfile", old)
    opens(cryptfs, vault, "--keyfile", old, code=13)
    opens(cryptfs, vault, "--protector", "stick", "--keyfile", new)
    add(cryptfs, vault, "--kind", "recovery", "--out", paper)
    said = cryptfs.run("protector", "change", vault, "recovery", "--out", paper, "--keyfile", new, code=2).stderr
    assert "exists already" in said
    opens(cryptfs, vault, "--recovery-file", paper)
    cryptfs.run("protector", "change", vault, "recovery", "--out", cryptfs.root / "paper2", "--keyfile", new)
    opens(cryptfs, vault, "--recovery-file", paper, code=13)
    opens(cryptfs, vault, "--recovery-file", cryptfs.root / "paper2")
    said = cryptfs.run("protector", "change", vault, "stick", "--out", "x", "--keyfile", new, code=2).stderr
    assert "--out is for protectors of the kind recovery" in said
    words = ("protector", "change", vault, "stick", "--new-keyfile", cryptfs.root / "n", "--keyfile", new)
    said = cryptfs.run(*words, "--label", "recovery", code=2).stderr
    assert "has a protector 'recovery' already" in said


def test_key_files_that_protect_nothing_are_warned_of(cryptfs: Cryptfs, vault: Path) -> None:
    assert "protects nothing" in add(cryptfs, vault, "--new-keyfile", vault / "key")
    weak = cryptfs.root / "weak"
    weak.write_text("these are the words of a song that everybody knows\n")
    weak.chmod(0o600)
    assert "does not look random" in add(cryptfs, vault, "--use-keyfile", weak, "--label", "weak")
    weak.write_bytes(bytes(64))
    assert "does not look random" in add(cryptfs, vault, "--use-keyfile", weak, "--label", "zeros")


def test_a_key_file_is_never_made_over_something_and_goes_if_nothing_comes_of_it(cryptfs: Cryptfs, vault: Path) -> None:
    keyfile = cryptfs.root / "key"
    keyfile.write_text("precious")
    assert "exists already" in add(cryptfs, vault, "--new-keyfile", keyfile, code=2)
    assert keyfile.read_text() == "precious"
    keyfile.unlink()
    env = {"CRYPTFS_PASSPHRASE": "wrong"}
    cryptfs.run("protector", "add", vault, "--new-keyfile", keyfile, code=13, env=env)
    assert not keyfile.exists()


def test_a_recovery_key_in_a_file(cryptfs: Cryptfs, vault: Path) -> None:
    out = cryptfs.root / "recovery"
    assert "no terminal to show" in add(cryptfs, vault, "--kind", "recovery", code=2)
    add(cryptfs, vault, "--kind", "recovery", "--out", out)
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    opens(cryptfs, vault, "--recovery-file", out)
    text = out.read_text().splitlines()[-1]
    out.write_text("\n# mine\n" + text.lower().replace("-", " ").replace("0", "o") + "\n")
    opens(cryptfs, vault, "--recovery-file", out)
    groups = text.split("-")
    groups[3] = groups[3][1] + groups[3][0] + groups[3][2:] if groups[3][0] != groups[3][1] else "00000"
    out.write_text("-".join(groups))
    assert "group 4 of 10 is not right" in opens(cryptfs, vault, "--recovery-file", out, code=2)
    out.write_text(to_text(bytes(25)))
    assert "another volume's" in opens(cryptfs, vault, "--recovery-file", out, code=13)


def test_a_recovery_key_on_the_terminal_is_shown_once_and_typed_back(cryptfs: Cryptfs, vault: Path) -> None:
    passfile = cryptfs.root / "pass"
    passfile.write_text(PASSPHRASE)
    passfile.chmod(0o600)
    with cryptfs.on_terminal("protector", "add", vault, "--kind", "recovery", "--passfile", passfile) as terminal:
        terminal.expect("Recovery key of the volume")
        assert terminal.ended() == 0
        lines = [line.strip() for line in terminal.seen.splitlines()]
    at = next(number for number, line in enumerate(lines) if line.endswith("-") and line.count("-") == 5)
    text = lines[at] + lines[at + 1]
    from_text(text)
    assert "█" in terminal.seen
    with cryptfs.on_terminal("unlock", vault, "--recovery-key") as terminal:
        terminal.expect("Recovery key: ")
        assert not terminal.is_echoing()
        terminal.enter(text[:-1])
        terminal.expect("group 10 of 10 is not 5 characters long; try again")
        terminal.expect("Recovery key: ")
        terminal.enter(text.lower())
        assert terminal.ended() == 0
        assert text.lower() not in terminal.seen
    cryptfs.run("lock", vault)
    log = "".join(path.read_text("latin-1") for path in cryptfs.root.rglob("*.log"))
    assert log
    assert text not in log
    assert text[:11] not in log


def test_init_with_each_kind(cryptfs: Cryptfs) -> None:
    keyfile, out = cryptfs.root / "key", cryptfs.root / "recovery"
    cryptfs.run("init", cryptfs.root / "a", "--new-keyfile", keyfile)
    assert list(protectors(cryptfs, cryptfs.root / "a")) == ["keyfile"]
    opens(cryptfs, cryptfs.root / "a", "--keyfile", keyfile)
    assert "opened by a key file" in opens(cryptfs, cryptfs.root / "a", code=2)
    cryptfs.run("init", cryptfs.root / "b", "--keyfile", keyfile, "--label", "stick")
    assert list(protectors(cryptfs, cryptfs.root / "b")) == ["stick"]
    opens(cryptfs, cryptfs.root / "b", "--keyfile", keyfile)
    cryptfs.run("init", cryptfs.root / "c", "--protector", "recovery", "--out", out)
    opens(cryptfs, cryptfs.root / "c", "--recovery-file", out)
    ended = cryptfs.run("init", cryptfs.root / "d", "--new-keyfile", keyfile, code=2)
    assert "exists already" in ended.stderr
    assert not (cryptfs.root / "d").exists()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("--kind", "keyfile"), "a key file is needed"),
        (("--kind", "pkcs11"), "which token?"),
        (("--kind", "passphrase", "--token", "x"), "--token is for protectors of the kind pkcs11"),
        (("--kind", "keyfile", "--kdf-cost", "low"), "--kdf-cost is for protectors of the kind passphrase"),
        (("--new-keyfile", "x", "--use-keyfile", "y"), "a key file is needed, and one only"),
        (("--new-keyfile", "x", "--out", "y"), "--out is for protectors of the kind recovery"),
        (("--kind", "passphrase", "--label", "passphrase", "--new-passfile", "/dev/null"), "has a protector"),
        (("--kind", "passphrase", "--label", "", "--new-passfile", "/dev/null"), "printable characters"),
        (("--kind", "pkcs11", "--token", "x", "--key-id", "zz"), "hexadecimal"),
    ],
)
def test_options_that_make_no_sense(cryptfs: Cryptfs, vault: Path, options: tuple[str, ...], why: str) -> None:
    before = (vault / "volume").read_bytes()
    assert why in add(cryptfs, vault, *options, code=2)
    assert (vault / "volume").read_bytes() == before
    assert not Path("x").exists()


def test_the_last_protector_stays_and_names_must_be_right(cryptfs: Cryptfs, vault: Path) -> None:
    said = cryptfs.run("protector", "remove", vault, "passphrase", "--yes", passphrase=PASSPHRASE, code=2).stderr
    assert "it is the last protector" in said
    for verb in ("remove", "change"):
        said = cryptfs.run("protector", verb, vault, "nobody", passphrase=PASSPHRASE, code=2).stderr
        assert "no protector 'nobody'" in said
        assert "'passphrase' (passphrase, " in said


def test_removal_is_asked_for_by_label(cryptfs: Cryptfs, vault: Path) -> None:
    keyfile = cryptfs.root / "key"
    add(cryptfs, vault, "--new-keyfile", keyfile, "--label", "stick")
    identity = protectors(cryptfs, vault)["stick"]["id"]
    ended = cryptfs.run("protector", "remove", vault, "stick", "--keyfile", keyfile, code=2)
    assert "--yes" in ended.stderr
    for typed, code in (("other", 2), ("stick", 0)):
        with cryptfs.on_terminal("protector", "remove", vault, identity[:6], "--keyfile", keyfile) as terminal:
            terminal.expect("Type its label, stick, to remove it: ")
            terminal.enter(typed)
            assert terminal.ended() == code
        assert ("stick" in protectors(cryptfs, vault)) == (code != 0)


def test_an_unlocked_volume_needs_no_secret_and_stays_so(cryptfs: Cryptfs, vault: Path) -> None:
    cryptfs.run("unlock", vault, passphrase=PASSPHRASE)
    keyfile = cryptfs.root / "key"
    cryptfs.run("protector", "add", vault, "--new-keyfile", keyfile)
    assert [volume["state"] for volume in cryptfs.status()] == ["unlocked"]
    cryptfs.run("protector", "remove", vault, "passphrase", "--yes")
    cryptfs.run("lock", vault)
    opens(cryptfs, vault, "--keyfile", keyfile)


def test_two_secrets_are_one_too_many(cryptfs: Cryptfs, vault: Path) -> None:
    said = cryptfs.run("unlock", vault, "--keyfile", vault, "--recovery-key", code=2).stderr
    assert "keyfile" in said or "--keyfile" in said
    said = cryptfs.run("unlock", vault, "--keyfile", "x", passphrase=PASSPHRASE, code=2).stderr
    assert "CRYPTFS_PASSPHRASE and --keyfile" in said


@contextlib.contextmanager
def small_disk(at: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    at.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", at], check=True)
    try:
        yield at
    finally:
        subprocess.run(["umount", at], check=True)


@pytest.mark.mount
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system")
def test_on_a_full_disk_everything_stays_as_it_was(cryptfs: Cryptfs, vault: Path) -> None:
    with small_disk(cryptfs.root / "small") as disk:
        copy = disk / "vault"
        shutil.copytree(vault, copy, symlinks=True)
        with (disk / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
            while filler.write(bytes(4096)):
                pass
        assert shutil.disk_usage(disk).free == 0
        before = (copy / "volume").read_bytes()
        keyfile = cryptfs.root / "key"
        assert "No space left" in add(cryptfs, copy, "--new-keyfile", keyfile, code=19)
        assert not keyfile.exists()
        assert (copy / "volume").read_bytes() == before
        assert not (copy / "volume.new").exists()
        opens(cryptfs, copy, passphrase=PASSPHRASE)
        (disk / "filler").unlink()
        add(cryptfs, copy, "--new-keyfile", keyfile)
        opens(cryptfs, copy, "--keyfile", keyfile)
        cryptfs.run("agent", "stop")


# ------------------------------------------------------------------------------------------------------ tokens


def test_a_token(cryptfs: Cryptfs, vault: Path, token: SoftHsm) -> None:
    add(cryptfs, vault, "--kind", "pkcs11", "--token", "card", env={"CRYPTFS_NEW_PIN": PIN})
    params = protectors(cryptfs, vault)["pkcs11"]["params"]
    assert params["module"] == MODULE
    assert params["token_label"] == "card"
    opens(cryptfs, vault, "--protector", "pkcs11", env={"CRYPTFS_PIN": PIN})
    assert "the token counts them" in opens(cryptfs, vault, code=13, env={"CRYPTFS_PIN": "000000"})
    with cryptfs.on_terminal("unlock", vault, "--protector", "pkcs11") as terminal:
        terminal.expect("PIN of the token card: ")
        terminal.enter("000000")
        # Not asked again: that would be another of the token's tries.
        assert terminal.ended() == 13
    cryptfs.run("protector", "remove", vault, "passphrase", "--yes", env={"CRYPTFS_PIN": PIN})
    with cryptfs.on_terminal("unlock", vault) as terminal:
        terminal.expect("PIN of the token card: ")
        terminal.enter(PIN)
        assert terminal.ended() == 0
    assert [volume["state"] for volume in cryptfs.status()] == ["unlocked"]


def test_a_passphrase_is_never_tried_as_a_pin(cryptfs: Cryptfs, vault: Path, token: SoftHsm) -> None:
    add(cryptfs, vault, "--kind", "pkcs11", "--token", "card", env={"CRYPTFS_NEW_PIN": PIN})
    opens(cryptfs, vault, passphrase="wrong", code=13)
    pin = cryptfs.run("unlock", vault, passphrase=PIN, code=13).stderr
    assert "no protector of the volume opens with this secret" in pin


def test_init_with_a_token_and_a_changed_key(cryptfs: Cryptfs, token: SoftHsm) -> None:
    vault = cryptfs.root / "card-vault"
    pin = {"CRYPTFS_PIN": PIN}
    cryptfs.run("init", vault, "--protector", "pkcs11", "--token", "card", "--module", MODULE, env=pin)
    before = protectors(cryptfs, vault)["pkcs11"]["params"]
    opens(cryptfs, vault, env=pin)
    said = cryptfs.run("protector", "change", vault, "pkcs11", env={**pin, "CRYPTFS_NEW_PIN": PIN}).stderr
    assert f"the root key {before['key_id']} stays in the token 'card'" in said
    assert "every old copy" in said
    after = protectors(cryptfs, vault)["pkcs11"]["params"]
    assert after["key_id"] != before["key_id"]
    assert after["token_serial"] == before["token_serial"]
    # And back: of a key that goes on being used nothing is said.
    words = ("protector", "change", vault, "pkcs11", "--key-id")
    said = cryptfs.run(*words, before["key_id"], env={**pin, "CRYPTFS_NEW_PIN": PIN}).stderr
    assert f"the root key {after['key_id']} stays" in said
    said = cryptfs.run(*words, before["key_id"], "--label", "card", env={**pin, "CRYPTFS_NEW_PIN": PIN}).stderr
    assert "stays" not in said
    cryptfs.run("protector", "change", vault, "card", "--label", "pkcs11", env={**pin, "CRYPTFS_NEW_PIN": PIN})
    opens(cryptfs, vault, env=pin)
    assert (
        "wrong PIN"
        in cryptfs.run("init", cryptfs.root / "other", "--token", "card", code=13, env={"CRYPTFS_PIN": "000000"}).stderr
    )
    assert not (cryptfs.root / "other").exists()


def test_a_token_that_is_away(cryptfs: Cryptfs, vault: Path, token: SoftHsm) -> None:
    add(cryptfs, vault, "--kind", "pkcs11", "--token", "card", env={"CRYPTFS_NEW_PIN": PIN})
    before = (vault / "volume").read_bytes()
    for at in ("nowhere", "card2"):
        assert "is there" in add(
            cryptfs, vault, "--kind", "pkcs11", "--token", at, "--label", at, code=30, env={"CRYPTFS_NEW_PIN": PIN}
        )
    assert (vault / "volume").read_bytes() == before
    token.delete_token("card")
    assert "is not there" in opens(cryptfs, vault, code=30, env={"CRYPTFS_PIN": PIN})
    agent_toml().unlink()
    cryptfs.run("agent", "stop")
    assert "names no PKCS#11 module" in opens(cryptfs, vault, code=30, env={"CRYPTFS_PIN": PIN})
    opens(cryptfs, vault, passphrase=PASSPHRASE)


def test_an_agent_with_a_bad_configuration_does_not_start(cryptfs: Cryptfs, vault: Path) -> None:
    agent_toml().write_text("[pkcs11.modules]\nsoft = 'libsoft.so'\n")
    assert "agent.toml: the path of the module 'soft' is not absolute" in opens(
        cryptfs, vault, code=2, passphrase=PASSPHRASE
    )
    agent_toml().write_text("")
    agent_toml().chmod(0o666)
    assert "other users may write" in opens(cryptfs, vault, code=20, passphrase=PASSPHRASE)
