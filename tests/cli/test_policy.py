"""`cryptfs policy`, on a real agent and without a mount."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cryptfs import errors
from cryptfs.format.volume import parse_volume
from cryptfs.ops.volume_file import VolumeEdit
from tests.cli.conftest import DEFAULT_POLICY, PASSPHRASE, Cryptfs


def policy(cryptfs: Cryptfs, vault: Path, *options: str, passphrase: str | None = None) -> dict[str, Any]:
    ended = cryptfs.run("policy", vault, *options, "--json", passphrase=passphrase)
    document: dict[str, Any] = json.loads(ended.stdout)
    return document


def test_it_is_shown_without_a_key_and_changed_with_it(cryptfs: Cryptfs, vault: Path) -> None:
    assert policy(cryptfs, vault) == {"policy": DEFAULT_POLICY, "set": []}
    assert cryptfs.agent_pids() == []
    changed = policy(cryptfs, vault, "--max-age", "5m", "--no-cache", "--idle", "8h", passphrase=PASSPHRASE)
    expected = {**DEFAULT_POLICY, "max_age_s": 300, "caching": False, "idle_s": 28800}
    assert changed == {"policy": expected, "set": ["caching", "idle_s", "max_age_s"]}
    assert policy(cryptfs, vault) == changed
    assert cryptfs.status() == [], "it was locked before, so it is now"
    shown = cryptfs.run("policy", vault).stdout
    assert "max age               300 s     set" in shown
    assert "max uses              no limit  default" in shown
    more = ["--max-uses", "3", "--cache", "--idle", "default", "--unwraps-per-s", "500", "--reverify", "1h"]
    policy(cryptfs, vault, *more, "--for", "2d", "--max-entries", "4096", passphrase=PASSPHRASE)
    expected = {**DEFAULT_POLICY, "max_age_s": 300, "max_uses": 3, "unwraps_per_s": 500, "reverify_s": 3600,
                "for_s": 172800, "max_entries": 4096}  # fmt: skip
    assert policy(cryptfs, vault)["policy"] == expected
    assert policy(cryptfs, vault)["set"] == [
        "caching", "for_s", "max_age_s", "max_entries", "max_uses", "reverify_s", "unwraps_per_s",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "bad",
    [("--max-age", "0"), ("--max-age", "8d"), ("--max-age", "often"), ("--max-entries", "1023"), ("--max-uses", "0"),
     ("--max-uses", "-1"), ("--idle", "0"), ("--idle", "367d"), ("--reverify", "1s"), ("--unwraps-per-s", "0"),
     ("--for", "400d")],
)  # fmt: skip
def test_what_is_out_of_bounds_is_a_usage_error_and_changes_nothing(
    cryptfs: Cryptfs, vault: Path, bad: tuple[str, str]
) -> None:
    before = (vault / "volume").read_bytes()
    ended = cryptfs.run("policy", vault, "--max-uses", "7", *bad, code=2, passphrase="not asked for")
    assert ended.stderr.startswith("error: ")
    assert (vault / "volume").read_bytes() == before
    assert cryptfs.agent_pids() == [], "nothing was unlocked for it"


def test_a_wrong_passphrase_changes_nothing(cryptfs: Cryptfs, vault: Path) -> None:
    before = (vault / "volume").read_bytes()
    cryptfs.run("policy", vault, "--max-uses", "7", code=13, passphrase="wrong")
    assert (vault / "volume").read_bytes() == before


def test_an_unlocked_volume_stays_so_and_obeys_at_once(cryptfs: Cryptfs, vault: Path) -> None:
    cryptfs.run("unlock", vault, passphrase=PASSPHRASE)
    cryptfs.run("policy", vault, "--idle", "1h")
    [volume] = cryptfs.status()
    assert volume["state"] == "unlocked"
    assert 3590 <= volume["locks_in_s"] <= 3600
    assert volume["policy"] == {**DEFAULT_POLICY, "idle_s": 3600}
    cryptfs.run("policy", vault, "--idle", "default")
    [volume] = cryptfs.status()
    assert volume["locks_in_s"] is None
    cryptfs.run("policy", vault, "--idle", "1s")
    lines = cryptfs.run("audit", "show", vault, "--ids", "--verb", "policy", "--json").stdout.splitlines()
    changes = [(json.loads(line)["detail"]["before"], json.loads(line)["detail"]["after"]) for line in lines]
    assert changes == [("{}", '{"idle_s":3600}'), ('{"idle_s":3600}', "{}"), ("{}", '{"idle_s":1}')]


def test_what_was_replaced_and_never_committed_is_made_good_by_asking_again(cryptfs: Cryptfs, vault: Path) -> None:
    cryptfs.run("unlock", vault, passphrase=PASSPHRASE)
    old = (vault / "volume").read_bytes()
    cryptfs.run("policy", vault, "--max-uses", "7")
    new = (vault / "volume").read_bytes()
    assert parse_volume(new).serial > parse_volume(old).serial
    cryptfs.run("policy", vault, "--max-uses", "7")
    assert (vault / "volume").read_bytes() == new, "there was nothing to change"
    [volume] = cryptfs.status()
    assert volume["policy"]["max_uses"] == 7


def test_two_who_change_it_at_once(cryptfs: Cryptfs, vault: Path) -> None:
    before = (vault / "volume").read_bytes()
    with VolumeEdit.of(vault):
        ended = cryptfs.run("policy", vault, "--max-uses", "7", code=14, passphrase=PASSPHRASE)
        assert "another process" in ended.stderr
        assert policy(cryptfs, vault)["set"] == [], "looking is allowed"
    assert (vault / "volume").read_bytes() == before


def test_it_needs_a_volume(cryptfs: Cryptfs, tmp_path: Path) -> None:
    cryptfs.run("policy", tmp_path, code=10)
    cryptfs.run("policy", tmp_path, "--max-uses", "1", code=10, passphrase=PASSPHRASE)


@pytest.mark.parametrize(
    ("option", "value", "bounds"),
    [("--max-age", "0", "1s to 7d"), ("--max-age", "8d", "1s to 7d"), ("--reverify", "4", "5s to 7d"),
     ("--idle", "367d", "1s to 366d"), ("--for", "0", "1s to 366d")],
)  # fmt: skip
def test_a_time_out_of_bounds_is_refused_with_its_own(
    cryptfs: Cryptfs, vault: Path, option: str, value: str, bounds: str
) -> None:
    ended = cryptfs.run("policy", vault, option, value, code=errors.UsageError.exit_code)
    assert f"is no time from {bounds}" in ended.stderr
    assert cryptfs.agent_pids() == []
