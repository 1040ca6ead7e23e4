"""The `state` file: beginning and ending a mount epoch (FORMAT.md §4).

Beginning: syncfs, write the next epoch into the other slot, fdatasync, and only then anything else. Whatever an
earlier daemon left in the page cache is thereby durable or gone: what reads back from now on is durable. A crash
before the fdatasync returns leaves the old state; after it, an epoch that ended uncleanly and holds nothing, which
forgives nothing.

Ending: everything durable first, then the same epoch, clean.
"""

from __future__ import annotations

import os

from cryptfs.crypto.mac import mac, same
from cryptfs.errors import Damaged, VolumeDamaged
from cryptfs.format.state import SLOT_BYTES, State, decode_slot
from cryptfs.fs.context import open_ours, write_all
from cryptfs.ports import Store
from cryptfs.types import Buffer

STATE = b"state"


def read_state(store: Store, volume_id: bytes, volume_key: Buffer) -> State:
    """The state that counts. Raises `VolumeDamaged` if no slot is authentic."""
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
    good: list[State] = []
    for at in (0, SLOT_BYTES):
        slot = decode_slot(raw[at : at + SLOT_BYTES])
        authentic = slot is not None and same(mac(volume_key, volume_id, slot[0].signed()), slot[1])
        if slot is not None and authentic and slot[0].slot * SLOT_BYTES == at:
            good.append(slot[0])
    if not good:
        raise VolumeDamaged("the volume's `state` file is damaged: neither of its two slots is authentic")
    return max(good, key=lambda state: state.sequence)


def sign_state(volume_id: bytes, volume_key: Buffer, state: State) -> bytes:
    """The slot's 512 bytes."""
    signed = state.signed()
    return signed + mac(volume_key, volume_id, signed)


def write_state(store: Store, volume_id: bytes, volume_key: Buffer, state: State) -> None:
    """Write `state` into its slot and sync it. Blocks. Raises OSError."""
    write_slot(store, state, sign_state(volume_id, volume_key, state))


def write_slot(store: Store, state: State, slot: bytes) -> None:
    """As `write_state`, with what `sign_state` returned."""
    fd = store.open(store.root(), STATE, os.O_RDWR | os.O_CREAT)
    try:
        write_all(store, fd, slot, state.slot * SLOT_BYTES)
        store.fdatasync(fd)
    finally:
        store.close(fd)
