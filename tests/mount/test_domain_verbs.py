"""What the verbs that are about volumes make of domains."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mount.box import PASSPHRASE, Box, boxed
from tests.mount.domains import CONTENT, SECRET, cipher_dir, create, domains, mounted_id, unlock
from tests.mount.rotating import look, populate, somebody_there, status, wait_for
from tests.mount.syscalls import refused, reread

pytestmark = pytest.mark.mount


def test_check_and_export_go_into_unlocked_domains_and_name_the_others(mounted: Box, pay: Path) -> None:
    (pay / "sub").mkdir()
    (pay / "sub" / "inner").write_bytes(CONTENT)
    create(mounted, mounted.clear / "dark")
    (mounted.clear / "dark" / "inner").write_bytes(CONTENT)
    for path in (pay / "sub" / "inner", mounted.clear / "plain"):
        reread(path)
    mounted.run("lock", mounted.clear / "dark")
    report = json.loads(mounted.run("check", "--deep", "--json", mounted.vault).stdout)
    assert {row["path"]: row["report"] and row["report"]["files"] for row in report["domains"]} == {
        "/pay": 1,
        "/dark": None,
    }
    out = mounted.root / "out"
    said = mounted.run("export", mounted.vault, "/", out, code=17).stderr
    assert "/dark" in said
    assert (out / "pay" / "sub" / "inner").read_bytes() == CONTENT
    assert (out / "plain").read_bytes() == CONTENT
    assert os.listdir(out / "dark") == []
    mounted.run("export", mounted.vault, "/pay/sub/inner", mounted.root / "one")
    assert (mounted.root / "one").read_bytes() == CONTENT
    mounted.run("export", mounted.vault, "/dark/inner", mounted.root / "two", code=17)
    mounted.run("export", pay, "/sub", mounted.root / "three")
    assert (mounted.root / "three" / "inner").read_bytes() == CONTENT
    assert json.loads(mounted.run("info", "--json", pay).stdout)["volume_id"] == mounted_id(pay)
    mounted.run("audit", "verify", pay)
    sizes = [
        int(subprocess.run(["du", "-s", p], capture_output=True, check=True).stdout.split()[0])
        for p in (pay, out / "pay")
    ]
    assert sizes[0] >= 256
    assert sizes[1] >= 256


def test_a_copy_of_the_cipher_directory_has_its_domains(mounted: Box, short_tmp: Path) -> None:
    """On another machine, too, unless it needs a shred secret that this one keeps."""
    pay, kept = mounted.clear / "pay", mounted.clear / "kept"
    create(mounted, pay, "--no-shred-secret")
    create(mounted, kept)
    (mounted.clear / "plain").write_bytes(CONTENT)
    (pay / "inner").write_bytes(CONTENT)
    mounted.umount()
    with boxed(short_tmp, mounted.vault) as copy:
        copy.mount()
        unlock(copy, copy.clear / "pay")
        assert (copy.clear / "pay" / "inner").read_bytes() == CONTENT
        assert (copy.clear / "plain").read_bytes() == CONTENT
        ids = {row["path"]: row["volume_id"] for row in domains(copy)}
        said = copy.run("unlock", copy.vault / "domains" / ids["/kept"], env={"CRYPTFS_PASSPHRASE": SECRET}, code=None)
        assert said.returncode
        assert "shred secret" in said.stderr


def test_what_a_shredded_domain_leaves_can_go(mounted: Box, pay: Path) -> None:
    (pay / "inner").write_bytes(CONTENT)
    where = cipher_dir(mounted)
    mounted.run("shred", "--yes", pay)
    mounted.remount()
    with refused(errno.EIO):
        os.listdir(pay)
    os.rmdir(pay)
    assert not where.exists()
    assert os.listdir(mounted.clear) == ["plain"]


def test_other_secrets_than_a_passphrase(mounted: Box) -> None:
    pay, keyfile = mounted.clear / "pay", mounted.root / "key"

    def run(*words: str | Path) -> None:
        """Without a passphrase in the environment."""
        subprocess.run([sys.executable, "-m", "cryptfs", *words], env=mounted.environment, check=True)

    run("domain", "create", "--new-keyfile", keyfile, pay)
    (pay / "inner").write_bytes(CONTENT)
    mounted.run("lock", pay)
    run("unlock", "--keyfile", keyfile, pay)
    assert (pay / "inner").read_bytes() == CONTENT
    protectors = json.loads(mounted.run("protector", "list", "--json", pay).stdout)
    assert [protector["kind"] for protector in protectors] == ["keyfile"]
    info = json.loads(mounted.run("info", "--json", mounted.vault).stdout)
    assert (info["features"], len(info["domains"])) == (["domains"], 1)
    mounted.run("policy", pay, "--max-age", "30s")
    assert (pay / "inner").read_bytes() == CONTENT


def test_a_reader_written_from_the_format_alone_names_domains(mounted: Box) -> None:
    pay = mounted.clear / "pay"
    create(mounted, pay, "--no-shred-secret")
    (mounted.clear / "plain").write_bytes(CONTENT)
    (pay / "inner").write_bytes(CONTENT)
    mounted.umount()
    script = Path(__file__).parents[2] / "scripts" / "reference_decrypt.py"
    for vault, secret, out, names in (
        (mounted.vault, PASSPHRASE, "all", ["pay", "plain"]),
        (cipher_dir(mounted), SECRET, "own", ["inner"]),
    ):
        passfile = mounted.root / f"{out}.pass"
        passfile.write_text(secret)
        words: list[str | Path] = [sys.executable, script, vault, mounted.root / out, "--passfile", passfile]
        ended = subprocess.run(words, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stderr
        assert ("left out: /pay (domain " in ended.stderr) == (out == "all")
        assert sorted(os.listdir(mounted.root / out)) == names


def test_rotation_of_a_domain_and_of_its_volume_do_not_meet(mounted: Box, pay: Path) -> None:
    (pay / "inner").write_bytes(CONTENT)
    mounted.run("rotate", "--kek", "--destroy-old", pay, env={"CRYPTFS_PASSPHRASE": SECRET})
    versions = [json.loads(mounted.run("info", "--json", path).stdout)["kek_version"] for path in (pay, mounted.vault)]
    assert versions == [2, 1]
    mounted.run("rotate", "--kek", "--destroy-old", mounted.vault)
    versions = [json.loads(mounted.run("info", "--json", path).stdout)["kek_version"] for path in (pay, mounted.vault)]
    assert versions == [2, 2]
    assert reread(pay / "inner") == CONTENT
    mounted.remount()
    unlock(mounted, pay)
    assert reread(pay / "inner") == CONTENT
    assert reread(mounted.clear / "plain") == CONTENT
    said = mounted.run("check", "--deep", mounted.vault).stdout
    assert "domain /pay: clean" in said, said


def test_a_volume_is_rotated_around_locked_domains_and_one_that_is_made_meanwhile(mounted: Box, pay: Path) -> None:
    box, other = mounted, mounted.clear / "other"
    (pay / "inner").write_bytes(CONTENT)
    box.run("lock", pay)
    populate(box.clear)
    before = {path: path.read_bytes() for path in cipher_dir(box).rglob("*") if path.is_file()}
    with somebody_there(box.clear):
        box.run("rotate", box.vault, "--kek", "--background")
        wait_for(box, "running")
        create(box, other)
        (other / "file").write_bytes(CONTENT)
        os.sync()
    box.run("rotate", box.vault, "--destroy-old")
    assert status(box)["older_versions"] == []
    assert {path: path.read_bytes() for path in before} == before, "nothing of a domain is touched"
    with refused(errno.ENOKEY):
        os.listdir(pay)
    # Not mounted: the command rewrites the places, too.
    box.umount()
    box.run("rotate", box.vault, "--kek", "--destroy-old")
    assert (status(box)["kek_version"], status(box)["older_versions"]) == (3, [])
    box.mount()
    look(box.clear)
    for path, name in ((pay, "inner"), (other, "file")):
        unlock(box, path)
        assert reread(path / name) == CONTENT
        assert json.loads(box.run("info", "--json", path).stdout)["kek_version"] == 1
    said = box.run("check", "--deep", box.vault).stdout
    assert "domain /pay: clean" in said, said
    assert "domain /other: clean" in said, said
