"""Making a domain: laid out beside the others, then handed to the daemon that has the volume mounted.

Order, and what a crash leaves: docs/adr/0013-domains.md. What fails here is taken away again, unless the directory
names it as its domain already.
"""

from __future__ import annotations

import errno
import os
import shutil
from contextlib import suppress
from pathlib import Path

import trio

from cryptfs.cli import located
from cryptfs.cli.advice import hinted
from cryptfs.cli.new_volume import lay_out
from cryptfs.errors import CryptfsError, StoreFailed, UsageError
from cryptfs.keys.agent_client import AgentClient
from cryptfs.ops.domains import domain_dir
from cryptfs.types import DOMAIN_ASIDE, DOMAIN_XATTR, DOMAINS_DIR


async def make(cipher_dir: Path, place: Path, volume_file: bytes, domain_id: bytes, client: AgentClient) -> None:
    """`client`'s agent holds the KEK of the new volume, whose id is `domain_id`.

    Raises `UsageError` (the directory is not empty, or is a domain's), `VolumeLocked`, `NotPermitted`, `StoreFailed`,
    key errors.
    """
    aside = cipher_dir / DOMAINS_DIR / (domain_id.hex() + DOMAIN_ASIDE)
    try:
        try:
            aside.parent.mkdir(mode=0o700, exist_ok=True)
            aside.mkdir(mode=0o700)
        except OSError as error:
            raise StoreFailed(f"{aside}: {error.strerror}") from error
        # This syncs the whole file system, and so the new names above it, too.
        await lay_out(aside, volume_file, domain_id, client)
        await trio.to_thread.run_sync(_hand_over, place, domain_id)
    except BaseException as failure:
        if _may_be_named(place, domain_id):
            if isinstance(failure, CryptfsError):
                failure.add_note(f"{place} is a domain all the same, or may be: see `cryptfs domain list`")
            raise
        with suppress(FileNotFoundError):
            shutil.rmtree(domain_dir(cipher_dir, domain_id))
        raise


def _hand_over(place: Path, domain_id: bytes) -> None:
    try:
        os.setxattr(place, DOMAIN_XATTR, domain_id.hex().encode(), follow_symlinks=False)
    except OSError as error:
        if error.errno == errno.ENOTEMPTY:
            raise UsageError(f"{place} is not empty") from None
        if error.errno == errno.EEXIST:
            raise UsageError(f"{place} is a domain already") from None
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTDIR):
            refused = UsageError(f"{place} cannot be a domain")
            raise hinted(refused, "it must be a directory of the mounted volume itself, and not its root") from None
        raise located.failure(place, error) from error


def _may_be_named(place: Path, domain_id: bytes) -> bool:
    """Whether the directory says that it is this domain's place, or does not say."""
    try:
        return located.domain_at(place) == domain_id
    except UsageError:
        return False
    except CryptfsError:
        return True
