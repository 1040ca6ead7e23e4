"""`cryptfs audit show|follow|verify`: what the key agent put on the record, and whether that is still what it wrote."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cryptfs.cli import protectors, ui
from cryptfs.cli.audit_lines import Filter, Shown, as_json, as_text, moment
from cryptfs.cli.protectors import Given
from cryptfs.format.audit import VERBS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import TypeVar

    from cryptfs.cli.audit_verdict import Outcome
    from cryptfs.ops.paths_by_id import Paths

    F = TypeVar("F", bound=Callable[..., object])

FOLLOW_S = 0.3
"""How often `follow` looks; inotify(7) would save nothing worth a binding."""


@click.group()
def audit() -> None:
    """Look at the record of what keys were asked for, by whom, and whether anybody changed that record."""


def _filters(command: F) -> F:
    for option in (
        click.option("--json", "as_json_lines", is_flag=True, help="Print one JSON object per line."),
        click.option("--process", metavar="WHO", help="Only requests of this process: its id, or part of its program."),
        click.option(
            "--verb",
            "verbs",
            metavar="VERB",
            type=click.Choice(sorted(VERBS)),
            multiple=True,
            help="Only this verb; may be repeated.",
        ),
        click.option("--refused", is_flag=True, help="Only what was refused or failed."),
    ):
        command = option(command)
    return command


@audit.command()
@click.argument("dir", type=click.Path(path_type=Path, readable=False), required=False)
@click.option("--since", metavar="WHEN", help="From then on: 2026-01-31, 2026-01-31T12:00, 90m, 24h or 7d ago.")
@click.option("--until", metavar="WHEN", help="Up to then.")
@click.option("--path", "path", metavar="PATH", help="Only keys of PATH in the volume DIR, and of what is below it.")
@click.option("--ids", is_flag=True, help="Show ids and no paths: needs no key.")
@_filters
@protectors.options
def show(  # noqa: PLR0913  one parameter per option
    dir: Path | None,  # noqa: A002
    *,
    since: str | None,
    until: str | None,
    path: str | None,
    ids: bool,
    as_json_lines: bool,
    process: str | None,
    verbs: tuple[str, ...],
    refused: bool,
    given: Given,
) -> None:
    """Show the lines of all logs, or those about the volume DIR, with the paths its files have now."""
    from cryptfs.cli.audit_lines import all_lines, ends_of
    from cryptfs.errors import UsageError

    if path is not None and (dir is None or ids):
        raise UsageError("--path takes DIR, and not --ids: only the volume says which files lie there")
    since_ns, until_ns = moment(since), moment(until)
    if since_ns is not None and until_ns is not None and since_ns > until_ns:
        raise UsageError("--since is later than --until: no line is of such a time")
    wanted = Filter(since_ns, until_ns, process, frozenset(verbs), refused=refused)
    # By place, not by time: the clock may have been set back, and what we ask for ourselves is not to be shown.
    ends = ends_of(_directory())
    known: Paths = {}
    if dir is not None:
        wanted.volume_id = _volume_id(dir)
        if not ids:
            known = _paths(dir, given)
        if path is not None:
            wanted.ids = _below(known, path)
    for shown in all_lines(_directory(), ends):
        if wanted.takes(shown.line):
            _print(shown, known, as_json_lines=as_json_lines)


@audit.command()
@click.argument("dir", type=click.Path(path_type=Path, readable=False), required=False)
@_filters
def follow(
    dir: Path | None,  # noqa: A002
    *,
    as_json_lines: bool,
    process: str | None,
    verbs: tuple[str, ...],
    refused: bool,
) -> None:
    """Show lines as they are written, until Ctrl-C; of all logs, or those about the volume DIR. Ids, not paths."""
    import sys
    import time

    from cryptfs.cli.audit_lines import Follower

    wanted = Filter(None, None, process, frozenset(verbs), refused=refused)
    if dir is not None:
        wanted.volume_id = _volume_id(dir)
    follower = Follower(_directory())
    while True:
        for shown in follower.fresh():
            if wanted.takes(shown.line):
                _print(shown, {}, as_json_lines=as_json_lines)
        sys.stdout.flush()
        time.sleep(FOLLOW_S)


@audit.command()
@click.argument("dir", type=click.Path(path_type=Path, readable=False), required=False)
@click.option("--json", "as_document", is_flag=True, help="Print a JSON document.")
@protectors.options
def verify(
    dir: Path | None,  # noqa: A002
    *,
    as_document: bool,
    given: Given,
) -> int:
    """Check that every log is what was written, whole: the agent's own and those of DIR, or of all unlocked volumes.

    Ends with 0 if nothing was changed, 28 if something was.
    """
    from cryptfs.cli.audit_verdict import verify_logs
    from cryptfs.cli.located import cipher_dir_of
    from cryptfs.cli.unlock import unlocked

    volume_id = None
    with contextlib.ExitStack() as stack:
        if dir is not None:
            volume_id = _volume_id(dir)
            stack.enter_context(unlocked(cipher_dir_of(dir), volume_id, given))
        with ui.waiting("verifying"):
            outcome = verify_logs(_directory(), volume_id)
    if as_document:
        ui.out_json(outcome.as_json())
    else:
        _tell(outcome)
    return outcome.exit_code


def _tell(outcome: Outcome) -> None:
    for verdict in outcome.verdicts:
        name = outcome.name(verdict.volume_id)
        state = "CHANGED" if verdict.damage else "intact"
        ui.out(f"{name}: {state}, {verdict.files} files, {verdict.lines} lines")
        for text in verdict.damage:
            ui.out(f"  damage: {ui.printable(text)}")
        for text in verdict.notes:
            ui.out(f"  note: {ui.printable(text)}")
    for name in outcome.gone:
        ui.out(f"volume {name}: CHANGED, its log is gone")
    for name in outcome.locked:
        ui.note(f"volume {name}: not verified, it is locked")


def _print(shown: Shown, known: Paths, *, as_json_lines: bool) -> None:
    ui.out(as_json(shown, known) if as_json_lines else ui.printable(as_text(shown, known)))


def _directory() -> str:
    from cryptfs import paths

    return os.path.join(paths.state_path(), "audit")


def _volume_id(cipher_dir: Path) -> bytes:
    from cryptfs.cli.located import cipher_dir_of
    from cryptfs.ops.info import read_volume

    return read_volume(cipher_dir_of(cipher_dir)).volume_id


def _paths(cipher_dir: Path, given: Given) -> Paths:
    from cryptfs.cli.volume_access import Reached, with_volume
    from cryptfs.ops.paths_by_id import paths_by_id

    async def work(reached: Reached) -> Paths:
        return await paths_by_id(reached.access)

    return with_volume(cipher_dir, given, work, exclusive=False)


def _below(known: Paths, path: str) -> frozenset[bytes]:
    """The ids at `path` and below. Raises `UsageError` if there are none."""
    from cryptfs.errors import UsageError

    top = b"/" + os.fsencode(path).strip(b"/")
    inside = top if top == b"/" else top + b"/"

    def has(paths: Sequence[bytes]) -> bool:
        return any(one == top or one.startswith(inside) for one in paths)

    found = frozenset(log_id for log_id, paths in known.items() if has(paths))
    if not found:
        raise UsageError(f"no {path} in the volume")
    return found
