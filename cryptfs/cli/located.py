"""Which volume a path on the command line means: a cipher directory, a mount point, or a domain's directory in a mount.

What lies in a mount is asked from a thread that may be left behind: its daemon may be hung.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path

from cryptfs.cli import mounts
from cryptfs.cli.advice import hinted
from cryptfs.errors import (
    CryptfsError,
    MountpointUnusable,
    NotPermitted,
    StoreFailed,
    UsageError,
    VolumeDamaged,
    VolumeLocked,
)
from cryptfs.ops.domains import domain_dir
from cryptfs.ops.info import read_volume
from cryptfs.types import DOMAIN_XATTR, ID_BYTES


@dataclass(frozen=True)
class Inside:
    """A path in a mount of this user's: the mount point, the mounted volume's cipher directory, the path itself."""

    mountpoint: Path
    cipher_dir: Path
    path: Path


def cipher_dir_of(path: Path) -> Path:
    """The cipher directory that `path` is or stands for, resolved; only of a domain's it is known that there is one.

    Raises `VolumeLocked` (the mounted volume is), `MountpointUnusable` (it does not answer, or its daemon is gone),
    `NotAVolume` and `VolumeDamaged` (the domain is lost, or another).
    """
    inside = inside_mount(path)
    if inside is None:
        return Path(os.path.realpath(path))
    if inside.path == inside.mountpoint:
        return inside.cipher_dir
    domain_id = domain_at(inside.path)
    if not domain_id:
        return Path(os.path.realpath(path))
    cipher_dir = domain_dir(inside.cipher_dir, domain_id)
    if read_volume(cipher_dir).volume_id != domain_id:
        raise VolumeDamaged(f"{cipher_dir} holds another volume than the domain {path}")
    return cipher_dir


def inside_mount(path: Path) -> Inside | None:
    """`path` if it is a mount point of this user's or lies below one; it need not exist.

    Raises `MountpointUnusable` if it does not answer or its daemon is gone, `NotPermitted` if it is another user's.
    """
    try:
        located = mounts.answer_of(lambda: mounts.resolved(path))
    except TimeoutError:
        raise MountpointUnusable(f"{path} does not answer") from None
    mount = mounts.mount_over(located)
    if mount is None or not mount.is_ours:
        return None
    daemon = mounts.daemon_of_mount(mount.mountpoint)
    if daemon is None:
        if mounts.is_dead(mount.mountpoint):
            raise hinted(
                MountpointUnusable(f"the daemon of {mount.mountpoint} is gone, and what it held with it"),
                f"`cryptfs umount {mount.mountpoint}` clears what it left; the volume is in {mount.source}",
            )
        raise NotPermitted(f"no daemon of this user serves {mount.mountpoint}")
    return Inside(mount.mountpoint, daemon.cipher_dir, located)


def domain_at(path: Path) -> bytes | None:
    """The id of the domain whose directory this is, in a mount; None: of none.

    Raises `UsageError` (there is no such path), `VolumeLocked`, `MountpointUnusable`, `StoreFailed`.
    """
    try:
        value = mounts.answer_of(lambda: os.getxattr(path, DOMAIN_XATTR, follow_symlinks=False))
    except TimeoutError:
        raise MountpointUnusable(f"{path} does not answer") from None
    except OSError as error:
        if error.errno in (errno.ENODATA, errno.EOPNOTSUPP):
            return None
        raise failure(path, error) from None
    try:
        domain_id = bytes.fromhex(value.decode("ascii"))
    except ValueError:
        domain_id = b""
    return domain_id if len(domain_id) == ID_BYTES else None


def failure(path: Path, error: OSError) -> CryptfsError:
    """What an error of the kernel about a path in a mount means."""
    if error.errno == errno.ENOKEY:
        return hinted(VolumeLocked(f"{path} is in a volume or domain that is locked"), "unlock that first")
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return UsageError(f"{path}: {error.strerror}")
    if error.errno in (errno.ENOTCONN, errno.ECONNABORTED):
        return MountpointUnusable(f"{path}: its daemon is gone")
    if error.errno in (errno.EPERM, errno.EACCES):
        return NotPermitted(f"{path}: {error.strerror}")
    return StoreFailed(f"{path}: {error.strerror}")
