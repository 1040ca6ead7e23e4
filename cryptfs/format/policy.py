"""A volume's policy as it stands in `volume`: plain bounded integers by name (FORMAT.md §3). Absent: not set."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from cryptfs.errors import UnsupportedFormat, UsageError, VolumeDamaged

_DAY_S = 86400
BOUNDS: Mapping[str, tuple[int, int]] = MappingProxyType(
    {
        "caching": (0, 1),
        "for_s": (1, 366 * _DAY_S),
        "idle_s": (1, 366 * _DAY_S),
        "max_age_s": (1, 7 * _DAY_S),
        "max_entries": (1024, 1 << 31),
        "max_uses": (1, 1 << 31),
        "reverify_s": (5, 7 * _DAY_S),
        "unwraps_per_s": (1, 1 << 31),
    }
)
"""Least and most of each field, seconds where the name ends in `_s`."""


REVERIFY_DEFAULT_S = 60


@dataclass(frozen=True, slots=True)
class Policy:
    """What the owner set for a volume; None: not set, so the program's default holds.

    `caching` (0 or 1), `max_age_s`, `max_entries`, `max_uses`: the daemon's cache of DEKs. `for_s`, `idle_s`: when an
    unlocked volume is locked. `reverify_s`: how often the root is asked again. `unwraps_per_s`: keys, on average.
    """

    caching: int | None = None
    for_s: int | None = None
    idle_s: int | None = None
    max_age_s: int | None = None
    max_entries: int | None = None
    max_uses: int | None = None
    reverify_s: int | None = None
    unwraps_per_s: int | None = None

    def __post_init__(self) -> None:
        """Raises `UsageError` for a value out of its bounds."""
        for name, value in self.encode().items():
            least, most = BOUNDS[name]
            if type(value) is not int or not least <= value <= most:
                raise UsageError(f"{name.replace('_', '-')} must be from {least} to {most}")

    def encode(self) -> dict[str, int]:
        """The msgpack map: what is set, by name, in alphabetical order."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


NO_POLICY = Policy()


def parse_policy(body: object) -> Policy:
    """Raises `UnsupportedFormat` for a field this program does not know, `VolumeDamaged` for anything else."""
    if not isinstance(body, dict) or any(type(name) is not str for name in body):
        raise VolumeDamaged("the volume file is damaged: policy is no map of names")
    unknown = sorted(body.keys() - BOUNDS.keys())
    if unknown:
        text = f"the volume's policy has fields this program does not know: {', '.join(unknown)}"
        raise UnsupportedFormat(text[:200])
    if list(body) != sorted(body) or None in body.values():
        raise VolumeDamaged("the volume file is damaged: policy is not in the canonical form")
    try:
        return Policy(**body)
    except UsageError as error:
        raise VolumeDamaged(f"the volume file is damaged: policy: {error}") from None
