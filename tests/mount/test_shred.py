"""Volumes destroyed for good, and volumes that nobody could ever keep."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cryptfs.cli.mounts import wait_until
from cryptfs.format.volume import parse_volume
from tests.mount.box import PASSPHRASE, Box, boxed
from tests.mount.domains import domains
from tests.mount.syscalls import refused
from tests.softhsm import MODULE, PIN, SoftHsm

SHRED_SECRET_MISSING = 29
BUSY = 14
LOCKED = 17
DAMAGED = 21
DENIED = 23
BACKEND_AWAY = 30
NOT_A_VOLUME = 10
UNSUPPORTED = 12
USAGE = 2
OTHER = {"CRYPTFS_PASSPHRASE": "another horse, another staple 8"}


@pytest.fixture
def bare(fuse: None, short_tmp: Path) -> Iterator[Box]:
    """Everything but the volume."""
    with boxed(short_tmp) as box:
        yield box


def written(box: Box) -> None:
    box.mount()
    (box.clear / "records").write_bytes(b"customer 4711\n" * 100)
    os.sync()
    box.umount()


def put_back(box: Box, copy: Path) -> None:
    shutil.rmtree(box.vault)
    shutil.copytree(copy, box.vault, symlinks=True)


@pytest.mark.parametrize("where", ["agent", "keyfile"])
def test_no_earlier_copy_opens_a_shredded_volume(bare: Box, where: str) -> None:
    keyfile = bare.root / "shred.key"
    bare.init(*(["--shred-secret"] if where == "agent" else ["--shred-keyfile", str(keyfile)]))
    written(bare)
    copy = bare.root / "yesterday"
    shutil.copytree(bare.vault, copy, symlinks=True)
    bare.mount()
    assert (bare.clear / "records").read_bytes().startswith(b"customer")
    bare.umount()
    bare.run("shred", "--yes", bare.vault)
    assert not keyfile.exists()
    bare.run("mount", bare.vault, bare.clear, code=NOT_A_VOLUME)
    # With everything anybody could have kept: the whole directory, and the passphrase.
    put_back(bare, copy)
    assert "shred secret" in bare.mount(code=SHRED_SECRET_MISSING)
    assert "shred secret" in bare.run("unlock", bare.vault, code=SHRED_SECRET_MISSING).stderr
    bare.run("export", bare.vault, "/records", bare.root / "out", code=SHRED_SECRET_MISSING)


def test_where_there_is_no_shred_secret_a_copy_still_opens_and_the_command_says_so(bare: Box) -> None:
    bare.init()
    written(bare)
    copy = bare.root / "yesterday"
    shutil.copytree(bare.vault, copy, symlinks=True)
    said = bare.run("shred", "--yes", bare.vault).stderr
    assert "no shred secret" in said
    assert "'passphrase'" in said
    assert not (bare.vault / "volume").exists()
    put_back(bare, copy)
    bare.mount()
    assert (bare.clear / "records").exists()
    bare.umount()


def test_a_mounted_volume_is_not_shredded(bare: Box) -> None:
    bare.init("--shred-secret")
    bare.mount()
    (bare.clear / "here").write_text("still")
    assert str(bare.clear) in bare.run("shred", "--yes", bare.vault, code=BUSY).stderr
    bare.remount()
    assert (bare.clear / "here").read_text() == "still"
    bare.umount()


def test_another_name_or_none_destroys_nothing(bare: Box) -> None:
    bare.init("--shred-secret")
    before = (bare.vault / "volume").read_bytes()
    assert "no terminal" in bare.run("shred", bare.vault, code=USAGE).stderr
    assert (bare.vault / "volume").read_bytes() == before
    bare.unlock()


def test_a_shred_key_file_that_is_gone_moved_or_another(bare: Box) -> None:
    keyfile = bare.root / "stick" / "shred.key"
    keyfile.parent.mkdir()
    bare.init("--shred-keyfile", str(keyfile))
    assert keyfile.stat().st_mode & 0o777 == 0o600
    moved = keyfile.rename(bare.root / "moved.key")
    assert str(keyfile) in bare.run("unlock", bare.vault, code=SHRED_SECRET_MISSING).stderr
    bare.run("unlock", bare.vault, env={"CRYPTFS_SHRED_KEYFILE": str(moved)})
    bare.run("lock", bare.vault)
    other = bare.root / "other.key"
    other.write_bytes(os.urandom(32))
    for data in (os.urandom(32), bytes(32), b"short"):
        other.write_bytes(data)
        bare.run("unlock", bare.vault, code=SHRED_SECRET_MISSING, env={"CRYPTFS_SHRED_KEYFILE": str(other)})
    # A file that is no such secret is not overwritten by a shred.
    other.write_bytes(b"a letter")
    bare.run("shred", "--yes", bare.vault, code=SHRED_SECRET_MISSING, env={"CRYPTFS_SHRED_KEYFILE": str(other)})
    assert other.read_bytes() == b"a letter"
    bare.run("unlock", bare.vault, env={"CRYPTFS_SHRED_KEYFILE": str(moved)})


def test_an_init_that_fails_leaves_no_shred_key_file(bare: Box) -> None:
    bare.vault.mkdir(mode=0o700)
    (bare.vault / "in the way").touch()
    keyfile = bare.root / "shred.key"
    bare.run("init", "--shred-keyfile", str(keyfile), bare.vault, code=USAGE)
    assert not keyfile.exists()
    keyfile.write_bytes(b"mine")
    (bare.vault / "in the way").unlink()
    bare.run("init", "--shred-keyfile", str(keyfile), bare.vault, code=USAGE)
    assert keyfile.read_bytes() == b"mine"


def test_an_ephemeral_volume_is_gone_with_its_mount(bare: Box) -> None:
    bare.init("--ephemeral")
    bare.mount()
    (bare.clear / "scratch").write_bytes(b"for now" * 1000)
    left = bare.vault / "tree"
    bare.umount()
    assert len(list(left.iterdir())) == 2, "the noise is there until the next mount"
    assert "ephemeral" in bare.run("unlock", bare.vault, code=12).stderr
    bare.mount()
    assert list(bare.clear.iterdir()) == []
    (bare.clear / "again").write_text("works")
    assert (bare.clear / "again").read_text() == "works"
    bare.umount()


@pytest.mark.parametrize("how", ["umount", "lock", "agent killed", "agent stop"])
def test_what_ends_an_ephemeral_volume_ends_every_copy_of_it(bare: Box, how: str) -> None:
    bare.init("--ephemeral", "--block-size", "4K")
    bare.mount()
    bare.run("policy", bare.vault, "--max-age", "5m")
    (bare.clear / "scratch").write_bytes(b"for now" * 1000)
    os.sync()
    copy = Path(shutil.copytree(bare.vault, bare.root / "copy", symlinks=True))
    if how == "lock":
        bare.run("lock", bare.clear)
        with refused(errno.ENOKEY):
            os.listdir(bare.clear)
    elif how == "agent killed":
        bare.kill_agent()
    elif how == "agent stop":
        bare.run("agent", "stop")
    else:
        bare.umount()
    for where in (bare.vault, copy):
        assert "its key is gone" in bare.run("unlock", where, code=UNSUPPORTED).stderr
        bare.run("export", where, "/scratch", bare.root / "out", code=UNSUPPORTED)
    if how != "umount":
        bare.umount()
    before = (bare.vault / "volume").read_bytes()
    bare.mount()
    now = parse_volume((bare.vault / "volume").read_bytes())
    assert now.volume_id != parse_volume(before).volume_id
    assert (now.block_size, now.policy.max_age_s) == (4096, None), "a policy lasts as long as the mount"
    assert list(bare.clear.iterdir()) == []
    bare.umount()


def test_ephemeral_mounts_leave_nothing_of_their_own_in_the_state_directory(bare: Box) -> None:
    bare.init("--ephemeral")
    ids = []
    for how in ("umount", "kill", "umount"):
        bare.mount()
        ids.append(parse_volume((bare.vault / "volume").read_bytes()).volume_id.hex())
        (bare.clear / "scratch").write_bytes(b"for now" * 1000)
        assert bare.run("audit", "verify").returncode == 0
        if how == "kill":
            bare.kill_agent()
            bare.kill_daemon()
        bare.run("umount", bare.clear)
    state = bare.root / "s" / "cryptfs"
    left = [str(path) for path in state.rglob("*")]
    # Of the daemon's logs that of the last mount: the next one removes it.
    assert [path for path in left if any(each in path for each in ids)] == [str(state / "log" / f"{ids[-1]}.log")]
    shown = bare.run("audit", "show", "--json").stdout
    assert all(each in shown for each in ids), "what was asked for is in the agent's log"
    assert "agent: intact" in bare.run("audit", "verify").stdout
    bare.mount()
    verified = bare.run("audit", "verify", bare.vault)
    assert "in the agent's" in verified.stdout + verified.stderr
    bare.umount()


@pytest.mark.parametrize("how", ["killed", "half made"])
def test_leftovers_of_an_ephemeral_volume_are_cleaned_up(bare: Box, how: str) -> None:
    bare.init("--ephemeral")
    bare.mount()
    (bare.clear / "scratch").write_bytes(b"for now" * 1000)
    if how == "killed":
        bare.kill_daemon()
        bare.run("umount", bare.clear, code=None)
    else:
        bare.umount()
        shutil.rmtree(bare.vault / "sidecars")
        (bare.vault / "volume.new").write_bytes(b"half")
    bare.mount()
    assert list(bare.clear.iterdir()) == []
    bare.umount()


@pytest.mark.parametrize("token", ["card", "card:", ":"])
def test_a_shred_token_without_a_name_is_refused_before_anything_is_asked(bare: Box, token: str) -> None:
    said = bare.run("init", "--shred-token", token, bare.vault, code=USAGE).stderr
    assert "MODULE:TOKEN" in said
    said = bare.run("init", "--shred-token", f"{MODULE}:card", bare.vault, code=USAGE).stderr
    assert "PIN" in said
    assert "CRYPTFS_SHRED_PIN" in said
    assert not bare.vault.exists()


def test_ephemeral_and_shred_secret_do_not_go_together(bare: Box) -> None:
    for options in (["--ephemeral", "--shred-secret"], ["--shred-secret", "--shred-keyfile", "x"]):
        bare.run("init", *options, bare.vault, code=USAGE)
    passfile = bare.root / "pass"
    passfile.write_text(PASSPHRASE)
    passfile.chmod(0o600)
    bare.run("init", "--ephemeral", "--passfile", passfile, bare.vault, code=USAGE)
    assert not bare.vault.exists()


def test_a_shred_secret_in_a_token(bare: Box) -> None:
    hsm = SoftHsm(bare.root / "hsm").set_up()
    hsm.make_token("shredding")
    pin = {"CRYPTFS_SHRED_PIN": PIN}
    init = ("init", "--kdf-cost", "low", "--shred-token", f"{MODULE}:shredding", bare.vault)
    assert "agent.toml" in bare.run(*init, code=BACKEND_AWAY, env=pin).stderr
    assert not bare.vault.exists()
    config = bare.root / "c" / "cryptfs"
    config.mkdir(parents=True)
    (config / "agent.toml").write_text(hsm.agent_toml())
    bare.run("agent", "stop")  # the one that said so may be about to end, and has read the configuration
    bare.run(*init, env=pin)
    bare.run("mount", bare.vault, bare.clear, env=pin)
    (bare.clear / "records").write_bytes(b"customer 4711\n")
    bare.umount()
    copy = bare.root / "yesterday"
    shutil.copytree(bare.vault, copy, symlinks=True)
    assert "PIN" in bare.run("unlock", bare.vault, code=13, env={"CRYPTFS_SHRED_PIN": "000000"}).stderr
    bare.run("unlock", bare.vault, code=USAGE)
    bare.run("shred", "--yes", bare.vault, env=pin)
    put_back(bare, copy)
    assert "not in the token any more" in bare.run("unlock", bare.vault, code=DENIED, env=pin).stderr


def domain_in(box: Box) -> Path:
    path = box.clear / "payroll"
    box.run("domain", "create", "--kdf-cost", "low", path, env=OTHER)
    (path / "salaries").write_bytes(b"4711\n" * 1000)
    (box.clear / "menu").write_text("soup")
    return path


def test_a_shredded_domain_is_gone_from_every_copy_and_nothing_else_is(bare: Box) -> None:
    bare.init()
    bare.mount()
    path = domain_in(bare)
    os.sync()
    copy = bare.root / "yesterday"
    shutil.copytree(bare.vault, copy, symlinks=True)
    [inner] = (bare.vault / "domains").iterdir()
    with (path / "salaries").open("rb") as open_file:
        assert open_file.read(4) == b"4711"
        bare.run("shred", "--yes", path)
        with pytest.raises(OSError, match="key"):
            os.pread(open_file.fileno(), 4, 0)
    assert (bare.clear / "menu").read_text() == "soup"
    assert sorted(os.listdir(bare.clear)) == ["menu", "payroll"]
    bare.remount()
    assert (bare.clear / "menu").read_text() == "soup"
    bare.umount()
    shutil.rmtree(inner)
    bare.mount()
    os.rmdir(bare.clear / "payroll")
    bare.umount()
    put_back(bare, copy)
    assert "shred secret" in bare.run("unlock", inner, code=SHRED_SECRET_MISSING, env=OTHER).stderr


def test_a_shredded_volume_takes_its_domains_along(bare: Box) -> None:
    bare.init("--shred-secret")
    bare.mount()
    domain_in(bare)
    bare.umount()
    [inner] = (bare.vault / "domains").iterdir()
    copy = bare.root / "yesterday"
    shutil.copytree(bare.vault, copy, symlinks=True)
    assert f"has no domain at {'/nothing'}" in bare.run("shred", "--yes", bare.vault, "nothing", code=USAGE).stderr
    bare.run("shred", "--yes", bare.vault)
    assert not (inner / "volume").exists()
    put_back(bare, copy)
    bare.run("unlock", inner, code=SHRED_SECRET_MISSING, env=OTHER)


def test_a_domain_named_by_its_path_while_nothing_is_mounted(bare: Box) -> None:
    bare.init()
    bare.mount()
    domain_in(bare)
    bare.umount()
    [inner] = (bare.vault / "domains").iterdir()
    bare.run("shred", "--yes", bare.vault, "payroll")
    assert not (inner / "volume").exists()
    bare.mount()
    assert (bare.clear / "menu").read_text() == "soup"
    bare.umount()


def test_rmdir_of_a_shredded_domain_removes_what_is_left_of_it(bare: Box) -> None:
    bare.init()
    bare.mount()
    path = domain_in(bare)
    [inner] = (bare.vault / "domains").iterdir()
    with (path / "salaries").open("rb") as open_file:
        bare.run("shred", "--yes", path)
        assert [row["state"] for row in domains(bare)] == ["shredded"]
        path.rmdir()
        assert os.listdir(bare.clear) == ["menu"]
        # What somebody has open of it goes with the mount, or with him, and shows nothing.
        with pytest.raises(OSError, match="key"):
            os.pread(open_file.fileno(), 4, 0)
    path.mkdir()
    (path / "file").write_text("of the volume itself")
    bare.remount()
    assert (path / "file").read_text() == "of the volume itself"
    assert not inner.exists()
    assert os.listdir(bare.vault / "domains") == []
    bare.umount()
    assert "clean" in bare.run("check", "--deep", bare.vault).stdout


def test_a_shredded_domain_that_is_not_open_goes_as_well_and_its_copies_do_not(bare: Box) -> None:
    bare.init()
    bare.mount()
    path = domain_in(bare)
    bare.umount()
    [inner] = (bare.vault / "domains").iterdir()
    volume = (inner / "volume").read_bytes()
    bare.run("shred", "--yes", bare.vault, "payroll")
    assert (inner / "shredded").read_bytes() == b""
    (inner / "volume").write_bytes(volume)
    bare.mount()
    # Somebody put the file back: it is not gone, whatever the other one says.
    with refused(errno.ENOKEY):
        path.rmdir()
    (inner / "volume").unlink()
    (inner / "shredded").rename(inner / "hidden")
    with refused(errno.EIO):
        path.rmdir()
    (inner / "hidden").rename(inner / "shredded")
    # What a crash leaves of the file's destruction.
    (inner / "volume").write_bytes(bytes(len(volume)))
    subprocess.run(["rm", "-rf", path], check=True)
    assert wait_until(lambda: not os.listdir(bare.vault / "domains"), 10)
    bare.umount()
    assert "clean" in bare.run("check", bare.vault).stdout


@pytest.mark.parametrize("left", ["nothing", "zeros"])
def test_everybody_says_that_a_domain_was_shredded_and_calls_nothing_damaged(bare: Box, left: str) -> None:
    """`left`: of its `volume` file; zeros if a crash came before its name went."""
    bare.init()
    bare.mount()
    domain_in(bare)
    bare.umount()
    [inner] = (bare.vault / "domains").iterdir()
    size = (inner / "volume").stat().st_size
    bare.run("shred", "--yes", bare.vault, "payroll")
    if left == "zeros":
        (inner / "volume").write_bytes(bytes(size))
    assert [row["state"] for row in domains(bare)] == ["shredded"]
    for options in ((), ("--deep",), ("--repair",)):
        report = json.loads(bare.run("check", *options, "--json", bare.vault).stdout)
        assert report["result"] == "clean"
        [finding] = report["findings"]
        assert (finding["severity"], finding["what"], finding["path"], finding["reason"]) == (
            "notice", "domain", "/payroll", "shredded",
        )  # fmt: skip
        assert finding["id"] == inner.name
        assert [domain["report"] for domain in report["domains"]] == [None]
    said = bare.run("check", bare.vault)
    assert "shredded (by its owner" in said.stdout
    assert "locked" not in said.stderr
    assert "shredded" in bare.run("export", bare.vault, "/", bare.root / "copy").stderr
    assert sorted(os.listdir(bare.root / "copy")) == ["menu", "payroll"]
    assert "shredded" in bare.run("export", bare.vault, "/payroll/salaries", bare.root / "one", code=LOCKED).stderr
    for words in (("unlock",), ("rotate", "--kek"), ("shred", "--yes"), ("info",), ("protector", "list")):
        assert "was shredded" in bare.run(*words, inner, code=NOT_A_VOLUME).stderr
    # Its directory alone proves nothing: without the word that `shred` leaves it is damage.
    (inner / "shredded").unlink()
    bare.run("check", bare.vault, code=DAMAGED)


def test_a_daemon_killed_after_removing_a_shredded_domain(bare: Box) -> None:
    bare.init()
    bare.mount()
    path = domain_in(bare)
    [inner] = (bare.vault / "domains").iterdir()
    bare.run("shred", "--yes", path)
    path.rmdir()
    bare.kill_daemon()
    if not inner.exists() and not inner.with_name(inner.name + ".aside").exists():
        # It was quicker: as the kill would have left it otherwise.
        aside = inner.with_name(inner.name + ".aside")
        (aside / "tree").mkdir(parents=True)
        (aside / "tree" / "noise").write_bytes(b"noise")
        (aside / "shredded").touch()
    bare.mount()
    assert os.listdir(bare.clear) == ["menu"]
    bare.umount()
    bare.run("check", "--repair", bare.vault, code=24)
    assert os.listdir(bare.vault / "domains") == []
