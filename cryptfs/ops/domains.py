"""What a cipher directory shows of a volume's domains without any key (docs/adr/0013-domains.md)."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from cryptfs import durable
from cryptfs.errors import StoreFailed
from cryptfs.types import DOMAIN_ASIDE, DOMAIN_SHREDDED, DOMAINS_DIR, ID_BYTES


def domain_dir(cipher_dir: Path, domain_id: bytes) -> Path:
    """The cipher directory of a domain of the volume in `cipher_dir`; put aside or not, there or not."""
    usual = cipher_dir / DOMAINS_DIR / domain_id.hex()
    aside = usual.with_name(usual.name + DOMAIN_ASIDE)
    return aside if aside.is_dir() and not usual.is_dir() else usual


def domain_ids(cipher_dir: Path) -> list[bytes]:
    """The ids that directories in `domains/` have as their names, in ascending order; those put aside, too.

    Raises OSError.
    """
    try:
        names = os.listdir(cipher_dir / DOMAINS_DIR)
    except FileNotFoundError:
        return []
    return sorted({domain_id for name in names if (domain_id := _id(name.removesuffix(DOMAIN_ASIDE))) is not None})


def is_domain(cipher_dir: Path) -> bool:
    """Whether a volume's cipher directory is a domain's, in that of another."""
    above = cipher_dir.parent
    name = cipher_dir.name.removesuffix(DOMAIN_ASIDE)
    return above.name == DOMAINS_DIR and _id(name) is not None and (above.parent / "volume").exists()


def say_shredded(cipher_dir: Path) -> None:
    """Leave word that a domain was shredded, durably. Means something once its `volume` file is gone.

    Raises `StoreFailed`.
    """
    path = cipher_dir / DOMAIN_SHREDDED
    try:
        with contextlib.suppress(FileExistsError):
            durable.write_new(path, b"")
        durable.sync_directory(cipher_dir)
    except OSError as error:
        raise StoreFailed(f"{path} cannot be made: {error.strerror}") from error


def _id(name: str) -> bytes | None:
    try:
        domain_id = bytes.fromhex(name)
    except ValueError:
        return None
    return domain_id if len(domain_id) == ID_BYTES and domain_id.hex() == name else None
