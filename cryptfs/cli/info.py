"""`cryptfs info DIR`: what a volume says about itself; needs neither key nor agent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cryptfs.cli import ui

_HIDDEN = ("salt", "key_id")


@click.command()
@click.argument("dir", type=click.Path(path_type=Path, readable=False))
@click.option("--json", "as_json", is_flag=True, help="Print a JSON document.")
def info(dir: Path, *, as_json: bool) -> None:  # noqa: A002  the argument's name is part of the help text
    """Show a volume's format, sizes and protectors.

    It is read without a key, so an edited file shows edited values: `unlock` and `mount` find that out.
    """
    from cryptfs.cli.located import cipher_dir_of
    from cryptfs.ops.info import read_info

    facts = read_info(cipher_dir_of(dir))
    if as_json:
        ui.out_json(facts)
        return
    for label, value in _lines(facts):
        ui.out(f"{label:<16}{ui.printable(value)}")


def _lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    lines = [
        ("volume id", facts["volume_id"]),
        ("format version", str(facts["format_version"])),
        ("created", day(facts["created_s"])),
        ("block size", f"{facts['block_size']} bytes"),
        ("features", ", ".join(facts["features"]) or "none"),
        ("KEK version", str(facts["kek_version"])),
        *([("domains", str(len(facts["domains"])))] if facts["domains"] else []),
    ]
    for protector in facts["protectors"]:
        params = ", ".join(f"{name} {value}" for name, value in protector["params"].items() if name not in _HIDDEN)
        label = f" ({protector['label']})" if protector["label"] else ""
        lines.append(("protector", f"{protector['id'][:8]} {protector['kind']}{label}: {params}"))
    return lines


def day(seconds: int) -> str:
    """Unix time as a day and minute in UTC."""
    from datetime import UTC, datetime

    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
    except (OverflowError, ValueError, OSError):
        return str(seconds)  # a number that no calendar has: the file is not authenticated
