"""Small operations and what they answered, written down so that two file systems can be compared line by line.

A line is `scenario / what was done = what came of it`: an errno's name, a value, a state. Nothing in it depends on
where or when it was done, so inode numbers, absolute times and the sizes of directories stay out.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

_IS_ROOT = os.geteuid() == 0
KINDS = tuple(
    kind
    for kind in ("reg", "dir", "fifo", "block", "char", "socket", "symlink")
    if _IS_ROOT or kind not in {"block", "char"}
)
"""All that whoever runs this may make."""
TICK_S = 0.006
"""Longer than the coarsest step of a file system's clock (a jiffy: 4 ms)."""


@dataclass(frozen=True)
class User:
    """Whom an operation is done as: effective uid and gid, and supplementary groups."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...] = ()


ROOT = User("root", 0, 0)
ANN = User("ann", 65534, 65534)
BEN = User("ben", 65533, 65533)
ANN_IN_BENS = User("ann+", 65534, 65534, (65533, 65532))
USERS = (ROOT, ANN, BEN, ANN_IN_BENS) if _IS_ROOT else (ROOT,)
"""An ordinary user cannot be anybody else; `ROOT` is then itself."""


@contextlib.contextmanager
def acting(user: User) -> Iterator[None]:
    """Be `user` inside; the saved uid stays root's, so the way back is open."""
    if user is ROOT:
        yield
        return
    os.setgroups(user.groups)
    os.setegid(user.gid)
    os.seteuid(user.uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(())


@dataclass
class Probe:
    """Writes lines down. `prefix` names the scenario."""

    prefix: str
    lines: list[str] = field(default_factory=list)
    _fresh: int = 0

    def note(self, what: str, value: object) -> None:
        self.lines.append(f"{self.prefix} / {what} = {value}")

    def do(self, what: str, call: Callable[[], object], user: User = ROOT) -> bool:
        """Note what `call` returns, or its errno, done as `user`; whether it succeeded."""
        who = "" if user is ROOT else f" by {user.name}"
        try:
            with acting(user):
                value = call()
        except OSError as error:
            self.note(what + who, errno.errorcode.get(error.errno or 0, str(error)))
            return False
        self.note(what + who, "ok" if value is None else value)
        return True

    def state(self, name: str, what: str = "") -> None:
        """Note what lstat says of `name`, as far as it is comparable."""
        self.do(f"lstat {what or name}", lambda: shown(os.lstat(name)))

    def name(self, stem: str = "n") -> str:
        """A name not used before in this scenario."""
        self._fresh += 1
        return f"{stem}{self._fresh}"

    @contextlib.contextmanager
    def times(self, what: str, *names: str | int) -> Iterator[None]:
        """Note which of atime, mtime and ctime of `names` (or descriptors) move by what is done inside."""
        before = [_times(name) for name in names]
        time.sleep(TICK_S)
        yield
        for number, (name, old) in enumerate(zip(names, before, strict=True)):
            moved = [word for word, a, b in zip("amc", old, _times(name), strict=True) if a != b]
            self.note(f"{what}: times of #{number} moved", "".join(moved) or "none")


def _times(name: str | int) -> tuple[int, int, int]:
    try:
        st = os.fstat(name) if isinstance(name, int) else os.lstat(name)
    except OSError:
        return 0, 0, 0
    return st.st_atime_ns, st.st_mtime_ns, st.st_ctime_ns


def shown(st: os.stat_result) -> str:
    """What of a stat may be compared between file systems."""
    kind = stat.S_IFMT(st.st_mode)
    size = "" if kind == stat.S_IFDIR else f" size {st.st_size}"
    device = f" rdev {st.st_rdev:#x}" if kind in {stat.S_IFBLK, stat.S_IFCHR} else ""
    return f"{st.st_mode:06o} {st.st_uid}:{st.st_gid} links {st.st_nlink}{size}{device}"


def make(kind: str, name: str, mode: int = 0o644, content: bytes = b"content") -> None:
    """An object of that kind, with exactly that mode (a symlink has none of its own)."""
    if kind == "reg":
        fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        os.write(fd, content)
        os.close(fd)
    elif kind == "dir":
        os.mkdir(name)
    elif kind == "symlink":
        os.symlink("nowhere", name)
        return
    else:
        kinds = {"fifo": stat.S_IFIFO, "socket": stat.S_IFSOCK, "block": stat.S_IFBLK, "char": stat.S_IFCHR}
        os.mknod(name, 0o600 | kinds[kind], os.makedev(1, 3) if kind == "char" else os.makedev(240, 77))
    os.chmod(name, mode)


def remove(name: str) -> None:
    """Whatever it is; a directory with what is in it."""
    try:
        kind = os.lstat(name).st_mode
    except OSError:
        return
    if stat.S_ISDIR(kind):
        os.chmod(name, 0o700)
        for child in os.listdir(name):
            remove(f"{name}/{child}")
        os.rmdir(name)
    else:
        os.unlink(name)


def opened(path: str | bytes, flags: int, mode: int = 0o600) -> None:
    """Open and close."""
    os.close(os.open(path, flags, mode))


def listed(path: str) -> Sequence[str]:
    return sorted(os.listdir(path))


Scenario = Callable[[Probe], None]
SCENARIOS: dict[str, Scenario] = {}


def scenario(function: Scenario) -> Scenario:
    """Register; its name is the scenario's."""
    SCENARIOS[function.__name__] = function
    return function
