"""A kind of protector that this program knows and this machine cannot serve: nothing is configured, or not installed.

So a volume that has one is told apart from one that a newer program made.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

from cryptfs.errors import BackendUnavailable
from cryptfs.types import Buffer


class AbsentProvider:
    """Says why, whatever is asked."""

    needs_network = False
    counts_wrong_secrets = True
    revocable = False

    def __init__(self, kind: str, why: str) -> None:
        self.kind = kind
        self._why = why

    def new_params(self, wish: Mapping[str, int | str | bytes]) -> NoReturn:
        """Raises `BackendUnavailable`."""
        del wish
        raise BackendUnavailable(self._why)

    def open(self, params: Mapping[str, int | str | bytes], secret: Buffer) -> NoReturn:
        """Raises `BackendUnavailable`."""
        del params, secret
        raise BackendUnavailable(self._why)

    def destroy(self, params: Mapping[str, int | str | bytes], secret: Buffer) -> NoReturn:
        """Raises `BackendUnavailable`."""
        del params, secret
        raise BackendUnavailable(self._why)

    def describe(self, params: Mapping[str, int | str | bytes]) -> str:
        """That it is not available here."""
        del params
        return f"{self.kind}: {self._why}"
