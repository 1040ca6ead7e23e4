"""What comes of a call depends on who makes it: sticky directories, set-id bits, devices, times, as pjdfstest asks."""

from __future__ import annotations

import itertools
import os
import stat
from collections.abc import Callable

from tests.mount.syscalls import RENAME_EXCHANGE, renameat2
from tests.posix.on_times import NOW, OMIT, utimensat
from tests.posix.probe import ANN, ANN_IN_BENS, BEN, ROOT, USERS, Probe, User, make, opened, remove, scenario

_OWNERS = (ROOT, ANN, BEN)


def put(kind: str, name: str, owner: User, mode: int = 0o644) -> None:
    if kind == "nothing":
        return
    make("dir" if kind == "full dir" else kind, name, mode | 0o111 * ("dir" in kind))
    if kind == "full dir":
        make("reg", f"{name}/in it")
    os.chown(name, owner.uid, owner.gid, follow_symlinks=False)


@scenario
def sticky_directories(p: Probe) -> None:
    """Renames in and between them, by who owns what; exchanges, and directories moved to another parent."""
    for above, to, own, other in itertools.product(_OWNERS, _OWNERS, (ANN, BEN), (ANN, BEN)):
        for kind, flags in itertools.product(("reg", "dir"), (0, RENAME_EXCHANGE)):
            for name, owner in (("from", above), ("to", to)):
                os.mkdir(name)
                os.chown(name, owner.uid, owner.gid)
                os.chmod(name, 0o1777)
            put(kind, "from/it", own, 0o755)
            put(kind, "to/it", other, 0o755)
            label = f"{kind} of {own.name} in {above.name}'s, over {other.name}'s in {to.name}'s, {flags}"
            p.do(label, lambda flags=flags: renameat2(b"from/it", b"to/it", flags), ANN)  # type: ignore[misc]
            p.do(f"rmdir or unlink after {label}", lambda: _take_away("to/it"), BEN)
            remove("from")
            remove("to")


def _take_away(name: str) -> None:
    if stat.S_ISDIR(os.lstat(name).st_mode):
        os.rmdir(name)
    else:
        os.unlink(name)


@scenario
def directories_given_another_parent(p: Probe) -> None:
    """A directory moved elsewhere gets another "..": who moves it must be allowed to write to it."""
    for mode, own, user in itertools.product((0o755, 0o555, 0o777, 0o1777), _OWNERS, (ANN, ANN_IN_BENS)):
        for name in ("from", "to"):
            os.mkdir(name)
            os.chmod(name, 0o777)
        os.mkdir("from/d")
        os.chown("from/d", own.uid, own.gid)
        os.chmod("from/d", mode)
        p.do(f"{own.name}'s {mode:o} within", lambda: os.rename("from/d", "from/e"), user)
        p.do(f"{own.name}'s {mode:o} elsewhere", lambda: os.rename("from/e", "to/e"), user)
        p.do(f"{own.name}'s {mode:o} exchanged", lambda: renameat2(b"from", b"to", RENAME_EXCHANGE), user)
        for name in ("from", "to"):
            remove(name)


_BITS = (0o777, 0o4777, 0o2777, 0o6777, 0o6711, 0o2755, 0o2745, 0o2766, 0o4644, 0o2644, 0o6666, 0o7644)


@scenario
def chown_of_set_id(p: Probe) -> None:
    """By root and by the owner, of everything: which bits go."""
    to = {"own uid": (65534, -1), "own group": (-1, 65534), "a group of its": (-1, 65533), "nothing": (-1, -1)}
    for kind, mode, (what, (uid, gid)) in itertools.product(("reg", "dir", "fifo", "symlink"), _BITS, to.items()):
        for user in (ROOT, ANN_IN_BENS, BEN):
            put(kind, "it", ANN)
            if kind != "symlink":
                os.chmod("it", mode)
            label = f"{kind} {mode:o} to {what}"
            p.do(label, lambda uid=uid, gid=gid: os.chown("it", uid, gid, follow_symlinks=False), user)  # type: ignore[misc]
            p.state("it", f"it after {label} by {user.name}")
            remove("it")


@scenario
def chmod_of_set_group_id(p: Probe) -> None:
    """An owner that is in the file's group keeps the bit, another one does not; sticky is for directories."""
    for kind, mode, group in itertools.product(("reg", "dir", "fifo"), _BITS, (65534, 65533, 65531)):
        for user in (ROOT, ANN, ANN_IN_BENS):
            put(kind, "it", ANN)
            os.chown("it", 65534, group)
            p.do(f"chmod {kind} of {group} to {mode:o}", lambda mode=mode: os.chmod("it", mode), user)  # type: ignore[misc]
            p.state("it", f"it after that by {user.name}")
            remove("it")


@scenario
def written_set_id(p: Probe) -> None:
    """What root and others take from a file by writing, cutting and mapping it."""
    ways: dict[str, Callable[[], object]] = {
        "write": lambda: _with("file", os.O_WRONLY, lambda fd: os.write(fd, b"x")),
        "writev to append": lambda: _with("file", os.O_WRONLY | os.O_APPEND, lambda fd: os.writev(fd, [b"x", b"y"])),
        "cut": lambda: os.truncate("file", 0),
        "grow": lambda: os.truncate("file", 100),
        "same size": lambda: os.truncate("file", 7),
        "open and cut": lambda: opened("file", os.O_WRONLY | os.O_TRUNC),
        "creat": lambda: opened("file", os.O_WRONLY | os.O_TRUNC | os.O_CREAT, 0o644),
        "direct": lambda: _with("file", os.O_WRONLY | os.O_SYNC, lambda fd: os.pwrite(fd, b"x", 3)),
    }
    for (what, way), mode, user in itertools.product(ways.items(), _BITS, (ROOT, ANN, ANN_IN_BENS, BEN)):
        put("reg", "file", ANN)
        os.chown("file", 65534, 65533)
        os.chmod("file", mode)
        p.do(f"{what} {mode:o}", way, user)
        p.state("file", f"file after {what} {mode:o} by {user.name}")
        remove("file")


def _with(name: str, flags: int, call: Callable[[int], object]) -> None:
    fd = os.open(name, flags)
    try:
        call(fd)
    finally:
        os.close(fd)


@scenario
def nodes_by_everybody(p: Probe) -> None:
    kinds = {
        "none": 0, "regular": stat.S_IFREG, "fifo": stat.S_IFIFO, "char": stat.S_IFCHR, "block": stat.S_IFBLK,
        "socket": stat.S_IFSOCK, "directory": stat.S_IFDIR, "symlink": stat.S_IFLNK, "no kind": 0o030000,
    }  # fmt: skip
    for (kind, bits), mode, user in itertools.product(kinds.items(), (0o644, 0o6777, 0o1000), USERS):
        for device in (0, os.makedev(1, 3), os.makedev(0xFFF, 0xFFFFF)):
            os.mkdir("d")
            os.chmod("d", 0o777)
            label = f"{kind} {mode:o} {device:x}"
            p.do(label, lambda b=bits | mode, d=device: os.mknod("d/it", b, d), user)  # type: ignore[misc]
            p.state("d/it", f"it after {label}")
            remove("d")


@scenario
def times_by_everybody(p: Probe) -> None:
    values = {"now": (0, NOW), "omit": (0, OMIT), "given": (7, 0)}
    for kind, mode, own, user in itertools.product(
        ("reg", "dir", "fifo"), (0o644, 0o666, 0o622, 0o444), _OWNERS, USERS
    ):
        for (what_a, atime), (what_m, mtime) in itertools.product(values.items(), values.items()):
            put(kind, "it", own)
            os.chmod("it", mode)
            p.do(
                f"{what_a} and {what_m} of {own.name}'s {kind} {mode:o}",
                lambda a=atime, m=mtime: utimensat("it", a, m), user,  # type: ignore[misc]
            )  # fmt: skip
            remove("it")
