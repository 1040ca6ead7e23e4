"""The daemon's command line, an interface between `cryptfs mount` and this process only. No secret is ever on it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptfs.errors import UsageError
from cryptfs.format.policy import NO_POLICY
from cryptfs.fs.owner import owner_of
from cryptfs.keys.policy import Overrides

FUSE_OPTIONS = frozenset(
    {
        "allow_other", "allow_root", "atime", "async", "auto_unmount", "dev", "dirsync", "exec", "noatime", "nodev",
        "nodiratime", "noexec", "nosuid", "relatime", "suid", "sync",
    }
)  # fmt: skip
_OURS = frozenset({"ro", "rw", "default_permissions"})


@dataclass(frozen=True, slots=True)
class DaemonArgs:
    """What to mount, where, and how."""

    cipher_dir: Path
    mountpoint: Path
    agent_socket: str
    ready_fd: int | None
    go_fd: int | None
    log_file: Path | None
    read_only: bool
    overrides: Overrides
    fuse_options: frozenset[str]
    force_owner: tuple[int, int] | None = None


def parse(argv: Sequence[str]) -> DaemonArgs:
    """Raises `UsageError` for values that make no sense."""
    parser = argparse.ArgumentParser(prog="cryptfs-daemon", allow_abbrev=False)
    parser.add_argument("--cipher-dir", type=Path, required=True)
    parser.add_argument("--mountpoint", type=Path, required=True)
    parser.add_argument("--agent-socket", required=True)
    parser.add_argument("--ready-fd", type=int)
    parser.add_argument("--go-fd", type=int)
    parser.add_argument("--log-file", type=Path)
    parser.add_argument("--foreground", action="store_true")
    parser.add_argument("--read-only", action="store_true")
    parser.add_argument("--max-age", type=float)
    parser.add_argument("--max-entries", type=int)
    parser.add_argument("--max-uses", type=int)
    caching = parser.add_mutually_exclusive_group()
    caching.add_argument("--cache", dest="caching", action="store_true", default=None)
    caching.add_argument("--no-cache", dest="caching", action="store_false", default=None)
    parser.add_argument("--force-owner")
    parser.add_argument("-o", dest="options", action="append", default=[])
    given = parser.parse_args(argv)
    options = {word for group in given.options for word in group.split(",") if word}
    unknown = options - FUSE_OPTIONS - _OURS
    if unknown:
        raise UsageError(f"unknown mount option: {min(unknown)}")
    overrides = Overrides(given.max_age, given.max_entries, given.max_uses, given.caching)
    overrides.over(NO_POLICY)
    return DaemonArgs(
        given.cipher_dir, given.mountpoint, given.agent_socket, given.ready_fd, given.go_fd, given.log_file,
        given.read_only or "ro" in options, overrides, frozenset(options & FUSE_OPTIONS),
        owner_of(given.force_owner),
    )  # fmt: skip
