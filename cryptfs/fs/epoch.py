"""The `state` file: beginning and ending a mount epoch (FORMAT.md §4).

Beginning: syncfs, write the next epoch into the other slot, fdatasync, and only then anything else. Whatever an
earlier daemon left in the page cache is thereby durable or gone: what reads back from now on is durable. A crash
before the fdatasync returns leaves the old state; after it, an epoch that ended uncleanly and holds nothing, which
forgives nothing.

Ending: everything durable first, then the same epoch, clean.

A slot is authentic under a key of its own, which is wrapped under the KEK that was the newest when it was written. So a
KEK rotation writes both slots anew (`reseal`), one after the other, each synced: a crash at any point leaves at least
one that is whole, under the old KEK or the new, both of which the volume has until the old one is destroyed.
"""

from __future__ import annotations

import os

from cryptfs.crypto.mac import mac, same
from cryptfs.errors import Damaged, VolumeDamaged
from cryptfs.format.state import SLOT_BYTES, Slot, State, decode_slot
from cryptfs.fs.context import FsContext, open_ours, write_all
from cryptfs.ports import DekProvider, KeyRun, Store
from cryptfs.types import ID_BYTES, Purpose

STATE = b"state"
_NO_ID = bytes(ID_BYTES)


async def read_state(store: Store, keys: DekProvider, volume_id: bytes) -> State:
    """The state that counts. Raises `VolumeDamaged` if no slot is authentic; key errors."""
    for slot in _slots(store):
        run = KeyRun(_NO_ID, Purpose.STATE, slot.kek_version, (slot.wrapped,))
        try:
            key = (await keys.unwrap([run]))[0][0]
        except Damaged:
            continue
        if same(mac(key, volume_id, slot.signed()), slot.mac):
            return slot.state
    raise VolumeDamaged("the volume's `state` file is damaged: neither of its two slots is authentic")


def _slots(store: Store) -> list[Slot]:
    """What may be slots, the later one first. Raises `VolumeDamaged`."""
    try:
        fd = open_ours(store, store.root(), STATE, os.O_RDONLY)
    except FileNotFoundError:
        raise VolumeDamaged("the volume's `state` file is missing") from None
    except Damaged:
        raise VolumeDamaged("the volume's `state` is no file") from None
    try:
        raw = store.pread(fd, 2 * SLOT_BYTES + 1, 0)
    finally:
        store.close(fd)
    if len(raw) > 2 * SLOT_BYTES:
        raise VolumeDamaged("the volume's `state` file is too long")
    slots = [(at, decode_slot(raw[at : at + SLOT_BYTES])) for at in (0, SLOT_BYTES)]
    placed = [slot for at, slot in slots if slot is not None and slot.state.slot * SLOT_BYTES == at]
    return sorted(placed, key=lambda slot: slot.state.sequence, reverse=True)


async def sign_states(keys: DekProvider, volume_id: bytes, *states: State) -> list[bytes]:
    """Each one's slot (512 bytes), all under one new key. Raises key errors."""
    fresh = await keys.generate(_NO_ID, Purpose.STATE, 1)
    # No await from here on: the key may be wiped at the next one.
    signed = [Slot(state, fresh.kek_version, fresh.wrapped[0]).signed() for state in states]
    return [data + mac(fresh.keys[0], volume_id, data) for data in signed]


def write_slot(store: Store, state: State, slot: bytes) -> None:
    """Write what `sign_states` made of `state` into its place and sync it. Blocks. Raises OSError."""
    fd = store.open(store.root(), STATE, os.O_RDWR | os.O_CREAT)
    try:
        write_all(store, fd, slot, state.slot * SLOT_BYTES)
        store.fdatasync(fd)
    finally:
        store.close(fd)


async def reseal(ctx: FsContext) -> None:
    """Write both slots of an open epoch anew, under the newest KEK. Raises OSError, key errors.

    They say what the newest one says. If only the first could be written, `ctx.farewell` is still of the sequence
    number that it has: the epoch's clean end takes its place.
    """
    assert ctx.state is not None
    first = State(ctx.state.sequence + 1, ctx.state.epoch, clean=False, unclean=ctx.state.unclean)
    second = State(first.sequence + 1, first.epoch, clean=False, unclean=first.unclean)
    *slots, farewell = await sign_states(ctx.keys, ctx.config.volume_id, first, second, second.ended())
    for state, slot in zip((first, second), slots, strict=True):
        await ctx.in_thread(write_slot, ctx.store, state, slot)
    ctx.state, ctx.farewell = second, farewell
