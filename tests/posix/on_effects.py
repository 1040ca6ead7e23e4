"""What a call does beside its answer, and where it is made: times that move, links and dots on the way, odd objects."""

from __future__ import annotations

import itertools
import os
import socket
import stat
import subprocess
import time
from collections.abc import Callable

from tests.mount.syscalls import RENAME_EXCHANGE, RENAME_NOREPLACE, renameat2
from tests.posix.on_callers import put
from tests.posix.on_times import NOW, OMIT, utimensat
from tests.posix.probe import ANN, BEN, KINDS, ROOT, TICK_S, Probe, make, opened, remove, scenario


@scenario
def times_of_calls(p: Probe) -> None:
    """Which times move of an object, its directory and another directory, when a call works and when it does not."""
    calls: dict[str, Callable[[], object]] = {
        "chmod": lambda: os.chmod("d/it", 0o640),
        "chmod to the same": lambda: os.chmod("d/it", stat.S_IMODE(os.lstat("d/it").st_mode)),
        "lchown": lambda: os.lchown("d/it", 3, 4),
        "lchown of nothing": lambda: os.lchown("d/it", -1, -1),
        "link": lambda: os.link("d/it", "e/link", follow_symlinks=False),
        "link over": lambda: os.link("d/it", "e/there", follow_symlinks=False),
        "rename": lambda: os.rename("d/it", "d/new"),
        "rename away": lambda: os.rename("d/it", "e/new"),
        "rename over": lambda: os.rename("d/it", "e/there"),
        "rename to itself": lambda: os.rename("d/it", "d/it"),
        "rename to another name of it": lambda: os.rename("d/it", "e/second"),
        "noreplace": lambda: renameat2(b"d/it", b"e/there", RENAME_NOREPLACE),
        "exchange": lambda: renameat2(b"d/it", b"e/there", RENAME_EXCHANGE),
        "unlink": lambda: os.unlink("d/it"),
        "unlink the second": lambda: os.unlink("e/second"),
        "rmdir": lambda: os.rmdir("d/it"),
        "truncate": lambda: os.truncate("d/it", 2),
        "truncate further": lambda: os.truncate("d/it", 2000),
        "mkdir over": lambda: os.mkdir("d/it"),
        "symlink over": lambda: os.symlink("x", "d/it"),
        "mkfifo over": lambda: os.mkfifo("d/it"),
        "create over": lambda: opened("d/it", os.O_CREAT | os.O_EXCL | os.O_WRONLY),
        "mkdir": lambda: os.mkdir("e/new"),
        "mkfifo": lambda: os.mkfifo("e/new"),
        "symlink": lambda: os.symlink("x", "e/new"),
        "create": lambda: opened("e/new", os.O_CREAT | os.O_EXCL | os.O_WRONLY),
        "open and cut": lambda: opened("d/it", os.O_WRONLY | os.O_TRUNC | os.O_NONBLOCK),
        "set xattr": lambda: os.setxattr("d/it", "trusted.a", b"1", follow_symlinks=False),
        "set xattr again": lambda: os.setxattr("d/it", "trusted.b", b"1", follow_symlinks=False),
        "remove xattr": lambda: os.removexattr("d/it", "trusted.b", follow_symlinks=False),
        "remove no xattr": lambda: os.removexattr("d/it", "trusted.c", follow_symlinks=False),
        "omit": lambda: utimensat("d/it", (0, OMIT), (0, OMIT), flags=0x100),
        "omit atime": lambda: utimensat("d/it", (0, OMIT), (0, NOW), flags=0x100),
        "omit mtime": lambda: utimensat("d/it", (0, NOW), (0, OMIT), flags=0x100),
    }
    for kind, (what, call) in itertools.product(KINDS, calls.items()):
        for user in (ROOT, BEN) if what in {"chmod", "lchown", "link", "rename", "unlink", "mkdir"} else (ROOT,):
            os.mkdir("d")
            os.mkdir("e")
            put(kind, "d/it", ROOT)
            put("reg", "e/there", ROOT)
            if kind != "dir":
                os.link("d/it", "e/second", follow_symlinks=False)
            os.setxattr("d/it", "trusted.b", b"0", follow_symlinks=False)
            watched = [os.open(name, os.O_PATH | os.O_NOFOLLOW) for name in ("d/it", "d", "e", "e/there")]
            before = [os.fstat(fd) for fd in watched]
            time.sleep(TICK_S)
            p.do(f"{what} {kind}", call, user)
            for name, fd, old in zip(("it", "d", "e", "there"), watched, before, strict=True):
                new = os.fstat(fd)
                moved = "m" * (old.st_mtime_ns != new.st_mtime_ns) + "c" * (old.st_ctime_ns != new.st_ctime_ns)
                p.note(f"moved of {name} by {what} {kind} by {user.name}", moved or "none")
                os.close(fd)
            remove("d")
            remove("e")


@scenario
def opens_of_special_files(p: Probe) -> None:
    for kind in ("fifo", "socket", "char", "block"):
        if kind not in KINDS:
            continue
        for flags, what in (
            (os.O_RDONLY | os.O_NONBLOCK, "read"), (os.O_WRONLY | os.O_NONBLOCK, "write"),
            (os.O_RDWR | os.O_NONBLOCK, "both"), (os.O_WRONLY | os.O_NONBLOCK | os.O_TRUNC, "cut"),
            (os.O_RDONLY | os.O_NONBLOCK | os.O_DIRECTORY, "directory"), (os.O_PATH, "path"),
            (os.O_RDONLY | os.O_NONBLOCK | os.O_CREAT, "creat"),
            (os.O_RDONLY | os.O_NONBLOCK | os.O_CREAT | os.O_EXCL, "excl"),
        ):  # fmt: skip
            for user in (ROOT, ANN, BEN):
                put(kind, "it", ANN, 0o600)
                p.do(f"{what} {kind}", lambda flags=flags: opened("it", flags, 0o600), user)  # type: ignore[misc]
                remove("it")
    os.mkfifo("fifo")
    reader = os.open("fifo", os.O_RDONLY | os.O_NONBLOCK)
    p.do("write with a reader", lambda: opened("fifo", os.O_WRONLY | os.O_NONBLOCK))
    writer = os.open("fifo", os.O_WRONLY | os.O_NONBLOCK)
    os.rename("fifo", "renamed")
    os.write(writer, b"through it")
    p.note("read", os.read(reader, 100))
    os.unlink("renamed")
    os.write(writer, b"without a name")
    p.note("read again", os.read(reader, 100))
    os.close(writer)
    p.note("end", os.read(reader, 100))
    os.close(reader)
    with socket.socket(socket.AF_UNIX) as server:
        p.do("bind", lambda: server.bind("socket"))
        server.listen()
        with socket.socket(socket.AF_UNIX) as client:
            p.do("connect", lambda: client.connect("socket"))
        os.chmod("socket", 0o600)
        with socket.socket(socket.AF_UNIX) as client:
            p.do("connect to root's", lambda: client.connect("socket"), ANN)
        os.link("socket", "linked")
        with socket.socket(socket.AF_UNIX) as client:
            p.do("connect to its other name", lambda: client.connect("linked"))
    p.state("socket")
    with socket.socket(socket.AF_UNIX) as client:
        p.do("connect to nobody", lambda: client.connect("socket"))
    with socket.socket(socket.AF_UNIX) as again:
        p.do("bind to what is there", lambda: again.bind("socket"))


@scenario
def symlinks_in_the_way(p: Probe) -> None:
    os.mkdir("real")
    targets = {
        "nothing": "none", "in no directory": "none/it", "in a directory": "real/it", "with a slash": "none/",
        "to a directory": "real", "to a directory with a slash": "real/", "absolute": "/proc/self/none",
        "itself": "link", "dot": ".", "dot dot": "..",
    }  # fmt: skip
    calls: dict[str, Callable[[str], object]] = {
        "creat": lambda n: opened(n, os.O_CREAT | os.O_WRONLY, 0o644),
        "excl": lambda n: opened(n, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644),
        "nofollow": lambda n: opened(n, os.O_CREAT | os.O_NOFOLLOW | os.O_WRONLY, 0o644),
        "directory": lambda n: opened(n, os.O_DIRECTORY | os.O_RDONLY),
        "creat directory": lambda n: opened(n, os.O_CREAT | os.O_DIRECTORY | os.O_RDONLY),
        "cut": lambda n: os.truncate(n, 0),
        "mkdir": os.mkdir,
        "mkfifo": os.mkfifo,
        "rmdir": os.rmdir,
        "unlink": os.unlink,
        "rename from": lambda n: os.rename(n, "moved"),
        "rename to": lambda n: os.rename("source", n),
        "rename a directory to": lambda n: os.rename("sourcedir", n),
        "link from": lambda n: os.link(n, "linked", follow_symlinks=False),
        "link from what it leads to": lambda n: os.link(n, "linked", follow_symlinks=True),
        "link to": lambda n: os.link("source", n),
        "symlink": lambda n: os.symlink("x", n),
        "readlink": os.readlink,
        "chmod": lambda n: os.chmod(n, 0o711),
        "lchown": lambda n: os.lchown(n, 1, 1),
        "utime": lambda n: os.utime(n, ns=(1, 1)),
        "setxattr": lambda n: os.setxattr(n, "user.a", b"1"),
    }
    for (target, to), (what, call), suffix in itertools.product(targets.items(), calls.items(), ("", "/", "/.")):
        for name in ("source", "sourcedir", "moved", "linked", "none", "link", "real"):
            remove(name)
        os.mkdir("real")
        make("reg", "source")
        os.mkdir("sourcedir")
        os.symlink(to, "link")
        p.do(f"{what} link{suffix} {target}", lambda call=call, s=suffix: call(f"link{s}"))  # type: ignore[misc]
        p.note("there is", sorted(os.listdir(".")))


@scenario
def dots(p: Probe) -> None:
    calls: dict[str, Callable[[str], object]] = {
        "rename from": lambda n: os.rename(n, "moved"),
        "rename to": lambda n: os.rename("d", n),
        "rename a file to": lambda n: os.rename("file", n),
        "exchange": lambda n: renameat2(n.encode(), b"d", RENAME_EXCHANGE),
        "noreplace": lambda n: renameat2(n.encode(), b"moved", RENAME_NOREPLACE),
        "rmdir": os.rmdir,
        "unlink": os.unlink,
        "mkdir": os.mkdir,
        "mknod": lambda n: os.mknod(n, stat.S_IFIFO | 0o600),
        "link to": lambda n: os.link("file", n),
        "link from": lambda n: os.link(n, "linked"),
        "symlink": lambda n: os.symlink("x", n),
        "truncate": lambda n: os.truncate(n, 0),
        "creat": lambda n: opened(n, os.O_CREAT | os.O_WRONLY),
        "chmod": lambda n: os.chmod(n, 0o755),
        "utime": lambda n: os.utime(n, ns=(1, 1)),
    }
    paths = (
        ".", "..", "d/.", "d/..", "d/sub/..", "d/../d", "d/sub/../../d", "d//sub", "./d/./sub/.", "d/sub/",
        "d//", "file/.", "file/..", "file/", "none/.", "none/..", "none/",
    )  # fmt: skip
    for (what, call), path in itertools.product(calls.items(), paths):
        os.mkdir("work")
        os.chmod("work", 0o755)
        os.makedirs("work/d/sub")
        make("reg", "work/file")
        os.chdir("work")
        p.do(f"{what} {path}", lambda call=call, path=path: call(path))  # type: ignore[misc]
        p.note("there is", sorted(os.listdir(".")))
        os.chdir("..")
        remove("work")


@scenario
def cutting(p: Probe) -> None:
    with open("/bin/sleep", "rb") as real, open("program", "wb") as copy:
        copy.write(real.read())
    os.chmod("program", 0o755)
    running = subprocess.Popen(["./program", "30"])
    try:
        for size in (0, 10, 10**6):
            p.do(f"truncate a running program to {size}", lambda size=size: os.truncate("program", size))  # type: ignore[misc]
        p.do("open it to write", lambda: opened("program", os.O_RDWR))
        p.do("rename it", lambda: os.rename("program", "other"))
        p.do("open it to write by another name", lambda: opened("other", os.O_RDWR))
        p.do("chmod it", lambda: os.chmod("other", 0o700))
        p.do("replace it", lambda: os.rename("other", "program"))
    finally:
        running.kill()
        running.wait()
    for kind, user in itertools.product((*KINDS, "nothing", "full dir"), (ROOT, ANN)):
        put(kind, "it", ROOT)
        p.do(f"truncate {kind}", lambda: os.truncate("it", 5), user)
        p.do(f"truncate {kind} to less than nothing", lambda: os.truncate("it", -1), user)
        p.do(f"truncate {kind}/", lambda: os.truncate("it/", 5), user)
        remove("it")


@scenario
def longest_names(p: Probe) -> None:
    """255 bytes in every place a name can have, and a path of 4095."""
    long, other = "n" * 255, "m" * 255
    for kind in KINDS:
        make(kind, long, 0o755)
        p.do(f"rename {kind}", lambda: os.rename(long, other))
        if kind != "dir":
            p.do(f"link {kind}", lambda: os.link(other, long, follow_symlinks=False))
            p.do(f"unlink {kind}", lambda: os.unlink(long))
        p.do(f"exchange {kind}", lambda: _exchanged(other, long))
        p.state(other)
        p.note("names", [len(name) for name in sorted(os.listdir("."))])
        remove(other)
        remove(long)
        p.do(f"rename {kind} to one more", lambda kind=kind: _renamed(kind, "n" * 256))  # type: ignore[misc]
        remove("short")
    deep = "/".join(["d" * 255] * 15)
    os.makedirs(deep)
    path = f"{deep}/{'f' * (4095 - len(deep) - 1)}"
    p.note("length", len(path))
    p.do("create", lambda: opened(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    p.do("rename", lambda: os.rename(path, "short"))
    p.do("rename back", lambda: os.rename("short", path))
    p.do("symlink to it", lambda: os.symlink(path, "link"))
    p.do("through it", lambda: opened("link", os.O_RDWR))
    p.do("one more", lambda: os.stat(path + "f"))
    p.do("unlink", lambda: os.unlink(path))
    p.do("mkdir", lambda: os.mkdir(path))
    p.do("rmdir", lambda: os.rmdir(path))


def _exchanged(one: str, other: str) -> None:
    make("reg", other)
    renameat2(one.encode(), other.encode(), RENAME_EXCHANGE)
    renameat2(one.encode(), other.encode(), RENAME_EXCHANGE)


def _renamed(kind: str, to: str) -> None:
    make(kind, "short")
    os.rename("short", to)
