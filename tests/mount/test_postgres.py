"""PostgreSQL as an unprivileged user on a root-run mount: initdb, pgbench, amcheck; and killed in the middle.

`scripts/install.sh torture` installs it. Where the tests run as root only, since the server refuses to.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.mount.box import Box, ending

pytestmark = [pytest.mark.mount, pytest.mark.torture, pytest.mark.usefixtures("root")]

NOBODY = 65534
TIMEOUT_S = 300


@dataclass(frozen=True)
class Server:
    """`data` lies on the mount, `run` (socket and log) beside it."""

    programs: Path
    data: Path
    run: Path

    def call(self, program: str, *words: str, stdin: str | None = None) -> str:
        """What it printed. Fails unless it ends with 0."""
        ended = subprocess.run(
            [self.programs / program, *words],
            input=stdin, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, cwd=self.run,
            user=NOBODY, group=NOBODY, extra_groups=[], env={"PATH": "/usr/bin:/bin", "HOME": str(self.run)},
        )  # fmt: skip
        assert ended.returncode == 0, f"{program} {words}: {ended.returncode}\n{ended.stdout}{ended.stderr}"
        return ended.stdout

    def ask(self, program: str, *words: str, stdin: str | None = None) -> str:
        return self.call(program, "-h", str(self.run), "-U", "owner", *words, stdin=stdin)

    def start(self) -> None:
        # pg_ctl's own output goes to its log: the server inherits its descriptors and would keep a pipe open.
        with (self.run / "pg_ctl.log").open("ab") as log:
            options = f"-k {self.run} -c listen_addresses=''"
            words = ["-w", "-t", "120", "-D", str(self.data), "-o", options, "-l", str(self.run / "log"), "start"]
            ended = subprocess.run(
                [self.programs / "pg_ctl", *words],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, timeout=TIMEOUT_S, check=False, cwd=self.run,
                user=NOBODY, group=NOBODY, extra_groups=[],
            )  # fmt: skip
        assert ended.returncode == 0, (self.run / "log").read_text("utf-8", "replace")

    def stop(self, mode: str = "fast") -> None:
        self.call("pg_ctl", "-w", "-m", mode, "-D", str(self.data), "stop")

    def is_sound(self) -> None:
        self.ask("pg_amcheck", "--all", "--heapallindexed", "--install-missing")


@pytest.fixture
def server(box: Box, short_root: Path, short_tmp: Path) -> Iterator[Server]:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not found:
        pytest.skip("no PostgreSQL: scripts/install.sh torture")
    for path in (short_root, short_tmp, box.root):
        path.chmod(0o711)
    box.mount("-o", "allow_other")
    box.clear.chmod(0o755)
    run = short_tmp / "run"
    for path in (run, box.clear / "pg"):
        path.mkdir(mode=0o700)
        os.chown(path, NOBODY, NOBODY)
    server = Server(found[-1].parent, box.clear / "pg" / "data", run)
    server.call("initdb", "-D", str(server.data), "-A", "trust", "-U", "owner", "--data-checksums")
    server.start()
    yield server
    if (server.data / "postmaster.pid").exists():
        server.stop("immediate")


def test_bench(server: Server, box: Box) -> None:
    server.ask("createdb", "bench")
    server.ask("pgbench", "-i", "-s", "2", "-q", "bench")
    said = server.ask("pgbench", "-c", "4", "-j", "2", "-T", "10", "bench")
    assert "number of failed transactions: 0 " in said
    sums = "select (select sum(abalance) from pgbench_accounts) = (select sum(delta) from pgbench_history)"
    assert server.ask("psql", "-Atc", sums, "bench").strip() == "t"
    server.is_sound()
    server.stop()
    box.remount("-o", "allow_other")
    server.call("pg_checksums", "--check", "-D", str(server.data))
    server.start()
    server.is_sound()
    server.stop()


def test_what_was_committed_outlives_the_daemon(server: Server, box: Box) -> None:
    server.ask("createdb", "bench")
    server.ask("psql", "-c", "create table t (n integer primary key, text text)", "bench")
    statements = server.run / "statements"
    insert = "insert into t values ({0}, repeat('x', {0} % 4000)) returning n;\n"
    statements.write_text("".join(insert.format(n) for n in range(50_000)), "ascii")
    pid = int((server.data / "postmaster.pid").read_text("ascii").split()[0])
    words = [str(server.programs / "psql"), "-h", str(server.run), "-U", "owner", "-qAt", "bench"]
    with (
        statements.open("rb") as stdin,
        subprocess.Popen(words, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as client,
    ):
        try:
            assert client.stdout is not None
            committed = [int(client.stdout.readline()) for _ in range(400)]
            box.kill_daemon()
            committed += [int(line) for line in client.stdout.read().splitlines() if line.isdigit()]
        finally:
            client.kill()
    with ending(pid):
        os.kill(pid, signal.SIGQUIT)
    box.mount("-o", "allow_other")
    (server.data / "postmaster.pid").unlink(missing_ok=True)
    server.start()
    there = {int(line) for line in server.ask("psql", "-Atc", "select n from t", "bench").split()}
    assert there >= set(committed)
    assert server.ask("psql", "-Atc", "select count(*) from t where length(text) <> n % 4000", "bench") == "0\n"
    server.is_sound()
    server.stop()
