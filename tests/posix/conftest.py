"""The fixtures of tests/mount."""

from __future__ import annotations

from tests.mount.conftest import box, fuse, mounted, root, template

__all__ = ["box", "fuse", "mounted", "root", "template"]
