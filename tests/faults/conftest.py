"""What every test of faults wants."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from cryptfs.fs import directory, journal
from tests.crash.machine import few_directories
from tests.threadless import without_threads


@pytest.fixture(autouse=True)
def _small_and_in_order() -> Iterator[None]:
    """The k-th call is always the same one, and no run spends its time on opening 256 directories."""
    with without_threads(), few_directories():
        yield


@pytest.fixture(autouse=True)
def _nothing_unexpected(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Errors are logged, as they should be; none of them is one that nobody thought of. Logs are rewritten early."""
    caplog.set_level(logging.WARNING, "cryptfs")
    monkeypatch.setattr(journal, "_COMPACT_MIN_BYTES", 0)
    monkeypatch.setattr(directory, "_COMPACT_MIN_BYTES", 0)
    yield
    assert not [r.getMessage() for r in caplog.records if "unexpectedly" in r.getMessage()]
