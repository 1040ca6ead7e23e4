"""What may be found after tampering: everything as it was, or EIO for what was tampered with, named in the log."""

from __future__ import annotations

import errno
import logging
import os
import re
from dataclasses import dataclass, field

from cryptfs.errors import Damaged
from cryptfs.types import Kind
from tests.faults.driver import CALLER, Driver, answer
from tests.tamper.mutations import Harm
from tests.tamper.vault import BLOCK, Place, Vault

REASONS = (
    "attr|added|data-header|dir-log|epoch|exchanged|frame|frame-head|id-mismatch|log-header|missing|missing-dir-log|"
    "missing-sidecar|missing-twin|name|payload|rolled-back|deleted|short|size|symlink|tag|wrap"
)
LINE = re.compile(rf"^inode (\d+): (?:\w+: )?({REASONS})(?::|$)")


class Said(logging.Handler):
    """Collects the log's errors."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@dataclass
class Verdict:
    """`wrong`: what must not be. `damaged`: paths that gave EIO; `bad_blocks`: (path, block) that did."""

    wrong: list[str] = field(default_factory=list)
    damaged: set[bytes] = field(default_factory=set)
    bad_blocks: set[tuple[bytes, int]] = field(default_factory=set)


class Inspector:
    """Looks at everything in an open volume, block by block."""

    def __init__(self, driver: Driver, vault: Vault, said: Said) -> None:
        self.driver = driver
        self.vault = vault
        self.said = said
        self.verdict = Verdict()

    async def look(self) -> Verdict:
        for path, place in self.vault.places.items():
            try:
                await self._look_at(path, place)
            except OSError as error:
                self._failed(path, error)
            except Damaged as error:
                self.verdict.damaged.add(path)
                if error.reason not in REASONS.split("|"):
                    raise
        return self.verdict

    def _failed(self, path: bytes, error: OSError) -> None:
        if error.errno != errno.EIO:
            self.verdict.wrong.append(f"{path!r}: {errno.errorcode[error.errno or 0]}")
        self.verdict.damaged.add(path)
        lines, self.said.lines = self.said.lines, []
        if not any(LINE.match(line) for line in lines):
            self.verdict.wrong.append(f"{path!r}: EIO, and the log says {lines}")

    async def _look_at(self, path: bytes, place: Place) -> None:
        attr = await self.driver.look(path)
        if place.kind == Kind.DIR:
            await self._list(path)
        elif place.kind == Kind.FILE:
            await self._read(path, place)
        elif place.kind == Kind.SYMLINK:
            target = b"-> " + bytes(await answer(self.driver.handlers.readlink(attr.st_ino, CALLER)))
            if target != place.content:
                self.verdict.wrong.append(f"{path!r} leads to {target!r}")

    async def _list(self, path: bytes) -> None:
        found = set(await self.driver.listing(path))
        prefix = path + b"/" if path else b""
        expected = {
            p.removeprefix(prefix)
            for p in self.vault.places
            if p and p.startswith(prefix) and b"/" not in p[len(prefix) :]
        }
        self.verdict.wrong += [f"{path!r} shows {name!r}" for name in found - expected]
        self.verdict.wrong += [f"{path!r} does not show {name!r}" for name in expected - found]

    async def _read(self, path: bytes, place: Place) -> None:
        fh = await self.driver.open(path, os.O_RDONLY)
        try:
            for block in range(place.blocks + 1):
                want = place.content[block * BLOCK :][:BLOCK]
                try:
                    got = await self.driver.read(fh, block * BLOCK, BLOCK)
                except OSError as error:
                    self._failed(path, error)
                    self.verdict.bad_blocks.add((path, block))
                    continue
                if got != want:
                    self.verdict.wrong.append(f"{path!r}, block {block}: {len(got)} bytes, not what was written")
        finally:
            await self.driver.close(fh)
        if path not in self.verdict.damaged:
            size = (await self.driver.look(path)).st_size
            if size != len(place.content):
                self.verdict.wrong.append(f"{path!r}: {size} bytes, not {len(place.content)}")


def judge(verdict: Verdict, harm: Harm) -> list[str]:
    """What of a verdict this harm does not excuse."""
    wrong = list(verdict.wrong)
    partly = {path for path, _ in harm.blocks}
    wrong += [f"{path!r} is damaged, and nobody touched it" for path in verdict.damaged - harm.victims - partly]
    for path, block in verdict.bad_blocks:
        if path not in harm.victims and (path, block) not in harm.blocks:
            wrong.append(f"block {block} of {path!r} is damaged, and nobody touched it")
    # What was damaged as a whole though only some blocks were touched.
    read = {path for path, _ in verdict.bad_blocks}
    wrong += [f"all of {path!r} is damaged" for path in (verdict.damaged & partly) - harm.victims - read]
    return wrong
