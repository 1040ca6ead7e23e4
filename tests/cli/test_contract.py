"""docs/CLI_ABI.md says what the program does."""

from __future__ import annotations

import errno
import os
import re
import signal
from pathlib import Path

import click
import pytest

from cryptfs import errors
from cryptfs.cli import daemon_process
from cryptfs.cli.advice import error_for, hint_for, hinted
from cryptfs.cli.main import EXIT_INTERNAL, EXIT_SIGNAL, cli
from cryptfs.cli.processes import clean_environment
from cryptfs.daemon.args import FUSE_OPTIONS, parse

DOCUMENT = (Path(__file__).parents[2] / "docs" / "CLI_ABI.md").read_text("utf-8")


def all_errors() -> set[type[errors.CryptfsError]]:
    found = {errors.CryptfsError}
    waiting = [errors.CryptfsError]
    while waiting:
        children = waiting.pop().__subclasses__()
        found.update(child for child in children if child.__module__ == "cryptfs.errors")
        waiting += children
    return found


def exit_code_of(cls: type[errors.CryptfsError]) -> int:
    return cls.exit_code


ERRORS: list[type[errors.CryptfsError]] = sorted(all_errors(), key=exit_code_of)


def section(title: str) -> str:
    return DOCUMENT.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_exit_codes_are_those_of_the_error_classes() -> None:
    rows = re.findall(r"^\| ([\d, ]+) \| (?:`(\w+)`)? *\|", section("Exit codes"), re.MULTILINE)
    documented = {name: int(code) for code, name in rows if name}
    assert documented == {cls.__name__: cls.exit_code for cls in all_errors()}
    signals = [EXIT_SIGNAL + number for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)]
    others = [int(code) for codes, name in rows if not name for code in codes.split(",")]
    assert others == [0, EXIT_INTERNAL, *signals]
    assert len({code for code, _ in rows}) == len(rows), "a code stands for two things"


def commands() -> dict[str, click.Command]:
    context = click.Context(cli)
    found: dict[str, click.Command] = {}
    for name in cli.list_commands(context):
        command = cli.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            found |= {f"{name} {sub}": inner for sub, inner in command.commands.items()}
        else:
            found[name] = command
    return found


def test_every_verb_and_option_is_documented() -> None:
    verbs = set(re.findall(r"^\| `cryptfs ((?:agent|audit|domain|protector) \w+|\w+)", section("Verbs"), re.MULTILINE))
    assert verbs == set(commands())
    documented = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", DOCUMENT))
    for name, command in commands().items():
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                missing = set(parameter.opts) - documented
                assert not missing, f"{name} takes {missing}"


def test_every_mount_option_is_documented_and_taken_by_the_daemon() -> None:
    listed = re.search(r"may be repeated: `([^`]+)`", DOCUMENT)
    assert listed is not None
    assert set(listed[1].split()) == daemon_process.FUSE_OPTIONS
    assert daemon_process.FUSE_OPTIONS >= FUSE_OPTIONS
    for name in daemon_process.FUSE_OPTIONS:
        parse(["--cipher-dir", "/", "--mountpoint", "/", "--agent-socket", "/", "-o", name])


def test_options_that_the_daemon_would_refuse_are_refused_first() -> None:
    for options in (
        daemon_process.MountOptions(fuse_options=("nodev,nonsense",)),
        daemon_process.MountOptions(max_age_s=float("nan")),
        daemon_process.MountOptions(max_entries=5),
    ):
        with pytest.raises(errors.UsageError):
            daemon_process.check(options)
        with pytest.raises(errors.UsageError):
            parse(["--cipher-dir", "/", "--mountpoint", "/", "--agent-socket", "/", *options.arguments()])


def test_the_inherited_environment_is_what_is_documented() -> None:
    listed = re.search(r"nothing else of the environment: `([^`]+)`", section("Environment").replace("\n", " "))
    assert listed is not None
    names = listed[1].split()
    given = dict.fromkeys(
        [*names, "LC_ALL", "XDG_X", "CRYPTFS_PASSPHRASE", "CRYPTFS_OTHER", "LD_PRELOAD", "SECRET"], "x"
    )
    assert set(clean_environment(given)) == {*names, "LC_ALL", "XDG_X"}


@pytest.mark.parametrize("cls", ERRORS, ids=lambda cls: cls.__name__)
def test_an_error_crosses_a_process_border_by_its_code(cls: type[errors.CryptfsError]) -> None:
    again = error_for(cls.exit_code, "said there")
    assert type(again) is cls
    assert str(again) == "said there"


def test_an_unknown_code_is_a_plain_failure() -> None:
    assert type(error_for(99, "said there")) is errors.CryptfsError


def test_a_hint_of_its_own_comes_before_that_of_the_class() -> None:
    assert hint_for(errors.NotAVolume("x")) == "`cryptfs init DIR` makes a volume"
    assert hint_for(hinted(errors.NotAVolume("x"), "look again")) == "look again"
    assert hint_for(errors.CryptfsError("x")) == ""


def test_what_may_not_be_read_is_found_out_by_us_and_not_by_the_parser() -> None:
    """Which would call another user's volume a wrong argument (2); it is `NotPermitted`, or only a name."""
    paths = [
        (verb, argument.type)
        for verb, command in commands().items()
        for argument in command.params
        if isinstance(argument, click.Argument) and isinstance(argument.type, click.Path)
    ]
    assert len(paths) > 15
    assert [verb for verb, kind in paths if kind.readable] == []


@pytest.mark.parametrize(
    ("number", "hint"), [(errno.ENOENT, "make the directory"), (errno.EACCES, "as the user"), (errno.ENOSPC, "full")]
)
def test_a_refusal_of_the_system_has_a_hint_that_fits(number: int, hint: str) -> None:
    assert hint in hint_for(errors.StoreFailed(f"/there: {os.strerror(number)}"))
