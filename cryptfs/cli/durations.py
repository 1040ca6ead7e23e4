"""Lengths of time on the command line: `90`, `90s`, `15m`, `8h`, `2d`."""

from __future__ import annotations

import re

import click

_UNITS_S = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
MAX_S = 366 * 86400


class Duration(click.ParamType[int]):
    """A whole number of seconds, within bounds."""

    name = "duration"

    def __init__(self, least_s: int = 1, most_s: int = MAX_S) -> None:
        self._least_s = least_s
        self._most_s = most_s

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Seconds. Fails, as click has it, for anything else."""
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"([0-9]{1,9})([smhd]?)", str(value))
        seconds = int(match[1]) * _UNITS_S[match[2]] if match else 0
        if not self._least_s <= seconds <= self._most_s:
            bounds = f"from {self._least_s}s to {self._most_s // _UNITS_S['d']}d"
            self.fail(f"{value!r} is no time {bounds}; write 90s, 15m, 8h or 2d", param, ctx)
        return seconds


DURATION = Duration()
