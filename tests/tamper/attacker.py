"""A process that exchanges what lies in a cipher directory for symlinks that lead outside, and back, as fast as it can.

python attacker.py VAULT OUTSIDE SEED      ends, everything back in its place, when its standard input does
"""

from __future__ import annotations

import ctypes
import os
import random
import select
import sys
from contextlib import suppress
from pathlib import Path

RENAME_EXCHANGE = 2
_AT_FDCWD = -100
_libc = ctypes.CDLL(None, use_errno=True)


def exchange(one: Path, two: Path) -> bool:
    """Whether both were there and changed places, atomically."""
    return not _libc.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(two), ctypes.c_uint(RENAME_EXCHANGE))


def targets(vault: Path) -> list[Path]:
    """What there is to exchange now: the volume's own directories, and everything in its tree."""
    found = [vault / name for name in ("tree", "sidecars", "tmp", "state")]
    for where, dirs, files in os.walk(vault / "tree"):
        found += [Path(where, name) for name in (*dirs, *files)]
    for where, _, files in os.walk(vault / "sidecars"):
        found += [Path(where, name) for name in files]
        found += [Path(where)] if files else []
    return found


def main() -> None:
    vault, outside, rng = Path(sys.argv[1]), Path(sys.argv[2]), random.Random(int(sys.argv[3]))
    lure = vault.parent / f"lure{sys.argv[3]}"
    swaps = 0
    while not select.select([sys.stdin], [], [], 0)[0]:
        for path in rng.sample(now := targets(vault), min(30, len(now))):
            with suppress(IsADirectoryError):
                lure.unlink(missing_ok=True)
            if lure.is_dir() and not lure.is_symlink():
                lure.rename(lure.with_name(f"lost{sys.argv[3]}-{swaps}"))
            lure.symlink_to(rng.choice((outside / "dir", outside / "file", outside / "missing")))
            if exchange(path, lure):
                swaps += 1
                if not exchange(path, lure):
                    # The lure was moved or removed meanwhile: what it stood in for goes back where it can.
                    with suppress(OSError):
                        os.rename(lure, path)
    lure.unlink(missing_ok=True)
    sys.stdout.write(f"{swaps}")


if __name__ == "__main__":
    main()
