"""What a volume has in its cipher directory (FORMAT.md §2), for those who take an unfinished or dead one away again."""

from __future__ import annotations

import contextlib
import shutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_INSIDE = ("volume.new", "state", "tree", "sidecars", "tmp")
MADE = ("volume", *_INSIDE)
"""What `init` may leave in the directory, and so what it may take away again."""
BESIDE_VOLUME = (*_INSIDE, "damaged", "domains")
"""What a volume that was in use may have besides the file `volume`."""


def remove(path: Path) -> None:
    """Remove a file, a symlink or a directory with all that is in it, if it is there. Raises OSError."""
    with contextlib.suppress(FileNotFoundError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
