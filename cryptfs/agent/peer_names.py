"""A small process that says which program another process runs, for an agent that may not look any more.

Under Landlock /proc/<pid>/exe of a process outside the sandbox cannot be read (ptrace(2)'s access check). So a child is
forked before: it never has a key, starts no program, opens no socket, and answers one question. It ends when its
parent does.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import time

from cryptfs.agent.peers import exe_of
from cryptfs.agent.sandbox import filter_calls

ANSWER_S = 0.25
_PID_BYTES = 4
_ANSWER_BYTES = 8192
_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15
_NAME = b"cryptfs-peers"
_ARG_START, _ARG_END = 47, 48
"""Fields 48 and 49 of /proc/<pid>/stat (proc(5)), counted from 0."""


class PeerNames:
    """The parent's end."""

    def __init__(self) -> None:
        """Fork; only while the process has one thread."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if os.fork() == 0:
            try:
                _answer(theirs.detach())
            finally:
                os._exit(0)
        theirs.close()
        self._sock = ours

    def exe_of(self, pid: int) -> str | None:
        """The program of process `pid`; None if it is hidden, gone, or nobody answers in time."""
        question = pid.to_bytes(_PID_BYTES, "big")
        end = time.monotonic() + ANSWER_S
        with contextlib.suppress(OSError):
            self._sock.settimeout(ANSWER_S)
            self._sock.send(question)
            while time.monotonic() < end:
                answer = self._sock.recv(_ANSWER_BYTES)
                if answer[:_PID_BYTES] == question:  # else: one that came too late the last time
                    return os.fsdecode(answer[_PID_BYTES:]) or None
                if not answer:
                    return None
        return None


def _answer(fd: int) -> None:
    """The child, until its parent is gone."""
    os.dup2(fd, 0)
    os.closerange(1, 4096)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    libc.prctl(_PR_SET_NAME, _NAME, 0, 0, 0)
    _say_another_command_line()
    filter_calls(network=False)
    with socket.socket(fileno=0) as sock:
        while question := sock.recv(_PID_BYTES):
            exe = exe_of(int.from_bytes(question, "big")) or ""
            sock.send(question + os.fsencode(exe))


def _say_another_command_line() -> None:
    """So that nobody who looks for the agent by its arguments finds two."""
    with open("/proc/self/stat", "rb") as file:
        fields = file.read().rsplit(b")", 1)[1].split()
    # What comes after the name begins with field 3.
    start, end = int(fields[_ARG_START - 2]), int(fields[_ARG_END - 2])
    if 0 < start < end:
        ctypes.memset(start, 0, end - start)
        ctypes.memmove(start, _NAME, min(len(_NAME), end - start - 1))
