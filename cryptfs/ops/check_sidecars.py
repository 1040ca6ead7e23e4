"""What lies in `sidecars/`, by id: orphans, unfinished rewrites, things that are none of ours."""

from __future__ import annotations

import re
import stat
from dataclasses import dataclass, field

from cryptfs.fs.context import FsContext

SIDECAR, TWIN = 1, 2
_NAME = re.compile(rb"([0-9a-f]{32})(\.twin|\.new)?")


@dataclass(slots=True)
class Sidecars:
    """`by_id`: id -> `SIDECAR` and `TWIN` as far as they are there. Paths are relative to the cipher directory.

    `foreign`: (path, what is wrong with it).
    """

    by_id: dict[bytes, int] = field(default_factory=dict)
    unfinished: list[bytes] = field(default_factory=list)
    foreign: list[tuple[bytes, str]] = field(default_factory=list)


def list_sidecars(ctx: FsContext) -> Sidecars:
    """A listing of `sidecars/`. Blocks. Raises OSError if one of its directories cannot be listed."""
    out = Sidecars()
    top = b"sidecars/"
    for name in ctx.store.listdir(ctx.dir_fd(b"sidecars")):
        if not re.fullmatch(rb"[0-9a-f]{2}", name):
            out.foreign.append((top + name, "not one of its 256 directories"))
    for first in range(256):
        prefix = b"%02x" % first
        fd = ctx.dir_fd(b"sidecars", prefix)
        for name in ctx.store.listdir(fd):
            path, match = top + prefix + b"/" + name, _NAME.fullmatch(name)
            if match is None or not name.startswith(prefix):
                out.foreign.append((path, "not a name of a sidecar here"))
            elif match[2] == b".new":
                out.unfinished.append(path)
            elif not stat.S_ISREG(ctx.store.lstat(fd, name).st_mode):
                out.foreign.append((path, "not a regular file"))
            else:
                log_id = bytes.fromhex(match[1].decode())
                out.by_id[log_id] = out.by_id.get(log_id, 0) | (TWIN if match[2] else SIDECAR)
    return out
