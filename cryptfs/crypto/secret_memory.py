"""Memory for secrets that the kernel itself does not map: memfd_secret(2), Linux 5.14, where it is switched on.

It is never swapped, never in a dump, and unreadable through /proc/<pid>/mem, by root too. Where there is none, secrets
stay where they are.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref

from cryptfs.crypto.secret import Secret

SLOT_BYTES = 64
POOL_BYTES = 16 << 10
_MEMFD_SECRET = 447


class SecretMemory:
    """256 slots of 64 bytes. `why_not` is None if there is such memory, else why not."""

    def __init__(self) -> None:
        self.why_not: str | None = None
        self._view: memoryview | None = None
        self._free: list[int] = []
        libc = ctypes.CDLL(None, use_errno=True)
        fd = libc.syscall(_MEMFD_SECRET, os.O_CLOEXEC)
        if fd < 0:
            self.why_not = f"no memfd_secret: {os.strerror(ctypes.get_errno())}"
            return
        try:
            os.ftruncate(fd, POOL_BYTES)
            # Not Python's mmap, which would keep a descriptor of it for as long as it lives.
            libc.mmap.restype = ctypes.c_void_p
            libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
            at = libc.mmap(None, POOL_BYTES, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, fd, 0)
            number = ctypes.get_errno()
        finally:
            os.close(fd)
        if at is None or at == ctypes.c_void_p(-1).value:
            # RLIMIT_MEMLOCK counts these pages.
            self.why_not = f"memfd_secret cannot be mapped: {os.strerror(number)}"
            return
        self._view = memoryview((ctypes.c_char * POOL_BYTES).from_address(at)).cast("B")
        weakref.finalize(self, libc.munmap, ctypes.c_void_p(at), ctypes.c_size_t(POOL_BYTES))
        self._free = list(range(0, POOL_BYTES, SLOT_BYTES))

    def moved(self, secret: Secret) -> Secret:
        """The same secret in this memory, its old place wiped; the secret itself if there is no room."""
        if self._view is None or not self._free or len(secret) > SLOT_BYTES:
            return secret
        at = self._free.pop()
        slot = self._view[at : at + len(secret)]
        slot[:] = secret.view()
        secret.wipe()
        return _Held(slot, self, at)

    def give_back(self, at: int) -> None:
        """The slot there may be used again."""
        self._free.append(at)


class _Held(Secret):
    """A secret in a slot, which it gives back when wiped."""

    __slots__ = ("_at", "_memory")

    def __init__(self, slot: memoryview, memory: SecretMemory, at: int) -> None:
        self._memory = memory  # which stays mapped as long as this is there
        self._at = at
        # A memoryview of fixed memory does all that `Secret` asks of its bytearray.
        super().__init__(slot)  # type: ignore[arg-type]

    def wipe(self) -> None:
        """Overwrite the bytes with zeros and give the slot back. May be called again."""
        was_wiped = self.wiped
        super().wipe()
        if not was_wiped:
            self._memory.give_back(self._at)
