"""What is in another process's memory: every page of it that root can read, searched for secrets."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

from scripts import reference_decrypt as reference

_CHUNK_BYTES = 16 << 20


def readable_memory(pid: int) -> Iterator[tuple[str, bytes]]:
    """(mapping's line in /proc/PID/maps, content in chunks that overlap by 64 bytes).

    What the kernel itself does not map (memfd_secret) cannot be read, by root neither, and is left out.
    """
    memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY)
    try:
        for line in Path(f"/proc/{pid}/maps").read_text("utf-8", "replace").splitlines():
            extent, rights = line.split()[:2]
            start, end = (int(part, 16) for part in extent.split("-"))
            at = start
            while "r" in rights and at < end:
                try:
                    chunk = os.pread(memory, min(_CHUNK_BYTES, end - at), at)
                except OSError:
                    break
                if not chunk:
                    break
                yield line, chunk
                at = at + len(chunk) if at + len(chunk) == end else at + max(1, len(chunk) - 64)
    finally:
        os.close(memory)


def found_in(pid: int, secrets: Mapping[bytes, str]) -> dict[str, int]:
    """How many of `secrets` (bytes of at least 16, their kind) are in the process's memory, by kind."""
    found: set[bytes] = set()
    for _, chunk in readable_memory(pid):
        # One search per secret: an alternation of all of them is a hundred times as slow.
        found |= {secret for secret in secrets if secret not in found and secret in chunk}
    kinds = [secrets[secret] for secret in found]
    return {kind: kinds.count(kind) for kind in sorted(set(kinds))}


def secrets_of(vault: Path, passphrase: bytes, scratch: Path) -> dict[bytes, str]:
    """Every key of a volume and what it is, as the reference reader finds them in a copy of `vault`.

    `scratch` (must not exist) is made and removed.
    """
    secrets: dict[bytes, str] = {passphrase: "passphrase"}

    class Kept(reference.Keys):
        """Keys that are written down."""

        def wrapping_key(self, purpose: str, log_id: bytes, version: int) -> bytes:
            secrets.update(dict.fromkeys(self.keks.values(), "KEK"))
            key = super().wrapping_key(purpose, log_id, version)
            secrets[key] = "wrapping key"
            return key

        def unwrap(self, purpose: str, log_id: bytes, version: int, wrapped: bytes) -> bytes:
            key = super().unwrap(purpose, log_id, version, wrapped)
            secrets[key] = f"{purpose} key"
            return key

    class KeptKdf:
        """Argon2id, its results written down."""

        def __init__(self, **parameters: Any) -> None:  # noqa: ANN401 - passed on
            self._kdf = Argon2id(**parameters)

        def derive(self, secret: bytes) -> bytes:
            key = self._kdf.derive(secret)
            secrets[key] = "root key"
            return key

    scratch.mkdir()
    try:
        shutil.copytree(vault, scratch / "vault", symlinks=True)
        with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
            patch.setattr(reference, "Keys", Kept)
            patch.setattr(reference, "Argon2id", KeptKdf)
            reference.decrypt_volume(
                scratch / "vault", scratch / "clear", reference.Secret("passphrase", passphrase), stack
            )
    finally:
        shutil.rmtree(scratch)
    return secrets
