"""All that is done with files but their names: `attributes`, `opening`, `settling`, and `entries` below them."""

from __future__ import annotations

from cryptfs.fs.attributes import Attributes
from cryptfs.fs.settling import Settling


class Files(Settling, Attributes):
    """Open files and attributes of one volume."""
