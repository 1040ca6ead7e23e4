"""A key or passphrase as a type: it can be used and wiped, and not printed, copied or pickled by accident.

What Python cannot promise: libraries that are given the bytes make copies of their own, and a `bytes` object that a
secret was made from cannot be overwritten. The wipe here covers the one buffer a `Secret` owns.
"""

from __future__ import annotations

import ctypes
import hmac
from collections.abc import Iterable
from types import TracebackType
from typing import NoReturn, Self

_BYTES_HEAD = bytes.__basicsize__ - 1
"""Where the content of a `bytes` object begins: CPython's layout, which counts one byte for the terminating zero."""
_SHARED_MAX_BYTES = 1
"""CPython has one object only for each of these."""


def overwrite(parts: Iterable[bytes | None]) -> None:
    """Fill `bytes` objects with zeros, which Python has no way to do: for keys that came out of a message just now.

    The caller has the only use for each of them, and none any more: whoever else has one sees it change.
    """
    for part in parts:
        if part is not None and len(part) > _SHARED_MAX_BYTES:
            ctypes.memset(id(part) + _BYTES_HEAD, 0, len(part))


class Secret:
    """Owns one `bytearray` and overwrites it with zeros when wiped, when left as a context, and when collected.

    Whoever makes a `Secret` wipes it, or hands it to an owner who does (the agent's keyring wipes at `lock`).
    """

    __slots__ = ("_buffer", "_wiped")

    def __init__(self, buffer: bytearray) -> None:
        """Take ownership of `buffer`: the caller keeps no other reference to it."""
        self._wiped = False
        self._buffer = buffer

    @classmethod
    def of(cls, data: bytes | bytearray | memoryview) -> Self:
        """A secret with a copy of `data`. The caller answers for the original."""
        return cls(bytearray(data))

    def view(self) -> memoryview:
        """The bytes, read-only and without a copy; they turn to zeros at `wipe`. Raises `ValueError` once wiped."""
        if self._wiped:
            raise ValueError("the secret was wiped")
        return memoryview(self._buffer).toreadonly()

    def equals(self, other: Secret) -> bool:
        """Whether both hold the same bytes, in a time that does not depend on where they differ."""
        return hmac.compare_digest(self.view(), other.view())

    def wipe(self) -> None:
        """Overwrite the bytes with zeros. May be called again."""
        self._wiped = True
        # Never resized: a bytearray with a live view refuses that, and a resize may leave a copy behind.
        self._buffer[:] = bytes(len(self._buffer))

    @property
    def wiped(self) -> bool:
        """Whether `wipe` was called."""
        return self._wiped

    def __len__(self) -> int:
        return len(self._buffer)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.wipe()

    def __del__(self) -> None:
        # Absent if __init__ itself was refused its argument.
        if hasattr(self, "_buffer"):
            self.wipe()

    def __repr__(self) -> str:
        return f"<Secret of {len(self._buffer)} bytes{', wiped' if self._wiped else ''}>"

    def __eq__(self, other: object) -> bool:
        """Identity only: content is compared by `equals`, so that no container compares keys in passing."""
        return self is other

    __hash__ = None  # type: ignore[assignment]

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a secret is neither copied nor pickled")

    def __copy__(self) -> NoReturn:
        raise TypeError("a secret is neither copied nor pickled")

    def __deepcopy__(self, memo: object) -> NoReturn:
        raise TypeError("a secret is neither copied nor pickled")
