"""Where the `cryptfs` command begins: `lock` is sent on its way, then the command line is imported."""

from __future__ import annotations

import sys


def main() -> int:
    """Run the command line of this process; the exit code."""
    if sys.argv[1:2] == ["lock"]:
        from cryptfs.cli import lock_first

        lock_first.send(sys.argv[2:])
    from cryptfs.cli.main import main as run

    return run()
