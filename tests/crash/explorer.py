"""Runs operations, stops before every store call that follows a change, and looks at what a crash there may leave.

    explorer = Explorer(Scene(Order.DIRECTORY, "old"), seed=1)
    await explorer.explore(parse_ops("rename a b; fsync b"), per_moment=4, again=1)

`explore` raises `Wrong` at the first survivor that is not as it should be. Its text has the operations, what the disk
lost, and a command that does the same again.

A survivor is opened (every crash may hit that, too), read to its end, worked on and crashed again, `again` times over.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from cryptfs.errors import CryptfsError
from cryptfs.store.disk_model import Disk, Inode, Order
from cryptfs.store.memory import MemoryStore
from cryptfs.testing.volumes import SampleVolume
from tests.crash.machine import Complaints, dropped, new_volume, opened
from tests.crash.survivors import Kept, Words, after_power_cut, choices, fingerprint, units_of
from tests.crash.workload import Op, Run, look_at, parse_ops
from tests.crash.world import Look, World, of_found
from tests.fs.tree import Tree

BASE = parse_ops(
    "mkdir d; mkdir e; create a; create b; create d/c; fsync a; overwrite a; fsync d/c; grow d/c; fsync d/c; append d/c"
)
"""Files with blocks in both homes, an empty directory."""
SYNCED = parse_ops("fsync a; fsync b; fsync d/c; fsyncdir /; fsyncdir d; fsyncdir e")
UNSYNCED = parse_ops(
    "hold; overwrite a; cut d/c; create d/k; rename b d/b; mkdir e/m; symlink d/s; fsync d/c; append a"
)

KILL_CHANCE = 0.25

STARTS = ("old", "new", "killed")
"""The files of `BASE`: of an epoch that ended cleanly; made and acknowledged just now; and, as found after kill -9 in
the middle of `UNSYNCED`."""

AGAIN = parse_ops(
    "overwrite a; append a; cut a; create a; unlink a; rename b a; fsync a; fsync b; rename a d/c; rename d/c a;"
    "create n; mkdir m; rename a m/a; rename n a; fsync n; fsyncdir /; fsyncdir d; rmdir e; compact a; compact /;"
    "settle; reap; rotate; rewrite; remount; link a l; unlink d/c; create d/c; fsync d/c; rename m d/m; symlink t;"
    "unlink t"
)
"""What a survivor is used for, of which what is possible is done."""


@dataclass(frozen=True)
class Step:
    """Operations, and a crash at their `moment`-th change. `lost`: None for kill -9, else what the disk has not."""

    ops: tuple[Op, ...]
    moment: int = -1
    lost: Kept | None = None

    def __str__(self) -> str:
        if self.lost is None:
            how = "killed"
        else:
            how = "lost " + ",".join(f"{ino}:{index}" for ino, index in sorted(self.lost))
        return f"{'; '.join(map(str, self.ops))} @{self.moment} {how}"

    @classmethod
    def parse(cls, text: str) -> Step:
        words, _, rest = text.partition("@")
        moment, how, *lost = rest.split()
        if how == "killed":
            return cls(parse_ops(words), int(moment), None)
        pairs = [each.split(":") for each in "".join(lost).split(",") if each]
        return cls(parse_ops(words), int(moment), frozenset((int(ino), int(index)) for ino, index in pairs))


@dataclass(frozen=True)
class Case:
    """Steps, one after the other, on the disk the one before left; each step's `moment` counts its own changes."""

    order: Order
    start: str
    seed: int
    steps: tuple[Step, ...]

    def __str__(self) -> str:
        return " | ".join([f"{self.order.value} {self.start} {self.seed}", *map(str, self.steps)])

    @classmethod
    def parse(cls, text: str) -> Case:
        head, *steps = text.split("|")
        order, start, seed = head.split()
        return cls(Order(order), start, int(seed), tuple(Step.parse(step) for step in steps))


class Wrong(AssertionError):
    """A survivor that may not be."""

    def __init__(self, case: Case, problems: Sequence[str], story: Sequence[str] = ()) -> None:
        super().__init__()
        self.case = case
        self.problems = list(problems)
        self.story = list(story)

    @property
    def kind(self) -> str:
        """What is wrong, without which file: to tell one bug from another."""
        return re.sub(r"\S*[/\d]\S*", "", self.problems[0])

    def __str__(self) -> str:
        return "\n".join([*self.problems, *self.story, f"python -m tests.crash.replay '{self.case}'"])


@dataclass
class Moment:
    """Between two store calls: the disk then, and what may be found if the power goes now."""

    disk: Disk
    world: World
    before: str


READING = frozenset({"close", "fstat", "fstatvfs", "listdir", "lock", "lstat", "pread", "preadv", "readlink"})
"""Store calls that change nothing."""


class Recorder:
    """The hook of a store: keeps a `Moment` whenever something has changed since the last one.

    Moments share the copies of inodes that did not change between them: they are only read from.
    """

    def __init__(self, disk: Disk, world: World) -> None:
        self.disk = disk
        self.world = world
        self.moments: list[Moment] = []
        self._call = ""
        self._acks = -1
        self._tables: tuple[object, ...] = ()
        self._inodes: dict[int, tuple[tuple[int, ...], tuple[int, ...], tuple[object, ...]]] = {}
        self._copies: dict[int, Inode] = {}

    def __call__(self, call: str) -> None:
        before, self._call = self._call, call
        if before in READING and self.world.acks == self._acks:
            return
        # A sync replaces `durable_content` or `transactions`; every other change lengthens one list or replaces the
        # attributes. What is compared is kept, so that an identity is not used again meanwhile.
        transactions = self.disk.transactions
        tables = (len(transactions), id(transactions), transactions)
        names_changed = tables[:2] != self._tables[:2]
        changed = names_changed or self.world.acks != self._acks or len(self.disk.inodes) != len(self._inodes)
        inodes, copies, known, copied = {}, {}, self._inodes.get, self._copies
        for ino, inode in self.disk.inodes.items():
            telling = (len(inode.changes), id(inode.durable_content), inode.links)
            same = (id(inode.changes), id(inode.attributes), id(inode.durable_attributes))
            last = known(ino)
            if last is not None and last[0] == telling and not (names_changed and inode.is_dir):
                if last[1] == same:
                    inodes[ino], copies[ino] = last, copied[ino]
                    continue
            else:
                changed = True
            kept = (inode.changes, inode.durable_content, inode.attributes, inode.durable_attributes)
            inodes[ino] = (telling, same, kept)
        if not changed:
            return
        self._acks, self._tables, self._inodes = self.world.acks, tables, inodes
        for ino, inode in self.disk.inodes.items():
            if ino not in copies:
                copies[ino] = inode.copy()
        disk = self.disk
        self._copies = copies
        frozen = Disk(disk.order, copies, list(disk.transactions), disk.next_ino, disk.now_ns)
        self.moments.append(Moment(frozen, self.world.copy(), call))


@dataclass(frozen=True)
class Scene:
    """Where workloads begin. Made once, used by many."""

    order: Order
    start: str
    sample: SampleVolume
    disk: Disk
    world: World

    @classmethod
    async def make(cls, order: Order, start: str) -> Scene:
        """`start` is one of `STARTS`."""
        sample, store = await new_volume(order)
        store.close_store()
        disk, world = store.disk.clone(), World()
        if start != "new":
            run = Run(await opened(sample, disk, 1), world)
            await run.do_all(BASE)
            await run.tree.unmount()
            dropped(run.tree)
            world.all_synced()
        if start == "killed":
            run = Run(await opened(sample, disk, 2), world, written=100)
            await run.do_all(UNSYNCED)
            dropped(run.tree)
        return cls(order, start, sample, disk, world)

    async def begun(self) -> Run:
        """The volume, open, on a copy of the disk."""
        world = self.world.copy()
        world.ids = dict(world.ids)
        self.sample.restart()
        tree = await opened(self.sample, self.disk.clone(), 3)
        if self.start == "new":
            run = Run(tree, world)
            await run.do_all(BASE + SYNCED)
            return run
        if self.start == "killed":
            look = await look_at(tree, world)
            problems = world.problems(look, self.order)
            assert not problems, problems
            return Run(tree, of_found(look, world), written=200)
        return Run(tree, world, written=200)


class Explorer:
    """`states`: how many different survivors were opened and found right."""

    def __init__(self, scene: Scene, seed: int = 1) -> None:
        self.scene = scene
        self.seed = seed
        self.states = 0
        self.workloads = 0
        self._complaints = Complaints()
        self._seen: dict[tuple[int, int, int], Look] = {}
        """What was found on disks of the workload, by fingerprint, by whose ids are known, and with which KEKs."""

    async def explore(self, ops: tuple[Op, ...], *, per_moment: int, again: int = 0) -> bool:
        """False if `ops` cannot be done. Raises `Wrong`."""
        with self._complaints.collected():
            case = Case(self.scene.order, self.scene.start, self.seed, ())
            moments = await self._first(case, ops)
            if not moments:
                return False
            self.workloads += 1
            self._seen = {}
            await self._crash(case, ops, moments, per_moment=per_moment, again=again)
            return True

    # steps -----------------------------------------------------------------------------------------------------

    async def _first(self, case: Case, ops: tuple[Op, ...]) -> list[Moment]:
        """The moments of the first step; none if `ops` cannot be done one after the other."""
        run = await self.scene.begun()
        try:
            store = run.tree.store
            assert isinstance(store, MemoryStore)
            store.before_call = recorder = Recorder(store.disk, run.world)
            return recorder.moments if await self._do(case, run, ops, recorder) else []
        finally:
            dropped(run.tree)

    async def _do(self, case: Case, run: Run, ops: Sequence[Op], recorder: Recorder) -> bool:
        try:
            for op in ops:
                if not run.possible(op):
                    return False
                await run.do(op)
            await run.finish()
        except (OSError, CryptfsError, AssertionError) as error:
            raise Wrong(_with(case, Step(tuple(ops))), [f"an operation failed: {error!r}"]) from error
        recorder("the end")
        return True

    async def _crash(
        self, case: Case, ops: tuple[Op, ...], moments: Sequence[Moment], *, per_moment: int, again: int
    ) -> None:
        for index, moment in enumerate(moments):
            rng = random.Random(f"{self.seed} {ops} {index}")
            for kept in choices(moment.disk, rng, per_moment):
                lost = frozenset(change for unit in units_of(moment.disk) for change in unit) - kept
                step = Step(ops, index, lost)
                await self._survive(_with(case, step), moment, rng, again=again)
            if again and rng.random() < KILL_CHANCE:
                await self._survive(_with(case, Step(ops, index)), moment, rng, again=again)

    async def _survive(self, case: Case, moment: Moment, rng: random.Random, *, again: int) -> None:
        """Look at what the last step of `case` leaves of `moment`'s disk; if `again`, use it and crash once more."""
        lost = case.steps[-1].lost
        disk = moment.disk.clone() if lost is None else after_power_cut(moment.disk, _kept(moment.disk, lost))
        try:
            key = _key(disk, moment.world)
            if again == 0 and key in self._seen:
                self._judge(case, moment.world, self._seen[key])
                return
            more = await self._use(case, disk, moment.world, rng if again else None)
            self.states += 1
            if not again:
                return
            ops, moments = more
            seen, self._seen = self._seen, {}
            for index in rng.sample(range(len(moments)), min(again, len(moments))):
                later = moments[index]
                for kept in choices(later.disk, rng, 1):
                    lost = frozenset(change for unit in units_of(later.disk) for change in unit) - kept
                    await self._survive(_with(case, Step(ops, index, lost)), later, rng, again=0)
            self._seen = seen
        except Wrong as wrong:
            wrong.story[:0] = _story(case, moment)
            raise

    async def _use(
        self, case: Case, disk: Disk, world: World, rng: random.Random | None, ops: tuple[Op, ...] | None = None
    ) -> tuple[tuple[Op, ...], list[Moment]]:
        """Open a survivor and look at it. With `rng` or `ops`, work on it: the moments from its opening on."""
        recorder = Recorder(disk, world) if rng is not None or ops is not None else None
        self._complaints.lines.clear()
        tree: Tree | None = None
        key = _key(disk, world)
        try:
            seed = 10 + len(case.steps)
            tree = await opened(self.scene.sample, disk, seed, recorder, least_kek=world.least_kek)
            look = await look_at(tree, world)
            self._judge(case, world, look)
            self._seen[key] = look
            if recorder is None:
                return (), []
            run = Run(tree, of_found(look, world), written=1000 * len(case.steps))
            run.world.acks = world.acks + 1
            recorder.world = run.world
            chosen = ops if ops is not None else await self._work(case, run, rng, recorder)
            if ops is not None:
                await self._do(case, run, ops, recorder)
            return chosen, recorder.moments
        except (OSError, CryptfsError) as error:
            raise Wrong(case, [f"reading failed: {error!r}"]) from error
        finally:
            if tree is not None:
                dropped(tree)

    def _judge(self, case: Case, world: World, look: Look) -> None:
        problems = world.problems(look, self.scene.order)
        problems += [f"logged: {line}" for line in self._complaints.lines]
        if problems:
            raise Wrong(case, problems)

    async def _work(self, case: Case, run: Run, rng: random.Random | None, recorder: Recorder) -> tuple[Op, ...]:
        """One or two operations that can be done; then, now and then, a clean end, after which all must be there."""
        assert rng is not None
        done: list[Op] = []
        for _ in range(rng.randint(1, 2)):
            possible = [op for op in AGAIN if run.possible(op)]
            done.append(rng.choice(possible))
            await self._do(case, run, done[-1:], recorder)
        return tuple(done)

    # a case once more ------------------------------------------------------------------------------------------

    async def replay(self, case: Case) -> None:
        """Do what `case` says. Raises `Wrong` if its last survivor, or anything on the way there, is."""
        with self._complaints.collected():
            self._seen = {}
            steps, past = case.steps, Case(case.order, case.start, case.seed, ())
            moments = await self._first(past, steps[0].ops)
            stories: list[str] = []
            try:
                for step, following in zip(steps, (*steps[1:], None), strict=True):
                    if step.moment < 0:
                        return
                    past, moment = _with(past, step), moments[step.moment]
                    stories += _story(past, moment)
                    disk = (
                        moment.disk.clone()
                        if step.lost is None
                        else after_power_cut(moment.disk, _kept(moment.disk, step.lost))
                    )
                    _, moments = await self._use(past, disk, moment.world, None, following.ops if following else None)
            except Wrong as wrong:
                wrong.story[:0] = stories
                raise

    async def smaller(self, wrong: Wrong) -> Wrong:
        """The same with as little lost as will do, and as few operations."""
        wrong = await self._fewer_operations(wrong)
        step = wrong.case.steps[-1]
        for change in sorted(step.lost or ()):
            step = wrong.case.steps[-1]
            less = replace(step, lost=(step.lost or frozenset()) - {change})
            try:
                await self.replay(replace(wrong.case, steps=(*wrong.case.steps[:-1], less)))
            except Wrong as still:
                if len(still.case.steps) == len(wrong.case.steps) and still.kind == wrong.kind:
                    wrong = still
            except (LookupError, ValueError):
                continue
        return wrong

    async def _fewer_operations(self, wrong: Wrong) -> Wrong:
        ops = wrong.case.steps[0].ops
        for i in range(len(ops)):
            fewer = ops[:i] + ops[i + 1 :]
            try:
                if fewer:
                    await self.explore(fewer, per_moment=16, again=len(wrong.case.steps) - 1)
            except Wrong as still:
                if still.kind != wrong.kind:
                    continue
                return await self._fewer_operations(still)
        return wrong


def _key(disk: Disk, world: World) -> tuple[int, int, int]:
    return fingerprint(disk), id(world.ids), world.least_kek


def _with(case: Case, step: Step) -> Case:
    return replace(case, steps=(*case.steps, step))


def _kept(disk: Disk, lost: Kept) -> Kept:
    return frozenset(change for unit in units_of(disk) for change in unit) - lost


def _story(case: Case, moment: Moment) -> list[str]:
    """The last crash of `case` in words."""
    step = case.steps[-1]
    things, ids = moment.world.things, moment.world.ids
    labels = {log_id.hex(): things[number].label for log_id, number in ids.items() if number in things}
    start = f"{case.start}, {case.order.value} order" if len(case.steps) == 1 else "then"
    done = "; ".join(map(str, step.ops))
    if step.lost is None:
        return [f"{start}: {done}; killed before {moment.before}"]
    lost = Words(moment.disk, labels).lost(_kept(moment.disk, step.lost))
    return [f"{start}: {done}; power cut before {moment.before}; lost:", *(f"    {line}" for line in lost)]
