"""What is known about one open file: the shared ground of reading, writing and journaling it."""

from __future__ import annotations

from cryptfs.blocks.extents import HOME_DATA, HOME_TWIN, ExtentMap
from cryptfs.errors import Damaged
from cryptfs.format.datafile import HEADER_BYTES
from cryptfs.fs.context import FsContext
from cryptfs.fs.locks import SharedLock


class FileState:
    """Descriptors, size and block map of a file.

    `blocks`: what is current. `displaced`: the durable versions that current, not yet durable ones stand in for;
    their homes must not be written.
    `data_len`: plaintext length the data file has room for (its size less the header), at least `size` once a write
    is complete.
    `acked`: something of this file may have been acknowledged as durable.
    """

    __slots__ = (
        "acked", "blocks", "ctx", "data_fd", "data_len", "data_unsynced", "displaced", "file_id", "ino", "lock",
        "meta_unsynced", "mtime_ns", "mtime_stale", "size", "twin_fd", "twin_new", "twin_unsynced", "writable",
    )  # fmt: skip

    def __init__(self, ctx: FsContext, ino: int, file_id: bytes, data_fd: int, *, writable: bool) -> None:
        self.ctx = ctx
        self.ino = ino
        self.file_id = file_id
        self.data_fd = data_fd
        self.writable = writable
        self.twin_fd: int | None = None
        self.lock = SharedLock()
        self.blocks = ExtentMap(ctx.config.block_size)
        self.displaced = ExtentMap(ctx.config.block_size)
        self.size = 0
        self.data_len = 0
        self.acked = True
        # What an earlier opening of this file wrote and did not sync is not known here, so the first fsync is a real
        # one.
        self.data_unsynced = True
        self.twin_unsynced = True
        self.twin_new = False
        # With the kernel's writeback cache the time of the last change is the kernel's to say: it sets it when it is
        # due. What this
        # process's own writes do to the data file's time is undone.
        self.mtime_ns = ctx.store.fstat(data_fd).st_mtime_ns
        self.mtime_stale = False
        self.meta_unsynced = True

    def home_offset(self, home: int, block: int) -> int:
        """Where `block` starts in its home."""
        offset = block * self.ctx.config.block_size
        return offset + HEADER_BYTES if home == HOME_DATA else offset

    def home_fd(self, home: int) -> int:
        """The descriptor of a home that a record names. Raises `Damaged` if the twin is missing."""
        if home == HOME_TWIN:
            if self.twin_fd is None:
                raise Damaged("missing-twin")
            return self.twin_fd
        return self.data_fd

    def restore_mtime(self) -> None:
        """Undo what writing ciphertext did to the data file's modification time. Raises OSError."""
        if self.mtime_stale:
            atime_ns = self.ctx.store.fstat(self.data_fd).st_atime_ns
            self.ctx.store.futimens(self.data_fd, atime_ns, self.mtime_ns)
            self.mtime_stale = False

    @property
    def cut_pending(self) -> bool:
        """The data file is longer than the file: it is cut once the smaller size is durable."""
        return self.data_len > self.size

    def close(self) -> None:
        """Close both homes."""
        self.ctx.store.close(self.data_fd)
        if self.twin_fd is not None:
            self.ctx.store.close(self.twin_fd)
            self.twin_fd = None
