"""What the agent takes from itself once it has started: files to write, programs, other processes, the network.

Landlock (Linux 5.13, landlock(7)) and seccomp (seccomp(2)) by ctypes: three system calls and a filter of some twenty
instructions. `pyseccomp` needs libseccomp on the machine, `landlock` packages follow the kernel slowly; both would be
code of others in the process that holds the KEKs. Both bind the calling thread and those it starts from then on, so
this is done before trio has any.

What a kernel lacks is left out and said (`status`). Nothing here can be undone, by this process either.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
from collections.abc import Iterable

_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2

# landlock(7); the numbers are the same on every architecture.
_LANDLOCK_CREATE_RULESET, _LANDLOCK_ADD_RULE, _LANDLOCK_RESTRICT_SELF = 444, 445, 446
_CREATE_RULESET_VERSION, _RULE_PATH_BENEATH = 1, 1
_EXECUTE, _WRITE_FILE = 1 << 0, 1 << 1
_REMOVE_DIR, _REMOVE_FILE = 1 << 4, 1 << 5
_MAKE_CHAR, _MAKE_DIR, _MAKE_REG, _MAKE_SOCK, _MAKE_FIFO, _MAKE_BLOCK, _MAKE_SYM = (1 << bit for bit in range(6, 13))
_REFER, _TRUNCATE, _IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15
_BIND_TCP, _CONNECT_TCP = 1, 2
_SCOPE_ABSTRACT_UNIX, _SCOPE_SIGNAL = 1, 2

_WRITING = (
    _WRITE_FILE | _REMOVE_DIR | _REMOVE_FILE | _MAKE_CHAR | _MAKE_DIR | _MAKE_REG | _MAKE_SOCK | _MAKE_FIFO
    | _MAKE_BLOCK | _MAKE_SYM
)  # fmt: skip
_OURS = _WRITE_FILE | _REMOVE_FILE | _MAKE_DIR | _MAKE_REG | _MAKE_SOCK | _REFER | _TRUNCATE


def confine(writable: Iterable[str], *, network: bool) -> dict[str, str]:
    """Write only below `writable` (directories that exist) and to /dev/null, start no program, look into no process.

    `network`: whether sockets other than Unix ones are needed (by a root key's holder). Returns, by measure, ``on`` or
    why not. Call it with one thread running.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        why = f"off: no_new_privs: {os.strerror(ctypes.get_errno())}"
        return {"landlock": why, "seccomp": why}
    return {
        "landlock": _landlock(libc, writable, network=network),
        "seccomp": _seccomp(libc, network=network),
    }


def filter_calls(*, network: bool) -> str:
    """Only the filter of system calls; ``on`` or why not. Needs no_new_privs or CAP_SYS_ADMIN; sets the first."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    return _seccomp(libc, network=network)


# Landlock ------------------------------------------------------------------------------------------------------


def _landlock(libc: ctypes.CDLL, writable: Iterable[str], *, network: bool) -> str:
    abi = libc.syscall(_LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), _CREATE_RULESET_VERSION)
    if abi < 1:
        return "off: the kernel has no Landlock, or it is not switched on"
    handled = _WRITING | _EXECUTE
    if abi >= 2:
        handled |= _REFER
    if abi >= 3:
        handled |= _TRUNCATE
    if abi >= 5:
        handled |= _IOCTL_DEV
    net = _BIND_TCP | _CONNECT_TCP if abi >= 4 and not network else 0
    scoped = _SCOPE_ABSTRACT_UNIX | _SCOPE_SIGNAL if abi >= 6 else 0
    attribute = struct.pack("=QQQ", handled, net, scoped)[: 8 if abi < 4 else 16 if abi < 6 else 24]
    ruleset = libc.syscall(_LANDLOCK_CREATE_RULESET, attribute, ctypes.c_size_t(len(attribute)), 0)
    if ruleset < 0:
        return f"off: {os.strerror(ctypes.get_errno())}"
    try:
        for path, allowed in [(path, _OURS) for path in writable] + [(os.devnull, _WRITE_FILE | _TRUNCATE)]:
            _allow(libc, ruleset, path, allowed & handled)
        if libc.syscall(_LANDLOCK_RESTRICT_SELF, ruleset, 0) != 0:
            return f"off: {os.strerror(ctypes.get_errno())}"
    except OSError as error:
        return f"off: {error.filename}: {error.strerror}"
    finally:
        os.close(ruleset)
    return "on" if abi >= 6 else f"on, as far as version {abi} of it goes"


def _allow(libc: ctypes.CDLL, ruleset: int, path: str, allowed: int) -> None:
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        rule = struct.pack("=Qi", allowed, fd)
        if libc.syscall(_LANDLOCK_ADD_RULE, ruleset, _RULE_PATH_BENEATH, rule, 0) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), path)
    finally:
        os.close(fd)


# seccomp -------------------------------------------------------------------------------------------------------

_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_EPERM, _EAFNOSUPPORT = 1, 97
_LOAD, _JUMP_EQUAL, _JUMP_GREATER_OR_EQUAL, _RETURN = 0x20, 0x15, 0x35, 0x06
_AT_NUMBER, _AT_ARCHITECTURE, _AT_FIRST_ARGUMENT = 0, 4, 16
_AF_UNIX = 1
_X32_BIT = 0x40000000

# (AUDIT_ARCH, socket, forbidden numbers): execve execveat ptrace process_vm_readv process_vm_writev kexec_load
# init_module finit_module delete_module bpf perf_event_open userfaultfd mount umount2 pivot_root keyctl add_key
# io_uring_setup (whose requests seccomp does not see), from the kernel's tables.
_MACHINES: dict[str, tuple[int, int, tuple[int, ...]]] = {
    "x86_64": (
        0xC000003E,
        41,
        (59, 322, 101, 310, 311, 246, 175, 313, 176, 321, 298, 323, 165, 166, 155, 250, 248, 425),
    ),
    "aarch64": (
        0xC00000B7,
        198,
        (221, 281, 117, 270, 271, 104, 105, 273, 106, 280, 241, 282, 40, 39, 41, 219, 217, 425),
    ),
}


def _seccomp(libc: ctypes.CDLL, *, network: bool) -> str:
    machine = _MACHINES.get(platform.machine())
    if machine is None:
        return f"off: no filter for {platform.machine()}"
    code = _filter(*machine, network=network)
    instructions = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("@HP", len(code) // 8, ctypes.addressof(instructions))
    if libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, program, 0, 0) != 0:
        return f"off: {os.strerror(ctypes.get_errno())}"
    return "on" if not network else "on, the network is needed and left open"


def _filter(architecture: int, socket_number: int, forbidden: tuple[int, ...], *, network: bool) -> bytes:
    """A classic BPF program over struct seccomp_data: another ABI is refused, then each number, then socket(2)."""
    refuse, rows = _ERRNO | _EPERM, []
    rows.append((_LOAD, 0, 0, _AT_ARCHITECTURE))
    rows.append((_JUMP_EQUAL, 1, 0, architecture))
    rows.append((_RETURN, 0, 0, refuse))
    rows.append((_LOAD, 0, 0, _AT_NUMBER))
    rows.append((_JUMP_GREATER_OR_EQUAL, 0, 1, _X32_BIT))
    rows.append((_RETURN, 0, 0, refuse))
    for number in forbidden:
        rows.append((_JUMP_EQUAL, 0, 1, number))
        rows.append((_RETURN, 0, 0, refuse))
    if not network:
        rows.append((_JUMP_EQUAL, 0, 3, socket_number))
        rows.append((_LOAD, 0, 0, _AT_FIRST_ARGUMENT))
        rows.append((_JUMP_EQUAL, 1, 0, _AF_UNIX))
        rows.append((_RETURN, 0, 0, _ERRNO | _EAFNOSUPPORT))
    rows.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("=HBBI", *row) for row in rows)
