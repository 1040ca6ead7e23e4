"""Every test here runs the real code without threads and with small thresholds (`machine.repeatable`)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.crash.machine import repeatable


@pytest.fixture
def machine() -> Iterator[None]:
    with repeatable():
        yield
