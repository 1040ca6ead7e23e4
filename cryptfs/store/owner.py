"""A cipher directory of an ordinary user: directories whose mode keeps their own owner out are worked in all the same.

Modes in `tree/` are those that programs gave. Of a directory with mode 0000 or 0311 its owner may still change the
mode, remove it, or make something in it, and the kernel has asked who calls before it asked the daemon; but the daemon
is that owner, and calls relative to a directory's descriptor are checked against its mode like any other. So a call
that was refused is done again with the directory's u+rwx set, and the mode is put back at once. Root needs none of
this.

What a crash between the two leaves: u+rwx on a directory that had less. Nobody gains by it but the owner, who may give
himself these bits at any time; group, others and set-id bits stay as they were. Nothing else records the mode, so it
stays wider until somebody sets it again. Data files without u+rw are opened in the same way (`fs.opening_closed`), with
the same consequence. The directory's ctime moves.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from cryptfs.store.local import LocalStore
from cryptfs.types import Buffer

T = TypeVar("T")

_SET_ID = stat.S_ISUID | stat.S_ISGID


def local_store(cipher_dir: Path) -> LocalStore:
    """The store for whoever this process is. Raises `FileNotFoundError`, `NotADirectoryError`."""
    return LocalStore(cipher_dir) if os.geteuid() == 0 else OwnersStore(cipher_dir)


class OwnersStore(LocalStore):
    """As `LocalStore`. Calls come from several threads: none sees a mode that is set for a moment, or loses its own.

    `_turn` is odd while modes are wider than they should be, which is only under `_lock`.
    """

    def __init__(self, cipher_dir: Path) -> None:
        """As `LocalStore`."""
        super().__init__(cipher_dir)
        self._lock = threading.RLock()
        self._turn = 0
        self._uid = os.geteuid()
        self._gids = frozenset({os.getegid(), *os.getgroups()})
        self.fstat = self._fstat
        self.fchmod = self._fchmod
        self.pwrite = self._pwrite
        self.pwritev = self._pwritev
        self.ftruncate = self._ftruncate

    def open(self, dir_fd: int, name: bytes, flags: int, mode: int = 0o600) -> int:
        """As `LocalStore`; a directory to be opened may be closed to its owner, too."""
        try:
            return super().open(dir_fd, name, flags, mode)
        except PermissionError as error:
            return self._again(error, lambda: self._open(dir_fd, name, flags, mode), dir_fd)

    def lstat(self, dir_fd: int, name: bytes) -> os.stat_result:
        """As `LocalStore`."""
        turn = self._turn
        try:
            st = super().lstat(dir_fd, name)
        except PermissionError as error:
            return self._again(error, lambda: LocalStore.lstat(self, dir_fd, name), dir_fd)
        if turn & 1 or turn != self._turn:
            with self._lock:
                return super().lstat(dir_fd, name)
        return st

    def _fstat(self, fd: int) -> os.stat_result:
        turn = self._turn
        st = os.fstat(fd)
        if turn & 1 or turn != self._turn:
            with self._lock:
                return os.fstat(fd)
        return st

    def _fchmod(self, fd: int, mode: int) -> None:
        with self._lock:
            os.fchmod(fd, mode)

    def _pwrite(self, fd: int, data: Buffer, offset: int) -> int:
        return self._with_set_id(fd, lambda: os.pwrite(fd, data, offset))

    def _pwritev(self, fd: int, buffers: Sequence[Buffer], offset: int) -> int:
        return self._with_set_id(fd, lambda: os.pwritev(fd, buffers, offset))

    def _ftruncate(self, fd: int, length: int) -> None:
        self._with_set_id(fd, lambda: os.ftruncate(fd, length))

    def _with_set_id(self, fd: int, call: Callable[[], T]) -> T:
        """`call`, which changes the file behind `fd`; its set-id bits stay."""
        if not os.fstat(fd).st_mode & _SET_ID:
            return call()
        with self._lock:
            before = os.fstat(fd).st_mode
            try:
                return call()
            finally:
                if os.fstat(fd).st_mode != before:
                    os.fchmod(fd, stat.S_IMODE(before))

    def chmod(self, dir_fd: int, name: bytes, mode: int) -> None:
        """As `LocalStore`."""
        with self._lock:
            self._as_owner(lambda: LocalStore.chmod(self, dir_fd, name, mode), dir_fd)

    def mkdir(self, dir_fd: int, name: bytes, mode: int = 0o700) -> None:
        """As `LocalStore`."""
        self._as_owner(lambda: LocalStore.mkdir(self, dir_fd, name, mode), dir_fd)

    def rmdir(self, dir_fd: int, name: bytes) -> None:
        """As `LocalStore`."""
        self._as_owner(lambda: LocalStore.rmdir(self, dir_fd, name), dir_fd)

    def unlink(self, dir_fd: int, name: bytes) -> None:
        """As `LocalStore`."""
        self._as_owner(lambda: LocalStore.unlink(self, dir_fd, name), dir_fd)

    def rename(self, src_fd: int, src: bytes, dst_fd: int, dst: bytes, flags: int = 0) -> None:
        """As `LocalStore`."""
        self._as_owner(lambda: LocalStore.rename(self, src_fd, src, dst_fd, dst, flags), src_fd, dst_fd)

    def link(self, src_fd: int, src: bytes, dst_fd: int, dst: bytes) -> None:
        """As `LocalStore`."""
        self._as_owner(lambda: LocalStore.link(self, src_fd, src, dst_fd, dst), src_fd, dst_fd)

    def symlink(self, target: bytes, dir_fd: int, name: bytes) -> None:
        """As `LocalStore`."""
        self._as_owner(lambda: LocalStore.symlink(self, target, dir_fd, name), dir_fd)

    def readlink(self, dir_fd: int, name: bytes) -> bytes:
        """As `LocalStore`."""
        return self._as_owner(lambda: LocalStore.readlink(self, dir_fd, name), dir_fd)

    def mknod(self, dir_fd: int, name: bytes, mode: int, rdev: int) -> None:
        """As `LocalStore`."""
        self._as_owner(lambda: LocalStore.mknod(self, dir_fd, name, mode, rdev), dir_fd)

    def chown(self, dir_fd: int, name: bytes, uid: int, gid: int) -> None:
        """As `LocalStore`."""
        self._as_owner(lambda: LocalStore.chown(self, dir_fd, name, uid, gid), dir_fd)

    def utimens(self, dir_fd: int, name: bytes, atime_ns: int, mtime_ns: int) -> None:
        """As `LocalStore`."""
        self._as_owner(lambda: LocalStore.utimens(self, dir_fd, name, atime_ns, mtime_ns), dir_fd)

    # as the owner ----------------------------------------------------------------------------------------------

    def _as_owner(self, call: Callable[[], T], *dir_fds: int) -> T:
        """`call`, which works in the directories behind `dir_fds`, whatever their modes say of us."""
        try:
            return call()
        except PermissionError as error:
            return self._again(error, call, *dir_fds)

    def _again(self, error: PermissionError, call: Callable[[], T], *dir_fds: int) -> T:
        """`call` with the directories behind `dir_fds` open to us. Raises `error` if it is none of their modes."""
        if error.errno != errno.EACCES:
            raise error
        with self._wider():
            before: list[tuple[int, int]] = []
            try:
                for fd in dict.fromkeys(dir_fds):
                    # The cipher directory's own mode is no program's: who made it read-only means it.
                    mode = self._closed(os.fstat(fd)) if fd != self.root() else None
                    if mode is not None:
                        os.fchmod(fd, mode | stat.S_IRWXU)
                        before.append((fd, mode))
                return call()
            finally:
                for fd, mode in before:
                    os.fchmod(fd, mode)

    def _open(self, dir_fd: int, name: bytes, flags: int, mode: int) -> int:
        """Under `_lock`, the directory above being open to us."""
        try:
            return super().open(dir_fd, name, flags, mode)
        except PermissionError:
            if not flags & os.O_DIRECTORY:
                raise
            # By descriptor: another directory may lie under the name by the next call.
            held = super().open(dir_fd, name, os.O_PATH | os.O_DIRECTORY)
            try:
                closed = self._closed(os.fstat(held))
                if closed is None:
                    raise
                LocalStore.chmod(self, held, b"", closed | stat.S_IRWXU)
                try:
                    return super().open(held, b".", flags, mode)
                finally:
                    LocalStore.chmod(self, held, b"", closed)
            finally:
                os.close(held)

    def _closed(self, st: os.stat_result) -> int | None:
        """The mode of a directory that we own and that its mode keeps us out of; None for anything else.

        Also for a set-group-id directory of a group that is none of ours: chmod(2) would take the bit.
        """
        mode = stat.S_IMODE(st.st_mode)
        if not stat.S_ISDIR(st.st_mode) or st.st_uid != self._uid or mode & stat.S_IRWXU == stat.S_IRWXU:
            return None
        return None if mode & stat.S_ISGID and st.st_gid not in self._gids else mode

    @contextmanager
    def _wider(self) -> Iterator[None]:
        with self._lock:
            nested = self._turn & 1
            self._turn += not nested
            try:
                yield
            finally:
                self._turn += not nested
