"""What a directory tree holds, in a form that two trees can be compared in and that JSON can keep."""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote_from_bytes

ROOT = Path(__file__).resolve().parents[2]
Entry = dict[str, str | int]


def describe(top: Path) -> dict[str, Entry]:
    """Every entry below `top`, by its percent-encoded path: type and mode, times, content, target, links, xattrs.

    Owners are left out (they are the caller's), as are inode numbers and access times.
    """
    out: dict[str, Entry] = {}
    first_name: dict[tuple[int, int], str] = {}
    todo = [b""]
    while todo:
        below = todo.pop()
        for name in sorted(os.listdir(os.fsencode(top) + b"/" + below)):
            path = below + name
            full = os.fsencode(top) + b"/" + path
            info = os.lstat(full)
            shown = quote_from_bytes(path)
            entry: Entry = {"mode": stat.filemode(info.st_mode), "mtime_ns": info.st_mtime_ns}
            if stat.S_ISDIR(info.st_mode):
                todo.append(path + b"/")
            elif stat.S_ISLNK(info.st_mode):
                entry["target"] = quote_from_bytes(os.readlink(full))
            elif stat.S_ISREG(info.st_mode):
                content = Path(os.fsdecode(full)).read_bytes()
                entry |= {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            elif info.st_rdev:
                entry["rdev"] = info.st_rdev
            if not stat.S_ISDIR(info.st_mode) and info.st_nlink > 1:
                inode = (info.st_dev, info.st_ino)
                entry["links"] = info.st_nlink
                first_name[inode] = min(shown, first_name.get(inode, shown))
                entry["inode"] = inode[1]
            for attribute in sorted(os.listxattr(full, follow_symlinks=False)):
                value = os.getxattr(full, attribute, follow_symlinks=False)
                entry[f"xattr {quote_from_bytes(os.fsencode(attribute))}"] = quote_from_bytes(value)
            out[shown] = entry
    names = {ino: name for (_, ino), name in first_name.items()}
    for entry in out.values():
        if "inode" in entry:
            entry["same_as"] = names[int(entry.pop("inode"))]
    return dict(sorted(out.items()))


def reference_decrypt(
    vault: Path, dest: Path, passphrase: bytes, *options: str | Path
) -> subprocess.CompletedProcess[str]:
    """Run the reference decryptor on `vault`; its output and exit status are the caller's to judge."""
    read_end, write_end = os.pipe()
    os.write(write_end, passphrase + b"\n")
    os.close(write_end)
    try:
        return subprocess.run(
            [
                sys.executable, ROOT / "scripts/reference_decrypt.py", vault, dest,
                "--passfile", f"/proc/self/fd/{read_end}", *options,
            ],
            pass_fds=[read_end], capture_output=True, text=True, errors="replace", check=False, timeout=120,
        )  # fmt: skip
    finally:
        os.close(read_end)
