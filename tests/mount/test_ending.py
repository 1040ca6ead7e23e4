"""How a mount may end, and what is there afterwards."""

from __future__ import annotations

import errno
import os
import random
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from cryptfs.cli import mounts
from cryptfs.cli.mounts import wait_until
from cryptfs.format.state import SLOT_BYTES, State, decode_slot
from tests.mount.box import Box, ending
from tests.mount.syscalls import refused

pytestmark = pytest.mark.mount

CONTENT = bytes(range(256)) * 1000


def state_of(vault: Path) -> State:
    """The newer slot (not authenticated here)."""
    raw = (vault / "state").read_bytes()
    slots = [decode_slot(raw[at : at + SLOT_BYTES]) for at in (0, SLOT_BYTES)]
    return max((slot.state for slot in slots if slot is not None), key=lambda state: state.sequence)


def umount(box: Box) -> None:
    subprocess.run(["umount", box.clear], check=True)


def fusermount(box: Box) -> None:
    subprocess.run(["fusermount3", "-u", box.clear], check=True)


def ours(box: Box) -> None:
    box.run("umount", box.clear)


def sigterm(box: Box) -> None:
    os.kill(box.daemon_pid, signal.SIGTERM)


def test_every_way_of_ending_leaves_the_volume_clean(mounted: Box) -> None:
    for number, end in enumerate((umount, fusermount, ours, sigterm)):
        (mounted.clear / "file").write_bytes(CONTENT)
        os.rename(mounted.clear / "file", mounted.clear / f"renamed {number}")
        before = state_of(mounted.vault)
        assert not before.clean
        [agent] = mounted.agent_pids()
        with ending(mounted.daemon_pid), ending(agent):
            end(mounted)
        after = state_of(mounted.vault)
        assert after.clean
        assert after.epoch == before.epoch
        assert after.unclean == ()
        assert not mounted.is_mounted
        mounted.mount()
        assert (mounted.clear / f"renamed {number}").read_bytes() == CONTENT


def close_quietly(fd: int) -> None:
    """Close what may have lost its daemon: close(2) then may say so, or not."""
    with suppress(OSError):
        os.close(fd)


def test_sigterm_while_files_are_open_keeps_what_was_written(mounted: Box) -> None:
    fd = os.open(mounted.clear / "file", os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        os.write(fd, CONTENT)
        pid = mounted.daemon_pid
        with ending(pid):
            os.kill(pid, signal.SIGTERM)
        with refused(errno.ENOTCONN, errno.ECONNABORTED, errno.EIO):
            os.fsync(fd)
    finally:
        close_quietly(fd)
    assert state_of(mounted.vault).clean
    mounted.mount()
    assert (mounted.clear / "file").read_bytes() == CONTENT


def test_a_lazy_unmount_ends_with_the_last_file(mounted: Box) -> None:
    pid = mounted.daemon_pid
    out = (mounted.clear / "file").open("wb", buffering=0)
    try:
        out.write(CONTENT)
        mounts.unmount(mounted.clear, lazily=True)
        assert not mounted.is_mounted
        out.write(CONTENT)
        os.fsync(out.fileno())
        assert os.path.exists(f"/proc/{pid}")
    finally:
        with ending(pid):
            out.close()
    assert state_of(mounted.vault).clean
    mounted.mount()
    assert (mounted.clear / "file").read_bytes() == 2 * CONTENT


def test_unmounting_while_it_is_busy_is_refused_and_harms_nothing(mounted: Box) -> None:
    with (mounted.clear / "file").open("wb", buffering=0) as out:
        out.write(CONTENT)
        for command in (["umount"], ["fusermount3", "-u"]):
            assert subprocess.run([*command, str(mounted.clear)], check=False, capture_output=True).returncode != 0
        mounted.run("umount", mounted.clear, code=15)
        out.write(CONTENT)
    assert (mounted.clear / "file").read_bytes() == 2 * CONTENT


def test_a_killed_daemon(mounted: Box) -> None:
    """What was synced is there; what was not is some prefix of what was written to it; nothing else is touched."""
    rng, clear = random.Random(1), mounted.clear
    (clear / "dir").mkdir()
    synced, appended, bystander = clear / "dir" / "synced", clear / "appended", clear / "bystander"
    bystander.write_bytes(CONTENT)
    bystander.rename(clear / "dir" / "bystander")
    whole = rng.randbytes(2_000_000)
    kept = bytearray(rng.randbytes(300_000))
    fds = []
    try:
        with synced.open("wb", buffering=0) as out:
            out.write(kept)
            for _ in range(10):
                at, piece = rng.randrange(len(kept)), rng.randbytes(20_000)
                os.pwrite(out.fileno(), piece, at)
                kept[len(kept) :] = bytes(max(0, at + len(piece) - len(kept)))
                kept[at : at + len(piece)] = piece
            os.fsync(out.fileno())
        fds.append(os.open(appended, os.O_WRONLY | os.O_CREAT, 0o600))
        os.write(fds[0], whole[:1_000_000])
        os.fsync(fds[0])
        for at in range(1_000_000, 2_000_000, 50_000):
            os.write(fds[0], whole[at : at + 50_000])
        (clear / "never synced").write_bytes(b"never synced")
        (clear / "dir" / "synced").rename(clear / "renamed")
        os.kill(mounted.daemon_pid, signal.SIGSTOP)  # nothing it does from here on counts
        mounted.kill_daemon()
        with refused(errno.ENOTCONN):
            os.listdir(clear)
    finally:
        for fd in fds:
            close_quietly(fd)
    said = mounted.mount()
    assert "Traceback" not in said
    places = [path for path in (clear / "renamed", synced) if path.exists()]
    assert [path.read_bytes() for path in places] == [kept]
    found = appended.read_bytes()
    assert len(found) >= 1_000_000
    assert found == whole[: len(found)]
    assert (clear / "dir" / "bystander").read_bytes() == CONTENT
    assert (clear / "never synced").read_bytes() in (b"", b"never synced")
    state = state_of(mounted.vault)
    assert (state.unclean, state.clean) == (((1, 1),), False)
    # All of it can be changed again, and is then settled for good.
    with appended.open("ab") as more:
        more.write(b"more")
    mounted.remount()
    assert appended.read_bytes() == found + b"more"
    assert " ERROR " not in mounted.log()


def test_daemon_and_agent_killed_one_after_the_other(mounted: Box) -> None:
    fd = os.open(mounted.clear / "file", os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        os.write(fd, CONTENT)
        os.fsync(fd)
        mounted.kill_agent()
        mounted.kill_daemon()
    finally:
        close_quietly(fd)
    mounted.mount()
    mounted.kill_daemon()
    mounted.run("umount", mounted.clear)
    assert not mounted.is_mounted
    mounted.mount()
    assert (mounted.clear / "file").read_bytes() == CONTENT
    assert state_of(mounted.vault).unclean == ((1, 2),)


# an agent that is none -----------------------------------------------------------------------------------------


@contextmanager
def impostor(path: Path, answer: bytes) -> Iterator[None]:
    """Listens where the agent should, and says `answer` to whoever asks something."""
    path.parent.mkdir(mode=0o700, exist_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()

    def serve() -> None:
        with listener:
            while True:
                try:
                    client, _ = listener.accept()
                    with client:
                        if client.recv(1 << 16) and answer:
                            client.sendall(answer)
                except OSError:
                    if listener.fileno() < 0 or stopping.is_set():
                        return

    stopping = threading.Event()
    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
        path.unlink()


NO_ANSWERS = {
    "dies": b"",
    "dies in mid-message": b"\0\0\0\x05hell",
    "other protocol": b"HTTP/1.1 200 OK\r\n\r\n",
    "oversized": b"\xff\xff\xff\xff" + bytes(5000),
    "no msgpack": b"\0\0\0\1\xc1",
}


def test_mount_with_an_agent_that_is_none(box: Box) -> None:
    for answer in NO_ANSWERS.values():
        with impostor(box.agent_socket, answer):
            said = box.mount(code=16)
        assert said.startswith("error: ")
        assert not box.is_mounted
    assert wait_until(lambda: not mounts.daemon_of_mount(box.clear), 5)
    box.mount()
    (box.clear / "file").write_bytes(b"works")
