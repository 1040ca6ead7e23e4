"""What may be found after a crash: everything a volume ever held since it was last durable, and what was acknowledged.

A `World` is told of each operation before it runs and of each acknowledgement after the sync returned. It knows
nothing of how cryptfs works; what it asks of a survivor:

- a name stands for something it stood for at or after its last acknowledgement;
- a directory's entries are those of one moment of its history, also if the disk forgets the directories' changes
  independently of each other; on a disk with one journal the whole tree is that of one moment;
- nothing acknowledged is gone that was there ever since, and nothing is in more places than it ever was;
- a file's content is one of those it had since its last acknowledgement: every write whole or absent, in their order.

`fsync` of a file acknowledges its content, its name (if it has only one) and that it can be reached; `fsync` of a
directory acknowledges which names it has, and that it can be reached.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from cryptfs.store.disk_model import Order
from cryptfs.types import Kind

ROOT = 0
UNKNOWN = -1
"""An empty file or directory under an id nobody gave: its creation lost its header or log."""

Place = tuple[int, bytes]
"""(number of the directory, name)."""
Space = dict[Place, int]
"""Which object each name stands for."""

LONG_NAME_BYTES = 176


@dataclass(slots=True)
class Thing:
    """A file, directory or symlink. `history`: contents or targets it had; `acked`: index of the acknowledged one."""

    kind: Kind
    label: str
    history: list[bytes]
    acked: int | None = None

    def copy(self) -> Thing:
        return Thing(self.kind, self.label, list(self.history), self.acked)


@dataclass(frozen=True, slots=True)
class Seen:
    """What lies under one name of a survivor."""

    number: int
    kind: Kind
    content: bytes = b""
    log_id: bytes = field(default=b"", compare=False)


Look = dict[Place, Seen]


@dataclass(slots=True)
class World:
    """`spaces`: all namespaces since the volume was last wholly durable, the present one last."""

    things: dict[int, Thing] = field(default_factory=dict)
    spaces: list[Space] = field(default_factory=lambda: [{}])
    acked_places: dict[Place, int] = field(default_factory=dict)
    kept: dict[int, int] = field(default_factory=dict)
    ids: dict[bytes, int] = field(default_factory=dict)
    """Whose ids are known; shared by all copies."""
    acks: int = 0
    """How many acknowledgements there were."""
    least_kek: int = 1
    """A rotation said that nothing needs an older one."""

    def __post_init__(self) -> None:
        self.things.setdefault(ROOT, Thing(Kind.DIR, "/", [], 0))

    def copy(self) -> World:
        things = {number: thing.copy() for number, thing in self.things.items()}
        return World(
            things, list(self.spaces), dict(self.acked_places), dict(self.kept), self.ids, self.acks, self.least_kek
        )

    @property
    def now(self) -> Space:
        return self.spaces[-1]

    # paths -----------------------------------------------------------------------------------------------------

    def number(self, path: bytes) -> int | None:
        """What the path stands for now."""
        number: int | None = ROOT
        for name in filter(None, path.split(b"/")):
            number = self.now.get((number, name)) if number is not None else None
        return number

    def place(self, path: bytes) -> Place | None:
        """The place a path means, if its directory exists."""
        above, _, name = path.rpartition(b"/")
        number = self.number(above)
        return (number, name) if number is not None and self.things[number].kind == Kind.DIR else None

    def places_of(self, number: int) -> list[Place]:
        return [place for place, each in self.now.items() if each == number]

    def paths(self) -> Iterator[bytes]:
        """All that can be reached now."""
        todo = [(ROOT, b"")]
        while todo:
            above, path = todo.pop()
            for (number, name), child in self.now.items():
                if number == above:
                    below = path + b"/" + name if path else name
                    yield below
                    if self.things[child].kind == Kind.DIR:
                        todo.append((child, below))

    # operations ------------------------------------------------------------------------------------------------

    def make(self, place: Place, kind: Kind, label: str, content: bytes = b"") -> int:
        number = len(self.things)
        self.things[number] = Thing(kind, label, [content])
        self.change({place: number})
        return number

    def change(self, come: Space | None = None, gone: tuple[Place, ...] = ()) -> None:
        """One operation on names, which may or may not have happened from now on."""
        space = {place: number for place, number in self.now.items() if place not in gone}
        self.spaces.append(space | (come or {}))

    def write(self, number: int, content: bytes) -> None:
        self.things[number].history.append(content)

    # acknowledgements ------------------------------------------------------------------------------------------

    def _reached(self, number: int) -> None:
        while number != ROOT:
            self.kept[number] = len(self.spaces) - 1
            places = self.places_of(number)
            if not places:
                return
            number = places[-1][0]

    def file_synced(self, number: int) -> None:
        self.acks += 1
        thing = self.things[number]
        thing.acked = len(thing.history) - 1
        self._reached(number)
        places = self.places_of(number)
        if len(places) == 1:
            self.acked_places[places[0]] = len(self.spaces) - 1

    def directory_synced(self, number: int) -> None:
        self.acks += 1
        self._reached(number)
        for place in {place for space in self.spaces for place in space if place[0] == number}:
            self.acked_places[place] = len(self.spaces) - 1
            child = self.now.get(place)
            if child is not None:
                self.kept[child] = len(self.spaces) - 1

    def all_synced(self) -> None:
        """After a clean unmount."""
        self.acks += 1
        for number in set(self.now.values()):
            thing = self.things[number]
            thing.acked = len(thing.history) - 1 if thing.history else 0
        self.spaces = [self.now]
        self.acked_places = {}
        self.kept = dict.fromkeys(set(self.now.values()), 0)

    def rotated(self, version: int) -> None:
        """All of it was rewritten durably: what a crash leaves from now on is read without older KEKs."""
        self.acks += 1
        self.least_kek = version

    # what may be found -----------------------------------------------------------------------------------------

    def problems(self, look: Look, order: Order) -> list[str]:
        """What of a survivor may not be; empty if all is well."""
        return [
            *self._wrong_names(look),
            *self._lost(look, order),
            *self._too_often(look),
            *self._mixed_moments(look, order),
            *self._wrong_contents(look),
        ]

    def _name(self, place: Place) -> str:
        return f"{self.things[place[0]].label.rstrip('/')}/{place[1][:20].decode('ascii', 'replace')}"

    def _may_be_unknown(self, number: int | None, seen: Seen) -> bool:
        """Whether `seen`, empty and under a new id, may be this one: made since, and nothing of it acknowledged."""
        if number is None or seen.content:
            return False
        thing = self.things[number]
        return thing.kind == seen.kind and thing.acked is None

    def _wrong_names(self, look: Look) -> Iterator[str]:
        standing = {seen.number for seen in look.values()} | {ROOT}
        for place in {place for space in self.spaces for place in space} | set(look):
            if place[0] not in standing:
                continue  # Its directory is gone, which `_lost` judges.
            allowed = [space.get(place) for space in self.spaces[self.acked_places.get(place, 0) :]]
            seen = look.get(place)
            if (seen.number if seen else None) in allowed:
                continue
            if seen and seen.number == UNKNOWN and any(self._may_be_unknown(n, seen) for n in allowed):
                continue
            if seen is None and any(self._may_go(place, number) for number in allowed):
                continue
            what = "nothing" if seen is None else self._called(seen.number)
            yield f"{self._name(place)} stands for {what}, not for {' or '.join({self._called(n) for n in allowed})}"

    def _called(self, number: int | None) -> str:
        if number is None:
            return "nothing"
        return "something new" if number == UNKNOWN else f"{self.things[number].label} (#{number})"

    def _may_go(self, place: Place, number: int | None) -> bool:
        """A long name, or a symlink, is taken away if the log that says what it is never reached the disk."""
        if number is None or number in self.kept:
            return False
        return len(place[1]) >= LONG_NAME_BYTES or self.things[number].kind == Kind.SYMLINK

    def _lost(self, look: Look, order: Order) -> Iterator[str]:
        there = {seen.number for seen in look.values()}
        for number, since in self.kept.items():
            spaces = self.spaces[since:]
            if number in there or not all(number in space.values() for space in spaces):
                continue
            # Link here and unlink there are two calls: only a journal keeps the first because it keeps the second.
            linked = any(sum(n == number for n in space.values()) > 1 for space in spaces)
            unknown = any(
                look.get(place) == Seen(UNKNOWN, self.things[number].kind) and self.things[number].acked is None
                for space in spaces
                for place, n in space.items()
                if n == number
            )
            if not unknown and (order is Order.JOURNAL or not linked):
                yield f"{self._called(number)} was acknowledged and is lost"

    def _too_often(self, look: Look) -> Iterator[str]:
        for number, count in Counter(seen.number for seen in look.values()).items():
            most = max((sum(n == number for n in space.values()) for space in self.spaces), default=0)
            if number != UNKNOWN and count > most:
                yield f"{self._called(number)} is in {count} places"

    def _mixed_moments(self, look: Look, order: Order) -> Iterator[str]:
        directories = {ROOT} | {seen.number for seen in look.values() if seen.kind == Kind.DIR} - {UNKNOWN}
        moments = range(len(self.spaces))
        fitting = {d: {i for i in moments if self._fits(look, d, self.spaces[i])} for d in directories}
        for directory, fit in fitting.items():
            if not fit:
                yield f"the entries of {self._called(directory)} are those of no one moment"
        if order is Order.JOURNAL and all(fitting.values()) and not set.intersection(*fitting.values()):
            yield "the directories are of different moments"

    def _fits(self, look: Look, directory: int, space: Space) -> bool:
        seen_here = {name: seen for (above, name), seen in look.items() if above == directory}
        here = {name: number for (above, name), number in space.items() if above == directory}
        for name in seen_here.keys() | here.keys():
            seen, number = seen_here.get(name), here.get(name)
            if (seen.number if seen else None) == number:
                continue
            if seen and seen.number == UNKNOWN and self._may_be_unknown(number, seen):
                continue
            if seen is None and self._may_go((directory, name), number):
                continue
            return False
        return True

    def _wrong_contents(self, look: Look) -> Iterator[str]:
        for place, seen in look.items():
            if seen.number == UNKNOWN or seen.kind == Kind.DIR:
                continue
            thing = self.things[seen.number]
            if seen.content in thing.history[thing.acked or 0 :]:
                continue
            if seen.content in thing.history:
                yield f"{self._name(place)} is as it was before it was acknowledged ({len(seen.content)} bytes)"
            else:
                yield f"{self._name(place)} holds {len(seen.content)} bytes it never held"


def of_found(look: Look, before: World) -> World:
    """The world as a survivor shows it: mounting made all of it durable."""
    world = World(least_kek=before.least_kek)
    numbers = {ROOT: ROOT}
    space: dict[Place, int] = {}
    for place, seen in look.items():
        number = world.ids.get(seen.log_id) if seen.number == UNKNOWN else numbers.get(seen.number)
        if number is None:
            number = len(world.things)
            label = before.things[seen.number].label if seen.number != UNKNOWN else "something new"
            # What was started anew, without header or log, may be found under another new id the next time.
            restarted = seen.number == UNKNOWN or (seen.kind == Kind.FILE and not seen.content)
            world.things[number] = Thing(seen.kind, label, [seen.content], None if restarted else 0)
            world.ids[seen.log_id] = number
            if seen.number != UNKNOWN:
                numbers[seen.number] = number
        space[place] = number
    world.spaces = [{(numbers[above], name): number for (above, name), number in space.items()}]
    world.kept = dict.fromkeys(set(world.now.values()), 0)
    return world
