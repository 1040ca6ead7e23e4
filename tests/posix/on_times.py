"""Which of atime, mtime and ctime moves by what, and which times can be set."""

from __future__ import annotations

import ctypes
import mmap
import os
import stat
import time

from tests.mount.syscalls import RENAME_EXCHANGE, renameat2
from tests.posix.probe import ANN, BEN, KINDS, ROOT, TICK_S, USERS, Probe, make, opened, remove, scenario

_libc = ctypes.CDLL(None, use_errno=True)
NOW, OMIT = (1 << 30) - 1, (1 << 30) - 2


class _Timespec(ctypes.Structure):
    _fields_ = (("sec", ctypes.c_long), ("nsec", ctypes.c_long))


def utimensat(path: str, atime: tuple[int, int], mtime: tuple[int, int], *, flags: int = 0) -> None:
    """utimensat(2) with (seconds, nanoseconds)."""
    times = (_Timespec * 2)(_Timespec(*atime), _Timespec(*mtime))
    if _libc.utimensat(-100, path.encode(), times, flags):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


@scenario
def moved_by_names(p: Probe) -> None:
    os.mkdir("d")
    os.mkdir("e")
    for kind in KINDS:
        with p.times(f"make {kind}", "d"):
            make(kind, "d/it", 0o644)
        if kind != "dir":
            with p.times(f"link {kind}", "d/it", "d", "e"):
                os.link("d/it", "e/link", follow_symlinks=False)
            with p.times(f"unlink one name of {kind}", "d/it", "e"):
                os.unlink("e/link")
        with p.times(f"rename {kind} within", "d/it", "d"):
            os.rename("d/it", "d/other")
        with p.times(f"rename {kind} away", "d", "e"):
            os.rename("d/other", "e/other")
        with p.times(f"rename {kind} back", "e", "d"):
            os.rename("e/other", "d/it")
        make(kind, "e/target", 0o644)
        if kind != "dir":
            os.link("e/target", "e/spare", follow_symlinks=False)
            with p.times(f"rename {kind} over", "d", "e", "e/spare"):
                os.rename("d/it", "e/target")
            remove("e/spare")
        else:
            with p.times(f"rename {kind} over", "d", "e"):
                os.rename("d/it", "e/target")
        make(kind, "d/it", 0o644)
        with p.times(f"exchange {kind}", "d", "e"):
            renameat2(b"d/it", b"e/target", RENAME_EXCHANGE)
        with p.times(f"remove {kind}", "d"):
            remove("d/it")
        remove("e/target")
    with p.times("failing to create", "d"):
        p.do("mkdir over", lambda: os.mkdir("d"))
    with p.times("failing to remove", "."):
        p.do("unlink a directory", lambda: os.unlink("d"))


@scenario
def moved_by_attributes(p: Probe) -> None:
    for kind in KINDS:
        make(kind, "it", 0o644)
        if kind != "symlink":
            for mode in (0o600, 0o600, 0o4711):
                with p.times(f"chmod {kind} {mode:o}", "it", "."):
                    os.chmod("it", mode)
        for uid, gid in ((5, 6), (5, 6), (-1, -1), (-1, 7), (0, 0)):
            with p.times(f"chown {kind} {uid}:{gid}", "it", "."):
                os.chown("it", uid, gid, follow_symlinks=False)
        with p.times(f"utime {kind}", "it", "."):
            os.utime("it", ns=(10**18, 10**18 + 1), follow_symlinks=False)
        with p.times(f"touch {kind}", "it"):
            os.utime("it", follow_symlinks=False)
        with p.times(f"stat {kind}", "it", "."):
            os.lstat("it")
        remove("it")
    make("reg", "it", 0o600)
    with p.times("chmod refused", "it"):
        p.do("chmod", lambda: os.chmod("it", 0o777), ANN)
    with p.times("chown refused", "it"):
        p.do("chown", lambda: os.chown("it", 65534, -1), ANN)


@scenario
def moved_by_content(p: Probe) -> None:
    make("reg", "file", 0o644, b"x" * 10_000)
    fd = os.open("file", os.O_RDWR)
    for what, call in (
        ("write", lambda: os.pwrite(fd, b"new", 0)),
        ("write nothing", lambda: os.pwrite(fd, b"", 0)),
        ("fsync", lambda: os.fsync(fd)),
        ("grow", lambda: os.ftruncate(fd, 20_000)),
        ("cut", lambda: os.ftruncate(fd, 5_000)),
        ("ftruncate to the same size", lambda: os.ftruncate(fd, 5_000)),
        ("truncate to the same size", lambda: os.truncate("file", 5_000)),
        ("truncate to another size", lambda: os.truncate("file", 4_000)),
        ("open", lambda: opened("file", os.O_RDWR)),
        ("open and cut", lambda: opened("file", os.O_RDWR | os.O_TRUNC)),
        ("open and cut what is empty", lambda: opened("file", os.O_RDWR | os.O_TRUNC)),
        ("open to create", lambda: opened("file", os.O_RDWR | os.O_CREAT)),
        ("write again", lambda: os.pwrite(fd, b"new" * 1000, 0)),
        ("write past the end", lambda: os.pwrite(fd, b"new", 50_000)),
        ("mapped write", lambda: _mapped_write(fd)),
        ("read nothing", lambda: os.pread(fd, 0, 0)),
        ("flush", lambda: os.close(os.dup(fd))),
    ):
        with p.times(what, "file", "."):
            call()
    os.utime(fd, ns=(0, 0))
    with p.times("read", "file"):
        os.pread(fd, 100, 0)
    os.close(fd)
    os.mkdir("d")
    make("reg", "d/one")
    os.utime("d", ns=(0, 0))
    with p.times("list", "d"):
        os.listdir("d")
    os.symlink("file", "link")
    os.utime("link", ns=(0, 0), follow_symlinks=False)
    with p.times("readlink", "link"):
        os.readlink("link")


def _mapped_write(fd: int) -> None:
    with mmap.mmap(fd, 0) as mapped:
        mapped[5] = 65
        mapped.flush()


SET = (
    (0, 0), (1, 999_999_999), (-1, 0), (-1, 999_999_999), (-(2**31), 1), (-(2**31) - 1, 1), (2**31 - 1, 2), (2**31, 3),
    (2**32 - 1, 4), (2**32, 5), (15_032_385_535, 6), (15_032_385_536, 7), (10**11, 8), (-(10**11), 9),
)  # fmt: skip


@scenario
def times_set(p: Probe) -> None:
    for kind in KINDS:
        make(kind, "it", 0o644)
        for at in SET:
            label = f"{kind} {at}"
            p.do(f"set {label}", lambda at=at: utimensat("it", at, at, flags=0x100))  # type: ignore[misc]
            p.do(f"get {label}", lambda: (os.lstat("it").st_atime_ns, os.lstat("it").st_mtime_ns))
        p.do(f"omit atime of {kind}", lambda: utimensat("it", (0, OMIT), (5, 5), flags=0x100))
        p.do("get", lambda: os.lstat("it").st_mtime_ns)
        p.do(f"omit mtime of {kind}", lambda: utimensat("it", (6, 6), (0, OMIT), flags=0x100))
        p.do("get", lambda: (os.lstat("it").st_atime_ns, os.lstat("it").st_mtime_ns))
        with p.times(f"omit both of {kind}", "it"):
            p.do("set", lambda: utimensat("it", (0, OMIT), (0, OMIT), flags=0x100))
        p.do(f"now and omit of {kind}", lambda: utimensat("it", (0, NOW), (0, OMIT), flags=0x100))
        p.note("is now", abs(os.lstat("it").st_atime - time.time()) < 2)
        p.do(f"now and a time of {kind}", lambda: utimensat("it", (9, 9), (0, NOW), flags=0x100))
        p.note("is now", abs(os.lstat("it").st_mtime - time.time()) < 2)
        remove("it")
    make("reg", "it")
    for nsec in (-1, 10**9, 10**9 + 5, NOW - 2, NOW + 1):
        p.do(f"{nsec} ns", lambda n=nsec: utimensat("it", (1, n), (1, 1)))  # type: ignore[misc]


@scenario
def who_may_set_times(p: Probe) -> None:
    cases = {
        "both now": ((0, NOW), (0, NOW)), "both omitted": ((0, OMIT), (0, OMIT)), "both given": ((5, 0), (6, 0)),
        "now and given": ((0, NOW), (6, 0)), "now and omitted": ((0, NOW), (0, OMIT)),
        "omitted and given": ((0, OMIT), (6, 0)),
    }  # fmt: skip
    for mode in (0o644, 0o666, 0o600, 0o444, 0o000):
        for what, (atime, mtime) in cases.items():
            for user in USERS:
                make("reg", "it", mode)
                os.chown("it", 65533, 65533)
                p.do(f"{what} of {mode:o}", lambda a=atime, m=mtime: utimensat("it", a, m), user)  # type: ignore[misc]
                remove("it")


@scenario
def open_and_closed(p: Probe) -> None:
    """What was set stays, whatever the file's pages do later."""
    for how in ("set, then close", "write, set, close", "write, set, sync, close", "set, unlink another, close"):
        fd = os.open("file", os.O_RDWR | os.O_CREAT)
        if "write" in how:
            os.write(fd, b"dirty")
        os.utime(fd, ns=(3 * 10**9 + 3, 4 * 10**9 + 4))
        if "sync" in how:
            os.fsync(fd)
        os.close(fd)
        time.sleep(TICK_S)
        p.note(how, (os.stat("file").st_atime_ns, os.stat("file").st_mtime_ns))
        os.unlink("file")
    make("reg", "file")
    before = os.stat("file")
    time.sleep(TICK_S)
    with open("file", "r+b") as file:
        file.write(b"xyz")
    after = os.stat("file")
    p.note("writing moves mtime and ctime on", (after.st_mtime > before.st_mtime, after.st_ctime > before.st_ctime))
    p.note("to the same", abs(after.st_mtime_ns - after.st_ctime_ns) < 10**8)
    for user in (ROOT, ANN, BEN):
        make("reg", "own", 0o666)
        p.do("touch", lambda: os.utime("own"), user)
        p.note("is a file", stat.S_ISREG(os.stat("own").st_mode))
        remove("own")
