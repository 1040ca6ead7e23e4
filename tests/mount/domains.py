"""Domains of a mounted volume: making, unlocking and listing them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from cryptfs.types import DOMAIN_XATTR
from tests.mount.box import Box

SECRET = "another horse, another staple 8"
CONTENT = bytes(range(256)) * 1024
"""256 KiB."""


def create(box: Box, path: Path, *options: str, code: int = 0) -> str:
    """`domain create`; what it said on stderr."""
    env = {"CRYPTFS_PASSPHRASE": SECRET}
    return box.run("domain", "create", "--kdf-cost", "low", *options, path, env=env, code=code).stderr


def unlock(box: Box, path: Path, *, code: int = 0) -> None:
    box.run("unlock", path, env={"CRYPTFS_PASSPHRASE": SECRET}, code=code)


def domains(box: Box) -> list[dict[str, Any]]:
    out: list[dict[str, Any]] = json.loads(box.run("domain", "list", "--json", box.vault).stdout)
    return out


def states(box: Box) -> dict[str, str]:
    """By cipher directory's name."""
    return {Path(v["cipher_dir"]).name: v["state"] for v in json.loads(box.run("status", "--json").stdout)}


def cipher_dir(box: Box) -> Path:
    """Of the one domain."""
    [path] = (box.vault / "domains").iterdir()
    return path


def mounted_id(path: Path) -> str:
    return os.getxattr(path, DOMAIN_XATTR).decode()
