"""The mount tests' own check for a machine that can mount."""

from tests.mount.conftest import fuse

__all__ = ["fuse"]
