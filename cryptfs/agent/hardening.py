"""What the kernel can do to keep keys out of dumps, swap and debuggers; each step says honestly if it failed."""

from __future__ import annotations

import ctypes
import os
import resource

_PR_SET_DUMPABLE = 4
_PR_GET_DUMPABLE = 3
_MCL_CURRENT, _MCL_FUTURE, _MCL_ONFAULT = 1, 2, 4


def harden() -> list[str]:
    """Apply every measure to this process; return one line for each that could not be had, none if all are in force."""
    return [problem for problem in measures().values() if problem]


def measures() -> dict[str, str | None]:
    """Apply every measure to this process; by name, why it could not be had, None where it is in force."""
    return {
        "no_core_dumps": _no_core_dumps(), "not_dumpable": _not_dumpable(), "locked_memory": _lock_memory(),
        "freed_memory": _freed_is_overwritten(),
    }  # fmt: skip


def _freed_is_overwritten() -> str | None:
    """glibc.malloc.perturb (mallopt(3), M_PERTURB): what is freed is filled with other bytes.

    It counts from a process's first allocation, so whoever starts the agent says so in its environment, as `cryptfs`
    does.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "").split(":")
    wanted = {"glibc.malloc.perturb", "glibc.malloc.tcache_count"}
    if os.environ.get("PYTHONMALLOC") == "malloc" and wanted <= {tunable.split("=")[0] for tunable in tunables}:
        if "CS_GNU_LIBC_VERSION" in os.confstr_names and os.confstr("CS_GNU_LIBC_VERSION"):
            return None
        return "freed memory is not overwritten: the C library is not glibc"
    return "freed memory is not overwritten: the agent was not started by `cryptfs`"


def _no_core_dumps() -> str | None:
    """RLIMIT_CORE 0 (setrlimit(2)): a crash writes no memory to disk."""
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (OSError, ValueError) as error:
        return f"core dumps could not be switched off: {error}"
    return None


def _not_dumpable() -> str | None:
    """PR_SET_DUMPABLE 0 (prctl(2)): no ptrace and no reading of /proc/<pid>/mem by other processes of the same user."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) != 0 or libc.prctl(_PR_GET_DUMPABLE, 0, 0, 0, 0) != 0:
        return f"the process could not be made undumpable: {os.strerror(ctypes.get_errno())}"
    return None


def _lock_memory() -> str | None:
    """mlockall(2): nothing of this process is swapped out.

    Only where the limit is off: under a finite RLIMIT_MEMLOCK, mlockall may succeed and every later allocation (the
    KDF's hundreds of MiB) would fail.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if hard == resource.RLIM_INFINITY and soft != hard:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (hard, hard))
    if hard != resource.RLIM_INFINITY and not _may_exceed_memlock():
        return (
            f"memory is not locked, keys may reach the swap: RLIMIT_MEMLOCK is {hard // 1024} KiB "
            "(raise it to unlimited, or encrypt or switch off swap)"
        )
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mlockall(_MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT) != 0:
        return f"memory is not locked, keys may reach the swap: {os.strerror(ctypes.get_errno())}"
    return None


def _may_exceed_memlock() -> bool:
    """Whether CAP_IPC_LOCK (bit 14, capabilities(7)) is in force in the first user namespace, where it counts."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as status:
        effective = next((int(line.split()[1], 16) for line in status if line.startswith("CapEff:")), 0)
    with open("/proc/self/uid_map", encoding="ascii") as uid_map:
        initial = uid_map.read().split() == ["0", "0", "4294967295"]
    return initial and bool(effective >> 14 & 1)
