"""Mounts of an ordinary user: what tests run as root do here in a mount namespace of their own.

`python -m tests.mount.ordinary ROOT MODULE WORD ...`, as root and in a new mount namespace (`unshare --mount`): makes
/dev/fuse, the interpreter, the sources and ROOT reachable for a user without any rights, becomes that user, and runs
`python -m MODULE ROOT WORD ...`. Nothing of it is seen outside, and it goes with its last process.
"""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

UID, GROUPS = 65534, (65534, 65533)
SOURCES = Path(__file__).resolve().parents[2]
_STAGE = Path("/mnt")
_TIMEOUT_S = 300


def ordinarily(parent: Path, module: str, *words: str) -> str:
    """What `python -m MODULE ROOT WORDS` says as an ordinary user; ROOT is a directory of its own in `parent`."""
    with tempfile.TemporaryDirectory(dir=parent, prefix="") as root:
        ended = subprocess.run(
            ["unshare", "--mount", sys.executable, "-m", __name__, root, module, *words],
            cwd=SOURCES, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False,
        )  # fmt: skip
        assert ended.returncode == 0, ended.stderr[-8000:]
        return ended.stdout


def _mount(*words: str | Path) -> None:
    subprocess.run(["mount", *map(str, words)], check=True)


def _closed_above(path: Path) -> Path | None:
    """The highest directory above `path` that others may not enter."""
    for above in reversed(path.parents):
        if not above.stat().st_mode & stat.S_IXOTH:
            return above
    return None


def _open_ways(paths: list[Path]) -> None:
    """Put an empty directory in place of each that is closed, with nothing in it but the way to `paths`."""
    closed: dict[Path, list[Path]] = {}
    for path in paths:
        above = _closed_above(path)
        if above is not None:
            closed.setdefault(above, []).append(path)
    for number, (above, below) in enumerate(closed.items()):
        aside = [_STAGE / f"way-{number}-{i}" for i in range(len(below))]
        for path, place in zip(below, aside, strict=True):
            place.mkdir()
            _mount("--rbind", path, place)
        _mount("-t", "tmpfs", "-o", "mode=755", "none", above)
        for path, place in zip(below, aside, strict=True):
            path.mkdir(parents=True, exist_ok=True)
            _mount("--rbind", place, path)


def _serve_fuse() -> None:
    device, conf = _STAGE / "fuse", _STAGE / "fuse.conf"
    os.mknod(device, stat.S_IFCHR | 0o666, os.stat("/dev/fuse").st_rdev)
    device.chmod(0o666)
    _mount("--bind", device, "/dev/fuse")
    conf.write_text("user_allow_other\n")
    if Path("/etc/fuse.conf").exists():
        _mount("--bind", conf, "/etc/fuse.conf")


def main(words: list[str]) -> None:
    """See the module's docstring."""
    root, module = Path(words[0]), words[1]
    os.chown(root, UID, GROUPS[0])
    root.chmod(0o700)
    os.umask(0o022)
    _mount("-t", "tmpfs", "-o", "mode=755", "none", _STAGE)
    _serve_fuse()
    ways = {Path(sys.base_prefix).resolve(), Path(sys.prefix).resolve(), SOURCES, root.resolve()}
    # What lies in another of them comes along with it.
    _open_ways(sorted(way for way in ways if not any(other in way.parents for other in ways)))
    os.setgroups(GROUPS)
    os.setresgid(GROUPS[0], GROUPS[0], GROUPS[0])
    os.setresuid(UID, UID, UID)
    os.chdir(SOURCES)
    os.environ.update(HOME=str(root), PYTHONDONTWRITEBYTECODE="1")
    os.execv(sys.executable, [sys.executable, "-m", module, str(root), *words[2:]])  # noqa: S606 - no shell is wanted


if __name__ == "__main__":
    main(sys.argv[1:])
