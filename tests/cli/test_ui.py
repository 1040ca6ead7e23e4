from __future__ import annotations

import io
import json

import pytest

from cryptfs.cli import ui


class FakeTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ü 漢", "plain ü 漢"),
        ("a\x1b[2Jb", "a\\x1b[2Jb"),
        ("line\nline\ttab\r", "line\\nline\\ttab\\r"),
        ("\udcff\udc80", "\\xff\\x80"),
        ("right-to-left \u202e", "right-to-left \\u202e"),
    ],
)
def test_text_from_outside_cannot_drive_the_terminal(text: str, shown: str) -> None:
    assert ui.printable(text) == shown


def test_an_error_and_its_hint_are_one_line_each_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    ui.error("the file\nis gone", "put it back")
    assert capsys.readouterr() == ("", "error: the file\\nis gone\nhint: put it back\n")


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_colour_only_where_it_is_welcome(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert ui.is_fancy(FakeTerminal())
    assert not ui.is_fancy(io.StringIO())
    monkeypatch.setenv(name, value)
    assert not ui.is_fancy(FakeTerminal())


def test_a_table_in_a_pipe_is_aligned_and_never_cut(capsys: pytest.CaptureFixture[str]) -> None:
    ui.table(["volume", "directory"], [["ab", "/" + "x" * 300], ["abcdefgh", "/y\n"]])
    lines = capsys.readouterr().out.split("\n")
    assert lines == ["VOLUME    DIRECTORY", "ab        /" + "x" * 300, "abcdefgh  /y\\n", ""]


def test_a_table_on_a_terminal_shows_every_cell_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.delenv("NO_COLOR", raising=False)
    screen = FakeTerminal()
    monkeypatch.setattr("sys.stdout", screen)
    ui.table(["volume", "directory"], [["ab", "/[bold]x[/bold]"]])
    assert "/[bold]x[/bold]" in screen.getvalue()


def test_json_carries_a_path_that_is_no_utf8(capsys: pytest.CaptureFixture[str]) -> None:
    ui.out_json([{"cipher_dir": "/\udcff"}])
    assert json.loads(capsys.readouterr().out) == [{"cipher_dir": "/\udcff"}]


def test_a_closed_stderr_does_not_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr("sys.stderr", closed)
    monkeypatch.setattr(ui, "is_fancy", lambda _stream: False)
    ui.error("nobody hears this")
