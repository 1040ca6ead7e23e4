"""As `tests/mount/test_rotation.py`: 50 kills of a daemon that rewrites everything under another key.

`CRYPTFS_TORTURE_SEED` chooses another run.
"""

from __future__ import annotations

import os
import sys
import time

import pytest

from tests.crash.conftest import box, fuse, mounted, template
from tests.mount.box import Box
from tests.mount.test_rotation import rounds_of_kills

__all__ = ["box", "fuse", "mounted", "template"]

pytestmark = [pytest.mark.mount, pytest.mark.torture]

KILLS = 50
FILES = 150


def test_kills_while_rotating(mounted: Box) -> None:
    seed = int(os.environ.get("CRYPTFS_TORTURE_SEED", str(time.time_ns() % 1_000_000)))
    sys.stdout.write(f"\nseed {seed}\n")
    hits = rounds_of_kills(mounted, KILLS, seed, FILES)
    sys.stdout.write(f"{KILLS} kills, {hits} of them in the middle of a rotation\n")
    assert hits >= KILLS // 10
