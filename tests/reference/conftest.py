"""The mount tests' own fixtures for a volume in a box."""

from tests.mount.conftest import box, fuse, template

__all__ = ["box", "fuse", "template"]
