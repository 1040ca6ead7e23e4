"""Which files programs have open, in memory that another process can look at after this one was killed.

The kernel asks us for every `open`, whatever it has cached, and says `release` once the last descriptor and the last
mapping are gone. So what is in here is all whose content it can still show to anybody.

One 8-byte slot per file, native order, 0 where there is none: a store of one slot is one store of the processor's, so
whoever looks at any moment sees old or new.
"""

from __future__ import annotations

import mmap
import os

FILES_MAX = 1 << 20
"""More than a process may have descriptors for (fs.nr_open); files beyond it are not in the table."""
_BYTES = FILES_MAX * 8


class OpenFiles:
    """One per mount. `fd` is a memfd of 8 MiB that takes a page of memory per 512 open files."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("cryptfs-open-files", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, _BYTES)
        self._slots = memoryview(mmap.mmap(self.fd, _BYTES)).cast("Q")
        self._used = 0
        self._free: list[int] = []
        self._opens: dict[int, list[int]] = {}
        """By inode number: slot, openings, whether one of them was for writing."""

    def opened(self, ino: int, *, writing: bool) -> None:
        """Once more."""
        entry = self._opens.get(ino)
        if entry is None:
            slot = self._free.pop() if self._free else self._used
            if slot < FILES_MAX:
                self._used = max(self._used, slot + 1)
                self._slots[slot] = ino
            self._opens[ino] = [slot, 1, int(writing)]
        else:
            entry[1] += 1
            entry[2] |= int(writing)

    def released(self, ino: int) -> None:
        """Once less."""
        entry = self._opens[ino]
        entry[1] -= 1
        if not entry[1]:
            del self._opens[ino]
            if entry[0] < FILES_MAX:
                self._slots[entry[0]] = 0
                self._free.append(entry[0])

    def close(self) -> None:
        """Close the descriptor."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def inos(self) -> list[tuple[int, bool]]:
        """(inode number, whether it was opened for writing): those that were not first."""
        return sorted(((ino, bool(entry[2])) for ino, entry in self._opens.items()), key=lambda item: item[1])


def read_table(fd: int) -> list[int]:
    """The inode numbers in the memory behind `fd`, whoever filled it."""
    with mmap.mmap(fd, _BYTES, prot=mmap.PROT_READ) as table, memoryview(table) as view, view.cast("Q") as slots:
        end = next((at for at in range(0, FILES_MAX, 512) if not any(slots[at : at + 512])), FILES_MAX)
        return [ino for ino in slots[:end] if ino]
