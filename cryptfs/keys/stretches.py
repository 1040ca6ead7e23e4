"""Cutting runs of wrapped keys to what one request carries, each piece knowing which blocks it is about."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from cryptfs.ports import KeyRun
from cryptfs.types import Purpose

KEYS_AT_ONCE = 4096
"""Most keys the agent takes in one request."""


def contiguous(wanted: list[tuple[KeyRun, list[bytes]]]) -> list[tuple[KeyRun, list[bytes]]]:
    """The same, with a run for each stretch of blocks that are asked for: what the audit log says is exact."""
    out: list[tuple[KeyRun, list[bytes]]] = []
    for run, wraps in wanted:
        if run.purpose is not Purpose.BLOCK or len(wraps) == len(run.wrapped):
            out.append((run, wraps))
            continue
        asked = set(wraps)
        stretch: list[bytes] = []
        for number, wrapped in enumerate(run.wrapped):
            if wrapped not in asked:
                stretch = []
                continue
            if not stretch:
                out.append((replace(run, wrapped=stretch, first_block=run.first_block + number), stretch))
            stretch.append(wrapped)
    return out


def requests_of(runs: Sequence[KeyRun]) -> Iterator[list[tuple[int, KeyRun]]]:
    """(number of the run, a piece of it), as many as one request takes, then the next; in order."""
    request: list[tuple[int, KeyRun]] = []
    room = KEYS_AT_ONCE
    for number, run in enumerate(runs):
        at = 0
        while at < len(run.wrapped):
            count = min(room, len(run.wrapped) - at)
            first = run.first_block + at if run.purpose is Purpose.BLOCK else run.first_block
            request.append((number, replace(run, wrapped=run.wrapped[at : at + count], first_block=first)))
            at += count
            room -= count
            if not room:
                yield request
                request, room = [], KEYS_AT_ONCE
    if request:
        yield request


def split(joined: bytes, width: int) -> list[bytes]:
    """The wraps that are joined, each `width` bytes."""
    return [joined[at : at + width] for at in range(0, len(joined), width)]
