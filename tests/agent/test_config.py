"""`agent.toml`: what is taken from it, and that nobody else's word is taken for it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from cryptfs.agent.config import FILE_MAX_BYTES, AgentConfig, read_config
from cryptfs.errors import NotPermitted, UsageError


def write(directory: Path, text: str | bytes, mode: int = 0o600) -> str:
    path = directory / "agent.toml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    path.chmod(mode)
    return str(directory)


@pytest.fixture
def library(short_tmp: Path) -> Path:
    path = short_tmp / "lib" / "module.so"
    path.parent.mkdir(mode=0o755)
    path.touch(0o755)
    return path


def test_without_a_file_nothing_is_configured(short_tmp: Path) -> None:
    assert read_config(str(short_tmp)) == read_config(str(short_tmp / "nowhere")) == AgentConfig()
    assert read_config(write(short_tmp, "")) == AgentConfig()


def test_everything_it_can_say(short_tmp: Path, library: Path) -> None:
    text = f"""
        [pkcs11]
        writable = ["{short_tmp}"]
        network = true
        environment = {{ SOFTHSM2_CONF = "/a b/c" }}
        [pkcs11.modules]
        soft = "{library}"
    """
    pkcs11 = read_config(write(short_tmp, text, 0o644)).pkcs11
    assert pkcs11.modules == {"soft": str(library)}
    assert pkcs11.writable == (str(short_tmp),)
    assert pkcs11.network
    assert pkcs11.environment == {"SOFTHSM2_CONF": "/a b/c"}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("nonsense", "agent.toml"),
        (b"\xff", "utf-8"),
        ("[pcks11]", "means nothing here"),
        ("pkcs11 = 1", "is no table"),
        ("[pkcs11]\nmodule = 1", "means nothing here"),
        ("[pkcs11]\nmodules = 1", "is no table"),
        ("[pkcs11.modules]\na = 1", "no text"),
        ('[pkcs11.modules]\na = "module.so"', "not absolute"),
        ('[pkcs11.modules]\na = "/nowhere/module.so"', "No such file"),
        ('[pkcs11.modules]\na = "/etc"', "is no file"),
        ('[pkcs11.modules]\n"" = "/etc/passwd"', "1 to 64 characters"),
        (f'[pkcs11.modules]\n{"a" * 65} = "/etc/passwd"', "1 to 64 characters"),
        ("[pkcs11]\nnetwork = 1", "not true or false"),
        ('[pkcs11]\nwritable = "/tmp"', "no list of texts"),
        ("[pkcs11]\nwritable = [1]", "no list of texts"),
        ('[pkcs11]\nwritable = ["tmp"]', "not the absolute path"),
        ('[pkcs11]\nwritable = ["/nowhere/at/all"]', "not the absolute path"),
        ("[pkcs11.environment]\nA = 1", "no text"),
        ('[pkcs11.environment]\n"A=B" = "1"', "cannot be set"),
        ('[pkcs11.environment]\nA = "\\u0000"', "cannot be set"),
        ("#" * (FILE_MAX_BYTES + 1), "longer than"),
    ],
)
def test_what_is_wrong_in_it_is_said(short_tmp: Path, text: str | bytes, why: str) -> None:
    with pytest.raises(UsageError, match=why) as caught:
        read_config(write(short_tmp, text))
    assert str(short_tmp / "agent.toml") in str(caught.value)


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_may_write_is_refused(short_tmp: Path, mode: int) -> None:
    with pytest.raises(NotPermitted, match="other users may write"):
        read_config(write(short_tmp, "", mode))


def test_libraries_that_others_may_write_or_replace_are_refused(short_tmp: Path, library: Path) -> None:
    directory = write(short_tmp, f'[pkcs11.modules]\nsoft = "{library}"')
    assert read_config(directory).pkcs11.modules
    for path, mode in ((library, 0o775), (library.parent, 0o777)):
        before = path.stat().st_mode
        path.chmod(mode)
        with pytest.raises(NotPermitted, match="other users may write"):
            read_config(directory)
        path.chmod(before)
    assert read_config(directory).pkcs11.modules


@pytest.mark.skipif(os.geteuid() != 0, reason="gives files away")
def test_another_users_file_or_library_is_refused(short_tmp: Path, library: Path) -> None:
    directory = write(short_tmp, f'[pkcs11.modules]\nsoft = "{library}"')
    for path in (library, library.parent, short_tmp / "agent.toml"):
        os.chown(path, 65534, 65534)
        with pytest.raises(NotPermitted, match="another user"):
            read_config(directory)
        os.chown(path, 0, 0)


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_what_is_no_file_is_refused_and_does_not_hang(short_tmp: Path, make: Callable[[Path], None]) -> None:
    make(short_tmp / "agent.toml")
    with pytest.raises(UsageError, match="no regular file"):
        read_config(str(short_tmp))
