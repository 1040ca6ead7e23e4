"""Faults to order: which call of the store fails, and how.

Calls are counted across all kinds. A failed sync leaves what it should have written in doubt for ever (`disk_model`),
as a kernel does. `close` never fails: Linux reports there only what the next fsync would have reported, and the
descriptor is gone either way. Nor does `fstat`: what an open file's attributes are, the kernel has in memory.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from cryptfs.store.memory import MemoryStore

READING = frozenset({"pread", "preadv", "lstat", "listdir", "readlink"})
REMOVING = frozenset({"unlink", "rmdir"})
SYNCING = frozenset({"fsync", "fdatasync", "syncfs"})
WRITING = frozenset({"pwrite", "pwritev"})
FULL = WRITING | {"ftruncate", "mkdir", "link", "symlink", "mknod"}
"""What finds a disk full, at the latest: making an inode may still work."""
CHANGING = FULL | REMOVING | SYNCING | {"open", "rename", "chmod", "fchmod", "chown", "fchown", "utimens", "futimens"}
ALL = CHANGING | READING


def errors_of(code: int) -> frozenset[str]:
    """The calls that can end with this errno. EIO: any. A full disk refuses what needs room; btrfs any change."""
    return ALL if code == errno.EIO else CHANGING


class Faults:
    """Attach to a store, then `arm`. `hits`: what failed so far, as `call: errno`."""

    def __init__(self, store: MemoryStore) -> None:
        self.store = store
        self.hits: list[str] = []
        self.calls = 0
        self._armed = False
        self._code = errno.EIO
        self._kinds: frozenset[str] = frozenset()
        self._every = 0
        self._only = 0
        self._short = 0
        store.before_call = self._before

    def fail_every(self, k: int, code: int, kinds: frozenset[str] | None = None) -> None:
        """From now on, every `k`-th call of `kinds` fails."""
        self._plan(code, kinds, every=k)

    def fail_once(self, k: int, code: int, kinds: frozenset[str] | None = None) -> None:
        """The `k`-th call of `kinds` from now on fails, and no other."""
        self._plan(code, kinds, only=k)

    def shorten_once(self, k: int, count: int, code: int) -> None:
        """The `k`-th write from now on takes `count` bytes only, and the one after it fails; 0: that one succeeds."""
        self._plan(code, WRITING, only=k)
        self._short = count

    def _plan(self, code: int, kinds: frozenset[str] | None, *, every: int = 0, only: int = 0) -> None:
        self._armed, self._code, self._every, self._only, self._short = True, code, every, only, 0
        self._kinds = errors_of(code) if kinds is None else kinds
        self.calls = 0
        self.hits = []

    def heal(self) -> None:
        """No more faults."""
        self._armed = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """No faults, and no counting, meanwhile."""
        before, self._armed = self._armed, False
        yield
        self._armed = before

    def _before(self, call: str) -> None:
        if not self._armed or call not in self._kinds:
            return
        self.calls += 1
        if self._short and self.calls == self._only:
            self.hits.append(f"{call}: {self._short} bytes")
            self.store.shorten(1, self._short)
            return
        due = self.calls == self._only + bool(self._short) if self._only else self.calls % self._every == 0
        if due and self._code:
            self.hits.append(f"{call}: {errno.errorcode[self._code]}")
            self.store.fail(call, 1, self._code)
