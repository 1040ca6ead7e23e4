"""Having the kernel forget what it knows of one volume, names and pages, after it handed over what programs wrote."""

from __future__ import annotations

import functools
import logging
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

import trio

from cryptfs.errors import CryptfsError
from cryptfs.fs.volume import Volume
from cryptfs.fuse.gate import Gate
from cryptfs.fuse.notify import WHOLE_FILE, Notifier
from cryptfs.fuse.open_files import OpenFiles
from cryptfs.types import Kind

log = logging.getLogger("cryptfs")

_THREADS = 16
"""They wait for the kernel, which waits for us where pages are dirty; those that do not must find a thread."""
_FILE_THREADS = _THREADS - 2
"""One is left for names, one for the sync."""
_PIECE_BYTES, _PIECES_MAX = 64 << 20, 16
"""Of a file that nobody writes: as much as makes use of the processors."""
_WRITTEN_PIECE_BYTES, _WRITTEN_PIECES_MAX = 2 << 20, 512
"""Of another one: what is behind a dirty page in the same piece waits for it."""
_USUAL_SWITCH_S, _SWITCH_S = sys.getswitchinterval(), 0.0002
"""How long the interpreter's lock may be kept from a thread that has dropped a piece and wants the next: as a rule
(sys.setswitchinterval) 5 ms, which with programs at work is what every single piece would wait."""

Piece = tuple[int, int, int]
"""Inode number, offset, length (bytes, `WHOLE_FILE`: to the end)."""


class Forgetting:
    """Of one volume of a mount. Calls wait for the kernel, which may wait for this process to answer: on threads."""

    def __init__(self, volume: Volume, gate: Gate, notifier: Notifier, open_files: OpenFiles, mountpoint: str) -> None:
        """`open_files`: all of the mount's."""
        self._volume = volume
        self._gate = gate
        self._notifier = notifier
        self._open_files = open_files
        self._mountpoint = mountpoint
        self._threads = trio.CapacityLimiter(_THREADS)

    def expires_names(self) -> bool:
        """Whether the kernel can be told to ask again for every name at once, of the mount's other volumes too."""
        return self._notifier.expire_names()

    async def sync(self) -> None:
        """Fetch what programs wrote from the kernel, which may take as long as this process takes to write it."""
        await trio.to_thread.run_sync(sync_mount, self._mountpoint, abandon_on_cancel=True, limiter=self._threads)

    async def drop_everything(self) -> None:
        """Have the kernel forget all names and content it knows; what was written and not fetched yet is fetched.

        Everything at once, on threads of their own, as one that meets a dirty page waits until that is written: names,
        with all that hangs on them and is not in use; open files in pieces, those that nobody writes first; then
        files that only the kernel remembers. Meanwhile dirty pages are fetched in bulk: one by one, as dropping
        fetches them, takes a hundred times as long. May be cancelled.
        """
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._sync_quietly)
            nursery.start_soon(self._drop_files, self._pieces())
            nursery.start_soon(self._drop_all_names)

    async def _drop_all_names(self) -> None:
        # What they are takes a key, which may have to be asked for: content does not wait for that.
        names = await self._top_names()
        await self._in_threads([functools.partial(self._drop_names, names)])

    async def _sync_quietly(self) -> None:
        # The mount point may be gone, the mount being detached: then every page is fetched by dropping it.
        with suppress(OSError):
            await self.sync()

    async def drop_files_in_use(self) -> None:
        """The same once more for the content of open files."""
        await self._drop_files(self._pieces(open_only=True))

    async def drop_range(self, ino: int, offset: int, length: int) -> None:
        """Have the kernel forget some pages."""
        await self._in_threads([functools.partial(_quietly, self._notifier.drop_pages, ino, offset, length)])

    def _pieces(self, *, open_only: bool = False) -> deque[Piece]:
        """What to drop, in order: open files, those not opened for writing first; then all others."""
        opened = dict(self._open_files.inos())
        pieces: deque[Piece] = deque()
        for ino, written in opened.items():
            inode = self._volume.inodes.find(ino)
            if inode is not None:
                pieces.extend(_in_pieces(ino, 0 if inode.file is None else inode.file.size, written))
        if not open_only:
            closed = (i.ino for i in self._volume.inodes.all() if i.kind == Kind.FILE and i.ino not in opened)
            pieces.extend((ino, 0, WHOLE_FILE) for ino in closed)
        return pieces

    async def _top_names(self) -> list[tuple[int, bytes]]:
        """What the kernel knows in the root: dropped, it takes along everything below that nobody uses.

        Where it cannot be told to ask again for every name, all the names it may know.
        """
        everywhere = not self.expires_names()
        try:
            return await self._volume.names.known(everywhere=everywhere)
        except (OSError, CryptfsError) as error:
            log.warning("some names stay with the kernel for %.0f s at most: %s", self._gate.entry_timeout_s, error)
            return []

    def _drop_names(self, names: list[tuple[int, bytes]]) -> None:
        for parent, name in names:
            _quietly(self._notifier.drop_name, parent, name)

    async def _drop_files(self, pieces: deque[Piece]) -> None:
        """Each thread takes the next piece until there is none."""
        sys.setswitchinterval(_SWITCH_S)
        try:
            await self._in_threads([functools.partial(self._drop_pages, pieces)] * min(_FILE_THREADS, len(pieces)))
        finally:
            sys.setswitchinterval(_USUAL_SWITCH_S)

    def _drop_pages(self, pieces: deque[Piece]) -> None:
        # Nothing else adds to it, and taking one is atomic.
        with suppress(IndexError):
            while True:
                _quietly(self._notifier.drop_pages, *pieces.popleft())

    async def _in_threads(self, calls: Sequence[Callable[[], None]]) -> None:
        async def one(call: Callable[[], None]) -> None:
            await trio.to_thread.run_sync(call, abandon_on_cancel=True, limiter=self._threads)

        async with trio.open_nursery() as nursery:
            for call in calls:
                nursery.start_soon(one, call)


def _in_pieces(ino: int, size: int, written: bool) -> Iterator[Piece]:
    """The last one is open, as the kernel may know the file longer."""
    piece_bytes, most = (_WRITTEN_PIECE_BYTES, _WRITTEN_PIECES_MAX) if written else (_PIECE_BYTES, _PIECES_MAX)
    step = max(piece_bytes, -(-size // most))
    for offset in range(0, size - step, step):
        yield ino, offset, step
    yield ino, max(0, (size - 1) // step * step), WHOLE_FILE


def _quietly(call: Callable[..., bool], *args: object) -> None:
    """A page that cannot be dropped (EBUSY: being read or written this moment) must not keep the others."""
    try:
        call(*args)
    except OSError as error:
        log.info("the kernel could not drop what it was told to: %s", error.strerror)


_SYNC = """
import ctypes, os, sys
ctypes.CDLL(None).syncfs(os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECTORY))
"""


def sync_mount(mountpoint: str) -> None:
    """syncfs(2) on the mount: the kernel writes its dirty pages to this process, which must go on answering.

    By a process that does not have the FUSE descriptor. The call cannot be interrupted, not even by SIGKILL: a thread
    of ours in it would keep a killed daemon's descriptor open, the connection with it, and itself waiting for ever.
    """
    words = [sys.executable, "-I", "-S", "-c", _SYNC, mountpoint]
    subprocess.run(words, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
