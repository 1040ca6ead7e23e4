"""Runs short histories of directory operations, and cuts the power before every sync and after every call.

What must hold of the survivor: no damage anywhere; every name stands for something it stood for at or after its last
acknowledged sync; nothing acknowledged and never removed is gone; nothing is in two places but hard links.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from cryptfs.store.disk_model import Order
from cryptfs.store.memory import MemoryStore
from tests.model.directory_model import DIR, FILE, ROOT, UNKNOWN, Binding, Look, Namespace, Ops, Place

Path = tuple[str, ...]


@dataclass(frozen=True)
class Op:
    """A call: `verb` is a method of `Ops` or "kill" or "remount"; paths are names from the root."""

    verb: str
    first: Path = ()
    second: Path = ()

    def __str__(self) -> str:
        return " ".join([self.verb, *("/".join(path) or "/" for path in (self.first, self.second) if path)])


def ops_of(text: str) -> tuple[Op, ...]:
    """Calls separated by commas: verb and paths; "/" is the root."""
    out = []
    for line in text.split(","):
        verb, *paths = line.split()
        parsed = [tuple(part for part in path.split("/") if part) for path in paths]
        out.append(Op(verb, *parsed))
    return tuple(out)


OPS = ops_of(
    "create n,create d/n,create L,create x,unlink x,mkdir m,create m/n,link x d/l,"
    "rename x d/x,rename x d/y,rename x z,rename x L,rename d/y x,rename x m/x,rename d/y m/y,rename d m/d,"
    "fsync_file x,fsync_file n,fsync_file m/n,fsync_file m/x,fsync_dir /,fsync_dir d,"
    "compact /,compact d,compact m,kill,remount"
)
NEW = ops_of("create x,mkdir d,create d/y,fsync_file x,fsync_file d/y")
"""A start in the epoch that will crash; all of it acknowledged."""
OLD = ops_of("create x,mkdir d,create d/y,fsync_file x,fsync_file d/y,remount")
"""The same, but of an earlier epoch that ended well."""


@dataclass
class History:
    """All namespaces since the last mount, and from which on each name and id is acknowledged."""

    states: list[Namespace]
    acknowledged: dict[Place, int] = field(default_factory=dict)
    kept: dict[str, int] = field(default_factory=dict)

    def copy(self) -> History:
        return History(list(self.states), dict(self.acknowledged), dict(self.kept))

    def acknowledge(self, place: Place) -> None:
        now = len(self.states) - 1
        self.acknowledged[place] = now
        binding = self.states[-1].get(place)
        if binding is not None:
            self.kept[binding[1]] = now

    def problems(self, look: Look, epoch: int, order: Order) -> list[str]:
        out = [f"damage: {damage}" for damage in look.damage]
        for place in {place for state in self.states for place in state} | set(look.seen):
            allowed = [state.get(place) for state in self.states[self.acknowledged.get(place, 0) :]]
            seen = look.seen.get(place)
            if seen not in allowed and not (seen == (FILE, UNKNOWN) and any(_is_new(each, epoch) for each in allowed)):
                out.append(f"{place[1]} stands for what it never was")
        everywhere = Counter(binding[1] for binding in look.seen.values())
        for entry_id, since in self.kept.items():
            always = all(any(b[1] == entry_id for b in state.values()) for state in self.states[since:])
            empty = any(  # its header is lost, and with it nothing acknowledged but the name
                look.seen.get(place) == (FILE, UNKNOWN)
                for state in self.states[since:]
                for place, b in state.items()
                if b[1] == entry_id and _is_new(b, epoch)
            )
            # link and unlink in two directories are two calls: only a journal keeps the first if it keeps the second
            linked = any(sum(b[1] == entry_id for b in state.values()) > 1 for state in self.states[since:])
            excused = empty or (linked and order is not Order.JOURNAL)
            if always and not everywhere[entry_id] and not excused:
                out.append("something acknowledged is gone")
        for entry_id, count in everywhere.items():
            most = max(sum(b[1] == entry_id for b in state.values()) for state in self.states)
            if entry_id != UNKNOWN and count > most:
                out.append("one thing in two places")
        return out


def _is_new(binding: Binding | None, epoch: int) -> bool:
    return binding is not None and binding[0] == FILE and binding[1].startswith(f"{epoch}.")


@dataclass
class Findings:
    states: int = 0
    wrong: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)


class Explorer:
    """One writer (which knows its reader) on disks of one order."""

    def __init__(
        self, make: type[Ops], *, ops: Sequence[Op] = OPS, order: Order = Order.DIRECTORY, limit: int = 20,
        again: int = 0, start: Sequence[Op] = OLD, stop_at_first: bool = False, seed: int = 1,
    ) -> None:  # fmt: skip
        self.make, self.ops, self.order, self.limit, self.again = make, ops, order, limit, again
        self.stop_at_first, self.start = stop_at_first, start
        self.rng = random.Random(seed)
        self.findings = Findings()

    def exhaustive(self, depth: int) -> Findings:
        """Every history of `depth` calls after the start."""
        self._deeper([], depth)
        return self.findings

    def _deeper(self, before: list[Op], depth: int) -> None:
        for op in self.ops:
            if self.stop_at_first and self.findings.wrong:
                return
            if self._run([*before, op], cut_only_last=True) and depth > 1:
                self._deeper([*before, op], depth - 1)

    def sample(self, histories: int, length: int) -> Findings:
        """Random histories of `length` calls."""
        for _ in range(histories):
            self._run(self.rng.choices(self.ops, k=length), cut_only_last=False)
            if self.stop_at_first and self.findings.wrong:
                break
        return self.findings

    def _run(self, ops: Sequence[Op], *, cut_only_last: bool) -> bool:
        """Whether the last call could be made."""
        run = Run(self, self.make(MemoryStore(order=self.order)))
        for op in self.start:
            run.do(op)
        run.history = History([dict(run.fs.names)], dict.fromkeys(run.fs.names, 0), {})
        for _, entry_id in run.fs.names.values():
            run.history.kept[entry_id] = 0
        possible = True
        for i, op in enumerate(ops):
            run.cutting = not cut_only_last or i == len(ops) - 1
            possible = run.do(op)
            if not possible and cut_only_last:
                break
        return possible


class Run:
    """One history as it happens."""

    def __init__(self, explorer: Explorer, fs: Ops) -> None:
        self.explorer, self.fs = explorer, fs
        self.history = History([dict(fs.names)])
        self.done: list[str] = []
        self.cutting = False

    def do(self, op: Op) -> bool:
        """False if the call makes no sense now."""
        if op.verb in {"kill", "remount"}:
            self._mount(op.verb)
            return True
        places = [self._place(path) for path in (op.first, op.second) if path]
        effect = self._effect(op, places)
        if effect is None:
            return False
        self.done.append(str(op))
        self.history.states.append(effect)
        self.fs.store.before_call = self._before_call
        self._call(op, places)
        self.fs.store.before_call = None
        assert self.fs.names == effect, (self.done, self.fs.names, effect)
        if op.verb == "fsync_file":
            self._acknowledge(places[0])
        elif op.verb == "fsync_dir":
            dir_id = self._dir_id(op.first)
            for place in {place for state in self.history.states for place in state if place[0] == dir_id}:
                self._acknowledge(place)
        self._cut()
        return True

    def _acknowledge(self, place: Place) -> None:
        while place[0] != ROOT:
            self.history.acknowledge(place)
            place = self.fs.parent[place[0]]
        self.history.acknowledge(place)

    def _dir_id(self, path: Path) -> str:
        dir_id = ROOT
        for name in path:
            kind, dir_id = self.fs.names.get((dir_id, name), (FILE, ""))
            if kind != DIR:
                return ""
        return dir_id

    def _place(self, path: Path) -> Place:
        return self._dir_id(path[:-1]), path[-1]

    def _effect(self, op: Op, places: list[Place]) -> Namespace | None:
        names = dict(self.fs.names)
        new = f"{self.fs.epoch}.{self.fs.made + 1}"
        if any(not place[0] for place in places):
            return None
        match op.verb, places:
            case (("create" | "mkdir"), [place]) if place not in names:
                names[place] = (FILE if op.verb == "create" else DIR, new)
            case "unlink", [place] if names.get(place, (DIR,))[0] == FILE:
                del names[place]
            case "rename", [src, dst] if src in names and (dst not in names or names[dst][0] == FILE):
                names[dst] = names.pop(src)
            case "link", [src, dst] if src in names and dst not in names:
                names[dst] = names[src]
            case "fsync_file", [place] if names.get(place, (DIR,))[0] == FILE:
                pass
            case (("fsync_dir" | "compact"), _) if self._dir_id(op.first):
                pass
            case _:
                return None
        return names

    def _call(self, op: Op, places: list[Place]) -> None:
        call: Callable[..., None] = getattr(self.fs, op.verb)
        if op.verb in {"fsync_dir", "compact"}:
            call(self._dir_id(op.first))
        else:
            call(*places)

    def _mount(self, verb: str) -> None:
        """After kill -9 or a clean unmount: exactly what was there."""
        self.done.append(verb)
        before = dict(self.fs.names)
        crashed = self.fs.crashed | {self.fs.epoch} if verb == "kill" else self.fs.crashed
        if verb == "remount":
            self.fs.store.syncfs(self.fs.store.root())
        self.fs = type(self.fs)(self.fs.store.killed(), self.fs.epoch, crashed)
        for damage in self.fs.found.damage:
            self._note(f"damage: {damage}", f"after {verb}")
        if self.fs.names != before:
            self._note("a mount changed something", f"after {verb}")
        self.history = self._all_durable()

    def _all_durable(self) -> History:
        """Mounting synced everything but the ids it gave to files without one."""
        names = dict(self.fs.names)
        ids = (binding[1] for binding in names.values())
        return History([names], dict.fromkeys(names, 0), {i: 0 for i in ids if not i.startswith(f"{self.fs.epoch}.")})

    def _before_call(self, name: str) -> None:
        if name in {"fsync", "fdatasync", "syncfs"}:
            self._cut()

    def _cut(self) -> None:
        if not self.cutting:
            return
        explorer = self.explorer
        hook, self.fs.store.before_call = self.fs.store.before_call, None
        crashed = self.fs.crashed | {self.fs.epoch}
        for survivor in self.fs.store.crash_states(explorer.rng, explorer.limit):
            explorer.findings.states += 1
            look = self.fs.reader(survivor, crashed).look()
            problems = self.history.problems(look, self.fs.epoch, explorer.order)
            for problem in problems:
                self._note(problem, "power cut")
            if explorer.again and not problems:
                self._go_on(survivor, crashed)
        self.fs.store.before_call = hook

    def _go_on(self, survivor: MemoryStore, crashed: frozenset[int]) -> None:
        explorer = self.explorer
        inner = Explorer(explorer.make, ops=explorer.ops, order=explorer.order, limit=3)
        inner.rng = explorer.rng
        run = Run(inner, type(self.fs)(survivor, self.fs.epoch, crashed))
        run.done = [*self.done, "power cut"]
        run.history = run._all_durable()
        run.cutting = True
        run._cut()
        for op in explorer.rng.choices(explorer.ops, k=explorer.again):
            run.do(op)
        explorer.findings.states += inner.findings.states
        explorer.findings.wrong.update(inner.findings.wrong)
        explorer.findings.examples.update(inner.findings.examples)

    def _note(self, problem: str, when: str) -> None:
        self.explorer.findings.wrong[problem] += 1
        self.explorer.findings.examples.setdefault(problem, ", ".join([*self.done, when]))
