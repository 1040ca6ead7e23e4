"""`cryptfs mount` and `umount` with a real daemon on a real mount."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cryptfs import errors, paths
from cryptfs.cli import processes
from cryptfs.cli.mounts import daemon_of_volume, mount_at, wait_until
from tests.cli.conftest import PASSPHRASE, Cryptfs

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif(not os.path.exists("/dev/fuse"), reason="no /dev/fuse on this machine"),
]


@pytest.fixture
def clear(cryptfs: Cryptfs) -> Iterator[Path]:
    """An empty directory to mount on; what is still mounted there at the end is unmounted."""
    path = cryptfs.root / "clear"
    path.mkdir()
    yield path
    if mount_at(path) is not None:
        cryptfs.run("umount", path, code=None)


@contextmanager
def ending(pids: list[int]) -> Iterator[None]:
    """The one process in `pids` ends by what is done inside."""
    assert len(pids) == 1
    with processes.watched(pids[0]) as watch:
        yield
        assert watch.has_ended(30), "the process has not ended"


def test_mount_work_umount_mount(cryptfs: Cryptfs, vault: Path, clear: Path) -> None:
    ended = cryptfs.run("mount", vault, clear, passphrase=PASSPHRASE)
    assert ended.stdout == ended.stderr == ""
    (clear / "file").write_text("in the clear")
    [volume] = cryptfs.status()
    assert volume["cipher_dir"] == str(vault)
    assert volume["mountpoint"] == str(clear)
    assert volume["state"] == "unlocked"
    assert [volume["daemon_pid"]] == cryptfs.daemon_pids()
    with ending(cryptfs.agent_pids()):
        cryptfs.run("umount", clear)
        assert cryptfs.daemon_pids() == [], "umount returns once the daemon is gone"
        assert cryptfs.status() == []
    assert list(clear.iterdir()) == []
    cryptfs.run("mount", vault, clear, passphrase=PASSPHRASE)
    assert (clear / "file").read_text() == "in the clear"


def test_the_passphrase_is_nowhere_but_where_it_was_given(cryptfs: Cryptfs, vault: Path, clear: Path) -> None:
    passfile = cryptfs.root / "pass"
    passfile.write_text(PASSPHRASE)
    passfile.chmod(0o600)
    cryptfs.run("mount", vault, clear, passphrase=PASSPHRASE)
    pids = [*cryptfs.agent_pids(), *cryptfs.daemon_pids()]
    assert len(pids) == 2
    for pid in pids:
        environ = Path(f"/proc/{pid}/environ").read_bytes()
        assert b"XDG_RUNTIME_DIR" in environ
        assert PASSPHRASE.encode() not in environ
        assert b"CRYPTFS_PASSPHRASE" not in environ
    for process in Path("/proc").glob("[0-9]*"):
        try:
            assert PASSPHRASE.encode() not in (process / "cmdline").read_bytes()
        except OSError:
            continue
    logs = list(Path(paths.state_dir(), "log").iterdir())
    assert len(logs) == 2
    for log in logs:
        assert PASSPHRASE not in log.read_text()
        assert log.stat().st_mode & 0o077 == 0


def test_an_unlocked_volume_is_mounted_without_asking(cryptfs: Cryptfs, vault: Path, clear: Path) -> None:
    cryptfs.run("unlock", vault, passphrase=PASSPHRASE)
    cryptfs.run("mount", vault, clear)
    assert mount_at(clear) is not None


def test_a_second_mount_is_refused(cryptfs: Cryptfs, vault: Path, clear: Path) -> None:
    other = cryptfs.root / "other"
    other.mkdir()
    cryptfs.run("mount", vault, clear, passphrase=PASSPHRASE)
    ended = cryptfs.run("mount", vault, other, passphrase=PASSPHRASE, code=14)
    assert str(clear) in ended.stderr
    ended = cryptfs.run("mount", vault, clear, passphrase=PASSPHRASE, code=14)
    (clear / "still").touch()


def test_a_second_mount_with_another_agent_is_refused_by_the_lock(
    cryptfs: Cryptfs, vault: Path, clear: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link, other = cryptfs.root / "link", cryptfs.root / "other"
    runtime, state = cryptfs.root / "r2", cryptfs.root / "s2"
    for path in (link, other):
        path.mkdir()
    for path in (runtime, state):
        path.mkdir(mode=0o700)
    elsewhere = {"XDG_RUNTIME_DIR": str(runtime), "XDG_STATE_HOME": str(state)}
    cryptfs.run("mount", vault, clear, passphrase=PASSPHRASE)
    subprocess.run(["mount", "--bind", vault, link], check=True)  # the same directory under another name
    try:
        ended = cryptfs.run("mount", link, other, passphrase=PASSPHRASE, env=elsewhere, code=14)
        assert ended.stderr.startswith("error: ")
        volumes = cryptfs.run("status", "--json", env=elsewhere).stdout
        assert volumes == "[]\n", "a mount that failed leaves no key behind"
    finally:
        subprocess.run(["umount", link], check=True)
    assert mount_at(other) is None


def test_unusable_mount_points(cryptfs: Cryptfs, vault: Path, clear: Path) -> None:
    (clear / "mine").touch()
    for path, why in (
        (clear, "not empty"),
        (clear / "mine", "no directory"),
        (cryptfs.root / "missing", "does not exist"),
        (vault, "is the volume itself"),
        (vault / "tree", "inside the volume"),
        (cryptfs.root, "would be hidden"),
    ):
        ended = cryptfs.run("mount", vault, path, passphrase=PASSPHRASE, code=15)
        assert why in ended.stderr
    assert cryptfs.agent_pids() == [], "no key is brought in for a mount that cannot be"


def test_a_mount_in_use_stays(cryptfs: Cryptfs, vault: Path, clear: Path) -> None:
    cryptfs.run("mount", vault, clear, passphrase=PASSPHRASE)
    with (clear / "file").open("w") as file:
        for words in ([], ["--keep-unlocked"]):
            ended = cryptfs.run("umount", clear, *words, code=15)
            assert "in use" in ended.stderr
            assert "hint: " in ended.stderr
        file.write("still works")
    assert (clear / "file").read_text() == "still works"
    cryptfs.run("umount", clear)
    assert cryptfs.status() == [], "the key is not kept by an umount that failed"


def test_keep_unlocked(cryptfs: Cryptfs, vault: Path, clear: Path) -> None:
    cryptfs.run("mount", vault, clear, passphrase=PASSPHRASE)
    cryptfs.run("umount", clear, "--keep-unlocked")
    [volume] = cryptfs.status()
    assert (volume["state"], volume["mountpoint"], volume["daemon_pid"]) == ("unlocked", None, None)
    assert volume["cipher_dir"] == str(vault)
    cryptfs.run("mount", vault, clear)
    cryptfs.run("umount", clear)
    assert cryptfs.status() == [], "it was asked for once"


@pytest.mark.parametrize("tool", [["fusermount3", "-u"], ["umount"]])
def test_other_tools_unmount_as_cleanly(cryptfs: Cryptfs, vault: Path, clear: Path, tool: list[str]) -> None:
    cryptfs.run("mount", vault, clear, passphrase=PASSPHRASE)
    (clear / "file").write_text("kept")
    agent = cryptfs.agent_pids()
    with ending(agent), ending(cryptfs.daemon_pids()):
        subprocess.run([*tool, clear], check=True)
    cryptfs.run("mount", vault, clear, passphrase=PASSPHRASE)
    assert (clear / "file").read_text() == "kept"


def test_mounting_again_at_once_waits_for_the_daemon_that_is_leaving(
    cryptfs: Cryptfs, vault: Path, clear: Path
) -> None:
    for round_number in range(3):
        cryptfs.run("mount", vault, clear, passphrase=PASSPHRASE)
        (clear / str(round_number)).write_bytes(bytes(1 << 20))
        subprocess.run(["fusermount3", "-u", clear], check=True)
    cryptfs.run("mount", vault, clear, passphrase=PASSPHRASE)
    assert sorted(os.listdir(clear)) == ["0", "1", "2"]


@pytest.mark.parametrize("verb", ["umount", "mount"])
def test_a_mount_left_dead_is_cleared(cryptfs: Cryptfs, vault: Path, clear: Path, verb: str) -> None:
    cryptfs.run("mount", vault, clear, passphrase=PASSPHRASE)
    (clear / "file").write_text("kept")
    os.sync()
    [pid] = cryptfs.daemon_pids()
    with (clear / "file").open() as held, ending([pid]):
        os.kill(pid, signal.SIGKILL)
        assert wait_until(lambda: not Path(f"/proc/{pid}").exists(), 30)
        with pytest.raises(OSError, match="not connected") as failure:
            os.statvfs(clear)
        assert failure.value.errno == errno.ENOTCONN
        assert f"`cryptfs umount {clear}` clears" in cryptfs.run("status").stderr
        said = cryptfs.run("lock", clear, code=errors.MountpointUnusable.exit_code).stderr
        assert "is gone" in said
        assert str(vault) in said
        if verb == "umount":  # also while a program holds a descriptor in it
            assert "cleared" in cryptfs.run("umount", clear).stderr
            assert mount_at(clear) is None
        del held
    cryptfs.run("mount", vault, clear, passphrase=PASSPHRASE)
    assert (clear / "file").read_text() in ("kept", "")


def test_umount_of_what_is_no_mount_of_ours(cryptfs: Cryptfs, clear: Path) -> None:
    assert "nothing is mounted there" in cryptfs.run("umount", clear, code=15).stderr
    assert "of type proc" in cryptfs.run("umount", "/proc", code=15).stderr
    cryptfs.run("umount", clear / "missing", code=15)


def test_lock_by_mount_point_and_unlock(cryptfs: Cryptfs, vault: Path, clear: Path) -> None:
    cryptfs.run("mount", vault, clear, "--no-cache", passphrase=PASSPHRASE)
    (clear / "file").write_text("text")
    cryptfs.run("lock", clear)
    [volume] = cryptfs.status()
    assert (volume["state"], volume["mountpoint"]) == ("locked", str(clear))
    cryptfs.run("unlock", vault, passphrase=PASSPHRASE)
    [volume] = cryptfs.status()
    assert (volume["state"], volume["mountpoint"]) == ("unlocked", str(clear))
    assert (clear / "file").read_text() == "text"


def test_status_and_umount_without_an_agent(cryptfs: Cryptfs, vault: Path, clear: Path) -> None:
    cryptfs.run("mount", vault, clear, passphrase=PASSPHRASE)
    ended = cryptfs.run("agent", "stop")
    assert f"{clear} stays mounted without a key" in ended.stderr
    [volume] = cryptfs.status()
    assert (volume["state"], volume["mountpoint"], volume["cipher_dir"]) == ("locked", str(clear), str(vault))
    assert [volume["daemon_pid"]] == cryptfs.daemon_pids()
    assert "locked already" in cryptfs.run("lock", clear).stderr
    cryptfs.run("unlock", vault, passphrase=PASSPHRASE)
    assert len(cryptfs.status()) == 1, "one volume, though the new agent does not know the daemon yet"
    cryptfs.run("umount", clear)
    assert cryptfs.status() == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_in_the_foreground_a_signal_unmounts(cryptfs: Cryptfs, vault: Path, clear: Path, number: int) -> None:
    with cryptfs.on_terminal("mount", "-f", vault, clear) as terminal:
        terminal.expect("Passphrase: ")
        terminal.enter(PASSPHRASE)
        terminal.expect("is mounted on")
        (clear / "file").write_text("kept")
        with ending(cryptfs.daemon_pids()):
            terminal.process.send_signal(number)
            assert terminal.ended() == 0
    assert mount_at(clear) is None
    assert wait_until(lambda: not cryptfs.agent_pids(), 30)


def test_ctrl_c_at_the_terminal_unmounts(cryptfs: Cryptfs, vault: Path, clear: Path) -> None:
    cryptfs.run("unlock", vault, passphrase=PASSPHRASE)
    with cryptfs.on_terminal("mount", "--foreground", vault, clear) as terminal:
        terminal.expect("is mounted on")
        terminal.type("\x03")
        assert terminal.ended() == 0
    assert mount_at(clear) is None


def test_in_the_foreground_umount_ends_it(cryptfs: Cryptfs, vault: Path, clear: Path) -> None:
    with cryptfs.on_terminal("mount", "-f", vault, clear) as terminal:
        terminal.expect("Passphrase: ")
        terminal.enter(PASSPHRASE)
        terminal.expect("is mounted on")
        cryptfs.run("umount", clear)
        assert terminal.ended() == 0


def test_options_reach_the_daemon(cryptfs: Cryptfs, vault: Path, clear: Path) -> None:
    words = (
        "--read-only",
        "--max-age",
        "2.5",
        "--max-entries",
        "2048",
        "--max-uses",
        "3",
        "-o",
        "noexec",
        "-o",
        "nodev,nosuid",
    )
    cryptfs.run("mount", vault, clear, *words, passphrase=PASSPHRASE)
    with pytest.raises(OSError, match="Read-only"):
        (clear / "file").touch()
    [pid] = cryptfs.daemon_pids()
    command = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
    assert command[command.index("--max-age") + 1] == "2.5"
    assert command[command.index("--max-entries") + 1] == "2048"
    assert command[command.index("--max-uses") + 1] == "3"
    options = next(
        line.split()[5] for line in Path("/proc/self/mountinfo").read_text().splitlines() if f" {clear} " in line
    )
    assert {"ro", "noexec", "nodev", "nosuid"} <= set(options.split(","))


def test_an_unknown_option_is_refused_before_a_key_is_brought_in(cryptfs: Cryptfs, vault: Path, clear: Path) -> None:
    ended = cryptfs.run("mount", vault, clear, "-o", "nonsense", passphrase=PASSPHRASE, code=2)
    assert "nonsense" in ended.stderr
    assert cryptfs.agent_pids() == []


def test_a_damaged_state_file(cryptfs: Cryptfs, vault: Path, clear: Path) -> None:
    state = vault / "state"
    state.write_bytes(bytes(len(state.read_bytes())))
    ended = cryptfs.run("mount", vault, clear, passphrase=PASSPHRASE, code=11)
    assert ended.stderr.startswith("error: ")
    assert cryptfs.status() == []
    assert mount_at(clear) is None


def test_without_fusermount_there_is_advice(cryptfs: Cryptfs, vault: Path, clear: Path) -> None:
    ended = cryptfs.run("mount", vault, clear, passphrase=PASSPHRASE, env={"PATH": "/nowhere"}, code=18)
    assert "hint: install the Debian package fuse3" in ended.stderr


def test_a_daemon_that_waits_for_the_key_is_no_daemon_yet_and_ends_with_its_command(
    cryptfs: Cryptfs, vault: Path, clear: Path
) -> None:
    """The fourth attempt after three wrong ones waits for a second, with the daemon's program loaded beside it."""
    for _ in range(3):
        cryptfs.run("mount", vault, clear, passphrase="wrong", code=errors.WrongSecret.exit_code)
        assert cryptfs.daemon_pids() == [], "one that is not wanted after all is ended"
    environment = {**os.environ, "CRYPTFS_PASSPHRASE": "wrong"}
    with subprocess.Popen(
        cryptfs.command("mount", vault, clear), env=environment, stderr=subprocess.DEVNULL
    ) as command:
        assert wait_until(lambda: bool(cryptfs.daemon_pids()), 30)
        with ending(cryptfs.daemon_pids()):
            assert daemon_of_volume(vault) is None
            assert cryptfs.status() == []
            command.kill()
    assert mount_at(clear) is None
    cryptfs.run("mount", vault, clear, passphrase=PASSPHRASE)
    daemon = daemon_of_volume(vault)
    assert daemon is not None
    assert [daemon.pid] == cryptfs.daemon_pids()
