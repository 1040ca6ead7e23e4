"""Importing code that handles KEKs, root keys or passphrases fails in this process.

The daemon holds plaintext and DEKs; that it never sees a KEK must not depend on nobody adding an import by mistake.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

FORBIDDEN = (
    "cryptfs.agent",
    "cryptfs.cli",
    "cryptfs.crypto.wrap",
    "cryptfs.roots",
    "cryptography.hazmat.primitives.kdf",
    "cryptography.hazmat.primitives.keywrap",
    "argon2",
)


class ImportGuard:
    """A meta path finder that raises for forbidden modules (importlib's finder protocol)."""

    def find_spec(
        self,
        name: str,
        path: Sequence[str] | None = None,  # noqa: ARG002 - importlib's signature
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> ModuleSpec | None:
        """Raises ImportError for a forbidden name; None, so that others look, for any other."""
        if name.startswith(FORBIDDEN) and any(name == f or name.startswith(f + ".") for f in FORBIDDEN):
            raise ImportError(f"{name} must not be imported in the daemon")
        return None


def install() -> None:
    """Guard this process from now on. Raises ImportError if it is too late."""
    loaded = [name for name in sys.modules if any(name == f or name.startswith(f + ".") for f in FORBIDDEN)]
    if loaded:
        raise ImportError(f"{loaded[0]} is loaded already")
    sys.meta_path.insert(0, ImportGuard())
