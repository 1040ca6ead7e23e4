"""How long, how often and how many keys may stay in clear in the daemon. Separate from the cache that obeys it."""

from __future__ import annotations

from dataclasses import dataclass

from cryptfs.errors import UsageError
from cryptfs.format.policy import BOUNDS, Policy

MAX_AGE_DEFAULT_S = 60.0
MAX_ENTRIES_DEFAULT = 262_144
"""4 GiB of data at the default block size, 8 MiB of keys."""
SWEEP_INTERVAL_S = 1.0
CACHE_FIELDS = ("caching", "max_age_s", "max_entries", "max_uses")
"""The fields of `format.policy.Policy` that the cache obeys."""


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
        if not 0 < self.max_age_s <= BOUNDS["max_age_s"][1]:
            raise UsageError("max age must be more than 0 s and at most 7 days")
        if self.max_entries < BOUNDS["max_entries"][0]:
            raise UsageError(f"max entries must be at least {BOUNDS['max_entries'][0]}")
        if self.max_uses is not None and self.max_uses < 1:
            raise UsageError("max uses must be at least 1")

    @property
    def lifetime_s(self) -> float:
        """How long a key stays in memory at most, but for the sweep."""
        return self.max_age_s if self.caching else min(self.max_age_s, SWEEP_INTERVAL_S)


@dataclass(frozen=True, slots=True)
class Overrides:
    """What a mount's options say instead of the volume's policy; None: they say nothing."""

    max_age_s: float | None = None
    max_entries: int | None = None
    max_uses: int | None = None
    caching: bool | None = None

    def over(self, policy: Policy) -> CachePolicy:
        """What the cache is to obey. Raises `UsageError`."""
        return CachePolicy(
            max_age_s=_first(self.max_age_s, policy.max_age_s, MAX_AGE_DEFAULT_S),
            max_entries=int(_first(self.max_entries, policy.max_entries, MAX_ENTRIES_DEFAULT)),
            max_uses=policy.max_uses if self.max_uses is None else self.max_uses,
            caching=bool(_first(self.caching, policy.caching, default=True)),
        )

    @property
    def names(self) -> list[str]:
        """The policy's fields that do not count for this mount."""
        return [name for name in CACHE_FIELDS if getattr(self, name) is not None]


def _first(override: float | None, policy: float | None, default: float) -> float:
    """What is said, by whoever goes first."""
    return override if override is not None else policy if policy is not None else default
