"""What is read from /proc, and the checks of a mount point that need no mount."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cryptfs.cli import mounts, processes
from cryptfs.errors import MissingDependency, MountpointUnusable

MOUNTINFO = r"""
21 26 0:19 / /sys rw,nosuid shared:7 - sysfs sysfs rw
60 26 0:50 / /home/a\040b\134c\011d rw,nosuid shared:9 master:1 - fuse.cryptfs /vault\040enc rw,user_id=0
61 26 0:51 / /mnt rw - ext4 /dev/sda1 rw
62 61 0:52 / /mnt rw - fuse.cryptfs /v rw
broken line
""".strip()


def test_mountinfo_with_escapes_optional_fields_and_stacked_mounts() -> None:
    found = mounts.parse_mountinfo(MOUNTINFO)
    assert [(str(m.mountpoint), m.fstype, m.source) for m in found] == [
        ("/sys", "sysfs", "sysfs"),
        ("/home/a b\\c\td", "fuse.cryptfs", "/vault enc"),
        ("/mnt", "ext4", "/dev/sda1"),
        ("/mnt", "fuse.cryptfs", "/v"),
    ]
    assert [m.is_ours for m in found] == [False, True, False, True]


def test_of_stacked_mounts_the_last_is_on_top(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mounts, "all_mounts", lambda: mounts.parse_mountinfo(MOUNTINFO))
    top = mounts.mount_at(Path("/mnt"))
    assert top is not None
    assert top.source == "/v"
    assert mounts.mount_at(Path("/mn")) is None


def test_this_machines_own_mounts_are_found() -> None:
    proc = mounts.mount_at(Path("/proc"))
    assert proc is not None
    assert proc.fstype == "proc"
    assert not proc.is_ours


def usable(tmp_path: Path) -> tuple[Path, Path]:
    cipher_dir, mountpoint = tmp_path / "vault", tmp_path / "clear"
    cipher_dir.mkdir()
    mountpoint.mkdir()
    return cipher_dir, mountpoint


def test_an_empty_directory_is_usable(tmp_path: Path) -> None:
    cipher_dir, mountpoint = usable(tmp_path)
    mounts.check_usable(mountpoint, cipher_dir)


def test_what_is_no_mount_point(tmp_path: Path) -> None:
    cipher_dir, _ = usable(tmp_path)
    inside = cipher_dir / "tree"
    inside.mkdir()
    full = tmp_path / "full"
    full.mkdir()
    (full / "x").touch()
    for path, why in (
        (cipher_dir, "is the volume itself"),
        (inside, "lies inside the volume"),
        (tmp_path, "would be hidden"),
        (Path("/"), "would be hidden"),
        (tmp_path / "missing", "does not exist"),
        (full / "x", "is no directory"),
        (full, "is not empty"),
        (Path("/proc"), "a file system of type proc is mounted on /proc already"),
    ):
        with pytest.raises(MountpointUnusable, match=why):
            mounts.check_usable(path, cipher_dir)


def test_symlinks_and_dots_are_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = tmp_path / "real"
    real.mkdir()
    (tmp_path / "link").symlink_to(real)
    (tmp_path / "up").symlink_to(tmp_path)
    monkeypatch.chdir(real)
    for path in (tmp_path / "link", tmp_path / "up" / "link", Path("."), Path("../link"), Path("../up/real")):
        assert mounts.resolved(path) == real


def test_an_answer_in_time_an_error_and_none_at_all() -> None:
    assert mounts.answer_of(lambda: 7) == 7

    def fail() -> None:
        raise OSError(errno.ENOTCONN, "not connected")

    with pytest.raises(OSError, match="not connected"):
        mounts.answer_of(fail)
    released = threading.Event()
    with pytest.raises(TimeoutError):
        mounts.answer_of(lambda: released.wait(30), timeout_s=0.05)
    released.set()


def test_a_dead_mount_is_known_by_its_errno(monkeypatch: pytest.MonkeyPatch) -> None:
    def statvfs_fails(number: int) -> None:
        def fail(path: Path) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr("os.statvfs", fail)

    statvfs_fails(errno.ENOTCONN)
    assert mounts.is_dead(Path("/x"))
    statvfs_fails(errno.EACCES)
    assert not mounts.is_dead(Path("/x"))


def test_unmounting_what_is_no_mount_says_so(tmp_path: Path) -> None:
    with pytest.raises(MountpointUnusable, match="cannot unmount"):
        mounts.unmount(tmp_path)


def test_a_machine_without_fuse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(MissingDependency, match="fusermount3") as failure:
        mounts.check_dependencies()
    assert "fuse3" in failure.value.__notes__[0]


@pytest.mark.parametrize(("call", "why"), [("exists", "/dev/fuse is missing"), ("access", "may not be opened")])
def test_a_machine_without_a_usable_device(monkeypatch: pytest.MonkeyPatch, call: str, why: str) -> None:
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr("os.path.exists", lambda _path: True)
    monkeypatch.setattr("os.path.exists" if call == "exists" else "os.access", lambda *_: False)
    with pytest.raises(MissingDependency, match=why):
        mounts.check_dependencies()


def test_a_daemon_is_found_by_its_command_line_and_watched_to_its_end(tmp_path: Path) -> None:
    words = ["-m", "cryptfs.daemon", "--cipher-dir", str(tmp_path), "--mountpoint", "/m n", "--agent-socket", "/s"]
    with subprocess.Popen(
        [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()", *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        daemon = next(found for found in mounts.running_daemons() if found.cipher_dir == tmp_path)
        assert daemon == mounts.Daemon(process.pid, tmp_path, Path("/m n"), Path("/s"))
        with mounts.watched(daemon) as watch:
            assert not watch.has_ended(0.01)
            process.communicate()
            assert watch.has_ended(10)
    with mounts.watched(daemon) as watch:
        assert watch.has_ended(0)
    with mounts.watched(None) as watch:
        assert watch.has_ended(0)


def test_a_number_that_came_to_mean_another_process_is_not_watched() -> None:
    with mounts.watched(mounts.Daemon(os.getpid(), Path("/c"), Path("/m"), Path("/s"))) as watch:
        assert watch.has_ended(0)


def child(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> processes.Starting:
    (tmp_path / "probe.py").write_text("import os, sys\nfd = int(sys.argv[sys.argv.index('--ready-fd') + 1])\n" + code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return processes.start("probe", [], log_file=tmp_path / "log" / "probe.log")


def test_a_child_says_when_it_is_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRYPTFS_PASSPHRASE", "hunter2")
    code = """
print(sorted(os.environ), os.getcwd(), os.getsid(0) == os.getpid(), file=sys.stderr)
os.write(fd, b'ready\\n')
"""
    starting = child(code, tmp_path, monkeypatch)
    assert starting.wait_ready(30) == "ready"
    assert starting.process.wait(30) == 0
    log = tmp_path / "log" / "probe.log"
    assert log.stat().st_mode & 0o777 == 0o600
    assert "PATH" in log.read_text()
    assert "CRYPTFS_PASSPHRASE" not in log.read_text()
    assert log.read_text().endswith("/ True\n")


@pytest.mark.parametrize(
    ("code", "line"),
    [("os.write(fd, b'error: 15 no such mount point\\nmore')", "error: 15 no such mount point"), ("sys.exit(1)", "")],
)
def test_a_child_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, line: str) -> None:
    starting = child(code, tmp_path, monkeypatch)
    assert starting.wait_ready(30) == line
    starting.process.wait(30)


def test_a_child_that_is_never_ready_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starting = child("sys.stdin = os.fdopen(os.pipe()[0]); sys.stdin.read()", tmp_path, monkeypatch)
    with processes.ended_unless_left(starting):
        assert starting.wait_ready(0.2) is None
    assert starting.process.returncode is not None
