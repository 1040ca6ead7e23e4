"""One run of the workload on a store that fails, checked against its model all the way."""

from __future__ import annotations

import copy
import errno
import random
from dataclasses import dataclass, field
from typing import cast

from cryptfs.fs.epoch import read_state
from cryptfs.store.disk_model import Order
from cryptfs.store.memory import MemoryStore
from cryptfs.testing.volumes import SampleVolume
from tests.crash.machine import new_volume
from tests.faults.driver import Driver
from tests.faults.faulty import Faults
from tests.faults.workload import Handles, Model, Step, prepare, workload

CODES = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
TRIES = 3


_PREPARED: tuple[MemoryStore, SampleVolume, Model] | None = None
"""A volume left clean, its secrets, and what is in it: made once, copied by every run."""


async def _prepare() -> None:
    global _PREPARED  # noqa: PLW0603 - made once
    model = Model()
    sample, store = await new_volume(Order.DIRECTORY)
    driver = await Driver.mount(store, sample)
    await prepare(driver, model)
    assert await driver.unmount()
    model.acknowledge_all()
    store.close_store()
    _PREPARED = store, sample, model


@dataclass
class Run:
    """One run of the workload on a store that fails."""

    driver: Driver
    model: Model
    faults: Faults
    handles: Handles = field(default_factory=dict)
    done: list[str] = field(default_factory=list)
    failed: int = 0

    @classmethod
    async def start(cls) -> Run:
        if _PREPARED is None:
            await _prepare()
        assert _PREPARED is not None
        store, sample, model = _PREPARED
        own = store.killed()
        return cls(await Driver.mount(own, sample), copy.deepcopy(model), Faults(own))

    @property
    def store(self) -> MemoryStore:
        return cast("MemoryStore", self.driver.store)

    async def run(self) -> None:
        for step in workload():
            await self.take(step)

    async def take(self, step: Step) -> None:
        """Until it succeeds; at last without faults. A call that failed has changed nothing."""
        for attempt in range(TRIES):
            before = len(self.faults.hits)
            hit = await self.attempt(step)
            if hit is None:
                return
            self.failed += 1
            assert len(self.faults.hits) > before, f"{step.what} failed with {errno.errorcode[hit]} all by itself"
            assert errno.errorcode[hit] in {h.split(": ")[1] for h in self.faults.hits[before:]}, (
                f"{step.what} said {errno.errorcode[hit]}, the store said {self.faults.hits[before:]}"
            )
            if attempt == 0:
                with self.faults.paused():
                    await self.compare(f"after {step.what} failed with {errno.errorcode[hit]}")
        with self.faults.paused():
            assert await self.attempt(step) is None, f"{step.what} fails without any fault"

    async def while_full(self, step: Step, code: int, skipped: list[Step]) -> None:
        """Try a step on a full disk: it says so, unless it needs no room. What depends on it waits with it."""
        if any(step.touches & other.touches for other in skipped):
            skipped.append(step)
            return
        hit = await self.attempt(step)
        if hit is not None:
            assert hit == code, f"{step.what} said {errno.errorcode[hit]}"
            assert not step.frees, f"{step.what} needs room"
            skipped.append(step)

    async def attempt(self, step: Step) -> int | None:
        """The errno, None if it succeeded."""
        self.done.append(step.what)
        try:
            await step.do(self.driver, self.handles)
        except OSError as error:
            self.done[-1] += f" -> {errno.errorcode[error.errno or 0]}"
            return error.errno or 0
        step.then(self.model)
        return None

    async def compare(self, when: str) -> None:
        """The tree is what the model says."""
        found, expected = await self.driver.snapshot(), self.model.snapshot()
        for path in sorted(found.keys() | expected.keys()):
            assert found.get(path, "absent") == expected.get(path, "absent"), f"{when}: {path!r}"

    async def check_power_cut(self, rng: random.Random, limit: int) -> int:
        """What a power cut now would leave holds everything acknowledged."""
        states = 0
        for survivor in self.store.crash_states(rng, limit):
            other = await Driver.mount(survivor, self.driver.sample)
            self.model.check_after_crash(await other.snapshot())
            other.kill()
            survivor.close_store()
            states += 1
        return states

    async def finish(self, rng: random.Random) -> None:
        """Healed: everything can be synced, the volume is left clean, and what was acknowledged is there."""
        self.faults.heal()
        for fh in self.handles.values():
            await self.driver.close(fh)
        self.handles.clear()
        await self.compare("healed")
        for path, node in self.model.at.items():
            if node.is_dir:
                await self.driver.fsyncdir(path)
            elif isinstance(node.now, bytes) and not node.now.startswith(b"-> "):
                fh = await self.driver.open(path)
                await self.driver.fsync(fh)
                await self.driver.close(fh)
        await self.driver.fsyncdir(b"")
        self.model.acknowledge_all()
        assert await self.check_power_cut(rng, 2)
        await self.driver.volume.files.settle()
        left_clean = await self.driver.unmount()
        # What closed files wrote before the whole file system could not be synced, nobody can vouch for.
        assert left_clean != any(hit.startswith("syncfs") for hit in self.faults.hits), "not left clean"
        assert self.store.open_descriptors() == 0
        await self.check_left(clean=left_clean)
        self.store.close_store()

    async def check_left(self, *, clean: bool) -> None:
        sample = self.driver.sample
        state = await read_state(self.store, sample.keys(), sample.volume_id)
        assert (state.clean, state.unclean) == (clean, ())
        self.driver = await Driver.mount(self.store, sample)
        await self.compare("after a remount")
        assert await self.driver.unmount()
        assert self.store.open_descriptors() == 0


async def run_with(plan: object, seed: int, *, cut: bool) -> Run:
    """The workload under `plan(faults)`; with `cut`, a power cut right after it, before anything is healed."""
    run = await Run.start()
    rng = random.Random(seed)
    plan(run.faults)  # type: ignore[operator]
    try:
        await run.run()
        if cut:
            with run.faults.paused():
                await run.check_power_cut(rng, 2)
        await run.finish(rng)
    except BaseException as error:
        error.add_note(f"seed {seed}; faults: {run.faults.hits}; done: {', '.join(run.done[-6:])}")
        raise
    return run
