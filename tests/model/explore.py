"""Runs every short history of a model, and cuts the power at every moment of it."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tests.model.disk import Disk, View
from tests.model.file_model import Crashed, File, recover

Op = tuple[str, Callable[[File], None]]


def _w(start: int, end: int) -> Op:
    return f"write {start}-{end}", lambda file: file.write(start, end)


def _t(size: int) -> Op:
    return f"truncate {size}", lambda file: file.truncate(size)


def _kill(file: File) -> None:
    file.mount()


def _remount(file: File) -> None:
    file.unmount()
    file.mount()


CHANGES: tuple[Op, ...] = (
    _w(0, 2), _w(0, 1), _w(1, 3), _w(2, 3), _w(3, 4), _w(2, 6), _t(0), _t(1), _t(3), _t(5),
)  # fmt: skip
FSYNC: Op = ("fsync", lambda file: file.fsync())
KILL: Op = ("kill -9", _kill)
REMOUNT: Op = ("remount", _remount)
COMPACT: Op = ("compact", lambda file: file.compact())
ROTATE: Op = ("rotate", lambda file: file.rotate())
ALL: tuple[Op, ...] = (*CHANGES, FSYNC, KILL, REMOUNT, COMPACT, ROTATE)

START: tuple[Op, ...] = (_w(0, 3), FSYNC)


@dataclass
class Findings:
    """How many crash states were looked at, and which were wrong (with one history each)."""

    states: int = 0
    wrong: Counter[str] = field(default_factory=Counter)
    examples: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def note(self, what: str, history: Sequence[str]) -> None:
        self.wrong[what] += 1
        self.examples.setdefault(what, tuple(history))


@dataclass
class Explorer:
    """Depth-first over histories of `ops`: `limit` crash states at each moment, then `again` operations and a cut."""

    make: type[File]
    ops: Sequence[Op] = ALL
    limit: int = 40
    again: int = 0
    stop_at_first: bool = False
    rng: random.Random = field(default_factory=lambda: random.Random(1))
    findings: Findings = field(default_factory=Findings)

    def run(self, depth: int, start: Sequence[Op] = START) -> Findings:
        """All histories of `depth` operations after `start`."""
        file = self.make(Disk())
        for _, do in start:
            do(file)
        self._deeper(file, depth, [name for name, _ in start])
        return self.findings

    def sample(self, histories: int, length: int) -> Findings:
        """Random histories of `length` operations."""
        for _ in range(histories):
            file = self.make(Disk())
            done: list[str] = []
            for op in self.rng.choices(self.ops, k=length):
                if not self._step(file, op, done):
                    break
        return self.findings

    def _deeper(self, file: File, depth: int, done: list[str]) -> None:
        for op in self.ops:
            if self.stop_at_first and self.findings.wrong:
                return
            next_file, next_done = file.clone(), list(done)
            if self._step(next_file, op, next_done) and depth > 1:
                self._deeper(next_file, depth - 1, next_done)

    def _step(self, file: File, op: Op, done: list[str]) -> bool:
        """Do one operation, cutting the power before each sync in it and after it."""
        done.append(op[0])
        file.disk.before_sync = lambda: self._cut(file, done)
        try:
            op[1](file)
        except Crashed as crashed:
            self.findings.note(str(crashed), done)
            return False
        finally:
            file.disk.before_sync = None
        self._cut(file, done)
        return True

    def _cut(self, file: File, done: list[str]) -> None:
        for view in file.disk.crash_states(self.rng, self.limit):
            self.findings.states += 1
            content = recover(view).content
            if content not in file.history:
                self.findings.note("damaged" if content is None else "not in history", done)
            elif self.again:
                self._go_on(view, done)

    def _go_on(self, view: View, done: list[str]) -> None:
        """After the crash: mount, a few more operations, another crash."""
        inner = Explorer(self.make, self.ops, limit=6, rng=self.rng)
        try:
            file = self.make(Disk(view))
        except Crashed as crashed:
            self.findings.note(f"{crashed} after a crash", done)
            return
        after = [*done, "power cut"]
        for op in self.rng.choices(self.ops, k=self.again):
            if not inner._step(file, op, after):
                break
        self.findings.states += inner.findings.states
        for what, count in inner.findings.wrong.items():
            self.findings.wrong[f"{what}, second crash"] += count
            self.findings.examples.setdefault(f"{what}, second crash", inner.findings.examples[what])


def tampered(depth: int, *, forgive_always: bool) -> Findings:
    """Histories that end with a clean unmount; then one sector is zeroed or set back: nothing else may be served."""
    findings = Findings()
    for ops in itertools.product((*CHANGES, FSYNC, COMPACT), repeat=depth):
        file = File(Disk())
        before: dict[object, object] = {}
        for name, do in (*START, *ops, REMOUNT):
            before.update({key: value for key, value in file.disk.durable.items() if name == "fsync"})
            do(file)
        file.unmount()
        good = file.disk.view()
        for key in good:
            if key in {("state",), ("name",)}:
                continue  # authentic in themselves, or the directory's business
            for value in (None, before.get(key)):
                findings.states += 1
                content = recover({**good, key: value}, forgive_always=forgive_always).content
                if content not in {None, file.content}:
                    findings.note("tampering served", [name for name, _ in ops])
    return findings
