"""What a power cut may leave of a disk: which subsets of what is not durable are tried, and in which words.

Not durable are directory transactions, and writes and cuts of files. `disk_model` keeps a file's changes by the
sector; here those of one write are one *unit*, kept or lost as a whole or, now and then, torn.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass

from cryptfs.store.disk_model import ROOT_INO, Cut, Disk, Fate, Grown, SectorWritten

Change = tuple[int, int]
"""As in `Disk.crash_states`: (inode number, index of the change); 0 for a transaction; index -1 for attributes."""
Unit = tuple[Change, ...]
Kept = frozenset[Change]

EXHAUSTIVE_MAX_UNITS = 8


def units_of(disk: Disk) -> list[Unit]:
    """All that is not durable, in the order it was done within each file; the attributes of an inode as one."""
    units: list[list[Change]] = [[(0, i)] for i in range(len(disk.transactions))]
    for ino, inode in disk.inodes.items():
        before: object = None
        for i, (change, fate) in enumerate(inode.changes):
            if fate is Fate.DURABLE:
                continue
            follows = isinstance(before, SectorWritten) and (
                (isinstance(change, SectorWritten) and change.index == before.index + 1) or isinstance(change, Grown)
            )
            if follows:
                units[-1].append((ino, i))
            else:
                units.append([(ino, i)])
            before = change
        if inode.attributes != inode.durable_attributes:
            units.append([(ino, -1)])
    return [tuple(unit) for unit in units]


def choices(disk: Disk, rng: random.Random, limit: int) -> Iterator[Kept]:
    """Up to `limit` different subsets of what is not durable, each as the disk's order allows.

    All subsets of units if there are few units and `limit` allows it, then torn ones. Else first the telling ones
    (everything, nothing, all but one, one inode lost as a whole), in a random order, then random ones.
    """
    seen: set[Kept] = set()
    for kept in itertools.islice(_candidates(disk, rng, limit), 8 * limit):
        closed = disk._closed(kept)
        if closed not in seen:
            seen.add(closed)
            yield closed
            if len(seen) >= limit:
                return


def _candidates(disk: Disk, rng: random.Random, limit: int) -> Iterator[Kept]:
    units = units_of(disk)
    everything = frozenset(itertools.chain.from_iterable(units))
    if not units:
        yield everything
        return
    # Attributes survive by chance: no promise depends on them.
    firm = [unit for unit in units if unit[0][1] != -1]
    if len(firm) <= EXHAUSTIVE_MAX_UNITS and 2 ** len(firm) <= limit:
        for flags in itertools.product((True, False), repeat=len(firm)):
            yield frozenset(itertools.chain.from_iterable(itertools.compress(firm, flags)))
    else:
        telling = [everything, frozenset()]
        telling += [everything.difference(unit) for unit in firm]
        for ino in {unit[0][0] for unit in firm}:
            mine = frozenset(itertools.chain.from_iterable(unit for unit in firm if unit[0][0] == ino))
            telling += [mine, everything - mine]
        yield from rng.sample(telling, len(telling))
    for _ in range(8 * limit):
        chance, tear = rng.choice((0.2, 0.5, 0.8)), rng.random() < 0.3
        yield frozenset(
            change
            for unit in units
            for whole in (rng.random() < chance,)
            for change in unit
            if (rng.random() < chance if tear else whole)
        )


def after_power_cut(disk: Disk, kept: Kept) -> Disk:
    """The disk with just `kept` of what was not durable."""
    return disk._after_power_cut(kept)


def fingerprint(disk: Disk) -> int:
    """The same for disks that hold the same."""
    return hash(
        tuple(
            (ino, inode.content.size_bytes, frozenset(inode.content.sectors.items()), frozenset(inode.entries.items()))
            for ino, inode in sorted(disk.inodes.items())
        )
    )


# in words ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Words:
    """Describes changes of `disk`. `labels`: hexadecimal id of a file or directory -> what it is called."""

    disk: Disk
    labels: dict[str, str]

    def names(self) -> dict[int, str]:
        """Inode number -> path in the cipher directory, ids replaced by what they stand for."""
        out = {ROOT_INO: "/"}
        todo = [(ROOT_INO, "")]
        while todo:
            ino, path = todo.pop()
            inode = self.disk.inodes[ino]
            for name, child in (inode.durable_entries | inode.entries).items():
                below = f"{path}/{self._readable(name)}"
                if child not in out:
                    out[child] = below
                    todo.append((child, below))
        return out

    def _readable(self, name: bytes) -> str:
        text = name.decode("ascii", "replace")
        log_id, dot, rest = text.partition(".")
        if log_id in self.labels:
            return f"<{self.labels[log_id]}>{dot}{rest}"
        return text if len(text) < 16 else text[:6] + "…"

    def lost(self, kept: Kept) -> list[str]:
        """One line per unit of which something is lost."""
        names, out = self.names(), []
        for unit in units_of(self.disk):
            missing = [change for change in unit if change not in kept]
            if missing and unit[0][1] != -1:
                torn = f" ({len(missing)} of {len(unit)} changes)" if len(missing) < len(unit) else ""
                out.append(self._unit(unit, names) + torn)
        return out

    def _unit(self, unit: Unit, names: dict[int, str]) -> str:
        ino, index = unit[0]
        if ino == 0:
            edits = self.disk.transactions[index]
            return "names: " + ", ".join(
                f"{names.get(d, d)}/{self._readable(name)} -> {names.get(to, to) if to is not None else 'nothing'}"
                for d, name, to in edits
            )
        change = self.disk.inodes[ino].changes[index][0]
        what = f"{names.get(ino, ino)} (inode {ino})"
        match change:
            case SectorWritten(first, _):
                return f"write to {what}: sectors {first} … {first + len(unit) - 1}"
            case Grown(size_bytes):
                return f"growth of {what} to {size_bytes} bytes"
            case Cut(size_bytes):
                return f"cut of {what} to {size_bytes} bytes"
