"""R2 for a volume that goes on being used: written to after it was tampered with, and tampered with after a crash."""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from cryptfs.errors import CryptfsError
from cryptfs.store.local import LocalStore
from cryptfs.types import Kind
from tests.faults.driver import Driver
from tests.tamper.mutations import MUTATIONS, Harm, NotHere
from tests.tamper.oracle import Inspector, Verdict, judge
from tests.tamper.test_mutations import HANG_S, listening
from tests.tamper.vault import BLOCK, Place, Vault, build

WRITTEN_TO = 30
CRASHED = 30
NOT_OF_OBJECTS = {"damage_the_state", "remove_one_of_the_volumes_directories", "add_strays"}
OF_CONTENT = sorted({
    "flip_in_a_block", "zero_a_block", "move_a_block_within_its_file", "exchange_blocks_of_two_files", "replay_a_block",
    "copy_a_block_to_its_other_home", "cut_or_extend_a_data_file", "cut_a_twin", "flip_in_a_data_header",
    "replace_a_twin", "flip_in_a_log", "lose_a_payload", "lose_a_head", "cut_a_log_inside_a_frame", "zero_in_a_log",
    "rearrange_a_log", "graft_frames",
})  # fmt: skip


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Vault, Path]:
    """A vault, and a copy of it with its hard links."""
    vault = build(tmp_path_factory.mktemp("living"))
    kept = vault.root.with_name("kept")
    subprocess.run(["cp", "-a", vault.root, kept], check=True)
    return vault, kept


@pytest.fixture
def vault(built: tuple[Vault, Path]) -> Iterator[Vault]:
    yield built[0]
    renew(*built)


def renew(vault: Vault, kept: Path) -> None:
    vault.forget()
    shutil.rmtree(vault.root)
    subprocess.run(["cp", "-a", kept, vault.root], check=True)


async def look(vault: Vault) -> Verdict:
    """Everything, in a mount of its own that changes nothing."""
    store = LocalStore(vault.root)
    try:
        with trio.fail_after(HANG_S), listening() as said:
            driver = await Driver.mount(store, vault.sample, read_only=True)
            verdict = await Inspector(driver, vault, said).look()
            await driver.unmount()
            verdict.wrong += [line for line in said.lines if "unexpectedly" in line]
            return verdict
    finally:
        store.close_store()


def files(vault: Vault) -> list[Place]:
    """One place for each file, whatever names it has."""
    return list({place.log_id: place for place in vault.of_kind(Kind.FILE)}.values())


def changed(vault: Vault, place: Place, content: bytes) -> None:
    for name in place.names:
        vault.places[name] = replace(vault.places[name], content=content)


async def overwrite(driver: Driver, vault: Vault, place: Place, block: int, rng: random.Random) -> None:
    """One whole block, synced; the vault's word on the file is the new content. Raises OSError."""
    was = place.content
    data = rng.randbytes(len(was[block * BLOCK :][:BLOCK]))
    fh = await driver.open(place.path)
    try:
        await driver.write(fh, block * BLOCK, data)
        await driver.fsync(fh)
    finally:
        await driver.close(fh)
    changed(vault, place, was[: block * BLOCK] + data + was[block * BLOCK + len(data) :])


async def write_into(vault: Vault, harm: Harm, rng: random.Random) -> set[tuple[bytes, int]]:
    """A block of every file, in a mount left cleanly; what was written. Only what was harmed may refuse, with EIO."""
    written: set[tuple[bytes, int]] = set()
    store = LocalStore(vault.root)
    try:
        with trio.fail_after(HANG_S):
            driver = await Driver.mount(store, vault.sample)
            for place in files(vault):
                if not place.blocks:
                    continue
                block = rng.randrange(place.blocks)
                try:
                    await overwrite(driver, vault, place, block, rng)
                except OSError as error:
                    if error.errno != errno.EIO or place.path not in harm.victims:
                        pytest.fail(f"{harm.what}: writing {place.path!r}: {error}")
                    continue
                written |= {(name, block) for name in place.names}
            assert await driver.unmount(), harm.what
    finally:
        store.close_store()
    return written


@pytest.mark.parametrize("part", range(2))
async def test_written_to_after_it_was_tampered_with(built: tuple[Vault, Path], vault: Vault, part: int) -> None:
    """What is undamaged takes new content; a damaged block that is written whole is good again; the rest stays EIO."""
    record, places = vault.sample.freshness, dict(vault.places)
    assert record is not None
    names = sorted(MUTATIONS.keys() - NOT_OF_OBJECTS)
    done = healed = 0
    for number in range(WRITTEN_TO // 2):
        rng = random.Random(f"written.{part}.{number}")
        vault.sample.freshness = record.clone()
        try:
            with suppress(NotHere):
                harm = MUTATIONS[rng.choice(names)](vault, rng)
                before = await look(vault)
                written = await write_into(vault, harm, rng)
                after = await look(vault)
                left = replace(harm, blocks=harm.blocks - written)
                wrong = judge(before, harm) + judge(after, left)
                wrong += [f"{hit} is no longer damaged" for hit in before.bad_blocks - written - after.bad_blocks]
                whole = before.damaged - {name for name, _ in before.bad_blocks}
                wrong += [f"{path!r} is no longer damaged" for path in whole - after.damaged]
                assert not wrong, f"{part}.{number} {harm.what}: {wrong[:4]}"
                done += 1
                healed += len(before.bad_blocks & written)
        finally:
            vault.sample.freshness = record
            vault.places.update(places)
            renew(*built)
    assert done > WRITTEN_TO // 4
    assert healed, "no damaged block was ever written"


async def crashed(vault: Vault, rng: random.Random) -> dict[bytes, list[bytes]]:
    """Write, sync and write on, then stop as kill -9 does: id -> every content the file had since."""
    had: dict[bytes, list[bytes]] = {place.log_id: [place.content] for place in files(vault)}
    store = LocalStore(vault.root)
    try:
        driver = await Driver.mount(store, vault.sample)
        for place in rng.sample(files(vault), 6):
            for _ in range(rng.randrange(1, 4)):
                here = vault.places[place.path]
                if here.blocks:
                    await overwrite(driver, vault, here, rng.randrange(here.blocks), rng)
                    had[place.log_id].append(vault.places[place.path].content)
        driver.kill()
    finally:
        store.close_store()
    return had


async def served(driver: Driver, path: bytes, blocks: int) -> list[bytes | None]:
    """Each block as it is read, None for EIO; one more than there are, so that growth is seen."""
    fh = await driver.open(path, os.O_RDONLY)
    out: list[bytes | None] = []
    try:
        for block in range(blocks + 1):
            try:
                out.append(await driver.read(fh, block * BLOCK, BLOCK))
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
                out.append(None)
    finally:
        await driver.close(fh)
    return out


def fits(got: list[bytes | None], content: bytes) -> bool:
    """Whether every block that was served is this content's."""
    return all(piece is None or piece == content[i * BLOCK :][:BLOCK] for i, piece in enumerate(got))


async def after_the_crash(vault: Vault, harm: Harm, had: dict[bytes, list[bytes]], *, read_only: bool) -> list[str]:
    """What is wrong with what is served now."""
    hit = harm.victims | {path for path, _ in harm.blocks}
    wrong = []
    store = LocalStore(vault.root)
    try:
        with trio.fail_after(HANG_S):
            driver = await Driver.mount(store, vault.sample, read_only=read_only)
            for path, place in vault.places.items():
                if place.kind != Kind.FILE:
                    continue
                try:
                    got = await served(driver, path, max(place.blocks, 1))
                except (OSError, CryptfsError) as error:
                    if path not in hit or getattr(error, "errno", errno.EIO) != errno.EIO:
                        wrong.append(f"{path!r}: {error!r}")
                    continue
                if path not in hit and got != [place.content[i * BLOCK :][:BLOCK] for i in range(len(got))]:
                    wrong.append(f"{path!r} is not as it was, and nobody touched it")
                if not any(fits(got, content) for content in had[place.log_id]):
                    wrong.append(f"{path!r} is what it never was")
            await driver.unmount()
    finally:
        store.close_store()
    return wrong


@pytest.mark.parametrize("seen", [True, False])
async def test_tampered_with_after_a_crash(built: tuple[Vault, Path], vault: Vault, seen: bool) -> None:
    """A crash excuses that what followed the last acknowledged frame is missing, and nothing that never was.

    `seen`: with the record of what this machine has seen, or on one that never saw the volume.
    """
    record, places = vault.sample.freshness, dict(vault.places)
    assert record is not None
    done = 0
    for number in range(CRASHED // 2):
        rng = random.Random(f"crashed.{seen}.{number}")
        vault.sample.freshness = record.clone() if seen else None
        try:
            had = await crashed(vault, rng)
            with suppress(NotHere):
                harm = MUTATIONS[rng.choice(OF_CONTENT)](vault, rng)
                for read_only in (True, False, True):
                    wrong = await after_the_crash(vault, harm, had, read_only=read_only)
                    assert not wrong, f"{number} {harm.what}: {wrong[:4]}"
                done += 1
        finally:
            vault.sample.freshness = record
            vault.places.update(places)
            renew(*built)
    assert done > CRASHED // 4
