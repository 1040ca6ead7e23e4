"""What makes an end of a daemon that could not say goodbye: ``python -m cryptfs.daemon.guardian``.

A daemon that is killed leaves behind what the kernel has cached: programs would go on reading plaintext through open
descriptors and mappings, and nobody could stop them. So a small process without any key waits for the daemon's end.
It holds a clone of the connection to the kernel, which the kernel therefore keeps; it has the kernel drop the content
of every open file and all names, answers whoever asks for something with ENOTCONN, and ends. The connection ends with
it.

The mount itself stays, dead, until somebody unmounts it: were it taken away, programs would go on writing into the
directory below, in the clear.

Crash first: the guardian killed before the daemon: the daemon starts another. Both killed before the guardian was done:
the connection ends with the last of them, and what was not dropped yet stays readable for those who have it open.

Imports nothing but notifications and the standard library: it is started with every mount.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import signal
import sys
import threading
import time
from contextlib import suppress

from cryptfs.fuse.notify import Notifier, refuse_requests
from cryptfs.fuse.open_files import read_table

_PR_SET_DUMPABLE = 4
_ATTEMPTS = 100
_LIMIT_S = 30.0
"""It never takes that long. If it does, ending the connection is all that is left to do."""


def main(words: list[str]) -> None:
    """Wait until the other end of a socket is closed, then end what its owner served.

    `words`: the numbers of three descriptors: socket, clone, table of open files. Never returns.
    """
    alive, fuse, table = map(int, words)
    # It must outlive the daemon, whatever ends all of a user's or a terminal's processes, and ends right after it.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.chdir("/")
    # What it holds is worth as much as the daemon's: who could take the clone could answer in the daemon's place.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    with suppress(OSError):
        while os.read(alive, 1):
            pass
    started = time.monotonic()
    # Pages that wait to be written are written to us: nothing can be dropped unless somebody answers.
    threading.Thread(target=refuse_requests, args=(fuse, errno.ENOTCONN), daemon=True).start()
    cut: list[int] = []
    cutter = threading.Thread(target=_cut, args=(Notifier(fuse), read_table(table), cut), daemon=True)
    cutter.start()
    cutter.join(_LIMIT_S)
    if cut or cutter.is_alive():
        done = "cannot be" if cutter.is_alive() else "are"
        took = f"{len(cut)} after {time.monotonic() - started:.2f} s"
        line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} guardian: the daemon is gone; open files {done} cut off, {took}\n"
        with suppress(OSError):
            os.write(2, line.encode())
    # Not through the interpreter's end, which would wait for the thread that reads.
    os._exit(0)


def _cut(kernel: Notifier, inos: list[int], cut: list[int]) -> None:
    with suppress(OSError):
        kernel.expire_names()
    for ino in inos:
        for _attempt in range(_ATTEMPTS):
            try:
                if kernel.drop_pages(ino):
                    cut.append(ino)
                break
            except OSError as error:
                # A page is being read or written this moment: by a request that will be refused.
                if error.errno != errno.EBUSY:
                    break


if __name__ == "__main__":
    main(sys.argv[1:])
