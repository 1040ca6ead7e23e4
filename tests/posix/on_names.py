"""Names and paths: how long, what they end in, what they lead through; links and renames of every kind of object."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests.mount.syscalls import RENAME_EXCHANGE, RENAME_NOREPLACE, renameat2
from tests.posix.probe import ANN, KINDS, Probe, make, opened, remove, scenario

# What may be asked of a path, each cheap and without lasting effect when it fails.
ASKED: dict[str, Callable[[str], object]] = {
    "open": lambda path: opened(path, os.O_RDONLY | os.O_NONBLOCK),
    "create": lambda path: opened(path, os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK, 0o644),
    "create excl": lambda path: opened(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644),
    "mkdir": lambda path: os.mkdir(path, 0o755),
    "mkfifo": lambda path: os.mkfifo(path, 0o644),
    "mknod": lambda path: os.mknod(path, 0o644 | stat.S_IFCHR, os.makedev(1, 2)),
    "symlink": lambda path: os.symlink("target", path),
    "link to": lambda path: os.link("source", path),
    "link from": lambda path: os.link(path, "linked", follow_symlinks=False),
    "rename to": lambda path: os.rename("source", path),
    "rename from": lambda path: os.rename(path, "renamed"),
    "rename dir to": lambda path: os.rename("sourcedir", path),
    "unlink": os.unlink,
    "rmdir": os.rmdir,
    "chmod": lambda path: os.chmod(path, 0o700),
    "chown": lambda path: os.chown(path, 1, 1),
    "lchown": lambda path: os.lchown(path, 1, 1),
    "truncate": lambda path: os.truncate(path, 3),
    "utime": lambda path: os.utime(path, ns=(5, 6)),
    "lutime": lambda path: os.utime(path, ns=(5, 6), follow_symlinks=False),
    "readlink": os.readlink,
    "stat": lambda path: str(stat.S_IFMT(os.stat(path).st_mode)),
    "listdir": lambda path: len(os.listdir(path)),
    "chdir": lambda path: os.close(os.open(path, os.O_PATH | os.O_DIRECTORY)),
}


def _ask_all(p: Probe, what: str, path: str, prepare: Callable[[], None]) -> None:
    for verb, ask in ASKED.items():
        for name in ("source", "sourcedir", "linked", "renamed"):
            remove(name)
        make("reg", "source")
        make("dir", "sourcedir", 0o755)
        prepare()
        p.do(f"{verb} {what}", lambda ask=ask: ask(path))  # type: ignore[misc]


@scenario
def every_call_on_every_kind(p: Probe) -> None:
    for kind in KINDS:

        def fresh(kind: str = kind) -> None:
            remove("it")
            make(kind, "it", 0o755)

        for suffix in ("", "/", "/.", "/..", "/below", "/below/deeper"):
            _ask_all(p, f"{kind}{suffix}", f"it{suffix}", fresh)


@scenario
def links_to_every_kind(p: Probe) -> None:
    for kind in (*KINDS, "nothing", "itself"):

        def fresh(kind: str = kind) -> None:
            remove("it")
            remove("real")
            if kind not in {"nothing", "itself"}:
                make(kind, "real", 0o755)
            os.symlink("it" if kind == "itself" else "real", "it")

        for suffix in ("", "/", "/below"):
            _ask_all(p, f"symlink to {kind}{suffix}", f"it{suffix}", fresh)


@scenario
def lengths(p: Probe) -> None:
    def clear(path: str) -> None:
        if len(path) < 4096:
            remove(path)

    for length in (1, 174, 175, 176, 177, 254, 255, 256, 300):
        path = "x" * length
        _ask_all(p, f"name of {length}", path, lambda path=path: clear(path[:255]))  # type: ignore[misc]
        remove(path[:255])
    for path in ("\u20ac" * 85, "\u20ac" * 85 + "a"):
        _ask_all(p, f"name of {len(path.encode())} in 3-byte letters", path, lambda: None)
        if len(path.encode()) < 256:
            remove(path)
    for length in (1, 59, 60, 61, 255, 256, 1023, 1024, 4000, 4094, 4095, 4096):
        name = p.name("target")
        if p.do(f"symlink to {length}", lambda n=length, name=name: os.symlink("t" * n, name)):  # type: ignore[misc]
            p.note(f"readlink {length}", os.readlink(name) == "t" * length)
            p.state(name)


@scenario
def path_lengths(p: Probe) -> None:
    def clear(path: str) -> None:
        if len(path) < 4096:
            remove(path)

    below = "/".join(["d" * 200] * 20)
    os.makedirs(below)
    for length in (4094, 4095, 4096, 4097):
        path = below + "/" + "y" * 10
        path = "./" * ((length - len(path)) // 2) + path
        path = path + "z" * (length - len(path))
        _ask_all(p, f"path of {length}", path, lambda path=path: clear(path))  # type: ignore[misc]
        clear(path)
    for verb, ask in ASKED.items():
        p.do(f"{verb} empty path", lambda ask=ask: ask(""))  # type: ignore[misc]


@scenario
def odd_names(p: Probe) -> None:
    for name in (b"\xff\xfe", b"\n", b"a b", b" ", b"-", b"*", b"...", b".hidden", b"\\", b"\x01", b".dir", b"volume"):
        p.do(f"create {name!r}", lambda n=name: opened(n, os.O_CREAT | os.O_EXCL | os.O_WRONLY))  # type: ignore[misc]
        p.note(f"list {name!r}", os.listdir(b".") == [name])
        os.unlink(name)
    p.do("symlink to nothing", lambda: os.symlink("", "empty"))
    for path in (".", "..", "./", "../.", "nothing/..", "nothing/."):
        for verb in ("mkdir", "rmdir", "unlink", "create excl", "symlink", "rename from", "rename to", "link to"):
            remove("source")
            make("reg", "source")
            p.do(f"{verb} {path}", lambda verb=verb, path=path: ASKED[verb](path))  # type: ignore[misc]


@scenario
def loops(p: Probe) -> None:
    os.symlink("b", "a")
    os.symlink("a", "b")
    _ask_all(p, "loop/x", "a/x", lambda: None)
    make("dir", "end0", 0o755)
    for number in range(1, 43):
        os.symlink(f"end{number - 1}", f"end{number}")
    for number in (39, 40, 41, 42):
        p.do(f"{number} symlinks", lambda n=number: len(os.listdir(f"end{n}")))  # type: ignore[misc]


@scenario
def renames_over_every_kind(p: Probe) -> None:
    olds = (*KINDS, "full dir")
    news = (*KINDS, "full dir", "nothing", "link to it")
    for old, new, how in itertools.product(olds, news, ("plain", "noreplace", "exchange")):
        for name in ("old", "new"):
            remove(name)
        for kind, name in ((old, "old"), (new, "new")):
            if kind == "full dir":
                make("dir", name, 0o755)
                make("reg", f"{name}/in {name}")
            elif kind in KINDS:
                make(kind, name, 0o755 if kind == "dir" else 0o600 if name == "old" else 0o640)
        if new == "link to it":
            if "dir" in old:
                continue
            os.link("old", "new", follow_symlinks=False)
        flags = {"plain": 0, "noreplace": RENAME_NOREPLACE, "exchange": RENAME_EXCHANGE}[how]
        label = f"{how} {old} over {new}"
        p.do(label, lambda flags=flags: renameat2(b"old", b"new", flags))  # type: ignore[misc]
        p.state("old", f"old after {label}")
        p.state("new", f"new after {label}")


@scenario
def renames_of_open_files(p: Probe) -> None:
    for how in ("rename over", "unlink"):
        make("reg", "victim", 0o644, b"the victim")
        make("reg", "other")
        fd = os.open("victim", os.O_RDWR)
        with p.times(how, fd):
            if how == "unlink":
                os.unlink("victim")
            else:
                os.rename("other", "victim")
        _use_unlinked(p, how, fd)
        os.close(fd)
        remove("victim")
        remove("other")
    os.mkdir("gone")
    fd = os.open("gone", os.O_RDONLY | os.O_DIRECTORY)
    os.rmdir("gone")
    p.do("fstat of a removed directory", lambda: os.fstat(fd).st_nlink)
    p.do("list it", lambda: os.listdir(fd))
    p.do("create in it", lambda: os.close(os.open("x", os.O_CREAT | os.O_WRONLY, dir_fd=fd)))
    p.do("mkdir in it", lambda: os.mkdir("x", dir_fd=fd))
    p.do("stat in it", lambda: os.stat("x", dir_fd=fd))
    p.do("stat ..", lambda: os.stat("..", dir_fd=fd).st_nlink > 0)
    p.do("chmod it", lambda: os.fchmod(fd, 0o700))
    p.do("chown it", lambda: os.fchown(fd, 1, 2))
    p.do("utime it", lambda: os.utime(fd, ns=(7, 8)))
    p.do("its mode", lambda: oct(os.fstat(fd).st_mode))
    p.do("fsync it", lambda: os.fsync(fd))
    os.close(fd)


def _use_unlinked(p: Probe, how: str, fd: int) -> None:
    p.note(f"links after {how}", os.fstat(fd).st_nlink)
    p.do(f"read after {how}", lambda: os.pread(fd, 100, 0))
    p.do(f"write after {how}", lambda: os.pwrite(fd, b"more", 20))
    p.do(f"size after {how}", lambda: os.fstat(fd).st_size)
    p.do(f"ftruncate after {how}", lambda: os.ftruncate(fd, 100_000))
    p.do(f"fchmod after {how}", lambda: os.fchmod(fd, 0o6711))
    p.do(f"fchown after {how}", lambda: os.fchown(fd, 12, 13))
    p.do(f"futimens after {how}", lambda: os.utime(fd, ns=(10**9, 2 * 10**9)))
    p.do(f"fsync after {how}", lambda: os.fsync(fd))
    p.do(f"state after {how}", lambda: f"{os.fstat(fd).st_mode:o} {os.fstat(fd).st_uid} {os.fstat(fd).st_mtime_ns}")
    p.do(f"link {how} by descriptor", lambda: os.link(f"/proc/self/fd/{fd}", "back"))
    again = f"/proc/self/fd/{fd}"
    p.do(f"open again after {how}", lambda: opened(again, os.O_RDWR))
    p.do(f"open again and cut after {how}", lambda: opened(again, os.O_RDWR | os.O_TRUNC))
    p.do(f"size in the end after {how}", lambda: os.fstat(fd).st_size)


@scenario
def hard_links(p: Probe) -> None:
    for kind in KINDS:
        make(kind, "it", 0o755 if kind == "dir" else 0o644, b"")
        with p.times(f"link {kind}", "it", "."):
            p.do(f"link {kind}", lambda: os.link("it", "more", follow_symlinks=False))
        p.state("it", f"{kind} linked")
        p.state("more", f"{kind} linked")
        if kind not in {"dir", "symlink"}:
            p.do(f"chmod one {kind}", lambda: os.chmod("more", 0o600))
            p.state("it", f"{kind}, the other one's mode changed")
            p.do(f"chown one {kind}", lambda: os.chown("more", 65534, 65533))
            p.state("it", f"{kind}, the other one's owner changed")
        remove("it")
        p.state("more", f"{kind} that is left")
        remove("more")
    make("reg", "empty", 0o644, b"")
    os.link("empty", "second")
    with open("second", "wb") as file:
        file.write(b"by the second name")
    p.note("content by the first", open("empty", "rb").read())  # noqa: SIM115
    os.mkdir("sub")
    os.rename("second", "sub/third")
    p.note("content after a rename", open("sub/third", "rb").read())  # noqa: SIM115
    p.state("empty")
    os.chmod("empty", 0o600)
    p.do("link another's private file", lambda: os.link("empty", "anns"), ANN)


@scenario
def link_maximum(p: Probe) -> None:
    for number in range(200):
        os.mkdir(f"d{number}")
    p.note("links of a directory with 200", os.stat(".").st_nlink)
    os.rename("d1", "d0/moved")
    p.note("after moving one away", (os.stat(".").st_nlink, os.stat("d0").st_nlink))
    renameat2(b"d2", b"d0/moved", RENAME_EXCHANGE)
    p.note("after an exchange", (os.stat(".").st_nlink, os.stat("d0").st_nlink))
    make("reg", "file")
    renameat2(b"file", b"d0/moved", RENAME_EXCHANGE)
    p.note("after an exchange with a file", (os.stat(".").st_nlink, os.stat("d0").st_nlink))
    os.rmdir("d5")
    p.note("after rmdir", os.stat(".").st_nlink)


@scenario
def link_limit(p: Probe) -> None:
    """EMLINK comes from below (65,000 names on ext4), and nothing is lost by it."""
    make("reg", "file", 0o644, b"of many names")
    os.mkdir("d")
    made = 1
    while made < 70_000 and _linked("file", f"d/{made}"):
        made += 1
    p.note("links", (made, os.stat("file").st_nlink))
    p.do("one more link", lambda: os.link("file", "more"))
    p.do("one more link elsewhere", lambda: os.link("d/7", "d/more"))
    p.state("file")
    p.do("rename of a name", lambda: os.rename("d/7", "seventh"))
    p.do("rename over a name", lambda: os.rename("d/8", "d/9"))
    p.do("unlink", lambda: os.unlink("d/10"))
    p.do("a link again", lambda: os.link("seventh", "d/10"))
    p.do("and no more", lambda: os.link("seventh", "d/another"))
    p.note("content", Path("d/10").read_bytes())
    p.note("names", len(os.listdir("d")))


def _linked(old: str, new: str) -> bool:
    try:
        os.link(old, new)
    except OSError as error:
        if error.errno != errno.EMLINK:
            raise
        return False
    return True


@scenario
def across_file_systems(p: Probe) -> None:
    """To and from a file system that is neither the mount nor the one below."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as other:
        for kind in (*KINDS, "nothing"):
            for what, here, there in (("out", "it", f"{other}/to"), ("in", f"{other}/from", "to")):
                remove(here)
                remove(there)
                if kind != "nothing":
                    make(kind, here, 0o755 if kind == "dir" else 0o644)
                for how, flags in (("rename", 0), ("noreplace", RENAME_NOREPLACE), ("exchange", RENAME_EXCHANGE)):
                    p.do(f"{how} {kind} {what}", lambda f=flags, a=here, b=there: renameat2(a.encode(), b.encode(), f))  # type: ignore[misc]
                p.do(f"link {kind} {what}", lambda a=here, b=there: os.link(a, b, follow_symlinks=False))  # type: ignore[misc]
                make("reg", there)
                p.do(f"rename {kind} {what} over a file", lambda a=here, b=there: os.rename(a, b))  # type: ignore[misc]
                remove(here)
                remove(there)
        make("reg", "file", 0o644, b"content " * 2000)
        with open("file", "rb") as source, open(f"{other}/copy", "w+b") as copy:
            p.do("copy_file_range", lambda: os.copy_file_range(source.fileno(), copy.fileno(), 10_000))
            p.do("sendfile", lambda: os.sendfile(copy.fileno(), source.fileno(), 0, 10_000))
            p.do("FICLONE", lambda: fcntl.ioctl(copy.fileno(), 0x40049409, source.fileno()))
        p.state("file")


@scenario
def subdirectories_of_themselves(p: Probe) -> None:
    os.makedirs("a/b/c")
    for new in ("a/x", "a/b", "a/b/x", "a/b/c", "a/b/c/x"):
        for flags in (0, RENAME_NOREPLACE, RENAME_EXCHANGE):
            code = 0
            try:
                renameat2(b"a", new.encode(), flags)
            except OSError as error:
                code = error.errno or 0
            p.note(f"rename a to {new} with {flags}", errno.errorcode.get(code, "ok"))
    p.do("rename a/b to a", lambda: os.rename("a/b", "a"))
    p.do("exchange a/b with a", lambda: renameat2(b"a/b", b"a", RENAME_EXCHANGE))
    for flags in (3, 4, 5, 6, 8, 128):
        p.do(f"rename with flags {flags}", lambda flags=flags: renameat2(b"a/b", b"free", flags))  # type: ignore[misc]
    p.do("rename to the same name", lambda: os.rename("a", "a"))
    p.do("rename to the same name without replacing", lambda: renameat2(b"a", b"a", RENAME_NOREPLACE))
