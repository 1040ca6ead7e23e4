"""How any failure becomes an exit code and one line."""

from __future__ import annotations

import subprocess
import sys

import pytest

from cryptfs import errors
from cryptfs.cli import main as main_module
from cryptfs.cli.main import main
from tests.cli.conftest import Cryptfs


def failing_with(monkeypatch: pytest.MonkeyPatch, failure: BaseException) -> None:
    def fail(*_args: object, **_kwargs: object) -> None:
        raise failure

    monkeypatch.setattr(main_module.cli, "main", fail)


@pytest.mark.parametrize(
    ("failure", "code", "said"),
    [
        (
            errors.VolumeBusy("it is mounted"),
            14,
            "error: it is mounted\nhint: `cryptfs status` shows where it is mounted\n",
        ),
        (ExceptionGroup("", [ExceptionGroup("", [errors.CryptfsError("deep")])]), 1, "error: deep\n"),
        (ExceptionGroup("", [ValueError("x"), errors.CryptfsError("ours")]), 1, "error: ours\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
        (BaseExceptionGroup("", [KeyboardInterrupt()]), 130, "error: interrupted\n"),
        (PermissionError(13, "Permission denied", "/x"), 19, "error: /x: Permission denied\n"),
    ],
)
def test_a_failure_is_one_line_and_its_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], failure: BaseException, code: int, said: str
) -> None:
    failing_with(monkeypatch, failure)
    assert main([]) == code
    assert capsys.readouterr().err.startswith(said)


def test_a_fault_of_our_own_shows_its_place_and_never_its_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing_with(monkeypatch, ValueError("hunter2"))
    assert main([]) == 70
    said = capsys.readouterr().err
    assert said.startswith("error: internal error: ValueError at test_main.py:")
    assert "--debug" in said
    assert "hunter2" not in said


def test_debug_shows_the_trace(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    failing_with(monkeypatch, errors.VolumeBusy("it is mounted"))
    assert main(["--debug", "status"]) == 14
    assert "Traceback" in capsys.readouterr().err


def test_debug_after_the_verb_is_the_verbs_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing_with(monkeypatch, errors.VolumeBusy("it is mounted"))
    assert main(["status", "--debug"]) == 14
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["nonsense"],
        ["mount"],
        ["init", "x", "--block-size", "5"],
        ["status", "--yaml"],
        ["mount", "a", "b", "--max-age", "0"],
    ],
)
def test_wrong_words_are_a_usage_error(cryptfs: Cryptfs, words: list[str]) -> None:
    ended = cryptfs.run(*words, code=2)
    assert ended.stderr.startswith("error: ")
    assert "hint: " in ended.stderr
    assert "Traceback" not in ended.stderr
    assert ended.stdout == ""


def test_help_and_version(cryptfs: Cryptfs) -> None:
    assert cryptfs.run("--version").stdout.startswith("cryptfs 0.")
    listed = cryptfs.run("--help").stdout
    for verb in ("init", "mount", "umount", "unlock", "lock", "status", "info", "agent"):
        assert f"\n  {verb} " in listed


def test_a_reader_that_leaves_early_is_no_fault_of_ours(cryptfs: Cryptfs) -> None:
    with subprocess.Popen(
        cryptfs.command("--help"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.wait(30) in (0, 1)
        assert "Traceback" not in process.stderr.read()


def test_the_version_costs_none_of_the_heavy_imports() -> None:
    code = "import sys; from cryptfs.cli.main import main; main(['--version']); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    heavy = {"trio", "rich", "zxcvbn", "msgpack", "cryptography", "pyfuse3", "subprocess"}
    assert not {name.split(".")[0] for name in loaded} & heavy - {"subprocess"}


@pytest.mark.parametrize("words", [[], ["audit"], ["agent"]])
def test_without_a_verb_the_help_is_shown_as_it_is(cryptfs: Cryptfs, words: list[str]) -> None:
    ended = cryptfs.run(*words, code=errors.UsageError.exit_code)
    assert ended.stderr.startswith("Usage: cryptfs ")
    assert "\nCommands:\n" in ended.stderr
    assert ended.stdout == ""
