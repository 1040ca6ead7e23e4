"""`python -m tests.posix.on_read_only DIR`: what nobody may do in DIR/work, which `prepare` made."""

from __future__ import annotations

import fcntl
import mmap
import os
import stat
import sys
from collections.abc import Callable

from tests.mount.syscalls import RENAME_EXCHANGE, RENAME_NOREPLACE, renameat2
from tests.posix.on_names import ASKED
from tests.posix.on_times import NOW, OMIT, utimensat
from tests.posix.probe import ANN, KINDS, ROOT, Probe, make, opened, shown

_OF_OPEN: dict[str, Callable[[int], object]] = {
    "write": lambda fd: os.write(fd, b"x"),
    "ftruncate": lambda fd: os.ftruncate(fd, 0),
    "fchmod": lambda fd: os.fchmod(fd, 0o600),
    "fchown": lambda fd: os.fchown(fd, 1, 1),
    "fchown of nothing": lambda fd: os.fchown(fd, -1, -1),
    "futimens": lambda fd: os.utime(fd, ns=(1, 2)),
    "fsetxattr": lambda fd: os.setxattr(fd, "user.b", b"2"),
    "fremovexattr": lambda fd: os.removexattr(fd, "user.a"),
    "fgetxattr": lambda fd: os.getxattr(fd, "user.a"),
    "fsync": os.fsync,
    "fdatasync": os.fdatasync,
    "flock": lambda fd: fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB),
    "posix_fallocate": lambda fd: os.posix_fallocate(fd, 0, 100),
    "read": lambda fd: os.pread(fd, 100, 0),
    "map to write": lambda fd: mmap.mmap(fd, 0).close(),
    "map to read": lambda fd: mmap.mmap(fd, 0, prot=mmap.PROT_READ).close(),
}
_MORE: dict[str, Callable[[str], object]] = {
    "open to write": lambda path: opened(path, os.O_WRONLY | os.O_NONBLOCK),
    "open to read and write": lambda path: opened(path, os.O_RDWR | os.O_NONBLOCK),
    "open and cut": lambda path: opened(path, os.O_RDONLY | os.O_TRUNC | os.O_NONBLOCK),
    "open to append": lambda path: opened(path, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK),
    "open without atime": lambda path: opened(path, os.O_RDONLY | os.O_NOATIME | os.O_NONBLOCK),
    "tmpfile": lambda path: opened(path, os.O_RDWR | os.O_TMPFILE),
    "access": lambda path: os.access(path, os.W_OK, effective_ids=True),
    "rename over": lambda path: os.rename(path, "source"),
    "rename without replacing": lambda path: renameat2(path.encode(), b"free", RENAME_NOREPLACE),
    "exchange": lambda path: renameat2(path.encode(), b"source", RENAME_EXCHANGE),
    "rename to itself": lambda path: os.rename(path, path),
    "rename in": lambda path: os.rename(path, "sourcedir/in"),
    "link to itself": lambda path: os.link(path, path, follow_symlinks=False),
    "setxattr": lambda path: os.setxattr(path, "user.b", b"2", follow_symlinks=False),
    "replace xattr": lambda path: os.setxattr(path, "trusted.a", b"2", os.XATTR_REPLACE, follow_symlinks=False),
    "removexattr": lambda path: os.removexattr(path, "user.a", follow_symlinks=False),
    "remove another xattr": lambda path: os.removexattr(path, "user.none", follow_symlinks=False),
    "listxattr": lambda path: sorted(os.listxattr(path, follow_symlinks=False)),
    "touch": lambda path: utimensat(path, (0, NOW), (0, NOW)),
    "set no time": lambda path: utimensat(path, (0, OMIT), (0, OMIT)),
}


def prepare() -> None:
    """One of each kind, and some more, in `work`."""
    os.mkdir("work")
    os.chmod("work", 0o777)
    os.chdir("work")
    for kind in KINDS:
        make(kind, kind, 0o755 if kind == "dir" else 0o644)
        os.chown(kind, ANN.uid, ANN.gid, follow_symlinks=False)
        os.setxattr(kind, "trusted.a", b"1", follow_symlinks=False)
        if kind in {"reg", "dir"}:
            os.setxattr(kind, "user.a", b"1")
    make("dir", "sourcedir", 0o755)
    make("dir", "full", 0o777)
    for name in ("source", "linked", "renamed", "full/file"):
        make("reg", name, 0o666)
    os.symlink("reg", "to reg")
    os.symlink("nothing", "dangling")


def main(words: list[str]) -> None:
    os.umask(0)
    os.chdir(words[0] + "/work")
    p = Probe("read_only")
    names = (*KINDS, "nothing", "full", "full/file", "full/nothing", "to reg", "dangling", "reg/below", ".", "full/..")
    for user in (ROOT, ANN):
        for path in names:
            for verb, ask in (ASKED | _MORE).items():
                # A device cannot be opened at will, and a fifo waits for its other end.
                p.do(f"{verb} {path}", lambda ask=ask, path=path: ask(path), user)  # type: ignore[misc]
        for flags in (os.O_RDONLY, os.O_PATH):
            for name in ("reg", "full"):
                fd = os.open(name, flags)
                for verb, call in _OF_OPEN.items():
                    p.do(f"{verb} of {name}, open {flags:o}", lambda call=call, fd=fd: call(fd), user)  # type: ignore[misc]
                os.close(fd)
    for name in sorted(os.listdir(".")):
        p.note(f"{name} in the end", shown(os.lstat(name)))
        p.note("is a file", stat.S_ISREG(os.lstat(name).st_mode))
    sys.stdout.write("".join(f"{line!r}\n" for line in p.lines))


if __name__ == "__main__":
    main(sys.argv[1:])
