"""The five ways a passphrase can come in."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cryptfs.cli import passphrase
from cryptfs.errors import UsageError
from tests.cli.terminal import Terminal


@pytest.fixture(autouse=True)
def nothing_claimed() -> Iterator[None]:
    yield
    os.environ.pop(passphrase.ENVIRONMENT_VARIABLE, None)
    passphrase.claim_environment()


def from_file(path: Path) -> bytes:
    return passphrase.choose(path, None, None).read()


def from_descriptor(content: bytes) -> bytes:
    read_fd, write_fd = os.pipe()
    try:
        os.write(write_fd, content)
        os.close(write_fd)
        return passphrase.choose(None, read_fd, None).read()
    finally:
        os.close(read_fd)


@pytest.mark.parametrize(
    ("content", "secret"),
    [
        (b"secret", b"secret"),
        (b"secret\n", b"secret"),
        (b"secret\n\n", b"secret\n"),
        (b"secret\r\n", b"secret\r"),
        (b"two\nlines\n", b"two\nlines"),
        (b" \x00\xff ", b" \x00\xff "),
        (b"x" * 65536 + b"\n", b"x" * 65536),
    ],
)
def test_a_file_and_a_descriptor_lose_one_newline(tmp_path: Path, content: bytes, secret: bytes) -> None:
    path = tmp_path / "pass"
    path.write_bytes(content)
    path.chmod(0o600)
    assert from_file(path) == secret
    if len(content) < 65536:  # a pipe's capacity
        assert from_descriptor(content) == secret


@pytest.mark.parametrize("content", [b"", b"\n", b"x" * 65537, b"x" * 200_000])
def test_empty_and_endless_passphrases_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "pass"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"empty|longer"):
        from_file(path)


@pytest.mark.parametrize(("mode", "warned"), [(0o600, False), (0o400, False), (0o640, True), (0o604, True)])
def test_a_file_that_others_may_open_is_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], mode: int, warned: bool
) -> None:
    path = tmp_path / "pass"
    path.write_bytes(b"secret")
    path.chmod(mode)
    assert from_file(path) == b"secret"
    assert ("warning: other users may open" in capsys.readouterr().err) is warned


def test_a_file_that_is_not_there_and_a_descriptor_that_is_closed(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        from_file(tmp_path / "missing")
    with pytest.raises(UsageError, match="Bad file descriptor"):
        passphrase.choose(None, 987, None).read()


@pytest.mark.parametrize(
    ("command", "secret"),
    [
        ("echo secret", b"secret"),
        ("printf secret", b"secret"),
        ("printf 'first\\nsecond\\n'", b"first"),
        ("printf 'a  b\\r\\n' | cat", b"a  b\r"),
    ],
)
def test_a_command_gives_its_first_line(command: str, secret: bytes) -> None:
    assert passphrase.choose(None, None, command).read() == secret


@pytest.mark.parametrize(
    ("command", "why"),
    [
        ("exit 3", "status 3"),
        ("echo secret; exit 1", "status 1"),
        ("true", "empty"),
        ("yes | tr -d '\\n'", "status|longer"),
    ],
)
def test_a_command_that_fails_gives_none(command: str, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        passphrase.choose(None, None, command).read()


def test_the_variable_is_taken_out_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(passphrase.ENVIRONMENT_VARIABLE, "secret\n")
    passphrase.claim_environment()
    assert passphrase.ENVIRONMENT_VARIABLE not in os.environ
    seen = subprocess.run(
        [sys.executable, "-c", "import os; print(*os.environ)"], capture_output=True, check=True
    ).stdout
    assert b"CRYPTFS_PASSPHRASE" not in seen
    sources = passphrase.choose(None, None, None)
    assert sources.read() == b"secret\n"
    assert "secret" not in repr(sources)


def test_an_empty_variable_is_an_empty_passphrase(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(passphrase.ENVIRONMENT_VARIABLE, "")
    passphrase.claim_environment()
    with pytest.raises(UsageError, match="empty"):
        passphrase.choose(None, None, None).read()


def test_two_sources_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="--passfile and --passfd"):
        passphrase.choose(Path("x"), 0, None)
    monkeypatch.setenv(passphrase.ENVIRONMENT_VARIABLE, "secret")
    passphrase.claim_environment()
    with pytest.raises(UsageError, match="--extpass and CRYPTFS_PASSPHRASE"):
        passphrase.choose(None, None, "echo x")


@pytest.mark.parametrize("words", [passphrase.PIN, passphrase.NEW_PASSPHRASE, passphrase.NEW_PIN])
def test_other_secrets_have_options_and_a_variable_of_their_own(
    monkeypatch: pytest.MonkeyPatch, words: passphrase.Words
) -> None:
    monkeypatch.setenv(words.variable, "secret")
    monkeypatch.setenv(passphrase.ENVIRONMENT_VARIABLE, "another")
    passphrase.claim_environment()
    assert words.variable not in os.environ
    assert passphrase.choose(None, None, None, words).read() == b"secret"
    assert passphrase.choose(None, None, None).read() == b"another"
    with pytest.raises(UsageError, match=f"{words.options[2]} and {words.variable}"):
        passphrase.choose(None, None, "echo x", words)


def asking(function: str) -> list[str]:
    return [sys.executable, "-c", f"from cryptfs.cli import passphrase as p; print('got', p.{function}().hex())"]


def test_the_prompt_shows_nothing_that_is_typed() -> None:
    with Terminal(asking("ask")) as terminal:
        assert terminal.is_echoing()
        terminal.expect("Passphrase: ")
        assert not terminal.is_echoing()
        terminal.enter("hunter2 ü ")
        terminal.expect("got " + "hunter2 ü ".encode().hex())
        assert terminal.is_echoing()
        assert terminal.ended() == 0
        assert "hunter" not in terminal.seen


def test_ctrl_c_at_the_prompt_gives_the_terminal_back() -> None:
    with Terminal(asking("ask")) as terminal:
        terminal.expect("Passphrase: ")
        terminal.type("\x03")
        terminal.expect("KeyboardInterrupt")
        assert terminal.is_echoing()
        assert terminal.ended() != 0


def test_a_new_passphrase_is_rated_and_typed_twice() -> None:
    with Terminal(asking("ask_new")) as terminal:
        terminal.expect("New passphrase: ")
        terminal.enter("")
        terminal.expect("empty")
        terminal.expect("New passphrase: ")
        terminal.enter("password")
        terminal.expect("strength: very weak")
        terminal.expect("Again, to be sure: ")
        terminal.enter("passwort")
        terminal.expect("not the same")
        terminal.expect("New passphrase: ")
        terminal.enter("Tr0mbone/quartz/9-elk")
        terminal.expect("strength: strong")
        terminal.expect("Again, to be sure: ")
        terminal.enter("Tr0mbone/quartz/9-elk")
        terminal.expect("got " + b"Tr0mbone/quartz/9-elk".hex())
        assert terminal.ended() == 0
        assert "quartz" not in terminal.seen


def test_a_very_long_passphrase_is_rated_in_bounded_time() -> None:
    assert passphrase._rating(b"aB3$" * 16000).startswith("strength: ")


def test_without_a_terminal_there_is_advice() -> None:
    code = "from cryptfs.cli import passphrase as p\ntry: p.ask()\nexcept Exception as e: print(e, e.__notes__)"
    ended = subprocess.run(
        [sys.executable, "-c", code],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
        start_new_session=True,
    )
    assert "no terminal to ask" in ended.stdout
    assert "--passfile" in ended.stdout
