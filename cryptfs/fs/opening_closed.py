"""Files and directories that their own owner's mode keeps out, used all the same: the mode is wider for a moment.

By descriptor, never by name. Whoever may write in a directory of `tree/` could put another file under the name between
two calls, and one that is nobody's business would get the mode. A crash in that moment leaves the wider mode, by which
nobody gains but the owner, who may give himself these bits at any time.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager

from cryptfs.errors import Damaged
from cryptfs.ports import Store

_PERMISSIONS = stat.S_IRUSR | stat.S_IWUSR | stat.S_IXUSR


@contextmanager
def wider(store: Store, dir_fd: int, name: bytes, bits: int, *, ino: int | None = None) -> Iterator[int]:
    """Give what lies there these bits of its owner's for as long as the caller is inside; yields an O_PATH descriptor.

    Raises OSError (a symlink is `ELOOP`), `Damaged("exchanged")` if it is not the object of that number.
    """
    assert not bits & ~_PERMISSIONS
    fd = store.open(dir_fd, name, os.O_PATH)
    try:
        st = store.fstat(fd)
        if stat.S_ISLNK(st.st_mode):
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        if ino not in {None, st.st_ino}:
            raise Damaged("exchanged", "another file lies under this name")
        mode = stat.S_IMODE(st.st_mode)
        store.chmod(fd, b"", mode | bits)
        try:
            yield fd
        finally:
            store.chmod(fd, b"", mode)
    finally:
        store.close(fd)
