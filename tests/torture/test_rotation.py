"""As `tests/mount/test_rotation.py`: 50 kills of those who rewrite everything under another key, or have it rewritten.

`CRYPTFS_TORTURE_SEED` chooses another run.
"""

from __future__ import annotations

import os
import sys
import time

import pytest

from tests.crash.conftest import box, fuse, mounted, template
from tests.mount.box import Box
from tests.mount.kills import rounds_of_kills

__all__ = ["box", "fuse", "mounted", "template"]

pytestmark = [pytest.mark.mount, pytest.mark.torture]

KILLS = 50
FILES = 200


def test_kills_while_rotating(mounted: Box) -> None:
    seed = int(os.environ.get("CRYPTFS_TORTURE_SEED", str(time.time_ns() % 1_000_000)))
    sys.stdout.write(f"\nseed {seed}\n")
    kills = rounds_of_kills(mounted, KILLS, seed, FILES)
    shown = ", ".join(f"{kills.hits[victim]} of {count} of the {victim}" for victim, count in kills.tried.items())
    sys.stdout.write(f"kills in the middle of a rotation: {shown}\n")
    assert kills.all_hits >= KILLS // 2
