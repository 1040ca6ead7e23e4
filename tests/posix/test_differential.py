"""The same small operations on a mount and on the plain directory beside it: every answer is the same, or explained."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.box import Box, boxed
from tests.mount.ordinary import ordinarily
from tests.posix import on_read_only
from tests.posix.expected import EXPECTED, Expected
from tests.posix.probe import SCENARIOS
from tests.posix.run import MODULES

pytestmark = [pytest.mark.mount, pytest.mark.usefixtures("root")]

LONG = frozenset(
    {
        "rights",
        "set_id_bits",
        "sticky",
        "every_call_on_every_kind",
        "links_to_every_kind",
        "lengths",
        "link_limit",
        "open_flags",
        "set_id_bits_of_others",
        "sticky_directories",
        "chown_of_set_id",
        "chmod_of_set_group_id",
        "written_set_id",
        "nodes_by_everybody",
        "times_by_everybody",
        "times_of_calls",
    }
)
"""Large products, thousands of lines each: `make torture`."""


@pytest.fixture(scope="module")
def served(template: Path, short_root: Path) -> Iterator[Box]:
    """A mount that root runs for everybody, with an ordinary directory beside it."""
    with boxed(short_root, template) as box:
        box.mount("-o", "allow_other,suid,dev")
        (box.root / "plain").mkdir()
        yield box
        assert "unexpectedly" not in box.log(), box.log()


def lines_of(directory: Path, *names: str) -> list[str]:
    """What the scenarios come to there."""
    return printed("tests.posix.run", directory, *names)


def printed(module: str, directory: Path, *words: str) -> list[str]:
    """The lines of a program that is given a directory to work in."""
    ended = subprocess.run(
        [sys.executable, "-m", module, str(directory), *words],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=1800, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.splitlines()


def unexplained(box: Box, *names: str) -> list[str]:
    """Pairs of lines that differ without a reason in `EXPECTED`, and what that expects of these scenarios in vain."""
    plain, ours = lines_of(box.root / "plain", *names), lines_of(box.clear, *names)
    return unexplained_pairs(plain, ours) + [f"no longer: {e.pattern}" for e in unseen(plain, ours, *names)]


def differing(plain: list[str], ours: list[str]) -> list[tuple[str, str]]:
    assert len(plain) == len(ours)
    return [(a, b) for a, b in zip(plain, ours, strict=True) if a != b]


def unexplained_pairs(plain: list[str], ours: list[str]) -> list[str]:
    """Pairs of lines that differ without a reason in `EXPECTED`."""
    pairs = differing(plain, ours)
    return [f"plain: {a}\nmount: {b}" for a, b in pairs if not any(expected.explains(b) for expected in EXPECTED)]


def unseen(plain: list[str], ours: list[str], *names: str) -> list[Expected]:
    """Differences of these scenarios that must be there and are not: listed for nothing, or no longer true."""
    lines = [b for _, b in differing(plain, ours)]
    due = [expected for expected in EXPECTED if expected.scenario in names and not expected.sometimes]
    return [expected for expected in due if not any(map(expected.explains, lines))]


def test_every_scenario_is_known() -> None:
    assert len(SCENARIOS) > 30
    assert {function.__module__ for function in SCENARIOS.values()} == {module.__name__ for module in MODULES}
    assert set(SCENARIOS) >= LONG
    names = {expected.scenario for expected in EXPECTED}
    assert names <= set(SCENARIOS), "an explanation of a scenario that does not exist"


def test_a_mount_answers_as_ext4_does(served: Box) -> None:
    assert not unexplained(served, *(name for name in SCENARIOS if name not in LONG))


@pytest.mark.torture
@pytest.mark.parametrize("name", sorted(LONG))
def test_a_mount_answers_as_ext4_does_in_every_combination(served: Box, name: str) -> None:
    assert not unexplained(served, name)


def test_an_ordinary_users_mount_answers_as_ext4_does(short_root: Path, fuse: None) -> None:
    """All that a user without rights can do in a mount of its own, and what modes keep it from."""
    names = [name for name in SCENARIOS if name not in LONG]
    out = json.loads(ordinarily(short_root, "tests.posix.on_user_mount", *names))
    plain, ours = out["plain"], out["clear"]
    for part in ("set_id", "closed"):
        assert plain[part] == ours[part]
        assert len(ours[part]) > 50
    assert not unexplained_pairs(plain["scenarios"], ours["scenarios"])
    assert len([line for line in ours["scenarios"] if "ended by" not in line]) > 1500
    code, said = out["check"]["said"]
    assert code == "0", said


def test_a_read_only_mount_refuses_what_a_read_only_ext4_does(template: Path, short_root: Path) -> None:
    with boxed(short_root, template) as box:
        plain = box.root / "plain"
        plain.mkdir()
        box.mount("-o", "allow_other,suid,dev")
        for where in (plain, box.clear):
            with contextlib.chdir(where):
                on_read_only.prepare()
        box.remount("--read-only", "-o", "allow_other,suid,dev")
        subprocess.run(["mount", "--bind", plain, plain], check=True)
        try:
            subprocess.run(["mount", "-o", "remount,bind,ro", plain], check=True)
            beside, ours = (printed("tests.posix.on_read_only", where) for where in (plain, box.clear))
        finally:
            subprocess.run(["umount", plain], check=True)
    assert not unexplained_pairs(beside, ours)
    assert len([line for line in ours if "EROFS" in line]) > 500


def test_the_comparison_finds_what_differs(served: Box) -> None:
    """Two different directories must not come out the same: a comparison that cannot fail shows nothing."""
    plain = lines_of(served.root / "plain", "rare_calls")
    ours = lines_of(served.clear, "rare_calls")
    assert differing(plain, ours)
    assert not unseen(plain, ours, "rare_calls")
    assert len(unseen(plain, plain, "rare_calls")) == 8, "a difference that went away would not be noticed"
