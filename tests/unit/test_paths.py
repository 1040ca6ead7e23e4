"""Where socket and state live, and that nobody else's directory is ever used."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from pathlib import Path

import pytest

from cryptfs import paths
from cryptfs.errors import NotPermitted
from tests.conftest import XdgDirs


def mode(path: str) -> int:
    return os.stat(path).st_mode & 0o7777


def test_the_xdg_directories_are_used_and_made_private(xdg_dirs: XdgDirs) -> None:
    assert paths.runtime_dir() == str(xdg_dirs.runtime / "cryptfs")
    assert paths.agent_socket() == str(xdg_dirs.runtime / "cryptfs" / "agent.sock")
    assert paths.state_dir() == str(xdg_dirs.state / "cryptfs")
    assert mode(paths.runtime_dir()) == mode(paths.state_dir()) == 0o700


def test_the_state_falls_back_to_the_home(xdg_dirs: XdgDirs, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_STATE_HOME", value)
        assert paths.state_dir() == str(xdg_dirs.home / ".local" / "state" / "cryptfs")


def test_without_a_runtime_directory_a_user_gets_one_of_his_own_under_tmp(
    short_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(short_tmp))
    uid = os.geteuid()
    monkeypatch.setattr("os.geteuid", lambda: uid or 4242)
    if uid == 0:
        # Made by root, but wanted by 4242: as good as another user's.
        with pytest.raises(NotPermitted, match="another user"):
            paths.runtime_dir()
        assert (short_tmp / "cryptfs-4242").is_dir()
    else:
        assert paths.runtime_dir() == str(short_tmp / f"cryptfs-{uid}")


def test_root_without_a_runtime_directory_uses_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr(paths, "private_dir", lambda path: path)
    assert paths.runtime_dir() == "/run/cryptfs"


def test_a_directory_open_to_others_is_refused(short_tmp: Path) -> None:
    (short_tmp / "d").mkdir()
    for bits in (0o750, 0o705, 0o711):
        (short_tmp / "d").chmod(bits)
        with pytest.raises(NotPermitted, match=f"{bits:04o}"):
            paths.private_dir(str(short_tmp / "d"))


def test_a_symlink_or_file_in_its_place_is_refused(short_tmp: Path) -> None:
    (short_tmp / "real").mkdir(mode=0o700)
    (short_tmp / "link").symlink_to(short_tmp / "real")
    (short_tmp / "file").write_text("")
    for name in ("link", "file"):
        with pytest.raises(NotPermitted, match="not a directory"):
            paths.private_dir(str(short_tmp / name))


def test_what_cannot_be_made_says_so(short_tmp: Path) -> None:
    (short_tmp / "file").write_text("")
    with pytest.raises(NotPermitted, match="cannot make"):
        paths.private_dir(str(short_tmp / "file" / "sub"))


@pytest.mark.parametrize("length", [60, 107, 108, 240])
def test_socket_addresses_of_any_length(short_tmp: Path, length: int) -> None:
    missing = length - len(str(short_tmp)) - 3
    directory = short_tmp / ("d" * missing)
    directory.mkdir()
    path = str(directory / "s")
    assert len(path) == length
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        with paths.socket_address(path) as address:
            server.bind(address)
        server.listen()
        with paths.socket_address(path) as address:
            client.connect(address)
    assert os.path.exists(path)


def test_a_full_backlog_is_waited_for_as_long_as_the_socket_says(short_tmp: Path) -> None:
    path = str(short_tmp / "sock")
    with socket.socket(socket.AF_UNIX) as listener, contextlib.ExitStack() as waiting:
        listener.bind(path)
        listener.listen(0)

        def another(timeout_s: float) -> None:
            sock = waiting.enter_context(socket.socket(socket.AF_UNIX))
            sock.settimeout(timeout_s)
            paths.connect(sock, path)

        another(0)
        for timeout_s in (0, 0.05):
            with pytest.raises(BlockingIOError):
                another(timeout_s)
        accepting = threading.Timer(0.1, lambda: waiting.enter_context(listener.accept()[0]))
        accepting.start()
        another(20)
        accepting.join()
