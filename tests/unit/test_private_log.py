"""The log file of agent and daemon."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from cryptfs.private_log import FILE_BYTES, FILES_KEPT, PrivateLog


@pytest.fixture
def no_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def test_it_is_bounded_and_private(tmp_path: Path, no_umask: None) -> None:
    handler = PrivateLog(tmp_path / "log")
    try:
        for number in range(60):
            text = f"{number:04d}" + "x" * (FILE_BYTES // 10)
            handler.emit(logging.LogRecord("cryptfs", logging.INFO, __file__, 1, text, None, None))
    finally:
        handler.close()
    names = ["log", *(f"log.{number}" for number in range(1, FILES_KEPT + 1))]
    assert sorted(os.listdir(tmp_path)) == names
    for name in names:
        st = (tmp_path / name).stat()
        assert st.st_mode & 0o777 == 0o600
        assert 0 < st.st_size <= FILE_BYTES
    assert (tmp_path / "log").read_text("ascii").splitlines()[-1].startswith("0059")
