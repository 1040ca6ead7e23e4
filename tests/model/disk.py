"""The smallest disk that can lose power: a map of sectors.

It keeps, per sector, the value last made durable and every value written since; a power cut leaves any one of them.
`kill -9` leaves everything to the next owner, no more durable than it was.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator

Key = tuple[str | int, ...]
View = dict[Key, object]


class Disk:
    """Sectors by key. None means "nothing there", as for a key never written."""

    def __init__(self, durable: View | None = None) -> None:
        self.durable: View = dict(durable or {})
        self.volatile: dict[Key, list[object]] = {}
        self.before_sync: Callable[[], None] | None = None
        """Called before a sync takes effect: the moment before is the worst one to lose power."""

    def clone(self) -> Disk:
        other = Disk(self.durable)
        other.volatile = {key: list(values) for key, values in self.volatile.items()}
        return other

    def write(self, key: Key, value: object) -> None:
        self.volatile.setdefault(key, []).append(value)

    def get(self, key: Key) -> object:
        values = self.volatile.get(key)
        return values[-1] if values else self.durable.get(key)

    def view(self) -> View:
        """What a reader sees now."""
        return {**self.durable, **{key: values[-1] for key, values in self.volatile.items()}}

    def sync(self, select: Callable[[Key], bool] = lambda _: True) -> None:
        """Make every chosen sector durable."""
        if self.before_sync is not None:
            self.before_sync()
        for key in [key for key in self.volatile if select(key)]:
            self.durable[key] = self.volatile.pop(key)[-1]

    def crash_states(self, rng: random.Random, limit: int) -> Iterator[View]:
        """All that a power cut can leave if that is at most `limit` states, else the extremes and a sample."""
        keys = list(self.volatile)
        options = [[self.durable.get(key), *self.volatile[key]] for key in keys]
        if math.prod(len(each) for each in options) <= limit:
            choices: Iterator[tuple[object, ...]] = itertools.product(*options)
        else:
            choices = itertools.islice(_sample(options, rng), limit)
        for choice in choices:
            yield {**self.durable, **dict(zip(keys, choice, strict=True))}


def _sample(options: list[list[object]], rng: random.Random) -> Iterator[tuple[object, ...]]:
    oldest, newest = tuple(each[0] for each in options), tuple(each[-1] for each in options)
    yield oldest
    yield newest
    at = rng.randrange(len(options))
    yield (*newest[:at], oldest[at], *newest[at + 1 :])
    yield (*oldest[:at], newest[at], *oldest[at + 1 :])
    while True:
        yield tuple(rng.choice(each) for each in options)
