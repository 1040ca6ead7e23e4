"""How long, how often and how many keys may stay in clear in the daemon. Separate from the cache that obeys it."""

from __future__ import annotations

from dataclasses import dataclass

from cryptfs.errors import UsageError

MAX_AGE_DEFAULT_S = 60.0
MAX_ENTRIES_DEFAULT = 262_144
"""4 GiB of data at the default block size, 8 MiB of keys."""
SWEEP_INTERVAL_S = 1.0


@dataclass(frozen=True, slots=True)
class CachePolicy:
    """`max_age_s` counts from the unwrap and is never extended by use; `max_uses` None: no limit.

    `caching` False is the mode `none`: no key serves twice, each is overwritten at the next sweep.
    """

    max_age_s: float = MAX_AGE_DEFAULT_S
    max_entries: int = MAX_ENTRIES_DEFAULT
    max_uses: int | None = None
    caching: bool = True

    def __post_init__(self) -> None:
        """Raises `UsageError` for values that mean nothing."""
        if not 0 < self.max_age_s <= 7 * 86400:
            raise UsageError("max age must be more than 0 s and at most 7 days")
        if self.max_entries < 1024:
            raise UsageError("max entries must be at least 1024")
        if self.max_uses is not None and self.max_uses < 1:
            raise UsageError("max uses must be at least 1")
