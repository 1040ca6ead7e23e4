"""`cryptfs audit`: what a mount did is on the record, under its paths; what somebody did to the record is found."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from cryptfs import errors, paths
from cryptfs.agent.audit_log import AuditLog, local_sealing, prepare
from cryptfs.cli.audit_lines import Filter, Follower, Shown, moment
from cryptfs.format.audit import AuditLine, PeerLine
from cryptfs.keys.clock import SystemClock
from tests.cli.conftest import PASSPHRASE, Cryptfs
from tests.conftest import XdgDirs


def audit_dir() -> Path:
    return Path(paths.state_path(), "audit")


def shown(cryptfs: Cryptfs, *words: str | Path, passphrase: str | None = None) -> list[dict[str, Any]]:
    out = cryptfs.run("audit", "show", "--json", *words, passphrase=passphrase).stdout
    return [json.loads(line) for line in out.splitlines()]


@pytest.mark.mount
def test_what_a_mount_did_is_shown_by_path_and_verified(cryptfs: Cryptfs, vault: Path) -> None:
    mnt = cryptfs.root / "mnt"
    mnt.mkdir()
    cryptfs.run("mount", vault, mnt, passphrase=PASSPHRASE)
    (mnt / "dir").mkdir()
    (mnt / "dir" / "file").write_bytes(b"x" * 100_000)
    (mnt / "other").write_bytes(b"y" * 20_000)
    cryptfs.run("umount", mnt)
    cryptfs.run("mount", vault, mnt, passphrase=PASSPHRASE)
    assert len((mnt / "dir" / "file").read_bytes()) == 100_000
    lines = shown(cryptfs, vault, "--path", "/dir/file", "--verb", "unwrap")
    assert lines
    assert {path for line in lines for row in line["files"] for path in row["paths"]} >= {"/dir/file"}
    blocks = {
        first + i
        for line in lines for row in line["files"] if row["paths"] == ["/dir/file"]
        for first, count in row["blocks"] for i in range(count)
    }  # fmt: skip
    assert blocks == set(range(7))
    assert lines[0]["peer"]["role"] == "daemon"
    assert lines[0]["peer"]["pid"] in cryptfs.daemon_pids()
    text = cryptfs.run("audit", "show", vault).stdout
    assert "/dir/file blocks " in text
    assert shown(cryptfs, vault, "--ids", "--process", str(lines[0]["peer"]["pid"]), "--verb", "attach")
    assert not shown(cryptfs, "--process", "no-such-program")
    verified = json.loads(cryptfs.run("audit", "verify", "--json").stdout)
    assert verified["result"] == "intact"
    assert [log["damage"] for log in verified["logs"]] == [[], []]
    cryptfs.run("umount", mnt)
    cryptfs.run("audit", "verify", vault, passphrase=PASSPHRASE)
    assert "locked" in cryptfs.run("audit", "verify").stderr
    log = audit_dir() / lines[0]["log"] / "00000001.log"
    log.write_bytes(log.read_bytes().replace(b'"purpose":"block"', b'"purpose":"blork"', 1))
    ended = cryptfs.run("audit", "verify", vault, passphrase=PASSPHRASE, code=errors.AuditDamaged.exit_code)
    assert "CHANGED" in ended.stdout


def test_a_wrong_passphrase_is_on_the_record_and_follow_sees_it(cryptfs: Cryptfs, vault: Path) -> None:
    cryptfs.run("unlock", vault, passphrase=PASSPHRASE)
    follower = Follower(str(audit_dir()))
    assert follower.fresh() == []
    cryptfs.run("lock", vault)
    cryptfs.run("unlock", vault, passphrase="wrong", code=errors.WrongSecret.exit_code)
    assert "wrong-secret" in [line.line.outcome for line in follower.fresh()]
    [refused] = shown(cryptfs, vault, "--ids", "--refused")
    assert (refused["verb"], refused["outcome"]) == ("unlock", "wrong-secret")
    assert "wrong" not in json.dumps(refused["detail"]).replace("wrong-secret", "")
    cryptfs.run("audit", "show", "--path", "/x", code=errors.UsageError.exit_code)
    cryptfs.run("audit", "show", "--since", "yesterday-ish", code=errors.UsageError.exit_code)
    cryptfs.run("audit", "show", vault, "--path", "/none", passphrase=PASSPHRASE, code=errors.UsageError.exit_code)


def put(*lines: AuditLine) -> None:
    """Into the agent's log, as an agent would."""
    where = str(audit_dir())
    prepare(where)
    log = AuditLog(os.path.join(where, "agent"), local_sealing(where, os.urandom), os.urandom, SystemClock())
    for each in lines:
        log.append(each.encode())
    log.close()


def test_lines_from_before_the_clock_was_set_back_are_shown(cryptfs: Cryptfs) -> None:
    later_ns = time.time_ns() + 3600 * 10**9
    put(AuditLine(later_ns, "lock", "ok"), AuditLine(later_ns - 10**9, "unlock", "ok"))
    assert [line["verb"] for line in shown(cryptfs)] == ["begin", "lock", "unlock"], "as they were written"
    assert [line["verb"] for line in shown(cryptfs, "--until", "1h")] == []
    assert shown(cryptfs, "--until", "1970-01-01T00:00:00+00:00") == []
    assert len(shown(cryptfs, "--until", "2200-01-01")) == 3


def test_a_verb_that_is_none_is_refused_with_those_there_are(cryptfs: Cryptfs) -> None:
    for command in ("show", "follow"):
        ended = cryptfs.run("audit", command, "--verb", "unlok", code=errors.UsageError.exit_code)
        assert "'unlok'" in ended.stderr
        assert "'unlock'" in ended.stderr


def test_follow_shows_lines_as_they_are_written(cryptfs: Cryptfs) -> None:
    put(AuditLine(1, "lock", "ok"))
    with subprocess.Popen(
        cryptfs.command("audit", "follow", "--json", "--verb", "unlock"), stdout=subprocess.PIPE, text=True
    ) as follow:
        assert follow.stdout is not None
        try:
            for number in range(3):
                seen = ""
                # It says nothing before it has looked once: lines from before that are not shown.
                while not seen:
                    put(AuditLine(10 + number, "unlock", "ok"), AuditLine(20, "detach", "ok"))
                    ready, _, _ = select.select([follow.stdout], [], [], 2)
                    seen = follow.stdout.readline() if ready else ""
                line = json.loads(seen)
                assert (line["verb"], line["log"]) == ("unlock", "agent")
        finally:
            follow.send_signal(signal.SIGINT)
        rest = follow.stdout.read()
        assert "detach" not in rest
        assert follow.wait(20) == 130
    assert "Traceback" not in rest


def test_follow_misses_nothing_when_files_are_begun_by_size(xdg_dirs: XdgDirs) -> None:
    where = str(audit_dir())
    prepare(where)
    log = AuditLog(
        os.path.join(where, "agent"), local_sealing(where, os.urandom), os.urandom, SystemClock(), file_bytes=2000
    )
    follower = Follower(where)
    seen: list[Shown] = []
    for number in range(60):
        log.append(AuditLine(10 + number, "unlock", "ok").encode())
        if number % 7 in (0, 1, 5):  # once in the middle of a file, once after several were begun
            seen += follower.fresh()
    seen += follower.fresh()
    log.close()
    assert [shown.line.time_ns - 10 for shown in seen if shown.line.verb == "unlock"] == list(range(60))
    assert len({shown.file for shown in seen}) > 5


def test_no_time_is_both_after_the_one_and_before_the_other(cryptfs: Cryptfs) -> None:
    ended = cryptfs.run("audit", "show", "--since", "1h", "--until", "2h", code=errors.UsageError.exit_code)
    assert "--since is later than --until" in ended.stderr


def test_no_log_is_no_failure(cryptfs: Cryptfs) -> None:
    assert cryptfs.run("audit", "show").stdout == ""
    assert json.loads(cryptfs.run("audit", "verify", "--json").stdout)["result"] == "intact"


def test_times() -> None:
    now = moment("now")
    ago = moment("90m")
    assert now is not None
    assert ago is not None
    assert 5390 < (now - ago) / 1e9 < 5410
    assert moment("1970-01-02T00:00:00+00:00") == 86400 * 10**9
    for bad in ("", "5", "5y", "2026-13-01", "9999999999d"):
        with pytest.raises(errors.UsageError):
            moment(bad)


def test_filters() -> None:
    line = AuditLine(100, "unwrap", "ok", b"v" * 16, PeerLine(7, 0, "/usr/bin/python3", "python3", "daemon"))
    takes = [
        Filter(100, 100, None, frozenset()), Filter(None, None, "7", frozenset()),
        Filter(None, None, "python", frozenset({"unwrap"})), Filter(None, None, "daemon", frozenset()),
    ]  # fmt: skip
    leaves = [
        Filter(101, None, None, frozenset()), Filter(None, 99, None, frozenset()),
        Filter(None, None, "77", frozenset()), Filter(None, None, None, frozenset({"lock"})),
        Filter(None, None, None, frozenset(), refused=True),
        Filter(None, None, None, frozenset(), volume_id=b"w" * 16),
        Filter(None, None, None, frozenset(), ids=frozenset({b"f" * 16})),
    ]  # fmt: skip
    assert all(each.takes(line) for each in takes)
    assert not any(each.takes(line) for each in leaves)
