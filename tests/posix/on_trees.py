"""Directories read while they change, and what a file system says about itself."""

from __future__ import annotations

import ctypes
import os

from tests.posix.probe import Probe, make, opened, scenario

_libc = ctypes.CDLL(None, use_errno=True)
_libc.opendir.restype = ctypes.c_void_p
_libc.readdir64.restype = ctypes.c_void_p
_libc.readdir64.argtypes = [ctypes.c_void_p]
_libc.telldir.argtypes = [ctypes.c_void_p]
_libc.telldir.restype = ctypes.c_long
_libc.seekdir.argtypes = [ctypes.c_void_p, ctypes.c_long]
_libc.rewinddir.argtypes = [ctypes.c_void_p]
_libc.closedir.argtypes = [ctypes.c_void_p]
_NAME_AT = 19
"""Where d_name is in a struct dirent64."""


class Directory:
    """opendir(3) and what belongs to it."""

    def __init__(self, path: str) -> None:
        self._stream = _libc.opendir(path.encode())
        if not self._stream:
            raise OSError(ctypes.get_errno(), path)

    def read(self) -> str | None:
        """The next name; None at the end."""
        entry = _libc.readdir64(self._stream)
        return None if not entry else ctypes.string_at(entry + _NAME_AT).decode()

    def rest(self) -> list[str]:
        names = []
        while (name := self.read()) is not None:
            names.append(name)
        return names

    def tell(self) -> int:
        return int(_libc.telldir(self._stream))

    def seek(self, at: int) -> None:
        _libc.seekdir(self._stream, at)

    def rewind(self) -> None:
        _libc.rewinddir(self._stream)

    def close(self) -> None:
        _libc.closedir(self._stream)


def _complete(names: list[str], must: set[str], may: set[str]) -> str:
    """Whether a listing has everything it must, nothing twice and nothing else."""
    found = set(names)
    return f"missing {len(must - found)}, twice {len(names) - len(found)}, strange {len(found - must - may)}"


@scenario
def listings_of_changing_directories(p: Probe) -> None:
    for count in (0, 1, 5, 400):
        os.mkdir("d")
        names = {f"file {number:05}" for number in range(count)}
        for name in names:
            opened(f"d/{name}", os.O_CREAT | os.O_WRONLY)
        dots = {".", ".."}
        stream = Directory("d")
        head = [name for name in (stream.read() for _ in range(count // 3)) if name is not None]
        added = {f"added {number}" for number in range(20)}
        for name in added:
            opened(f"d/{name}", os.O_CREAT | os.O_WRONLY)
        removed = {name for name in sorted(names)[::3] if name not in head}
        for name in removed:
            os.unlink(f"d/{name}")
        rest = stream.rest()
        p.note(f"{count}, while adding and removing", _complete(head + rest, names - removed | dots, added | removed))
        stream.rewind()
        p.note(f"{count}, rewound", _complete(stream.rest(), (names - removed) | added | dots, set()))
        stream.close()
        for name in os.listdir("d"):
            os.unlink(f"d/{name}")
        os.rmdir("d")


@scenario
def places_in_listings(p: Probe) -> None:
    os.mkdir("d")
    for number in range(300):
        opened(f"d/{number}", os.O_CREAT | os.O_WRONLY)
    stream = Directory("d")
    places, names = [], []
    while True:
        places.append(stream.tell())
        name = stream.read()
        if name is None:
            break
        names.append(name)
    p.note("names", _complete(names, set(os.listdir("d")) | {".", ".."}, set()))
    p.note("places differ", len(set(places)) == len(places))
    for at in (0, 1, 2, 3, 100, 150, 299, 301):
        stream.seek(places[at])
        p.note(f"after seeking to {at}", stream.rest() == names[at:])
    for at in range(0, 302, 30):
        stream.seek(places[at])
        p.note(f"one after seeking to {at}", stream.read() == names[at])
    gone = names[200]
    if gone not in {".", ".."}:
        os.unlink(f"d/{gone}")
    stream.seek(places[100])
    rest = stream.rest()
    p.note("after a removal", [name for name in names[100:] if name != gone] == [name for name in rest if name != gone])
    stream.close()


@scenario
def directories_removed_under_a_reader(p: Probe) -> None:
    os.mkdir("d")
    for number in range(100):
        opened(f"d/{number}", os.O_CREAT | os.O_WRONLY)
    stream = Directory("d")
    seen = [stream.read() for _ in range(10)]
    for name in os.listdir("d"):
        os.unlink(f"d/{name}")
    os.rmdir("d")
    p.note("read before", len(seen))
    stream.rewind()
    p.note("read after", [name for name in stream.rest() if name not in {".", ".."}])
    stream.close()


@scenario
def deleting_while_listing(p: Probe) -> None:
    """What rm -rf does: unlink each name as it comes."""
    os.mkdir("d")
    for number in range(400):
        opened(f"d/{number}", os.O_CREAT | os.O_WRONLY)
    stream = Directory("d")
    while (name := stream.read()) is not None:
        if name not in {".", ".."}:
            os.unlink(f"d/{name}")
    stream.close()
    p.do("rmdir after deleting while listing", lambda: os.rmdir("d"))


@scenario
def statements(p: Probe) -> None:
    make("reg", "file")
    for name in (".", "file"):
        said = os.statvfs(name)
        p.note(f"namemax at {name}", said.f_namemax)
        p.note(
            f"sensible at {name}", said.f_blocks >= said.f_bfree >= said.f_bavail > 0 and said.f_files >= said.f_ffree
        )
        p.note(f"block sizes at {name}", (said.f_bsize, said.f_frsize))
        p.note(f"st_blksize at {name}", os.stat(name).st_blksize)
    for option in ("PC_NAME_MAX", "PC_PATH_MAX", "PC_LINK_MAX", "PC_NO_TRUNC", "PC_CHOWN_RESTRICTED"):
        if option != "PC_LINK_MAX":
            p.note(option, os.pathconf(".", option))
    st = os.stat(".")
    p.note("links of a directory without others", st.st_nlink)
    p.note(". is itself", os.path.samestat(os.stat("./."), st))
    os.mkdir("sub")
    p.note(".. is the one above", os.stat("sub/..").st_ino == os.stat(".").st_ino)
    entries = {entry.name: entry for entry in os.scandir(".")}
    p.note("inode numbers in listings", all(e.inode() == os.lstat(n).st_ino for n, e in entries.items()))
    p.note("kinds in listings", sorted((n, e.is_dir(), e.is_file()) for n, e in entries.items()))
