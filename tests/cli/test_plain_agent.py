"""Asking without an event loop, of agents that answer, refuse, talk, hang up or are somebody else's."""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from cryptfs import paths
from cryptfs.cli import plain_agent
from cryptfs.cli.plain_agent import NotReached
from cryptfs.errors import AgentUnavailable, NotPermitted, WrongSecret
from cryptfs.format.agent_msg import PROTOCOL_VERSION, encode_failure, encode_push, encode_reply
from cryptfs.keys.agent_answers import get_int
from tests.cli.conftest import PASSPHRASE, Cryptfs
from tests.conftest import XdgDirs

HELLO = encode_reply(1, {"version": PROTOCOL_VERSION, "pid": 7, "started_s": 1})
EVENT = encode_push({"event": "waiting"})


@contextmanager
def agent_that_says(*answers: bytes) -> Iterator[list[bytes]]:
    """Answers the requests of one connection after the other; hangs up once it has nothing more to say.

    Yields what it is sent.
    """
    heard: list[bytes] = []
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(paths.agent_socket())
    listener.listen()

    def serve() -> None:
        with listener:
            client, _ = listener.accept()
            with client:
                for answer in answers:
                    heard.append(client.recv(1 << 16))
                    client.sendall(answer)
                client.shutdown(socket.SHUT_WR)
                while part := client.recv(1 << 16):
                    heard.append(part)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield heard
    finally:
        thread.join(20)
        assert not thread.is_alive()


def tell() -> int:
    return plain_agent.tell("unlock", {"secret": b"s3cret"}, lambda result: get_int(result, "n"), patience_s=20)


@pytest.fixture(autouse=True)
def _own_directories(xdg_dirs: XdgDirs) -> None:
    Path(paths.agent_socket()).parent.mkdir(mode=0o700, parents=True, exist_ok=True)


def test_an_answer_and_what_was_sent_for_it() -> None:
    with agent_that_says(HELLO, encode_reply(2, {"n": 5})) as heard:
        assert tell() == 5
    assert [b"s3cret" in part for part in heard] == [False, True]


def test_events_are_passed_over_wherever_they_are_cut() -> None:
    """The second one's beginning comes with the first answer."""
    with agent_that_says(HELLO + EVENT + EVENT[:5], EVENT[5:] + encode_reply(2, {"n": 6})):
        assert tell() == 6


def test_a_refusal_is_the_error_it_stands_for() -> None:
    with agent_that_says(HELLO, encode_failure(2, "wrong-secret", "no")), pytest.raises(WrongSecret, match="no"):
        tell()


@pytest.mark.parametrize(
    ("hello", "why"),
    [
        (b"", "does not answer"),
        (HELLO[:9], "does not answer"),
        (encode_reply(1, {"version": PROTOCOL_VERSION + 1, "pid": 7}), "not protocol version"),
        (b"\xff" * 64, "does not answer"),
    ],
)
def test_without_a_right_hello_nothing_is_asked(hello: bytes, why: str) -> None:
    with agent_that_says(*filter(None, [hello])) as heard, pytest.raises(NotReached, match=why):
        tell()
    assert not any(b"s3cret" in part for part in heard)


def test_nobody_listens() -> None:
    with pytest.raises(NotReached, match="no key agent answers"):
        tell()


@pytest.mark.parametrize("answer", [b"\xff" * 64, encode_reply(2, {"n": "five"}), encode_reply(2, {})])
def test_rubbish(answer: bytes) -> None:
    with agent_that_says(HELLO, answer), pytest.raises(AgentUnavailable, match="rubbish"):
        tell()


def test_one_that_hangs_up_is_not_asked_again() -> None:
    """It may have done what it was asked."""
    with agent_that_says(HELLO) as heard, pytest.raises(AgentUnavailable, match="gone"):
        tell()
    assert [b"s3cret" in part for part in heard] == [False, True]


def test_another_users_agent_is_told_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    user = os.geteuid()
    monkeypatch.setattr(paths, "peer_of", lambda _sock: (1, user + 1))
    with agent_that_says() as heard, pytest.raises(NotPermitted, match="another user"):
        tell()
    assert heard == []


@contextmanager
def another_program(says: bytes) -> Iterator[None]:
    """Serves the agent's socket, answers whatever it is sent with this, and hangs up."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(paths.agent_socket())
        listener.listen()

        def serve() -> None:
            while True:
                client, _ = listener.accept()
                with client, suppress(OSError):
                    if client.recv(1 << 16) == b"end":
                        return
                    client.sendall(says)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            with socket.socket(socket.AF_UNIX) as last:
                last.connect(paths.agent_socket())
                last.sendall(b"end")
            thread.join(20)


@pytest.mark.parametrize("says", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b""])
def test_another_program_on_the_socket_is_named(cryptfs: Cryptfs, vault: Path, says: bytes) -> None:
    with another_program(says):
        for words in (["status"], ["lock", "--all"], ["agent", "status"], ["agent", "stop"], ["unlock", vault]):
            ended = cryptfs.run(*words, passphrase=PASSPHRASE, code=AgentUnavailable.exit_code)
            assert f"process {os.getpid()} listens at {paths.agent_socket()}" in ended.stderr, words
            assert "end that process" in ended.stderr, words
            assert ended.stderr.count("does not answer") == 0, words


def test_what_is_no_socket_is_left_alone_and_to_be_moved(cryptfs: Cryptfs, vault: Path) -> None:
    Path(paths.agent_socket()).write_text("notes")
    ended = cryptfs.run("unlock", vault, passphrase=PASSPHRASE, code=NotPermitted.exit_code)
    assert "is no socket" in ended.stderr
    assert "move it away" in ended.stderr
    assert Path(paths.agent_socket()).read_text() == "notes"


def test_unlock_loads_no_event_loop(cryptfs: Cryptfs, vault: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = cryptfs.command
    monkeypatch.setattr(cryptfs, "command", lambda *words: [sys.executable, "-X", "importtime", *command(*words)[1:]])
    trace = cryptfs.run("unlock", vault, passphrase=PASSPHRASE).stderr
    assert "cryptfs.cli.key_agent" in trace
    assert "trio" not in trace
