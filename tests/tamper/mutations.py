"""Everything that may be done to a cipher directory. Each says whom it may cost something; all others must not notice.

`rollback`: what is left is a complete older state of something, which nothing inside the cipher directory can tell from
the newest (docs/THREAT_MODEL.md): only the record of what was seen, kept outside, can.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from cryptfs.errors import Damaged
from cryptfs.format.datafile import HEADER_BYTES
from cryptfs.format.log import FOOT_BYTES, HEAD_BYTES
from cryptfs.format.log import HEADER_BYTES as LOG_HEADER_BYTES
from cryptfs.format.sidecar import decode_sidecar
from cryptfs.format.state import SLOT_BYTES
from cryptfs.fs.sealed_log import Replay, parse
from cryptfs.types import Kind
from tests.tamper.vault import BLOCK, Place, Vault


class NotHere(Exception):
    """There is nothing this change could be made to."""


@dataclass
class Harm:
    """What was done. `blocks`: (path, block) that may be damaged, of files that are otherwise to be as they were."""

    what: str
    victims: set[bytes] = field(default_factory=set)
    blocks: set[tuple[bytes, int]] = field(default_factory=set)
    rollback: bool = False
    whole: bool = False
    """The volume may refuse to be opened."""

    def __add__(self, other: Harm) -> Harm:
        return Harm(
            f"{self.what}; {other.what}", self.victims | other.victims, self.blocks | other.blocks,
            self.rollback or other.rollback, self.whole or other.whole,
        )  # fmt: skip


Mutation = Callable[[Vault, random.Random], Harm]

MUTATIONS: dict[str, Mutation] = {}


def mutation(function: Mutation) -> Mutation:
    MUTATIONS[function.__name__] = function
    return function


# choosing --------------------------------------------------------------------------------------------------------


def a_file(vault: Vault, rng: random.Random, *, content: bool = True) -> Place:
    return rng.choice([p for p in vault.of_kind(Kind.FILE) if p.content or not content])


def a_home(vault: Vault, rng: random.Random) -> tuple[Place, Path, int]:
    """(file, one of its two homes, where block 0 lies in it)."""
    place = a_file(vault, rng)
    twin = vault.twin(place)
    if twin.exists() and rng.random() < 0.5:
        return place, twin, 0
    return place, place.below, HEADER_BYTES


def a_block(place: Place, rng: random.Random) -> int:
    return rng.randrange(place.blocks)


def a_log(vault: Vault, rng: random.Random) -> tuple[Place, Path]:
    kind = rng.choice((Kind.FILE, Kind.FILE, Kind.DIR, Kind.SYMLINK))
    place = rng.choice(vault.of_kind(kind))
    return place, vault.log(place)


def an_entry(vault: Vault, rng: random.Random) -> Place:
    return rng.choice([place for path, place in sorted(vault.places.items()) if path])


def frames(path: Path) -> tuple[bytes, Replay]:
    raw = path.read_bytes()
    try:
        return raw, parse(raw)
    except Damaged:
        raise NotHere from None


def bounds(replay: Replay) -> list[tuple[int, int]]:
    starts = [LOG_HEADER_BYTES, *replay.ends[:-1]]
    return list(zip(starts, replay.ends, strict=True))


def flipped(raw: bytes, at: int, rng: random.Random) -> bytes:
    return raw[:at] + bytes([raw[at] ^ 1 << rng.randrange(8)]) + raw[at + 1 :]


def replaced(raw: bytes, at: int, piece: bytes) -> bytes:
    return raw[:at] + piece + raw[at + len(piece) :]


def blocks_of(place: Place, first: int, end: int) -> set[tuple[bytes, int]]:
    return {(path, block) for path in place.names for block in range(first, end)}


# blocks ----------------------------------------------------------------------------------------------------------


@mutation
def flip_in_a_block(vault: Vault, rng: random.Random) -> Harm:
    place, home, start = a_home(vault, rng)
    raw = home.read_bytes()
    if len(raw) <= start:
        raise NotHere
    at = rng.randrange(start, len(raw))
    vault.write(home, flipped(raw, at, rng))
    block = (at - start) // BLOCK
    return Harm(
        f"flip byte {at} of {home.suffix or 'data'} of {place.path!r}", blocks=blocks_of(place, block, block + 1)
    )


@mutation
def zero_a_block(vault: Vault, rng: random.Random) -> Harm:
    place, home, start = a_home(vault, rng)
    raw, block = home.read_bytes(), a_block(place, rng)
    piece = raw[start + block * BLOCK :][:BLOCK]
    vault.write(home, replaced(raw, start + block * BLOCK, bytes(len(piece))))
    return Harm(f"zero block {block} of {place.path!r}", blocks=blocks_of(place, block, block + 1))


@mutation
def move_a_block_within_its_file(vault: Vault, rng: random.Random) -> Harm:
    place, home, start = a_home(vault, rng)
    raw, a, b = home.read_bytes(), a_block(place, rng), a_block(place, rng)
    piece = raw[start + a * BLOCK :][:BLOCK]
    vault.write(home, replaced(raw, start + b * BLOCK, piece)[: len(raw)])
    return Harm(f"copy block {a} of {place.path!r} over {b}", blocks=blocks_of(place, b, b + 1))


@mutation
def exchange_blocks_of_two_files(vault: Vault, rng: random.Random) -> Harm:
    (one, home, start), (two, other, start2) = a_home(vault, rng), a_home(vault, rng)
    block = min(a_block(one, rng), a_block(two, rng))
    if home == other:
        raise NotHere
    raw, raw2 = home.read_bytes(), other.read_bytes()
    piece, piece2 = raw[start + block * BLOCK :][:BLOCK], raw2[start2 + block * BLOCK :][:BLOCK]
    size = min(len(piece), len(piece2))
    vault.write(home, replaced(raw, start + block * BLOCK, piece2[:size]))
    vault.write(other, replaced(raw2, start2 + block * BLOCK, piece[:size]))
    what = f"exchange block {block} of {one.path!r} and {two.path!r}"
    return Harm(what, blocks=blocks_of(one, block, block + 1) | blocks_of(two, block, block + 1))


@mutation
def replay_a_block(vault: Vault, rng: random.Random) -> Harm:
    place, home, start = a_home(vault, rng)
    older = vault.older(home)
    if not older.exists():
        raise NotHere
    raw, block = home.read_bytes(), a_block(place, rng)
    piece = older.read_bytes()[start + block * BLOCK :][:BLOCK]
    vault.write(home, replaced(raw, start + block * BLOCK, piece)[: len(raw)])
    return Harm(f"older block {block} of {place.path!r}", blocks=blocks_of(place, block, block + 1))


@mutation
def copy_a_block_to_its_other_home(vault: Vault, rng: random.Random) -> Harm:
    place = a_file(vault, rng)
    if not vault.twin(place).exists():
        raise NotHere
    data, twin, block = place.below.read_bytes(), vault.twin(place).read_bytes(), a_block(place, rng)
    if rng.random() < 0.5:
        piece = data[HEADER_BYTES + block * BLOCK :][:BLOCK]
        vault.write(vault.twin(place), replaced(twin.ljust(block * BLOCK, b"\0"), block * BLOCK, piece))
    else:
        piece = twin[block * BLOCK :][:BLOCK]
        vault.write(place.below, replaced(data, HEADER_BYTES + block * BLOCK, piece)[: len(data)])
    return Harm(f"copy block {block} of {place.path!r} to its other home", blocks=blocks_of(place, block, block + 1))


# files below -----------------------------------------------------------------------------------------------------


def a_size(raw: bytes, edges: list[int], rng: random.Random) -> int:
    """To cut to: an edge, one beside it, or anywhere."""
    edge = rng.choice([*edges, 0, len(raw)]) + rng.choice((-1, 0, 0, 0, 1))
    return rng.choice((max(0, min(edge, len(raw))), rng.randrange(len(raw) + 1)))


@mutation
def cut_or_extend_a_data_file(vault: Vault, rng: random.Random) -> Harm:
    place = a_file(vault, rng, content=False)
    raw = place.below.read_bytes()
    size = a_size(raw, [HEADER_BYTES + i * BLOCK for i in range(place.blocks)], rng)
    now = raw[:size] if size < len(raw) else raw + rng.choice((b"\0", b"\0" * BLOCK, rng.randbytes(100)))
    vault.write(place.below, now)
    return Harm(f"data file of {place.path!r} of {len(now)} instead of {len(raw)} bytes", vault.victims(place))


@mutation
def cut_a_twin(vault: Vault, rng: random.Random) -> Harm:
    place = a_file(vault, rng)
    twin = vault.twin(place)
    if not twin.exists():
        raise NotHere
    raw = twin.read_bytes()
    size = a_size(raw, [i * BLOCK for i in range(place.blocks)], rng)
    vault.write(twin, raw[:size])
    return Harm(f"twin of {place.path!r} cut to {size}", blocks=blocks_of(place, size // BLOCK, place.blocks))


@mutation
def flip_in_a_data_header(vault: Vault, rng: random.Random) -> Harm:
    place = a_file(vault, rng, content=False)
    at = rng.randrange(HEADER_BYTES)
    vault.write(place.below, flipped(place.below.read_bytes(), at, rng))
    return Harm(f"flip byte {at} of the header of {place.path!r}", vault.victims(place))


@mutation
def replace_a_data_file(vault: Vault, rng: random.Random) -> Harm:
    place, other = a_file(vault, rng, content=False), a_file(vault, rng, content=False)
    source = rng.choice((other.below, vault.older(place.below), vault.older(other.below), vault.log(other)))
    if not source.exists() or (source.read_bytes() == place.below.read_bytes()):
        raise NotHere
    vault.write(place.below, source.read_bytes())
    return Harm(f"data file of {place.path!r} replaced by {source.name}", vault.victims(place))


@mutation
def exchange_two_data_files(vault: Vault, rng: random.Random) -> Harm:
    one, two = a_file(vault, rng), a_file(vault, rng)
    if one.log_id == two.log_id:
        raise NotHere
    vault.swap(one.below, two.below)
    return Harm(f"exchange {one.path!r} and {two.path!r}", vault.victims(one) | vault.victims(two))


@mutation
def replace_a_twin(vault: Vault, rng: random.Random) -> Harm:
    place, other = a_file(vault, rng), a_file(vault, rng)
    source = rng.choice((vault.twin(other), vault.older(vault.twin(place)), place.below))
    if not source.exists():
        raise NotHere
    vault.copy(source, vault.twin(place))
    return Harm(f"twin of {place.path!r} replaced", vault.victims(place))


@mutation
def remove_below(vault: Vault, rng: random.Random) -> Harm:
    place = an_entry(vault, rng)
    path = rng.choice([p for p in (place.below, vault.log(place), vault.twin(place)) if p.exists() or p.is_symlink()])
    vault.take(path)
    only_this_name = path == place.below and place.kind != Kind.DIR
    return Harm(f"remove {path.name} of {place.path!r}", {place.path} if only_this_name else vault.victims(place))


@mutation
def replace_by_another_kind(vault: Vault, rng: random.Random) -> Harm:
    place = an_entry(vault, rng)
    target = rng.choice((place.below, vault.log(place)))
    makers: dict[str, Callable[[Path], object]] = {
        "a directory": Path.mkdir, "a fifo": os.mkfifo, "a symlink": lambda p: p.symlink_to("/etc/passwd"),
        "an empty file": Path.touch, "a loop": lambda p: p.symlink_to(p.name),
    }  # fmt: skip
    name = rng.choice(sorted(makers))
    if place.kind == Kind.FIFO and name == "a fifo":
        raise NotHere
    vault.add(target, makers[name])
    return Harm(f"{name} instead of {target.name} of {place.path!r}", vault.victims(place))


@mutation
def replace_a_whole_file(vault: Vault, rng: random.Random) -> Harm:
    """Data file, twin and sidecar by those of another file: everything fits, but for the id in `.dir`."""
    place, other = a_file(vault, rng), a_file(vault, rng)
    if place.log_id == other.log_id:
        raise NotHere
    vault.write(place.below, other.below.read_bytes())
    if rng.random() < 0.5:
        vault.write(vault.sidecar(place), vault.sidecar(other).read_bytes())
    return Harm(f"all of {place.path!r} replaced by {other.path!r}", vault.victims(place))


# logs ------------------------------------------------------------------------------------------------------------


def log_harm(vault: Vault, place: Place, what: str, *, rollback: bool = False) -> Harm:
    return Harm(f"{what} of {place.path!r}", vault.victims(place), rollback=rollback)


@mutation
def flip_in_a_log(vault: Vault, rng: random.Random) -> Harm:
    place, path = a_log(vault, rng)
    raw, replay = frames(path)
    start, end = rng.choice([(0, LOG_HEADER_BYTES), *bounds(replay)])
    part = rng.choice(("head", "payload", "foot"))
    if part == "head" or not start:
        at = rng.randrange(start, min(start + HEAD_BYTES, end))
    elif part == "payload" and end - start > HEAD_BYTES + FOOT_BYTES:
        at = rng.randrange(start + HEAD_BYTES, end - FOOT_BYTES)
    else:
        at = rng.randrange(max(start, end - FOOT_BYTES), end)
    vault.write(path, flipped(raw, at, rng))
    return log_harm(vault, place, f"flip byte {at} ({part}) of the log")


@mutation
def lose_a_payload(vault: Vault, rng: random.Random) -> Harm:
    """A frame whose head is whole costs the blocks it names, and nothing else."""
    place = a_file(vault, rng)
    raw, replay = frames(vault.sidecar(place))
    start, end = rng.choice(bounds(replay))
    if end - start <= HEAD_BYTES + FOOT_BYTES + 1:
        raise NotHere
    head = next(h for h, (s, _) in zip(replay.heads, bounds(replay), strict=True) if s == start)
    at = rng.randrange(start + HEAD_BYTES, end - FOOT_BYTES)
    vault.write(vault.sidecar(place), flipped(raw, at, rng))
    what = f"flip byte {at} of a payload of {place.path!r}, blocks {head.first} to {head.end}"
    return Harm(what, blocks=blocks_of(place, head.first, head.end))


@mutation
def lose_a_head(vault: Vault, rng: random.Random) -> Harm:
    """A frame that is lost with its head costs the blocks of that time which no later frame states."""
    place = a_file(vault, rng)
    raw, replay = frames(vault.sidecar(place))
    if len(replay.heads) < 2:
        raise NotHere
    which = rng.randrange(len(replay.heads) - 1)
    at = rng.randrange(bounds(replay)[which][0], bounds(replay)[which][0] + HEAD_BYTES)
    vault.write(vault.sidecar(place), flipped(raw, at, rng))
    known: set[int] = set()
    for payload, head in zip(replay.payloads[which + 1 :], replay.heads[which + 1 :], strict=True):
        assert payload is not None
        said = decode_sidecar(payload, BLOCK)
        known.update(b for first, count in said.holes for b in range(first, first + count))
        known.update(b for run in said.runs for b in range(run.first, run.first + run.count))
        known.update(range(-(-head.size // BLOCK), place.blocks))
    lost = {(path, b) for path, b in blocks_of(place, 0, place.blocks) if b not in known}
    return Harm(f"flip byte {at} of a head of {place.path!r}, {len(lost)} blocks", blocks=lost)


@mutation
def flip_a_foot(vault: Vault, rng: random.Random) -> Harm:
    place, path = a_log(vault, rng)
    raw, replay = frames(path)
    _, end = rng.choice(bounds(replay))
    vault.write(path, flipped(raw, end - 1 - rng.randrange(FOOT_BYTES), rng))
    return Harm(f"flip in a foot of {place.path!r}")


@mutation
def cut_a_log_inside_a_frame(vault: Vault, rng: random.Random) -> Harm:
    place, path = a_log(vault, rng)
    raw, replay = frames(path)
    start, end = rng.choice(bounds(replay))
    size = rng.choice((0, 1, LOG_HEADER_BYTES - 1, LOG_HEADER_BYTES, start + HEAD_BYTES, start + 1, end - FOOT_BYTES,
                       end - 1, rng.randrange(start + 1, end)))  # fmt: skip
    if size in replay.ends:
        raise NotHere
    vault.write(path, raw[:size])
    return log_harm(vault, place, f"cut at {size} of {len(raw)} the log")


@mutation
def zero_in_a_log(vault: Vault, rng: random.Random) -> Harm:
    place, path = a_log(vault, rng)
    raw = path.read_bytes()
    start = rng.choice((0, 512 * rng.randrange(1 + len(raw) // 512)))
    count = rng.choice((512, len(raw) - start))
    vault.write(path, replaced(raw, start, bytes(min(count, len(raw) - start))))
    return log_harm(vault, place, f"zero {count} bytes from {start} of the log")


@mutation
def rearrange_a_log(vault: Vault, rng: random.Random) -> Harm:
    """A frame left out (not the last), said twice, two exchanged, or something between and after them."""
    place, path = a_log(vault, rng)
    raw, replay = frames(path)
    parts = [raw[a:b] for a, b in bounds(replay)]
    at = rng.randrange(len(parts))
    how = rng.choice(("leave out", "repeat", "exchange", "insert", "append", "append a head"))
    if how == "leave out" and at < len(parts) - 1:
        del parts[at]
    elif how == "repeat":
        parts.insert(rng.randrange(at, len(parts)) + 1, parts[at])
    elif how == "exchange" and len(parts) > 1:
        parts[at - 1], parts[at] = parts[at], parts[at - 1]
    elif how == "insert":
        parts.insert(at, rng.randbytes(rng.choice((1, 8, 300))))
    elif how == "append":
        parts.append(rng.choice((rng.randbytes(1), b"\0" * 200, b"CFF1" + rng.randbytes(300))))
    else:
        parts.append(parts[-1][:HEAD_BYTES])
    vault.write(path, raw[:LOG_HEADER_BYTES] + b"".join(parts))
    return log_harm(vault, place, f"{how} frame {at} of the log")


@mutation
def replace_a_log(vault: Vault, rng: random.Random) -> Harm:
    (place, path), (other, source) = a_log(vault, rng), a_log(vault, rng)
    if place.log_id == other.log_id:
        raise NotHere
    if rng.random() < 0.5:
        vault.write(path, source.read_bytes())
        return log_harm(vault, place, f"{other.path!r}'s in place of the log")
    vault.swap(path, source)
    return log_harm(vault, place, "exchange the log") + log_harm(vault, other, "and the log")


@mutation
def graft_frames(vault: Vault, rng: random.Random) -> Harm:
    """One log's header and another one's frames, or the first frames of one and the last of another."""
    (place, path), (other, source) = a_log(vault, rng), a_log(vault, rng)
    raw, replay = frames(path)
    raw2, replay2 = frames(source)
    if place.log_id == other.log_id:
        raise NotHere
    keep = rng.choice([LOG_HEADER_BYTES, *replay.ends])
    graft = raw2[rng.choice([LOG_HEADER_BYTES, *replay2.ends[:-1]]) :]
    vault.write(path, raw[:keep] + graft)
    return log_harm(vault, place, f"frames of {other.path!r} from {keep} on in the log")


@mutation
def change_a_directorys_id(vault: Vault, rng: random.Random) -> Harm:
    place, other = (rng.choice(vault.of_kind(Kind.DIR)) for _ in range(2))
    raw = vault.log(place).read_bytes()
    log_id = rng.choice((other.log_id, rng.randbytes(16)))
    if log_id == place.log_id:
        raise NotHere
    vault.write(vault.log(place), replaced(raw, 16, log_id))
    return log_harm(vault, place, "change the id")


# names -----------------------------------------------------------------------------------------------------------


@mutation
def exchange_two_names(vault: Vault, rng: random.Random) -> Harm:
    one, two = an_entry(vault, rng), an_entry(vault, rng)
    nested = one.below in two.below.parents or two.below in one.below.parents
    if one.log_id == two.log_id or one.kind == two.kind == Kind.FIFO or nested:
        raise NotHere
    vault.swap(one.below, two.below)
    return Harm(f"exchange the names of {one.path!r} and {two.path!r}", _named(vault, one) | _named(vault, two))


def _named(vault: Vault, place: Place) -> set[bytes]:
    return vault.victims(place) if place.kind == Kind.DIR else {place.path}


@mutation
def move_an_entry(vault: Vault, rng: random.Random) -> Harm:
    place, other = an_entry(vault, rng), rng.choice(vault.of_kind(Kind.DIR))
    to = other.below / rng.choice((place.below.name, an_entry(vault, rng).below.name, "A" * 40))
    if to == place.below or place.below in to.parents or to in place.below.parents:
        raise NotHere
    harm = Harm(f"move {place.path!r} to {to.name} in {other.path!r}", _named(vault, place))
    for there in vault.places.values():
        if there.below == to:
            harm.victims |= _named(vault, there)
    vault.move(place.below, to)
    return harm


@mutation
def add_an_entry(vault: Vault, rng: random.Random) -> Harm:
    place, other = an_entry(vault, rng), rng.choice(vault.of_kind(Kind.DIR))
    name = rng.choice((place.below.name, "plain", "A" * 40, "~" + "B" * 43, ".dir.new", ".hidden"))
    to = other.below / name
    if to.exists() or to.is_symlink() or place.below in to.parents:
        raise NotHere
    vault.copy(place.below, to)
    return Harm(f"add {name} to {other.path!r}")


@mutation
def bring_a_deleted_one_back(vault: Vault, rng: random.Random) -> Harm:
    place = rng.choice([place for _, place in sorted(vault.deleted.items())])
    if not place.below.parent.is_dir():
        raise NotHere
    for path in (place.below, vault.sidecar(place)):
        if vault.older(path).exists() or vault.older(path).is_symlink():
            vault.copy(vault.older(path), path)
    return Harm(f"bring {place.path!r} back")


@mutation
def add_strays(vault: Vault, rng: random.Random) -> Harm:
    """Things that mean nothing."""
    name = f"{rng.getrandbits(128):032x}"
    where = rng.choice(("tmp", f"sidecars/{name[:2]}", ".", "sidecars"))
    vault.add(
        vault.root / where / rng.choice((name, "x", f"{name}.twin", f"{name}.new")),
        rng.choice((Path.mkdir, Path.touch)),
    )
    return Harm(f"a stray in {where}")


@mutation
def change_a_symlink(vault: Vault, rng: random.Random) -> Harm:
    one, two = (rng.choice(vault.of_kind(Kind.SYMLINK)) for _ in range(2))
    text = os.readlink(one.below)
    new = rng.choice((os.readlink(two.below), "x", text[::-1], text[:-2] + "AA", "/etc/passwd", text + "\n"))
    if new == text:
        raise NotHere
    vault.add(one.below, lambda path: path.symlink_to(new))
    return Harm(f"other text for {one.path!r}", vault.victims(one))


# the volume's own files ------------------------------------------------------------------------------------------


@mutation
def damage_the_state(vault: Vault, rng: random.Random) -> Harm:
    path = vault.root / "state"
    raw = path.read_bytes()
    new = rng.choice((
        flipped(raw, rng.randrange(len(raw)), rng), b"", raw[: SLOT_BYTES * rng.randrange(2)], raw[SLOT_BYTES:],
        raw[SLOT_BYTES:] + raw[:SLOT_BYTES], bytes(len(raw)), raw + b"\0", raw[:100],
        raw[:SLOT_BYTES] * 2, raw[SLOT_BYTES:] * 2, rng.randbytes(len(raw)),
    ))  # fmt: skip
    vault.write(path, new)
    return Harm("damage the state", whole=True)


@mutation
def remove_one_of_the_volumes_directories(vault: Vault, rng: random.Random) -> Harm:
    place = an_entry(vault, rng)
    which = rng.choice(("tree", "sidecars", "tmp", f"sidecars/{place.log_id.hex()[:2]}"))
    vault.take(vault.root / which)
    return Harm(f"remove {which}", set(vault.places), whole=True)


# what only a record outside can tell -----------------------------------------------------------------------------

ROLLBACKS: dict[str, Mutation] = {}


def rollback(function: Mutation) -> Mutation:
    ROLLBACKS[function.__name__] = function
    return function


@rollback
def cut_a_log_between_frames(vault: Vault, rng: random.Random) -> Harm:
    place, path = a_log(vault, rng)
    raw, replay = frames(path)
    if len(replay.ends) < 2:
        raise NotHere
    size = rng.choice(replay.ends[:-1])
    vault.write(path, raw[:size])
    return log_harm(vault, place, f"cut at {size} the log", rollback=True)


@rollback
def replay_a_log(vault: Vault, rng: random.Random) -> Harm:
    place, path = a_log(vault, rng)
    older = vault.older(path)
    if not older.exists() or older.read_bytes() == path.read_bytes():
        raise NotHere
    vault.write(path, older.read_bytes())
    return log_harm(vault, place, "the older log", rollback=True)


@rollback
def replay_a_whole_file(vault: Vault, rng: random.Random) -> Harm:
    place = a_file(vault, rng)
    if not vault.older(vault.sidecar(place)).exists() or not vault.older(place.below).exists():
        raise NotHere
    for path in (place.below, vault.sidecar(place), vault.twin(place)):
        if vault.older(path).exists():
            vault.copy(vault.older(path), path)
        elif path.exists():
            vault.take(path)
    return log_harm(vault, place, "all of the older version", rollback=True)


@rollback
def replay_the_whole_volume(vault: Vault, rng: random.Random) -> Harm:
    for name in ("state", "tree", "sidecars", "tmp"):
        vault.copy(vault.past / name, vault.root / name)
    return Harm("the whole volume as it was", set(vault.places), rollback=True, whole=True)


@rollback
def make_it_look_like_a_crash(vault: Vault, rng: random.Random) -> Harm:
    """Without the slot that says so, the last epoch did not end cleanly; then damage what a crash would excuse."""
    path = vault.root / "state"
    raw = path.read_bytes()
    newest = max((0, SLOT_BYTES), key=lambda at: raw[at + 8 : at + 16])
    vault.write(path, replaced(raw, newest, bytes(SLOT_BYTES)))
    other = rng.choice((flip_in_a_block, cut_a_log_inside_a_frame, cut_a_log_between_frames, remove_below))
    harm = other(vault, rng)
    harm.victims |= {name for name, _ in harm.blocks}
    return Harm("hide the clean end", set(), rollback=True, whole=True) + harm
