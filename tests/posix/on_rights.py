"""Who may do what: every user against every owner and mode; set-id bits; groups passed on; sticky directories."""

from __future__ import annotations

import itertools
import os
import stat
from collections.abc import Callable

from tests.posix.probe import (
    ANN,
    ANN_IN_BENS,
    BEN,
    KINDS,
    ROOT,
    USERS,
    Probe,
    User,
    acting,
    make,
    opened,
    remove,
    scenario,
    shown,
)

TRIED: dict[str, Callable[[], object]] = {
    "read": lambda: opened("d/file", os.O_RDONLY),
    "write": lambda: opened("d/file", os.O_WRONLY),
    "read and write": lambda: opened("d/file", os.O_RDWR),
    "cut": lambda: os.truncate("d/file", 2),
    "open and cut": lambda: opened("d/file", os.O_RDONLY | os.O_TRUNC),
    "run": lambda: os.access("d/file", os.X_OK, effective_ids=True),
    "create": lambda: opened("d/new", os.O_CREAT | os.O_WRONLY | os.O_EXCL),
    "create over": lambda: opened("d/file", os.O_CREAT | os.O_WRONLY),
    "mkdir": lambda: os.mkdir("d/new"),
    "mkfifo": lambda: os.mkfifo("d/new"),
    "mknod device": lambda: os.mknod("d/new", 0o644 | stat.S_IFCHR, os.makedev(1, 3)),
    "symlink": lambda: os.symlink("x", "d/new"),
    "link in": lambda: os.link("d/file", "d/new"),
    "unlink": lambda: os.unlink("d/file"),
    "rmdir": lambda: os.rmdir("d/sub"),
    "rename": lambda: os.rename("d/file", "d/new"),
    "rename over": lambda: os.rename("d/file", "d/other"),
    "rename out": lambda: os.rename("d/file", "out"),
    "rename dir out": lambda: os.rename("d/sub", "out"),
    "list": lambda: sorted(os.listdir("d")),
    "stat in": lambda: os.stat("d/file").st_size,
    "chmod": lambda: os.chmod("d/file", 0o640),
    "chown to itself": lambda: os.chown("d/file", os.stat("d/file").st_uid, -1),
    "chown to ben": lambda: os.chown("d/file", 65533, -1),
    "chgrp to ben's": lambda: os.chown("d/file", -1, 65533),
    "chgrp to ann's": lambda: os.chown("d/file", -1, 65534),
    "chown of nothing": lambda: os.chown("d/file", -1, -1),
    "touch": lambda: os.utime("d/file"),
    "set times": lambda: os.utime("d/file", ns=(10**9, 10**9)),
}


@scenario
def rights(p: Probe) -> None:
    owners = (ROOT, ANN, BEN)
    for mode, above, own in itertools.product((0o755, 0o777, 0o1777, 0o730, 0o700, 0o500), owners, owners):
        if mode not in {0o1777, 0o755, 0o777} and own is BEN:
            continue
        for verb, call in TRIED.items():
            for user in USERS if mode in {0o1777, 0o730} else (ANN, ANN_IN_BENS):
                _one_right(p, f"d {mode:o} of {above.name}, file of {own.name}: {verb}", call, user, mode, above, own)


def _one_right(p: Probe, label: str, call: Callable[[], object], user: User, mode: int, above: User, own: User) -> None:
    if not os.path.lexists("d"):
        os.mkdir("d")
    for name in ("d/new", "out"):
        if os.path.lexists(name):
            remove(name)
    for name in ("d/file", "d/other"):
        if not os.path.lexists(name):
            make("reg", name, 0o640)
        os.chown(name, own.uid, own.gid)
        os.chmod(name, 0o640)
    if not os.path.lexists("d/sub"):
        os.mkdir("d/sub")
    os.chown("d/sub", own.uid, own.gid)
    os.chown("d", above.uid, above.gid)
    os.chmod("d", mode)
    p.do(label, call, user)
    for name in ("d/file", "d/new", "out"):
        if os.path.lexists(name):
            p.state(name, f"{name} after {label} by {user.name}")


@scenario
def file_modes(p: Probe) -> None:
    make("reg", "file")
    for mode in range(0o1000):
        os.chmod("file", mode)
        os.chown("file", 65534, 65533)
        for user in (ANN, BEN, User("cat", 65532, 65532)):
            with acting(user):
                granted = "".join(
                    word for word, how in (("r", os.R_OK), ("w", os.W_OK), ("x", os.X_OK))
                    if os.access("file", how, effective_ids=True)
                )  # fmt: skip
            p.note(f"{mode:o} for {user.name}", granted)


@scenario
def modes_of_every_kind(p: Probe) -> None:
    for kind, mode in itertools.product(KINDS, (0, 0o111, 0o644, 0o1644, 0o2755, 0o4755, 0o6777, 0o7777)):
        for user in (ROOT, ANN, BEN, ANN_IN_BENS):
            make(kind, "it", 0o600)
            os.chown("it", 65534, 65533, follow_symlinks=False)
            if kind != "symlink":
                p.do(f"chmod {kind} to {mode:o}", lambda mode=mode: os.chmod("it", mode), user)  # type: ignore[misc]
            p.state("it", f"{kind} after chmod {mode:o} by {user.name}")
            remove("it")


@scenario
def set_id_bits(p: Probe) -> None:
    calls: dict[str, Callable[[int], object]] = {
        "write": lambda fd: os.pwrite(fd, b"x", 0),
        "write nothing": lambda fd: os.pwrite(fd, b"", 0),
        "ftruncate": lambda fd: os.ftruncate(fd, 2),
        "ftruncate to the same size": lambda fd: os.ftruncate(fd, 7),
        "truncate": lambda _: os.truncate("file", 1),
        "open and cut": lambda _: opened("file", os.O_WRONLY | os.O_TRUNC),
        "chown to own group": lambda _: os.chown("file", -1, 65534),
        "chown to other group": lambda _: os.chown("file", -1, 65533),
        "chown of nothing": lambda _: os.chown("file", -1, -1),
        "chown to itself": lambda _: os.chown("file", 65534, 65534),
        "fchown to own group": lambda fd: os.fchown(fd, -1, 65534),
        "chmod to what it is": lambda _: os.chmod("file", stat.S_IMODE(os.stat("file").st_mode)),
        "utime": lambda _: os.utime("file"),
        "link": lambda _: os.link("file", "more"),
        "rename": lambda _: os.rename("file", "more"),
        "append": lambda _: _append(),
        "copy_file_range": _copy_range,
    }
    for (verb, call), mode, user in itertools.product(
        calls.items(), (0o6777, 0o4777, 0o2777, 0o2767, 0o2666, 0o4666, 0o7777), (ROOT, ANN, BEN, ANN_IN_BENS)
    ):
        make("reg", "file")
        os.chown("file", 65534, 65534)
        fd = os.open("file", os.O_RDWR)
        os.chmod("file", mode)
        p.do(f"{verb} of {mode:o}", lambda call=call, fd=fd: call(fd), user)  # type: ignore[misc]
        p.note(f"descriptor's after {verb} of {mode:o} by {user.name}", shown(os.fstat(fd)))
        os.close(fd)
        remove("file")
        remove("more")


def _append() -> None:
    fd = os.open("file", os.O_WRONLY | os.O_APPEND)
    os.write(fd, b"more")
    os.close(fd)


def _copy_range(fd: int) -> int:
    return os.copy_file_range(fd, fd, 2, 0, 4)


@scenario
def set_id_bits_of_others(p: Probe) -> None:
    """chown by root and by the owner, of everything that has the bits."""
    for kind, mode in itertools.product(("reg", "dir", "fifo", "block", "char", "socket"), (0o6777, 0o2767, 0o7755)):
        for uid, gid in ((65533, -1), (-1, 65533), (0, 0), (-1, -1), (2**32 - 2, 2**32 - 2), (70_000, 80_000)):
            for user in (ROOT, ANN_IN_BENS):
                make(kind, "it", 0o600)
                os.chown("it", 65534, 65534)
                os.chmod("it", mode)
                label = f"chown {kind} {mode:o} to {uid}:{gid}"
                with p.times(label, "it") if user is ROOT and kind == "reg" and mode == 0o6777 else _nothing():
                    p.do(label, lambda uid=uid, gid=gid: os.chown("it", uid, gid), user)  # type: ignore[misc]
                p.state("it", f"it after {label} by {user.name}")
                remove("it")


class _nothing:  # noqa: N801 - stands where a context manager's function would
    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None


@scenario
def groups_passed_on(p: Probe) -> None:
    for mode, user in itertools.product((0o777, 0o2777, 0o3777), USERS):
        for mask in (0, 0o022, 0o077):
            os.mkdir("d")
            os.chown("d", 65533, 65533)
            os.chmod("d", mode)
            os.umask(mask)
            label = f"in {mode:o}, umask {mask:o}"
            p.do(f"file {label}", lambda: opened("d/file", os.O_CREAT | os.O_WRONLY, 0o6777), user)
            p.do(f"dir {label}", lambda: os.mkdir("d/dir", 0o1777), user)
            p.do(f"set-id dir {label}", lambda: os.mkdir("d/sgid", 0o2777), user)
            p.do(f"fifo {label}", lambda: os.mkfifo("d/fifo", 0o2777), user)
            p.do(f"regular by mknod {label}", lambda: os.mknod("d/node", 0o2776), user)
            p.do(f"socket {label}", lambda: os.mknod("d/socket", stat.S_IFSOCK | 0o666), user)
            p.do(f"symlink {label}", lambda: os.symlink("x", "d/symlink"), user)
            os.umask(0)
            for name in ("file", "dir", "sgid", "fifo", "node", "socket", "symlink"):
                p.state(f"d/{name}", f"{name} {label} by {user.name}")
            remove("d")


@scenario
def sticky(p: Probe) -> None:
    """Who may remove, and rename over, what is in a sticky directory."""
    owners = (ROOT, ANN, BEN)
    for above, own, other, user in itertools.product(owners, owners, owners, (ANN, BEN)):
        for kind in ("reg", "dir", "symlink", "fifo"):
            os.mkdir("d")
            os.chmod("d", 0o1777)
            os.chown("d", above.uid, above.gid)
            make(kind, "d/one", 0o700)
            make(kind, "d/two", 0o700)
            os.chown("d/one", own.uid, own.gid, follow_symlinks=False)
            os.chown("d/two", other.uid, other.gid, follow_symlinks=False)
            label = f"in {above.name}'s: {own.name}'s {kind}"
            p.do(f"rename {label} over {other.name}'s", lambda: os.rename("d/one", "d/two"), user)
            remove("d/two")
            make("reg", "d/two", 0o700)
            os.chown("d/two", other.uid, other.gid)
            p.do(f"unlink {label} beside {other.name}'s", lambda: os.unlink("d/two"), user)
            remove("d")
