"""All that is done with names. One room each: `looking`, `making`, `removing`, `linking`.

`changing` is what the last three share: the locks, and in which order frame, tree and memory change.
"""

from __future__ import annotations

from cryptfs.fs.linking import Linking
from cryptfs.fs.making import Making


class Namespace(Making, Linking):
    """The tree of one volume."""
