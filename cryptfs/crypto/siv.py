"""AES-SIV (RFC 5297) for names: deterministic, so a name finds its entry without a search, and authenticated."""

from __future__ import annotations

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESSIV

from cryptfs.errors import Damaged
from cryptfs.types import Buffer


class NameCipher:
    """Names of one directory, under its names key (64 bytes). Holds the key: drop it when the key expires."""

    __slots__ = ("_aad", "_siv")

    def __init__(self, names_key: Buffer, dir_id: bytes) -> None:
        self._siv = AESSIV(names_key)
        self._aad = [dir_id]

    def seal(self, name: bytes) -> bytes:
        """`name` (1 … 255 bytes) -> 16 bytes more."""
        return self._siv.encrypt(name, self._aad)

    def open(self, sealed: bytes) -> bytes:
        """The reverse; raises `Damaged("name")`."""
        try:
            return self._siv.decrypt(sealed, self._aad)
        except InvalidTag:
            raise Damaged("name", "not authentic") from None
