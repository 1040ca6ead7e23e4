"""The tests of the real code run without threads and with small thresholds (`machine.repeatable`)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.crash.machine import repeatable
from tests.mount.conftest import box, fuse, mounted, template

__all__ = ["box", "fuse", "machine", "mounted", "template"]


@pytest.fixture
def machine() -> Iterator[None]:
    with repeatable():
        yield
