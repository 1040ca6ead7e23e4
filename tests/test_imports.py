"""Which modules each process loads, read from the interpreter's own import trace (-X importtime)."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

DAEMON = "cryptfs.daemon.main"
AGENT = "cryptfs.agent.__main__"
NOT_IN_THE_DAEMON = (
    "cryptfs.agent",
    "cryptfs.roots",
    "cryptfs.cli",
    "cryptfs.crypto.wrap",
    "cryptography.hazmat.primitives.kdf",
    "cryptography.hazmat.primitives.keywrap",
    "argon2",
    "click",
    "zxcvbn",
)
GUARDED = tuple(name for name in NOT_IN_THE_DAEMON if name not in {"click", "zxcvbn"})
NOT_IN_THE_AGENT = ("cryptfs.fs", "cryptfs.fuse", "cryptfs.daemon", "cryptfs.cli", "cryptfs.store", "pyfuse3", "click")


def loaded_by(module: str) -> set[str]:
    """Every module that importing `module` in a fresh interpreter loads, even if it was removed again."""
    trace = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", f"import {module}"], check=True, capture_output=True, text=True
    ).stderr
    return {match[1] for match in re.finditer(r"^import time:\s+\d+ \|\s+\d+ \|\s+(\S+)$", trace, re.MULTILINE)}


def within(modules: set[str], package: str) -> set[str]:
    return {name for name in modules if name == package or name.startswith(package + ".")}


@pytest.fixture(scope="module")
def daemon_modules() -> set[str]:
    return loaded_by(DAEMON)


@pytest.fixture(scope="module")
def agent_modules() -> set[str]:
    return loaded_by(AGENT)


def test_the_trace_shows_what_each_process_is_made_of(daemon_modules: set[str], agent_modules: set[str]) -> None:
    assert {DAEMON, "cryptfs.fs", "cryptfs.fuse", "cryptfs.keys", "pyfuse3", "trio"} <= daemon_modules
    assert {"cryptfs.agent", "cryptfs.roots", "cryptfs.crypto.wrap"} <= agent_modules
    assert within(agent_modules, "cryptography.hazmat.primitives.kdf")


@pytest.mark.parametrize("package", NOT_IN_THE_DAEMON)
def test_the_daemon_loads_no_code_that_handles_keks(daemon_modules: set[str], package: str) -> None:
    assert within(daemon_modules, package) == set()


@pytest.mark.parametrize("package", NOT_IN_THE_AGENT)
def test_the_agent_loads_no_code_that_handles_files(agent_modules: set[str], package: str) -> None:
    assert within(agent_modules, package) == set()


@pytest.mark.parametrize("module", ["cryptfs.cli.main", "cryptfs.cli.status"])
def test_a_command_starts_without_the_file_system(module: str) -> None:
    loaded = loaded_by(module)
    assert module in loaded
    assert within(loaded, "cryptfs.fs") | within(loaded, "cryptfs.fuse") | within(loaded, "zxcvbn") == set()


@pytest.mark.parametrize("package", GUARDED)
def test_the_guard_refuses_such_code_even_when_asked_for_later(package: str) -> None:
    script = f"from cryptfs.daemon import guard; guard.install()\nimport {package}"
    refused = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True)
    assert refused.returncode == 1
    assert f"ImportError: {package} must not be imported in the daemon" in refused.stderr


def test_the_guard_notices_that_it_comes_too_late() -> None:
    script = "import cryptfs.crypto.wrap\nfrom cryptfs.daemon import guard; guard.install()"
    refused = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True)
    assert refused.returncode == 1
    assert "is loaded already" in refused.stderr
